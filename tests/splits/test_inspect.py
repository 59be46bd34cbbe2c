"""refdet inspect: descriptions of splits, run directories and stores, and the refusal of other files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from resumable_extraction import RECIPE_HEADER, run
from safetensors.numpy import save_file

from refdet.errors import InputError, Interrupted
from refdet.extraction.workers_file import read_workers
from refdet.splits.inspect import check, describe
from refdet.store import Columns, Header, ImageRow, create
from refdet.structures.provenance import UNKNOWN, Provenance
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow

PROVENANCE = Provenance("a.json", "ab", 2, 3, "cd", {"refcoco/unc/val": {"images": 1500, "found": 5}}, "imagenet")


def write_split(path: Path) -> Path:
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 1}
    path.write_text(
        json.dumps(
            {
                "images": [{"id": i, "height": 4, "width": 4} for i in (1, 2)],
                "annotations": [annotation, annotation | {"id": 2, "bbox": [0, 0, 0, 1]}],
                "categories": [{"id": 1, "name": "dog"}],
            }
        )
    )
    return path


def write_run_directory(folder: Path) -> Path:
    folder.mkdir()
    model = {"recipe": {"model": {"width": 24}}, "categories": [{"id": 1, "name": "dog"}], "step": 500,
             "provenance": PROVENANCE.to_json()}  # fmt: skip
    (folder / "model.json").write_text(json.dumps(model))
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}, folder / "model.safetensors")
    return folder


def write_store(path: Path, complete: bool = True) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = "refdet-features/1"
        file.attrs["classes"] = json.dumps([{"id": 1, "name": "dog"}])
        file.attrs["provenance"] = json.dumps(PROVENANCE.to_json())
        file.attrs["options"] = json.dumps({"max_regions": 100})
        file.attrs["complete"] = complete
        file["images/id"] = np.array([4, 9])
        file.create_dataset("images/error", data=["", "cannot be read"], dtype=h5py.string_dtype())
        file["regions/box"] = np.zeros((3, 4), np.float32)
        file["regions/mask_start"] = np.array([0, 5, 5, 8])
        file["features/pool5"] = np.zeros((3, 16), np.float16)
    return path


def test_describe_split(tmp_path: Path) -> None:
    found = describe(write_split(tmp_path / "f.json"))
    assert found["kind"] == "split" and found["images"] == 2 and found["images_without_annotations"] == 1
    assert found["crowds"] == 1 and found["annotations"] == 2 and len(found["dropped"]) == 1
    assert found["provenance"]["note"] == UNKNOWN


def test_describe_checkpoint(tmp_path: Path) -> None:
    folder = write_run_directory(tmp_path / "run")
    found = describe(folder)
    assert found["kind"] == "checkpoint" and found["step"] == 500 and found["recipe"]["model"]["width"] == 24
    assert (found["tensors"], found["numbers"], found["dtypes"]) == (2, 10, ["F16", "F32"])
    assert found["provenance"] == PROVENANCE.to_json()
    assert describe(folder / "model.safetensors") == found
    weights = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}
    for recorded, step in (("600", 600), ("", 500), ("-1", 500), ("9" * 5000, 500)):
        # As if training had been killed before it wrote model.json.
        save_file(weights, folder / "model.safetensors", {"step": recorded})
        assert describe(folder) == {**found, "step": step}
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="model.safetensors: damaged"):
        describe(folder)
    (folder / "model.json").unlink()
    with pytest.raises(InputError, match="no model.json"):
        describe(folder)


def test_describe_store(tmp_path: Path) -> None:
    found = describe(write_store(tmp_path / "f.h5", complete=False))
    assert found["kind"] == "store" and not found["complete"]
    assert (found["images"], found["images_with_errors"], found["regions"], found["masks"]) == (2, 1, 3, 2)
    assert found["features"] == {"pool5": {"width": 16, "dtype": "float16"}} and not found["ann_ids"]
    assert found["options"] == {"max_regions": 100} and found["provenance"] == PROVENANCE.to_json()


FEATURES = {"pool5": (16,), "spatial_fc7": (8, 7, 7)}


@pytest.mark.usefixtures("check_hdf5_in_process")
@pytest.mark.parametrize("regions", [[], [0, 0], [2, 0, 1]])
@pytest.mark.parametrize("features", [(), ("pool5",), ("pool5", "spatial_fc7")])
@pytest.mark.parametrize("optional", list(product([False, True], repeat=4)))
def test_describe_stores_with_and_without_each_optional_part(
    tmp_path: Path, optional: tuple[bool, ...], features: tuple[str, ...], regions: list[int]
) -> None:
    """Columns are optional, there may be no images or regions, and older stores have no checksums."""
    masks, ann_ids, maps, older = optional
    path, total = tmp_path / "a.h5", sum(regions)
    columns = Columns({name: FEATURES[name] for name in features}, "float16", masks, ann_ids, ("head",) if maps else ())
    shape = (2, 3, 4) if maps else (0, 0, 0)
    rows = [ImageRow(i, f"{i}.jpg", 9, 9, "", n, 3 * n * masks, shape) for i, n in enumerate(regions)]
    header = Header([{"id": 1, "name": "dog"}], "{}", PROVENANCE.to_json(), {"max_regions": 100})
    with create(path, header, columns, rows) as writer:
        for row in rows:
            n = row.regions
            writer.put(Regions(
                row.id, row.file_name, 9, 9, np.zeros((n, 4), np.float32),
                np.zeros(n, np.float32), np.ones(n, np.int64),
                ann_ids=np.arange(n) if ann_ids else None, masks=(b"abc",) * n if masks else None,
                features={name: np.zeros((n, *FEATURES[name]), np.float16) for name in features},
                maps={"head": np.zeros(shape, np.float16)} if maps else {},
                im_info=np.zeros(3, np.float32) if maps else None,
            ))  # fmt: skip
    if older:
        with h5py.File(path, "r+") as file:
            del file["checksums"]
    found = describe(path)
    assert (found["images"], found["regions"], found["masks"]) == (len(regions), total, total * masks)
    assert (found["ann_ids"], found["checksums"], found["complete"]) == (ann_ids, not older, True)
    assert list(found["features"]) == sorted(features) and list(found["maps"]) == (["head"] if maps else [])
    assert found["provenance"] == PROVENANCE.to_json()


def test_describe_an_unfinished_store(tmp_path: Path) -> None:
    out, parts = tmp_path / "a.h5", tmp_path / "a.h5.parts"
    with pytest.raises(Interrupted):
        run(out, stop_at=2, header=replace(RECIPE_HEADER, provenance=PROVENANCE.to_json()))
    found = describe(parts)
    assert found["kind"] == "unfinished store" and (found["shards_finished"], found["shards"]) == (2, 4)
    assert (found["images"], found["categories"], found["options"]["score_threshold"]) == (10, 1, 0.05)
    assert found["provenance"] == PROVENANCE.to_json()
    state = "2 of 4 shards are finished; finish it with the same refdet extract-features command and --resume"
    assert state in found["state"]
    with pytest.raises(InputError, match=f"a.h5.parts: an unfinished store: {state}"):
        check(parts)
    for look in (describe, check):
        with pytest.raises(InputError, match=f"a.h5: not finished yet: in .*a.h5.parts, {state}"):
            look(out)
    with pytest.raises(InputError, match="a folder; only a file"):
        check(tmp_path)


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    whole = write_store(tmp_path / "whole.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for name, text in (
        ("x.txt", "not an instances JSON, run directory or feature store"),
        ("cut.h5", "damaged"),
        ("other.h5", "not a feature store"),
        ("no", "no such file"),
    ):
        with pytest.raises(InputError, match=f"{name}: .*{text}"):
            describe(tmp_path / name)


def test_numbers_that_json_lacks_are_damage_except_in_the_times(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run_directory(tmp_path / "run")
    text = (run / "model.json").read_text()
    (run / "model.json").write_text(text.replace("{", '{"numbers": NaN, ', 1))
    with pytest.raises(InputError, match=r"model\.json: malformed JSON: NaN is not a JSON number"):
        describe(run)
    path = write_store(tmp_path / "f.h5")
    for number in ("NaN", "-Infinity", "1e999"):
        with h5py.File(path, "r+") as file:
            file.attrs["run"] = f'{{"seconds": {number}}}'
        assert describe(path)["run"] == {"seconds": None}
        assert f"note: {path}: attribute run has 1 number that is not finite" in caplog.text
        caplog.clear()
        with h5py.File(path, "r+") as file:
            options, file.attrs["options"] = file.attrs["options"], f'{{"seconds": {number}}}'
        with pytest.raises(InputError, match="damaged: attribute 'options' is not JSON"):
            describe(path)
        with h5py.File(path, "r+") as file:
            file.attrs["options"] = options


def test_numbers_in_the_progress_of_a_part_that_json_lacks_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "workers.json").write_text(
        '{"token": "", "workers": [{"worker": "w", "images_per_second": NaN, "shards": [NaN]}]}'
    )
    (tmp_path / "part-1.json").write_text('{"worker": "part 1/2", "images_per_second": 1e999, "updated": 5.0}')
    json.dumps(read_workers(tmp_path), allow_nan=False)


def test_inspect_command(tmp_path: Path) -> None:
    from refdet.cli.main import main

    for path in (
        write_split(tmp_path / "f.json"),
        write_run_directory(tmp_path / "run"),
        write_store(tmp_path / "f.h5"),
    ):
        as_json = CliRunner().invoke(main, ["inspect", str(path), "--json"])
        assert as_json.exit_code == 0 and json.loads(as_json.stdout) == describe(path)
        table = CliRunner().invoke(main, ["inspect", str(path)])
        assert table.exit_code == 0 and "provenance" in table.stdout
    assert "refcoco/unc/val    1500      5" in table.stdout
