"""Fetch archives from the first source that works, check them, and unpack them into the data folder."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refdet.data.fetch.catalog import ITEMS, Item, mirror_url
from refdet.data.refer_statistics import compare_with_published, count_refs
from refdet.errors import InputError, RuntimeFailure
from refdet.files.atomic import atomic_write
from refdet.files.download import RESERVED_BYTES, DownloadFailure, check_file, download
from refdet.files.lock import exclusive_lock
from refdet.files.short_text import format_missing_space
from refdet.files.unpack import move_files, remove_unfinished, unpack_temporarily
from refer import ReferError
from refer.files import available, read_instances, read_refs
from refer.statistics import COUNTS

log = logging.getLogger(__name__)

_RETRY_WAIT = 1.0  # seconds
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_POOCH_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}")  # pooch's name for the file that it downloads to


@dataclass(frozen=True)
class FetchedItem:
    """Result of fetching an item.

    Attributes:
        name: name of the item.
        source: URL or path of the archive that was used; "" if the item's files already existed.
        sha256: of the archive; "" if the item's files already existed.
        files: paths of the item's files; of images that were unpacked already, the folder.
        verified: how the archive was checked: "checksum", "published counts", "refs and instances alone" (they can be
            read, but no counts are published) or "first bytes alone"; "" if the item's files already existed.
    """

    name: str
    source: str
    sha256: str
    files: list[Path]
    verified: str


def fetch_data(
    out: str | Path,
    only: Sequence[str] = (),
    mirror: str | None = None,
    items: Sequence[Item] = ITEMS,
    wait: float = _RETRY_WAIT,
) -> list[FetchedItem]:
    """Download COCO and REFER.

    Every source of an item is tried in turn. Finished and partial downloads are kept for the next call.

    Args:
        out: the data folder; items whose files exist in it are not downloaded again.
        only: names of items, also comma-separated; empty for the default ones, which training on REFER needs.
        mirror: an http address, or a folder on disk, with the archives under their published names; it is then the only
            source.
        items: the available items.
        wait: seconds before retrying a source.

    Returns:
        The result of each item.

    Raises:
        InputError: an unknown name or address, or every source of an item has something other than the published file.
        RuntimeFailure: no source of an item works, as a server or the network failed; or the disk space is not enough.
    """
    out = Path(out)
    selected = choose_items(only, items)
    if mirror is not None and not mirror.startswith(("http://", "https://")) and not Path(mirror).is_dir():
        raise InputError(f"`mirror` {mirror}: not an http address and not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out, ".fetch-data.lock", "wait for it to finish"):
        _remove_leftovers(out)
        missing = [item for item in selected if not is_fetched(out, item)]
        if mirror is None or not Path(mirror).is_dir():
            _check_space(out, missing)
        results = []
        for item in selected:
            if item in missing:
                results.append(_fetch(out, item, mirror, wait))
            else:
                files = _existing_files(out, item)
                _warn_of_damage(out, item)
                results.append(FetchedItem(item.name, source="", sha256="", files=files, verified=""))
        folder = out / "downloads"
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return results


def choose_items(only: Sequence[str], items: Sequence[Item] = ITEMS) -> list[Item]:
    """Select items by name, also comma-separated; the default ones if no name is given.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    names = [name.strip() for text in only for name in text.split(",") if name.strip()]
    selected: list[Item] = []
    for name in names:
        matching = [item for item in items if name in (item.name, _group_name(item))]
        if not matching:
            choices = dict.fromkeys(map(_group_name, items))
            raise InputError(f"`only` {name}: no such data; choose from {', '.join(choices)}")
        selected += matching
    return list(dict.fromkeys(selected)) or [item for item in items if item.default]


def _group_name(item: Item) -> str:
    """The part of an item's name that selects it together with others: "A" of "A/B"."""
    return item.name.partition("/")[0]


def is_fetched(out: Path, item: Item) -> bool:
    """Whether all files of an item are in the data folder; images may also be in a folder instead of a zip."""
    return all((out / name).is_file() for name in item.outputs) or _unpacked_images(out, item) is not None


def _existing_files(out: Path, item: Item) -> list[Path]:
    """Paths of the files of an item that `is_fetched`; the folder of images if there is no zip of them."""
    files = [out / name for name in item.outputs]
    folder = _unpacked_images(out, item)
    return files if folder is None or files[0].is_file() else [folder]


def _unpacked_images(out: Path, item: Item) -> Path | None:
    """The folder in which the user has unpacked an item's zip of images, None if there is none."""
    archive = out / item.outputs[0]
    folder = archive.with_suffix("")
    return folder if archive.suffix == ".zip" and _has_image(folder) else None


def _has_image(folder: Path) -> bool:
    return any(name.lower().endswith(_IMAGE_SUFFIXES) for _, _, names in os.walk(folder) for name in names)


def _remove_leftovers(out: Path) -> None:
    """Remove temporary files of calls that were killed; partial downloads stay."""
    remove_unfinished(out)
    folder = out / "downloads"
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _POOCH_TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def _check_space(out: Path, items: Sequence[Item]) -> None:
    """Raise a RuntimeFailure if the archives do not fit on the disk, as far as their sizes are known."""
    partial = {item.name: out / "downloads" / f"{item.archive}.part" for item in items}
    downloaded = sum(path.stat().st_size for path in partial.values() if path.is_file())
    needed = sum(item.size or 0 for item in items) - downloaded
    free = shutil.disk_usage(out).free
    if free < needed + RESERVED_BYTES:
        names = ", ".join(item.name for item in items)
        raise RuntimeFailure(
            f"{out}: {names} need {format_missing_space(needed + RESERVED_BYTES, free)}; free some space or choose "
            "fewer with `only`"
        )


def _fetch(out: Path, item: Item, mirror: str | None, wait: float) -> FetchedItem:
    """Fetch an item from the first of its sources that works, or from the mirror."""
    problems: list[InputError | RuntimeFailure] = []
    urls = item.urls if mirror is None else (mirror_url(item, mirror),)
    for url in urls:
        try:
            return _fetch_from(out, item, url, wait)
        except (InputError, ReferError, RuntimeFailure) as error:
            if isinstance(error, RuntimeFailure) and not isinstance(error, DownloadFailure):
                raise  # a full disk, which another source cannot fix
            problem = InputError(str(error)) if isinstance(error, ReferError) else error
            problems.append(problem)
            if len(urls) > 1:
                log.warning("note: %s: %s", item.name, problem)
    if len(problems) == 1:
        raise problems[0]
    parquet = f"{item.name}-parquet"  # the group of items with the same dataset in another format
    alternative = ""
    if parquet in map(_group_name, ITEMS):
        alternative = f"; or run refdet fetch-data --only {parquet}, then refdet convert-refer on its files"
    kind = InputError if all(isinstance(problem, InputError) for problem in problems) else RuntimeFailure
    raise kind(
        f"{item.name}: none of its {len(urls)} sources works, the last one: {problems[-1]}; give your own mirror "
        f"or a folder with {item.archive} as `mirror`{alternative}"
    )


def _fetch_from(out: Path, item: Item, url: str, wait: float) -> FetchedItem:
    """Fetch an item from one source: the URL, or the path in a folder, of its archive."""
    local = not url.startswith(("http://", "https://"))
    archive = Path(url) if local else out / "downloads" / item.archive
    if local:
        if not archive.is_file():
            raise InputError(f"{archive}: no such file; {item.name} needs it")
        sha256 = check_file(archive, url, item.checksum)
    else:
        log.info("%s: downloading %s", item.name, url)
        sha256 = download(url, archive, item.checksum, item.size, wait)
    try:
        files = _install(out, item, archive, url, sha256, local)
    except (InputError, ReferError):
        if not local:
            archive.unlink(missing_ok=True)  # its contents are wrong, so that the next call must not continue with it
        raise
    if not local:
        archive.unlink(missing_ok=True)
    return FetchedItem(item.name, url, sha256, files, _verification(item))


def _verification(item: Item) -> str:
    """How the archive of an item is checked, as in `FetchedItem.verified`."""
    if item.checksum:
        return "checksum"
    if not item.dataset:
        return "first bytes alone"
    counted = any(dataset == item.dataset for dataset, _ in COUNTS)
    return "published counts" if counted else "refs and instances alone"


def _install(out: Path, item: Item, archive: Path, url: str, sha256: str, local: bool) -> list[Path]:
    """Check an archive and move its files, or the archive itself, into the data folder; return their paths.

    A ``local`` archive is the user's and stays where it is.
    """
    if item.target_path is None:
        with archive.open("rb") as file:
            if file.read(len(item.magic)) != item.magic:
                raise InputError(f"{url}: not the file, which begins with {item.magic!r} (sha256 {sha256})")
        target = out / item.outputs[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        if local:
            with atomic_write(target) as temporary:
                shutil.copyfile(archive, temporary)
        else:
            os.replace(archive, target)
        return [target]
    with unpack_temporarily(archive, url, item.target_path, out) as folder:
        missing = [name for name in item.outputs if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{url}: no {', '.join(Path(name).name for name in missing)} in it (sha256 {sha256})")
        if item.dataset:
            _check_refer(folder / "refer", item.dataset, url, sha256)
        moved, kept = move_files(folder, out)
    for path in kept:
        log.warning(
            "note: %s: kept, though the one in %s has other contents; if they do not fit together, remove it and run "
            "this again",
            path,
            item.archive,
        )
    return moved + kept


def _warn_of_damage(out: Path, item: Item) -> None:
    """Warn if existing REFER data cannot be read, or is neither of the published size nor a small sample."""
    if not item.dataset:
        return
    try:
        lines = _size_differences(out / "refer", item.dataset, allow_sample=True)
    except ReferError as error:
        log.warning("note: %s: kept as it is: %s; to fetch it anew, remove that file first", item.name, error)
        return
    if lines:
        log.warning(
            "note: %s: kept as it is, although it differs from the published data (damaged, or converted from another "
            "format?): %s",
            item.name,
            "; ".join(lines),
        )


def _size_differences(root: Path, dataset: str, allow_sample: bool) -> list[str]:
    """Read REFER data and list the differences from its published size; raises ReferError if it cannot be read."""
    read_instances(root, dataset)
    counts = {by: count_refs(read_refs(root, name, by)) for name, by in available(root) if name == dataset}
    return [
        line
        for split_by, split_counts in counts.items()
        for line in compare_with_published(dataset, split_by, split_counts, allow_sample)
    ]


def _check_refer(root: Path, dataset: str, url: str, sha256: str) -> None:
    """Check that REFER data can be read and has the published size, if one is published.

    Raises:
        InputError: the data cannot be read or has another size; the message has the SHA-256 of the archive.
    """
    try:
        mismatches = _size_differences(root, dataset, allow_sample=False)
    except ReferError as error:
        raise InputError(f"{url} (sha256 {sha256}): {str(error).replace(f'{root}{os.sep}', '')}") from None
    if mismatches:
        raise InputError(f"{url}: {'; '.join(mismatches)} (sha256 {sha256})")
