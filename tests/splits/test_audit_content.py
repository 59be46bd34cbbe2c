"""audit --find-duplicates: copies of held-out images under other ids are found, other images are not."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from damaged_images import encoded
from PIL import Image, ImageOps
from split_examples import coco, scene, write, write_refs

from refdet.cli.main import main
from refdet.errors import InputError
from refdet.splits.duplicates import audit_content
from refdet.splits.perceptual_hash import BITS, hashes, matches, thumbnails


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return encoded(image, "JPEG", quality=quality)


def resize(image: Image.Image, scale: float) -> Image.Image:
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def crop_border(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "0.3 of the size": lambda image: jpeg(resize(image, 0.3)),
    "twice the size": lambda image: jpeg(resize(image, 2)),
    "square": lambda image: jpeg(image.resize((224, 224), Image.Resampling.BILINEAR)),
    "quality 30": lambda image: jpeg(image, 30),
    "quality 95": lambda image: jpeg(image, 95),
    "gray": lambda image: jpeg(image.convert("L")),
    "cropped by a hundredth": lambda image: jpeg(crop_border(image, 0.01)),
    "mirrored": lambda image: jpeg(ImageOps.mirror(image)),
}


def stack_thumbnails(files: list[bytes]) -> np.ndarray:
    return np.stack([thumbnails(data)[0] for data in files])


@pytest.mark.parametrize("kind", COPIES)
def test_real_copies_are_found_and_no_others(shared: Path, kind: str) -> None:
    paths = sorted((shared / "data/coco_mini").glob("*2017/*.jpg"))[::4]
    originals = stack_thumbnails([path.read_bytes() for path in paths])
    copies = stack_thumbnails([COPIES[kind](Image.open(path).convert("RGB")) for path in paths])
    found = matches(copies, originals)
    assert [(match.first, match.second) for match in found] == [(n, n) for n in range(len(paths))]
    assert all(match.mirrored == (kind == "mirrored") for match in found)


def test_all_real_images_are_different(shared: Path) -> None:
    paths = sorted((shared / "data/coco_mini").glob("*2017/*.jpg"))
    pictures = stack_thumbnails([path.read_bytes() for path in paths])
    assert [(m.first, m.second, m.hamming_distance) for m in matches(pictures, pictures)] == [
        (n, n, 0) for n in range(159)
    ]


def test_hashes_follow_the_definition_of_the_dct() -> None:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (32, 32)).astype(np.uint8)
    low = np.zeros((12, 12))
    for u in range(12):  # DCT-II by its definition, in float64
        for v in range(12):
            y, x = np.mgrid[:32, :32]
            waves = np.cos(np.pi * (2 * y + 1) * u / 64) * np.cos(np.pi * (2 * x + 1) * v / 64)
            low[u, v] = (picture * waves).sum()
    flat = low.ravel()[1:]
    [found] = hashes(picture[None])
    assert found.shape == (BITS,) and np.array_equal(found, np.where(flat > np.median(flat), 1, -1))


def test_matches_finds_equal_and_mirrored_pairs() -> None:
    random = np.random.default_rng(1)
    first = random.integers(0, 256, (40, 32, 32), dtype=np.uint8)
    second = np.concatenate([first[5:9, :, ::-1], first[20:22], random.integers(0, 256, (9, 32, 32), dtype=np.uint8)])
    found = {(match.first, match.second, match.mirrored) for match in matches(first, second)}
    assert found == {(5, 0, True), (6, 1, True), (7, 2, True), (8, 3, True), (20, 4, False), (21, 5, False)}
    assert matches(first[:0], second) == [] and matches(first, second[:0]) == []


def test_a_picture_of_one_color_matches_nothing() -> None:
    uniform = np.full((2, 32, 32), 7, np.uint8)
    assert matches(uniform, uniform) == []


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An instances file of images 10 to 15, a REFER root that holds out 1 to 3, and a folder of images.

    Images 12 and 13 are copies of 1 and 2, image 14 is damaged, and image 15 has no file.
    """
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(1, "val"), (2, "testA"), (3, "val")]})
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 2, 3, 10, 11):
        (folder / f"{number:012d}.jpg").write_bytes(jpeg(scene(number)))
    (folder / "000000000012.jpg").write_bytes(jpeg(resize(scene(1), 0.5), 60))
    scene(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "000000000013.png")
    (folder / "000000000014.jpg").write_bytes(b"no image")
    data = coco([10, 11, 12, 13, 14, 15], [], {13: "000000000013.png"})
    return write(tmp_path / "f.json", data), root, folder


def test_copies_and_missing_and_damaged_files_are_reported(dataset: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, root, folder = dataset
    found = audit_content(source, root, folder)
    assert [(copy.image, copy.refer_image_id, copy.splits, copy.mirrored) for copy in found.copies] == [
        (12, 1, ["refcoco/unc/val"], False),
        (13, 2, ["refcoco/unc/testA"], True),
    ]
    assert (found.compared, found.missing, found.unreadable) == (4, [15], [14]) and found.refer_compared == 3
    assert any("1 image of the list has no file, first: 15" in note for note in found.notes())
    assert [copy.image for copy in audit_content(source, root, folder, exclude=["refcoco:unc:testA"]).copies] == [13]
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"train/{path.name}")
    assert audit_content(source, root, archive, folder) == found == audit_content(source, root, folder, archive)


def test_a_list_of_names_is_enough_and_held_out_ids_are_not_compared(
    dataset: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, root, folder = dataset
    names = tmp_path / "names.txt"
    names.write_text("000000000001.jpg\n000000000010.jpg\nkitchen.jpg\n")
    (folder / "kitchen.jpg").write_bytes(jpeg(scene(3), 50))
    found = audit_content(names, root, folder)
    assert [(copy.image, copy.refer_image_id) for copy in found.copies] == [("kitchen.jpg", 3)] and found.compared == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n.txt", "FLICKR\nOTHER\n"),
        ("n.json", '["FLICKR", "OTHER"]'),
        ("n.json", '[{"image": "FLICKR", "id": 2}, {"image": "OTHER", "id": 3}]'),
        ("n.json", '{"train": ["FLICKR"], "val": ["OTHER"]}'),
        ("n.jsonl", '{"image": "FLICKR"}\n{"image": "OTHER"}\n'),
    ],
)
def test_lists_without_any_coco_id_are_compared(
    dataset: tuple[Path, Path, Path], tmp_path: Path, name: str, text: str
) -> None:
    _, root, folder = dataset
    (folder / "flickr30k").mkdir()
    paths = {"FLICKR": "flickr30k/36979.jpg", "OTHER": "flickr30k/1000092795.jpg"}
    (folder / paths["OTHER"]).write_bytes(jpeg(scene(20)))
    for key, path in paths.items():
        text = text.replace(key, path)
    (tmp_path / name).write_text(text)
    arguments = ["audit", "--instances", str(tmp_path / name), "--refer-root", str(root)]
    assert CliRunner().invoke(main, arguments).exit_code == 2
    arguments += ["--find-duplicates", "--images", str(folder)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "not proven: 1 image not compared (first: " in done.stderr
    (folder / paths["FLICKR"]).write_bytes(jpeg(scene(21)))
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0 and "no copies: 2 images compared with 3 held-out images" in done.stdout
    assert "image_ids_sha256" not in done.stdout and "file_sha256" in done.stdout
    (folder / paths["FLICKR"]).write_bytes(jpeg(scene(3), 50))
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "contains copies of held-out images" in done.stderr


def test_copies_of_held_out_benchmark_images_are_found(dataset: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, root, folder = dataset
    names, benchmark = tmp_path / "names.txt", tmp_path / "benchmark.json"
    names.write_text("000000000010.jpg\nkitchen.jpg\n")
    benchmark.write_text(json.dumps(["COCO_train2014_000000000011.jpg"]))
    (folder / "kitchen.jpg").write_bytes(jpeg(scene(11), 50))
    arguments = ["audit", "--instances", str(names), "--refer-root", str(root), "--benchmark", str(benchmark)]
    arguments += ["--find-duplicates", "--images", str(folder)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "copies of held-out images under other ids (1 image)" in done.stderr
    (copy,) = audit_content(names, root, folder, benchmark=[benchmark]).copies
    assert (copy.image, copy.refer_image_id, copy.splits) == ("kitchen.jpg", 11, ["benchmark/benchmark.json"])
    (folder / "000000000011.jpg").unlink()
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "not proven: 1 held-out image not compared (first: 11)" in done.stderr


def test_folders_without_the_images_are_refused(dataset: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, root, folder = dataset
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="none of 3 held-out images.*`refer_images`"):
        audit_content(source, root, folder, tmp_path / "empty")
    with pytest.raises(InputError, match="`images` .*empty: none of 6 images"):
        audit_content(source, root, tmp_path / "empty", folder)
    with pytest.raises(InputError, match="`refer_images` .*nowhere: no such file or folder"):
        audit_content(source, root, folder, tmp_path / "nowhere")


def test_find_duplicates_command(dataset: tuple[Path, Path, Path]) -> None:
    source, root, folder = (str(path) for path in dataset)
    arguments = ["audit", "--instances", source, "--refer-root", root, "--find-duplicates", "--images", folder]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "contains copies of held-out images under other ids (2 images)" in done.stderr
    assert "mirrored" in done.stdout and "Traceback" not in done.output
    as_json = CliRunner().invoke(main, [*arguments, "--json"])
    tree = json.loads(as_json.stdout)
    assert tree["clean"] is False and tree["leaked_image_ids"] == []
    assert [copy["image"] for copy in tree["content"]["copies"]] == [12, 13]
    assert all(copy["bits"] == copy["hamming_distance"] for copy in tree["content"]["copies"])


def test_only_compared_images_are_proven_clean(dataset: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, root, folder = dataset
    (folder / "kitchen.jpg").write_bytes(jpeg(scene(20)))
    (folder / "000000000014.jpg").write_bytes(b"no image")

    def run(names: str, *more: str) -> tuple[int, str]:
        (tmp_path / "n.txt").write_text(names)
        arguments = ["audit", "--instances", str(tmp_path / "n.txt"), "--refer-root", str(root), *more]
        done = CliRunner().invoke(main, arguments)
        return done.exit_code, done.stderr

    content = ("--find-duplicates", "--images", str(folder))
    code, text = run("10\nkitchen.jpg\n")
    assert code == 1 and "not proven: 1 image unknown (first: kitchen.jpg); compare them with --find-dup" in text
    assert run("10\nkitchen.jpg\n", *content)[0] == 0
    for names in ("10\n15\n", "10\n14\n"):  # no file, a damaged file
        code, text = run(names, *content)
        assert code == 1 and "not proven: 1 image not compared (first: 1" in text
        assert text.endswith("; add or repair their files, or accept them with --allow-unidentified\n")
        assert run(names, *content, "--allow-unidentified")[0] == 0
    (folder / "000000000003.jpg").unlink()
    code, text = run("10\n", *content)
    assert code == 1 and "1 held-out image not compared (first: 3)" in text


def test_benchmark_images_without_a_file_leave_the_list_unproven(
    dataset: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """If an image of the benchmark has no file, the list is not proven clean, as with REFER's images."""
    _, root, folder = dataset
    (folder / "000000000020.jpg").write_bytes(jpeg(scene(20)))
    (folder / "kitchen.jpg").write_bytes(jpeg(resize(scene(20), 0.5)))
    names, benchmark = tmp_path / "names.txt", tmp_path / "benchmark.txt"
    names.write_text("10\nkitchen.jpg\n")
    arguments = ["audit", "--instances", str(names), "--refer-root", str(root), "--benchmark", str(benchmark)]
    arguments += ["--find-duplicates", "--images", str(folder)]
    benchmark.write_text("000000000020.jpg\n")
    assert audit_content(names, root, folder).copies == []
    (copy,) = audit_content(names, root, folder, benchmark=[benchmark]).copies
    assert (copy.image, copy.refer_image_id, copy.splits) == ("kitchen.jpg", 20, ["benchmark/benchmark.txt"])
    assert CliRunner().invoke(main, arguments).exit_code == 1
    benchmark.write_text("000000000021.jpg\n")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "not proven: 1 held-out image not compared (first: 21)" in done.stderr
