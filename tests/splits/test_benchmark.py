"""Benchmarks as further sources of held-out images (--benchmark): Ref-L4, Visual Genome, Flickr30k, name lists."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import refer
from refdet.cli.main import main
from refdet.errors import InputError
from refdet.splits.benchmark import held_out_benchmarks
from refdet.splits.build import build_split
from refdet.splits.leak_audit import audit


@pytest.fixture
def refer_root(shapes_root: Path) -> Path:
    return shapes_root / "refer"


@pytest.fixture
def other_ids(train_instances: Path, refer_root: Path) -> list[int]:
    """Ids of some images that REFER does not hold out."""
    result = audit(train_instances, refer_root)
    ids = [image["id"] for image in json.loads(train_instances.read_text())["images"]]
    return sorted(set(ids) - set(result.leaked))[:3]


def write_ref_l4(path: Path, ids: list[int], others: int) -> Path:
    """A Parquet file like Ref-L4's: two rows for each COCO image, and rows of Objects365 images."""
    rows: list[dict[str, Any]] = []
    names = [(f"coco_{n}", f"COCO_train2014_{n:012d}.jpg") for n in ids for _ in range(2)]
    names += [(f"o365_{n}", f"objects365_v2_{n:08d}.jpg") for n in range(900_000, 900_000 + others)]
    for number, (image_id, name) in enumerate(names):
        rows.append(
            {
                "id": number,
                "caption": "a shape",
                "bbox": [1.0, 2.0, 3.0, 4.0],
                "bbox_area": 12.0,
                "bbox_id": f"o365_{number}",
                "ori_category_id": "o365_64",
                "image_id": image_id,
                "height": 9,
                "width": 9,
                "file_name": name,
                "is_rewrite": True,
                "split": "val",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_coco_images_of_ref_l4_are_held_out(
    tmp_path: Path, train_instances: Path, refer_root: Path, other_ids: list[int]
) -> None:
    path = write_ref_l4(tmp_path / "ref-l4-val.parquet", other_ids, others=4)
    (split,), notes = held_out_benchmarks([path])
    assert (split.name, split.image_ids) == ("benchmark/ref-l4-val.parquet", frozenset(other_ids))
    assert len(notes) == 1 and "4 images cannot be identified as COCO's (first: " in notes[0]
    before = audit(train_instances, refer_root, benchmark=[path])
    assert before.splits[-1].image_ids == other_ids
    assert before.held_out_images == audit(train_instances, refer_root).held_out_images + 3
    clean = tmp_path / "split.json"
    result = build_split(train_instances, refer_root, clean, benchmark=[path])
    assert result.report["excluded"]["benchmark/ref-l4-val.parquet"] == {"images": 3, "found": 3}
    assert audit(clean, refer_root, benchmark=[path]).leaked == []
    without = tmp_path / "without.json"
    build_split(train_instances, refer_root, without)
    assert audit(without, refer_root, benchmark=[path]).leaked == other_ids


def test_visual_genome_is_matched_by_coco_id(
    tmp_path: Path, train_instances: Path, refer_root: Path, other_ids: list[int]
) -> None:
    entries = [
        {"image_id": number, "url": f"https://cs.stanford.edu/people/rak248/VG_100K/{number}.jpg", "coco_id": coco_id}
        for number, coco_id in enumerate([*other_ids, None, None], start=2_300_000)
    ]
    path = tmp_path / "image_data.json"
    path.write_text(json.dumps(entries))
    (split,), notes = held_out_benchmarks([path])
    assert split.image_ids == frozenset(other_ids)
    assert notes == [f"{path}: 2 images are not COCO's according to the file and are not looked for"]
    assert audit(train_instances, refer_root, benchmark=[path]).splits[-1].image_ids == other_ids


def test_flickr30k_numbers_are_not_mistaken_for_coco_ids(tmp_path: Path, other_ids: list[int]) -> None:
    path = tmp_path / "test.txt"
    path.write_text("1007129816\n36979\n65567\n4999888777\n")
    with pytest.raises(InputError, match=r"2 of 4 lines have no COCO id \(first: 1007129816\), so the other"):
        held_out_benchmarks([path])
    path.write_text("1007129816.jpg\n36979.jpg\n")
    with pytest.raises(InputError, match="1 of 2 lines has no COCO id"):
        held_out_benchmarks([path])
    for entries in (["1007129816.jpg", "36979.jpg"], [{"image": "36979.jpg"}, {"image": "x/4999888777.jpg"}]):
        path.write_text(json.dumps(entries))
        with pytest.raises(InputError, match="1 of 2 entries has no COCO id"):
            held_out_benchmarks([path])
    path.write_text("flickr30k-images/36979.jpg\nFlickr30k/flickr30k_images/65567.jpg\n")
    with pytest.raises(InputError, match="its 2 entries have no COCO image id"):
        held_out_benchmarks([path])
    path.write_text("1007129816\n4999888777\n")
    with pytest.raises(InputError, match="COCO"):
        held_out_benchmarks([path])
    path.write_text("".join(f"{n}\n" for n in other_ids))
    assert held_out_benchmarks([path])[0][0].image_ids == frozenset(other_ids)


def test_names_nested_by_split_are_found(tmp_path: Path, refer_root: Path, other_ids: list[int]) -> None:
    refs = [ref for ref in refer.files.read_refs(refer_root, "refcoco", "unc") if ref["split"] == "val"]
    path = tmp_path / "refcocom.json"
    path.write_text(json.dumps({"val": [{"file_name": ref["file_name"], "part": "head"} for ref in refs]}))
    (split,), _ = held_out_benchmarks([path])
    assert split.image_ids == frozenset(ref["image_id"] for ref in refs)


def test_unusable_benchmark_files_are_refused(tmp_path: Path) -> None:
    path = write_ref_l4(tmp_path / "a.parquet", [], others=3)
    with pytest.raises(InputError, match="its 3 images cannot be identified"):
        held_out_benchmarks([path])
    pq.write_table(pa.table({"caption": ["a"]}), path)
    with pytest.raises(InputError, match="no column with names or ids of images"):
        held_out_benchmarks([path])
    for name in ("none.parquet", "none.json"):
        with pytest.raises(InputError, match=rf"{name}: no such file"):
            held_out_benchmarks([tmp_path / name])
    (tmp_path / "2").mkdir()
    paths = [write_ref_l4(folder / "b.parquet", [9], 0) for folder in (tmp_path, tmp_path / "2")]
    with pytest.raises(InputError, match="another benchmark has the same file name"):
        held_out_benchmarks(paths)


def test_parquet_names_of_type_large_string(tmp_path: Path, other_ids: list[int]) -> None:
    path = write_ref_l4(tmp_path / "a.parquet", other_ids, others=0)
    small = pq.read_table(path)
    names = small["file_name"].cast(pa.large_string())
    pq.write_table(pa.table({"file_name": names}), path)
    ((split,), _) = held_out_benchmarks([path])
    assert split.image_ids == frozenset(other_ids)


def test_build_split_and_audit_commands_with_a_benchmark(
    tmp_path: Path, train_instances: Path, refer_root: Path, other_ids: list[int]
) -> None:
    path = write_ref_l4(tmp_path / "ref-l4-test.parquet", other_ids, others=1)
    common = ["--refer-root", str(refer_root), "--benchmark", str(path)]
    out = str(tmp_path / "split.json")
    built = CliRunner().invoke(main, ["build-split", "--instances", str(train_instances), "--out", out, *common])
    assert built.exit_code == 0 and "benchmark/ref-l4-test.parquet" in built.stdout
    clean = CliRunner().invoke(main, ["audit", "--instances", out, *common])
    assert clean.exit_code == 0 and "benchmark/ref-l4-test.parquet" in clean.stdout
    leaks = CliRunner().invoke(main, ["audit", "--instances", str(train_instances), *common])
    assert leaks.exit_code == 1
    detector = CliRunner().invoke(main, ["audit", "--checkpoint", str(tmp_path), *common])
    assert detector.exit_code == 2 and "--benchmark is for --instances alone" in detector.stderr


def test_a_coco_url_beside_a_renamed_file_is_found(
    tmp_path: Path, train_instances: Path, refer_root: Path, other_ids: list[int]
) -> None:
    """An entry whose address has a COCO name is held out, even if its file was renamed."""
    url = "http://images.cocodataset.org/train2017/{:012d}.jpg"
    images = [{"id": n, "file_name": f"street_{n}.jpg", "coco_url": url.format(i)} for n, i in enumerate(other_ids)]
    images.append({"id": 9, "file_name": "street_9.jpg"})
    path = tmp_path / "renamed.json"
    path.write_text(json.dumps({"images": images}))
    (split,), notes = held_out_benchmarks([path])
    assert split.image_ids == frozenset(other_ids)
    assert len(notes) == 1 and "1 image cannot be identified as COCO's (first: 9)" in notes[0]
    assert audit(train_instances, refer_root, benchmark=[path]).splits[-1].image_ids == other_ids
