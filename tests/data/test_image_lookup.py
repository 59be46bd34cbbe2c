"""Finding the file for a file_name: never a different image, and equally in folders and zips."""

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

NAME_2017, NAME_2014 = "000000000009.jpg", "COCO_train2014_000000000009.jpg"
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def path_for(files: list[str], name: str, image_id: int = 1, root: tuple[str, ...] = ()) -> str | None:
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
        # only whole path components are compared
        (["xa.png"], "a.png", None),
        (["a.png"], "xa.png", None),
        (["a.png"], "a.jpg", None),
        (["a.png"], "A.png", None),
        # Windows paths, in the file_name or in the zip
        (["img/a.png", "b/a.png"], "img\\a.png", "img/a.png"),
        (["img\\a.png"], "img/a.png", "img\\a.png"),
        (["a.png"], "..\\..\\label-studio\\upload\\4\\a.png", "a.png"),
        (["img/a.png", "b/a.png"], "D:\\data\\img\\a.png", "img/a.png"),
        # absolute paths and .. are compared, never followed
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
        # COCO ids, in the last path component only
        ([NAME_2017], NAME_2014, NAME_2017),
        ([f"train2017/{NAME_2017}"], f"val2014/{NAME_2014}", f"train2017/{NAME_2017}"),
        ([NAME_2014], NAME_2017, NAME_2014),
        (["COCO_val2014_000000000009.jpg"], "COCO_train2014_000000000009_4.jpg", "COCO_val2014_000000000009.jpg"),
        ([NAME_2017], "COCO_train2014_000000000009", NAME_2017),
        ([NAME_2017], "http://images.cocodataset.org/train2017/000000000009.jpg?x=1", NAME_2017),
        ([f"a/{NAME_2017}", f"b/{NAME_2017}"], NAME_2014, None),
        ([f"a/{NAME_2017}", f"b/{NAME_2017}"], NAME_2017, None),
        ([f"a/{NAME_2017}", "a/000000000010.jpg"], "000000000009_000000000010.jpg", None),
        ([NAME_2017], "9.jpg", None),
        ([NAME_2017], "street_0009.jpg", None),
        ([NAME_2017], "mask_000000000009.jpg", None),
        ([NAME_2017], "000000000009_depth.png", None),
        ([NAME_2017], "20240000000000009.jpg", None),
        ([NAME_2017], "000000000009_2.jpg", None),
        (["9.jpg"], NAME_2017, None),
        ([f"mask_{NAME_2017}"], NAME_2014, None),
        # hidden files match only a file_name that names their hidden folder
        (["x.jpg", "._x.jpg", "__MACOSX/._x.jpg"], "x.jpg", "x.jpg"),
        (["img/x.jpg", "__MACOSX/img/x.jpg", ".thumbnails/x.jpg"], "x.jpg", "img/x.jpg"),
        ([".thumbnails/x.jpg", "__MACOSX/x.jpg"], "x.jpg", None),
        ([f".cache/{NAME_2017}"], NAME_2014, None),
        ([".thumbnails/x.jpg"], ".thumbnails/x.jpg", ".thumbnails/x.jpg"),
        (["a/.b/x.jpg", "c/x.jpg"], "data/.b/x.jpg", "a/.b/x.jpg"),
    ],
)  # fmt: skip
def test_the_best_matching_path_or_none_if_ambiguous(files: list[str], name: str, right: str | None) -> None:
    for order in (files, files[::-1]):
        assert path_for(order, name) == right


def test_the_image_id_is_used_only_without_a_file_name() -> None:
    assert path_for([NAME_2017], "", 9) == NAME_2017 and path_for([f"COCO_val2014_{9:012d}.jpg"], "", 9) is not None
    assert path_for([NAME_2017], "", 10) is None
    for name in ("street_2.png", "x", "..", " ", "0", "9", "9.jpg"):
        assert path_for([NAME_2017], name, 9) is None, name


@pytest.mark.parametrize(
    ("files", "names", "right"),
    [
        (["cam1/1.png"], ["cam1/1.png", "cam2/1.png"], ["cam1/1.png", None]),
        (["cam1/1.png"], ["cam2/1.png", "cam1/1.png"], [None, "cam1/1.png"]),
        (["d/cam1/1.png"], ["/x/cam1/1.png", "/x/cam2/1.png", "1.png"], ["d/cam1/1.png", None, None]),
        (["1.png"], ["1.png", "cam2/1.png"], ["1.png", None]),
        (["1.png"], ["cam1/1.png", "cam2/1.png"], [None, None]),
        (["cam2/1.png"], ["cam1/1.png"], ["cam2/1.png"]),
        # the same name in different spellings, or the same COCO image, may occur several times
        (["cam1/1.png"], ["cam1/1.png", "cam1\\1.png", "./cam1/1.png"], ["cam1/1.png"] * 3),
        (
            [f"t/{NAME_2017}"],
            [f"t/{NAME_2017}", NAME_2014, f"v/{NAME_2017}", NAME_2017],
            [f"t/{NAME_2017}"] * 4,
        ),
    ],
)
def test_different_names_do_not_share_a_file(files: list[str], names: list[str], right: list[str | None]) -> None:
    matches = FileNames(files).locate(list(enumerate(names)))
    assert [matches[name].path for name in names] == right
    for name in names:
        assert bool(matches[name].reason) == (matches[name].path is None)


def test_an_image_without_a_name_may_share_a_coco_file() -> None:
    matches = FileNames([NAME_2017]).locate([(9, ""), (1, NAME_2014), (2, "x/street.png")])
    assert matches[9].path == matches[NAME_2014].path == NAME_2017


PART = st.sampled_from(["a", "b", "c", NFC, NFD, "000000000009"])
PATH = st.lists(PART, min_size=1, max_size=4).map(lambda parts: "/".join([*parts[:-1], parts[-1] + ".jpg"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(PATH, max_size=8, unique=True), st.lists(PATH, max_size=6), st.randoms(use_true_random=False))
def test_lookup_equals_a_linear_search(files: list[str], names: list[str], shuffle: random.Random) -> None:
    """Comparison with a linear search through all files, in any order."""
    shuffled = list(files)
    shuffle.shuffle(shuffled)
    matches = FileNames(shuffled).locate(list(enumerate(names)))
    for name in names:
        parts = parts_of(name)
        shared_counts = {file: count_shared_components(parts, parts_of(file)) for file in files}
        exact = [file for file in files if parts_of(file) == parts]
        most = max(shared_counts.values(), default=0)
        best = [file for file in files if shared_counts[file] == most and most > 0]
        right = exact if len(exact) == 1 or name not in exact else [name]
        right = right or (best if most else [])
        path = matches[name].path
        if path is None and len(right) == 1:  # it belongs to another name
            rivals = [
                other
                for other in names
                if parts_of(other) != parts and count_shared_components(parts_of(other), parts_of(right[0]))
            ]
            assert rivals and coco_number(name) is None
        else:
            assert path == (right[0] if len(right) == 1 else None)
    owners: dict[str, set[tuple[str, ...]]] = {}
    for name, match in matches.items():
        if match.path is not None and coco_number(match.path) is None:
            owners.setdefault(match.path, set()).add(parts_of(str(name)))
    assert all(len(names) == 1 for names in owners.values())


def count_shared_components(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """The number of equal path components, counted from the end."""
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


def write_images(root: Path, paths: list[str], zipped: bool) -> ImageSource:
    """A folder or zip of files, each with its own path as its contents."""
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
def test_lookup_in_folders_and_zips(tmp_path: Path, zipped: bool, caplog: pytest.LogCaptureFixture) -> None:
    source = write_images(
        tmp_path, ["cam1/1.png", "cam1/2.png", f"{NFD}.png", "__MACOSX/cam1/._1.png", NAME_2014], zipped
    )
    listed = records("cam1/1.png", "cam2/2.png", f"{NFC}.png", "gone.png", NAME_2017)
    for one in (source, pickle.loads(pickle.dumps(source))):
        missing = one.locate(listed)
        paths = [one.find(record) for record in listed]
        assert paths == ["cam1/1.png", "cam1/2.png", f"{NFD}.png", None, NAME_2014]
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
def test_an_ambiguous_name_is_an_error_that_names_both_files(tmp_path: Path, zipped: bool) -> None:
    source = write_images(tmp_path, ["images/1.png", "masks/1.png", "images/2.png"], zipped)
    with pytest.raises(
        InputError, match=r"1\.png: ambiguous file name: images/1\.png, masks/1\.png \(the same for 1 of"
    ):
        source.check(records("1.png", "2.png"), Path("i.json"))
    with pytest.raises(ImageError, match=r"image 1, 1\.png: ambiguous file name: images/1\.png, masks/1\.png"):
        source.read(records("1.png")[0])
    source.check(records("images/1.png", "images/2.png"), Path("i.json"))


def test_lookup_of_some_images_respects_the_files_of_the_others(tmp_path: Path) -> None:
    """A listed image keeps its file even if only other images are looked up."""
    source = write_images(tmp_path, ["cam1/1.png"], False)
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
    source = write_images(tmp_path, ["a/x.png"], False)
    with pytest.raises(ImageError, match="no file of that name"):
        source.read(records(name.format(root=tmp_path))[0])


def test_the_name_of_the_image_folder_in_a_file_name_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_images(tmp_path, ["1.png"], False)
    source.locate(records("images/1.png"))
    source.locate(records(f"{tmp_path}/images/1.png"))
    assert "another folder" not in caplog.text
    source.locate(records("pictures/1.png"))
    assert "1 of 1 image is in another folder than the file_name says" in caplog.text


def test_renaming_between_2014_and_2017_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_images(tmp_path, [NAME_2017], False)
    assert source.locate(records(NAME_2014)) == [] and not caplog.text
