import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from click.testing import CliRunner
from loopback_server import Site, serving

import refer
from refdet.cli.main import main
from refdet.data.fetch.catalog import ITEMS, Item, instances_path, mirror_url, refer_path
from refdet.data.fetch.fetch import fetch_data
from refdet.data.refer_statistics import count_refs
from refdet.errors import InputError, RuntimeFailure
from refer.statistics import COUNTS


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as served:
        yield served


def zip_folders(root: Path, *names: str) -> bytes:
    """A zip of folders, with a resource fork like those that macOS adds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            for path in sorted((root / name).rglob("*")):
                file.write(path, path.relative_to(root).as_posix())
        file.writestr("__MACOSX/refcoco/instances.json", b"cruft")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def refcoco_zip(shapes_root: Path) -> bytes:
    """A zip of the synthetic RefCOCO, laid out like REFER's refcoco.zip."""
    return zip_folders(shapes_root / "refer", "refcoco")


@pytest.fixture
def published_counts(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace REFER's published counts by those of the synthetic dataset, so that it passes as the real one."""
    for by in ("unc", "google"):
        found = count_refs(refer.files.read_refs(shapes_root / "refer", "refcoco", by))
        monkeypatch.setitem(COUNTS, ("refcoco", by), found)


def refcoco_item(site: Site, data: bytes | None, *paths: str) -> Item:
    return Item(
        name="refcoco",
        archive="refcoco.zip",
        contents="refs",
        urls=tuple(site.address + path for path in paths or ("/refcoco.zip",)),
        outputs=("refer/refcoco/instances.json", "refer/refcoco/refs(unc).p", "refer/refcoco/refs(google).p"),
        size=None if data is None else len(data),
        checksum=None if data is None else f"sha256:{hashlib.sha256(data).hexdigest()}",
        target_path=refer_path("refcoco"),
        dataset="refcoco",
        default=True,
    )


def fetch_item(item: Item, out: Path, **options: Any) -> Any:
    (result,) = fetch_data(out, items=(item,), wait=0, **options)
    return result


def files_in(out: Path) -> list[str]:
    """The names of all files but the locks."""
    return sorted(path.name for path in out.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def refer_equals_original(out: Path, shapes_root: Path) -> bool:
    original = shapes_root / "refer" / "refcoco"
    return all((out / "refer" / "refcoco" / path.name).read_bytes() == path.read_bytes() for path in original.iterdir())


@pytest.mark.usefixtures("published_counts")
@pytest.mark.parametrize("has_checksum", [True, False])
def test_an_archive_is_verified_and_unpacked_once(
    site: Site, tmp_path: Path, refcoco_zip: bytes, shapes_root: Path, has_checksum: bool
) -> None:
    site.add("/refcoco.zip", refcoco_zip, cuts=[1000, 5000])
    result = fetch_item(refcoco_item(site, refcoco_zip if has_checksum else None), tmp_path)
    assert result.verified == ("checksum" if has_checksum else "published counts")
    assert (result.source, result.sha256) == (f"{site.address}/refcoco.zip", hashlib.sha256(refcoco_zip).hexdigest())
    assert refer_equals_original(tmp_path, shapes_root) and sorted(path.name for path in result.files) == files_in(
        tmp_path
    )
    site.files.clear()
    again = fetch_item(refcoco_item(site, refcoco_zip), tmp_path)
    assert again.source == "" and again.files


@pytest.mark.usefixtures("published_counts")
def test_sources_are_tried_in_order_until_one_works(
    site: Site, tmp_path: Path, refcoco_zip: bytes, shapes_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site.add("/page.zip", b"<!doctype html>", kind="text/html")
    site.add("/other.zip", refcoco_zip[:-1] + b"?")
    site.add("/short.zip", refcoco_zip, cuts=[9000] * 7)
    site.add("/moved.zip", status=301, location="/right.zip")
    site.add("/right.zip", refcoco_zip)
    item = refcoco_item(site, refcoco_zip, "/none.zip", "/page.zip", "/other.zip", "/short.zip", "/moved.zip")
    result = fetch_item(item, tmp_path)
    assert result.source.endswith("/moved.zip") and refer_equals_original(tmp_path, shapes_root)
    lines = [record.getMessage() for record in caplog.records]
    problems = ("none.zip: 404 Not Found", "page.zip: an HTML page", "other.zip: checksum mismatch", "short.zip: ")
    assert all(problem in line for problem, line in zip(problems, lines, strict=True))


def test_the_error_if_no_source_works(site: Site, tmp_path: Path, refcoco_zip: bytes) -> None:
    item = refcoco_item(site, refcoco_zip, "/a.zip", "/b.zip")
    with pytest.raises(
        RuntimeFailure, match=r"none of its 2 sources works, .*b\.zip: 404 Not Found; give your own mirror"
    ):
        fetch_item(item, tmp_path)
    site.add("/a.zip", b"<html>")
    site.add("/b.zip", b"<html>")
    with pytest.raises(InputError, match="none of its 2 sources works"):
        fetch_item(item, tmp_path)
    assert files_in(tmp_path) == []


def test_other_refs_are_refused_by_their_counts(site: Site, tmp_path: Path, refcoco_zip: bytes) -> None:
    site.add("/refcoco.zip", refcoco_zip)
    found = hashlib.sha256(refcoco_zip).hexdigest()
    with pytest.raises(InputError, match=rf"refs instead of the published 40,000.*sha256 {found}"):
        fetch_item(refcoco_item(site, None), tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.usefixtures("published_counts")
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"refcoco/refs(unc).p": b"\x80\x02]."}, "no instances.json, refs(google).p in it"),
        ({"../refcoco/instances.json": b"{}"}, "would be written outside"),
        (
            {"refcoco/instances.json": b"{", "refcoco/refs(unc).p": b"", "refcoco/refs(google).p": b""},
            "refcoco/instances.json: malformed JSON",
        ),
    ],
)  # fmt: skip
def test_archives_with_wrong_or_malicious_members_are_refused(
    site: Site, tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    site.add("/refcoco.zip", buffer.getvalue())
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        fetch_item(refcoco_item(site, None), tmp_path)
    assert files_in(tmp_path) == [] and "\n" not in str(caught.value)


def test_a_mirror_with_another_checksum_is_refused(site: Site, tmp_path: Path, refcoco_zip: bytes) -> None:
    site.add("/mine/refcoco.zip", refcoco_zip[:-1] + b"?")
    item = refcoco_item(site, refcoco_zip)
    with pytest.raises(InputError, match=r"/mine/refcoco\.zip: checksum mismatch \(sha256 "):
        fetch_item(item, tmp_path, mirror=f"{site.address}/mine")
    assert files_in(tmp_path) == []


@pytest.mark.usefixtures("published_counts")
def test_a_mirror_may_be_a_url_or_a_folder(site: Site, tmp_path: Path, refcoco_zip: bytes, shapes_root: Path) -> None:
    site.add("/mine/refcoco.zip", refcoco_zip)
    item = replace(refcoco_item(site, refcoco_zip), urls=())
    assert fetch_item(item, tmp_path / "1", mirror=f"{site.address}/mine/").source == f"{site.address}/mine/refcoco.zip"
    fetch_item(item, tmp_path / "2", mirror=f"{site.address}/mine/refcoco.zip")
    folder = tmp_path / "archives"
    folder.mkdir()
    with pytest.raises(InputError, match=r"refcoco\.zip: no such file; refcoco needs it"):
        fetch_item(item, tmp_path / "3", mirror=str(folder))
    (folder / "refcoco.zip").write_bytes(refcoco_zip)
    fetch_item(item, tmp_path / "3", mirror=str(folder))
    assert all(refer_equals_original(tmp_path / name, shapes_root) for name in "123")
    assert (folder / "refcoco.zip").read_bytes() == refcoco_zip
    with pytest.raises(InputError, match="not an http address and not a folder"):
        fetch_item(item, tmp_path / "4", mirror="ftp://a/b")


def test_annotations_are_unpacked_and_image_zips_are_kept(site: Site, tmp_path: Path, shapes_root: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("instances_minival2014.json", "person_keypoints_minival2014.json"):
            info = tarfile.TarInfo(f"annotations/{name}")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    site.add("/minival.tgz", buffer.getvalue())
    images = zip_folders(shapes_root, "val2014")
    site.add("/val2014.zip", images)
    url = site.address
    outputs = ("annotations/instances_minival2014.json",)
    items = (
        Item("minival", "minival.tgz", "", (f"{url}/minival.tgz",), outputs, target_path=instances_path, default=True),
        Item("val2014", "val2014.zip", "", (f"{url}/val2014.zip",), ("val2014.zip",), default=True),
    )
    fetch_data(tmp_path, items=items, wait=0)
    assert files_in(tmp_path) == ["instances_minival2014.json", "val2014.zip"]
    assert (tmp_path / "val2014.zip").read_bytes() == images
    (tmp_path / "val2014.zip").unlink()
    (tmp_path / "val2014").mkdir()
    assert [one.source for one in fetch_data(tmp_path, items=items, wait=0)] == ["", f"{url}/val2014.zip"]
    (tmp_path / "val2014.zip").unlink()
    (tmp_path / "val2014" / "1.jpg").touch()  # as if the user had unpacked the zip
    results = fetch_data(tmp_path, items=items, wait=0)
    assert [one.source for one in results] == ["", ""]
    assert [path for one in results for path in one.files] == [tmp_path / outputs[0], tmp_path / "val2014"]


@pytest.mark.usefixtures("published_counts")
@pytest.mark.parametrize("name", ["refs(unc).p", "instances.json"])
def test_existing_damaged_files_are_noted(
    site: Site, tmp_path: Path, refcoco_zip: bytes, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    site.add("/refcoco.zip", refcoco_zip)
    item = refcoco_item(site, refcoco_zip, "/refcoco.zip")
    fetch_item(item, tmp_path)
    caplog.clear()
    fetch_item(item, tmp_path)
    assert "kept as it is" not in caplog.text
    path = tmp_path / "refer" / "refcoco" / name
    damaged = path.read_bytes()[:-100]
    path.write_bytes(damaged)
    fetch_item(item, tmp_path)
    assert f"note: refcoco: kept as it is: {path}: " in caplog.text
    assert "to fetch it anew, remove that file first" in caplog.text and path.read_bytes() == damaged


@pytest.mark.usefixtures("published_counts")
def test_existing_files_are_kept_and_leftovers_removed(
    site: Site, tmp_path: Path, refcoco_zip: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    existing = tmp_path / "refer" / "refcoco" / "refs(unc).p"
    existing.parent.mkdir(parents=True)
    existing.write_bytes(b"converted")
    for name in ("downloads/tmp1a_b2c3d", ".unpacking-1/refer/a"):  # leftovers of a killed run
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    site.add("/refcoco.zip", refcoco_zip)
    result = fetch_item(refcoco_item(site, refcoco_zip), tmp_path)
    assert existing in result.files and existing.read_bytes() == b"converted"
    assert files_in(tmp_path) == ["instances.json", "refs(google).p", "refs(unc).p"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{existing}: kept" in line


def test_without_published_counts_refs_are_checked_against_instances_only(
    site: Site, tmp_path: Path, refcoco_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for by in ("unc", "google"):
        monkeypatch.delitem(COUNTS, ("refcoco", by))
    site.add("/refcoco.zip", refcoco_zip)
    assert fetch_item(refcoco_item(site, None), tmp_path).verified == "refs and instances alone"


def test_free_space_is_checked_before_downloading(
    site: Site, tmp_path: Path, refcoco_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = site.add("/refcoco.zip", refcoco_zip)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1_000_000))
    item = replace(refcoco_item(site, refcoco_zip), size=10**10)
    with pytest.raises(RuntimeFailure, match=r"refcoco need 10\.1 GB, 10\.1 GB more than is free; .* `only`"):
        fetch_item(item, tmp_path)
    assert file.requests == []


def test_catalog_entries_are_consistent() -> None:
    names = [item.name for item in ITEMS]
    assert len(set(names)) == len(names)
    for item in ITEMS:
        assert len(item.urls) >= (1 if item.magic else 2) and len(set(item.urls)) == len(item.urls)
        for url in item.urls:
            assert urlparse(url).scheme in ("http", "https") and (item.magic or url.endswith(f"/{item.archive}"))
        assert item.checksum is None or re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", item.checksum)
        if item.magic:
            assert item.checksum is None and item.outputs[0].endswith(".parquet")
        elif item.target_path is None:
            assert item.outputs == (item.archive,)
        elif item.dataset:
            assert all(item.target_path(f"{item.dataset}/{Path(name).name}") == name for name in item.outputs)
        else:
            assert all(item.target_path(name) == name for name in item.outputs)
    plus = ITEMS[names.index("refcoco+")]
    assert mirror_url(plus, "https://a/b") == "https://a/b/refcoco+.zip"


def test_parquet_is_checked_by_its_first_bytes_and_suggested_as_a_fallback(
    site: Site, tmp_path: Path, refcoco_zip: bytes
) -> None:
    url = site.address
    splits = ("train", "validation")
    items = tuple(
        Item(f"p/{split}", f"{split}.parquet", "", (f"{url}/{split}",), (f"parquet/{split}.parquet",), magic=b"PAR1")
        for split in splits
    )
    for split in splits:
        site.add(f"/{split}", b"PAR1 and more", kind="application/octet-stream")
    results = fetch_data(tmp_path, ["p"], items=items, wait=0)
    assert [one.verified for one in results] == ["first bytes alone"] * 2
    assert files_in(tmp_path) == ["train.parquet", "validation.parquet"]
    site.add("/validation", b"Not found", kind="text/plain")
    with pytest.raises(InputError, match=r"/validation: not the file, which begins with b'PAR1'"):
        fetch_data(tmp_path / "2", ["p/validation"], items=items, wait=0)
    assert files_in(tmp_path / "2") == []
    item = refcoco_item(site, refcoco_zip, "/a.zip", "/b.zip")
    with pytest.raises(RuntimeFailure, match="run refdet fetch-data --only refcoco-parquet, then refdet convert-refer"):
        fetch_item(item, tmp_path)


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(main, ["fetch-data", *map(str, args)])


def test_fetch_data_command(site: Site, tmp_path: Path, refcoco_zip: bytes) -> None:
    listed = run("--list")
    assert listed.exit_code == 0 and all(url in listed.stdout for item in ITEMS for url in item.urls)
    as_json = json.loads(run("--list", "--only", "refcoco,train2014", "--json").stdout)
    assert [one["name"] for one in as_json] == ["refcoco", "train2014"]
    site.add("/refcoco.zip", refcoco_zip)
    wrong = run("--out", tmp_path, "--only", "refcoco", "--from", site.address)
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1 and "another file, of" in wrong.stderr
    unknown = run("--out", tmp_path, "--only", "refcocoplus")
    assert unknown.exit_code == 2 and "--only refcocoplus: no such data; choose from refcoco, " in unknown.stderr
    for nothing in ("", " ,"):  # as from an empty shell variable; must not download all of COCO
        empty = run("--out", tmp_path, "--only", nothing, "--from", site.address)
        assert empty.exit_code == 2 and f"--only {nothing!r}: no names in it" in empty.stderr
    assert files_in(tmp_path) == []
    for item in ITEMS[:1]:
        for name in item.outputs:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    there = run("--out", tmp_path, "--only", "refcoco", "--from", site.address)
    assert there.exit_code == 0 and there.stdout == f"refcoco: already in {tmp_path}\n"
    assert os.listdir(tmp_path / "refer") == ["refcoco"]
