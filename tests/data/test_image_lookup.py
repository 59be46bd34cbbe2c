"""Which file a file_name means: never another picture than the one named, the same in a folder and in a zip."""

from __future__ import annotations

import pickle
import random
import time
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageError, ImageSource
from refdet.errors import InputError
from refer.image_lookup import FileNames, coco_number, parts_of

NINE, OTHER = "000000000009.jpg", "COCO_train2014_000000000009.jpg"
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def found(files: list[str], name: str, image_id: int = 1, root: tuple[str, ...] = ()) -> str | None:
    return FileNames(files, root).locate([(image_id, name)])[name or image_id].path


@pytest.mark.parametrize(
    ("files", "name", "right"),
    [
        (["a.png", "sub/a.png"], "a.png", "a.png"),
        (["b/a.png", "c/b/a.png"], "b/a.png", "b/a.png"),
        (["images/x.png", "annotations/x.png"], "images/x.png", "images/x.png"),
        (["data/images/x.png", "data/annotations/x.png"], "images/x.png", "data/images/x.png"),
        (["data/images/x.png", "data/annotations/x.png"], "/home/me/images/x.png", "data/images/x.png"),
        (["images/x.png", "annotations/x.png"], "x.png", None),
        (["images/x.png", "annotations/x.png"], "train/x.png", None),
        (["1/a/x.png", "2/a/x.png", "3/b/x.png"], "a/x.png", None),
        (["1/a/x.png", "2/a/x.png", "3/b/x.png"], "b/x.png", "3/b/x.png"),
        (["sub/a.png"], "a.png", "sub/a.png"),
        (["a.png"], "elsewhere/a.png", "a.png"),
        # parts of a name are no suffix of a path
        (["xa.png"], "a.png", None),
        (["a.png"], "xa.png", None),
        (["a.png"], "a.jpg", None),
        (["a.png"], "A.png", None),
        # written on Windows, on either side
        (["img/a.png", "b/a.png"], "img\\a.png", "img/a.png"),
        (["img\\a.png"], "img/a.png", "img\\a.png"),
        (["a.png"], "..\\..\\label-studio\\upload\\4\\a.png", "a.png"),
        (["img/a.png", "b/a.png"], "D:\\data\\img\\a.png", "img/a.png"),
        # what leads out of the folder only takes part in the comparison
        (["a.png"], "../../a.png", "a.png"),
        (["etc/passwd"], "../../../etc/passwd", "etc/passwd"),
        (["a.png"], "../../../etc/passwd", None),
        (["a.png"], "/a.png", "a.png"),
        (["b/a.png", "c/a.png"], "./b/../c/a.png", "c/a.png"),
        (["a.png"], "..", None),
        (["a.png"], "/", None),
        (["a.png"], "a.png/", "a.png"),
        # Unicode
        ([f"{NFD}.png"], f"{NFC}.png", f"{NFD}.png"),
        ([f"{NFC}/x.png", "y/x.png"], f"{NFD}/x.png", f"{NFC}/x.png"),
        ([f"{NFC}.png", f"{NFD}.png"], f"{NFD}.png", f"{NFD}.png"),
        (["cafe.png"], f"{NFC}.png", None),
        # COCO's numbers, of the file name alone
        ([NINE], OTHER, NINE),
        ([f"train2017/{NINE}"], f"val2014/{OTHER}", f"train2017/{NINE}"),
        ([OTHER], NINE, OTHER),
        (["COCO_val2014_000000000009.jpg"], "COCO_train2014_000000000009_4.jpg", "COCO_val2014_000000000009.jpg"),
        ([NINE], "COCO_train2014_000000000009", NINE),
        ([NINE], "http://images.cocodataset.org/train2017/000000000009.jpg?x=1", NINE),
        ([f"a/{NINE}", f"b/{NINE}"], OTHER, None),
        ([f"a/{NINE}", f"b/{NINE}"], NINE, None),
        ([f"a/{NINE}", "a/000000000010.jpg"], "000000000009_000000000010.jpg", None),
        ([NINE], "9.jpg", None),
        ([NINE], "street_0009.jpg", None),
        ([NINE], "mask_000000000009.jpg", None),
        ([NINE], "000000000009_depth.png", None),
        ([NINE], "20240000000000009.jpg", None),
        ([NINE], "000000000009_2.jpg", None),
        (["9.jpg"], NINE, None),
        ([f"mask_{NINE}"], OTHER, None),
        # hidden files are what a system keeps for itself
        (["x.jpg", "._x.jpg", "__MACOSX/._x.jpg"], "x.jpg", "x.jpg"),
        (["img/x.jpg", "__MACOSX/img/x.jpg", ".thumbnails/x.jpg"], "x.jpg", "img/x.jpg"),
        ([".thumbnails/x.jpg", "__MACOSX/x.jpg"], "x.jpg", None),
        ([f".cache/{NINE}"], OTHER, None),
        ([".thumbnails/x.jpg"], ".thumbnails/x.jpg", ".thumbnails/x.jpg"),
        (["a/.b/x.jpg", "c/x.jpg"], "data/.b/x.jpg", "a/.b/x.jpg"),
    ],
)  # fmt: skip
def test_names(files: list[str], name: str, right: str | None) -> None:
    for order in (files, files[::-1]):
        assert found(order, name) == right


def test_an_id_counts_only_where_there_is_no_name() -> None:
    assert found([NINE], "", 9) == NINE and found([f"COCO_val2014_{9:012d}.jpg"], "", 9) is not None
    assert found([NINE], "", 10) is None
    for name in ("street_2.png", "x", "..", " ", "0", "9", "9.jpg"):
        assert found([NINE], name, 9) is None, name


@pytest.mark.parametrize(
    ("files", "names", "right"),
    [
        (["cam1/1.png"], ["cam1/1.png", "cam2/1.png"], ["cam1/1.png", None]),
        (["cam1/1.png"], ["cam2/1.png", "cam1/1.png"], [None, "cam1/1.png"]),
        (["d/cam1/1.png"], ["/x/cam1/1.png", "/x/cam2/1.png", "1.png"], ["d/cam1/1.png", None, None]),
        (["1.png"], ["1.png", "cam2/1.png"], ["1.png", None]),
        (["1.png"], ["cam1/1.png", "cam2/1.png"], [None, None]),
        (["cam2/1.png"], ["cam1/1.png"], ["cam2/1.png"]),
        # one name, however it is written, may stand in a list several times; so may one image of COCO
        (["cam1/1.png"], ["cam1/1.png", "cam1\\1.png", "./cam1/1.png"], ["cam1/1.png"] * 3),
        ([f"t/{NINE}"], [f"t/{NINE}", OTHER, f"v/{NINE}", NINE], [f"t/{NINE}"] * 4),
    ],
)
def test_two_names_do_not_share_a_file(files: list[str], names: list[str], right: list[str | None]) -> None:
    matches = FileNames(files).locate(list(enumerate(names)))
    assert [matches[name].path for name in names] == right
    for name in names:
        assert bool(matches[name].reason) == (matches[name].path is None)


def test_an_image_without_a_name_shares_only_coco_s_own_file() -> None:
    matches = FileNames([NINE]).locate([(9, ""), (1, OTHER), (2, "x/street.png")])
    assert matches[9].path == matches[OTHER].path == NINE


PART = st.sampled_from(["a", "b", "c", NFC, NFD, "000000000009"])
PATH = st.lists(PART, min_size=1, max_size=4).map(lambda parts: "/".join([*parts[:-1], parts[-1] + ".jpg"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(PATH, max_size=8, unique=True), st.lists(PATH, max_size=6), st.randoms(use_true_random=False))
def test_the_rule_by_its_definition(files: list[str], names: list[str], shuffle: random.Random) -> None:
    """Against a plain search through all files, whatever their order."""
    mixed = list(files)
    shuffle.shuffle(mixed)
    matches = FileNames(mixed).locate(list(enumerate(names)))
    for name in names:
        parts = parts_of(name)
        shared = {file: _shared(parts, parts_of(file)) for file in files}
        exact = [file for file in files if parts_of(file) == parts]
        most = max(shared.values(), default=0)
        best = [file for file in files if shared[file] == most and most > 0]
        right = exact if len(exact) == 1 or name not in exact else [name]
        right = right or (best if most else [])
        path = matches[name].path
        if path is None and len(right) == 1:  # another name has it
            rivals = [
                other for other in names if parts_of(other) != parts and _shared(parts_of(other), parts_of(right[0]))
            ]
            assert rivals and coco_number(name) is None
        else:
            assert path == (right[0] if len(right) == 1 else None)
    owners: dict[str, set[tuple[str, ...]]] = {}
    for name, match in matches.items():
        if match.path is not None and coco_number(match.path) is None:
            owners.setdefault(match.path, set()).add(parts_of(str(name)))
    assert all(len(names) == 1 for names in owners.values())


def _shared(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return count


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ([f"{n:06d}.jpg" for n in range(30_000)], [f"x/{n:06d}.jpg" for n in range(30_000)]),
        ([f"{n}/rgb.png" for n in range(30_000)], [f"d/{n}/rgb.png" for n in range(30_000)]),
        ([f"{n}/rgb.png" for n in range(30_000)], [f"none{n}/rgb.png" for n in range(30_000)]),
        ([f"{n}/.h/rgb.png" for n in range(30_000)], [f"none{n}/.h/rgb.png" for n in range(30_000)]),
    ],
)
def test_large_folders_take_no_longer_for_each_image(files: list[str], names: list[str]) -> None:
    started = time.process_time()
    FileNames(files).locate(list(enumerate(names)))
    assert time.process_time() - started < 5  # a search through all would take minutes


def write(root: Path, paths: list[str], zipped: bool) -> ImageSource:
    """A folder or zip of files that hold their own paths."""
    if zipped:
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for path in paths:
                archive.writestr(path, path)
        return ImageSource.open(root / "images.zip")
    for path in paths:
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / path).write_text(path)
    return ImageSource.open(root / "images")


def records(*names: str) -> list[ImageRecord]:
    return [ImageRecord(number, name, 6, 9) for number, name in enumerate(names, start=1)]


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_and_zips(tmp_path: Path, zipped: bool, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path, ["cam1/1.png", "cam1/2.png", f"{NFD}.png", "__MACOSX/cam1/._1.png", OTHER], zipped)
    listed = records("cam1/1.png", "cam2/2.png", f"{NFC}.png", "gone.png", NINE)
    for one in (source, pickle.loads(pickle.dumps(source))):
        missing = one.locate(listed)
        paths = [one.find(record) for record in listed]
        assert paths == ["cam1/1.png", "cam1/2.png", f"{NFD}.png", None, OTHER]
        assert [one.data(path).decode() for path in paths if path] == [path for path in paths if path]
        assert missing == ["gone.png (no file of that name)"]
    assert caplog.text.count("1 of 5 images is in another folder") == 2
    assert "cam2/2.png, read from cam1/2.png" in caplog.text
    located = pickle.loads(pickle.dumps(source))
    assert [located.find(record) for record in listed] == paths
    with pytest.raises(ImageError, match=r"no file for image 4, gone\.png: no file of that name"):
        source.read(listed[3])
    with pytest.raises(InputError, match=r"1 of 5 images in i\.json is missing among its \d+ files, first: gone\.png"):
        source.check(listed, Path("i.json"))


@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_not_clear_is_an_error_that_names_both(tmp_path: Path, zipped: bool) -> None:
    source = write(tmp_path, ["images/1.png", "masks/1.png", "images/2.png"], zipped)
    with pytest.raises(
        InputError, match=r"1\.png: ambiguous file name: images/1\.png, masks/1\.png \(the same for 1 of"
    ):
        source.check(records("1.png", "2.png"), Path("i.json"))
    with pytest.raises(ImageError, match=r"image 1, 1\.png: ambiguous file name: images/1\.png, masks/1\.png"):
        source.read(records("1.png")[0])
    source.check(records("images/1.png", "images/2.png"), Path("i.json"))


def test_the_list_is_whole_though_some_of_its_images_are_asked_for(tmp_path: Path) -> None:
    """An image that is not asked for keeps its file."""
    source = write(tmp_path, ["cam1/1.png"], False)
    asked, other = records("cam2/1.png", "cam1/1.png")
    assert source.locate([asked], [asked, other]) == [
        "cam2/1.png (the best match, cam1/1.png, is the file of another image in the list)"
    ]
    with pytest.raises(InputError, match=r"first: cam2/1\.png \(the best match, cam1/1\.png, is the file"):
        source.check([asked], Path("i.json"), [other])
    assert source.find(asked) is None and source.find(other) == "cam1/1.png"


@pytest.mark.parametrize("name", ["../secret.png", "..\\secret.png", "/{root}/secret.png", "a/../../secret.png"])
def test_nothing_outside_the_folder_is_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_text("secret")
    source = write(tmp_path, ["a/x.png"], False)
    with pytest.raises(ImageError, match="no file of that name"):
        source.read(records(name.format(root=tmp_path))[0])


def test_the_folders_own_name_is_no_other_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path, ["1.png"], False)
    source.locate(records("images/1.png"))
    source.locate(records(f"{tmp_path}/images/1.png"))
    assert "another folder" not in caplog.text
    source.locate(records("pictures/1.png"))
    assert "1 of 1 image is in another folder than the file_name says" in caplog.text


def test_renaming_between_2014_and_2017_is_nothing_to_speak_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, [NINE], False)
    assert source.locate(records(OTHER)) == [] and not caplog.text
