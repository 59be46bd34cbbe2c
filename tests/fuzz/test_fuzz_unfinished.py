"""Unfinished extractions changed at random: what is damaged is computed again, or refused in a line."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from fuzzing import changed_bytes, changed_tree, fuzz
from interrupted_extraction import BATCHES, compute, run
from store_examples import PLAN, contents, make_regions

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.extraction.steps import Finish
from refdet.store.codec import decode, encode_all
from refdet.store.shard_file import ShardError, ShardWriter, read
from refdet.structures.limits import is_id, size_problem

pytestmark = pytest.mark.slow

MAGIC = b"refdet-shard/2\n"


def stopped(batch: list[ImageRecord], images: list[Any]) -> Finish:
    if batch == BATCHES[2]:
        raise KeyboardInterrupt
    return compute(batch, images)


def changed_shard(data: bytes, chance: random.Random) -> bytes:
    """A shard with one of its blocks changed, whose checksums are right all the same."""
    blocks, at = [], len(MAGIC)
    while length := struct.unpack_from("<Q", data, at)[0]:
        blocks.append(data[at + 12 : at + 12 + length])
        at += 12 + length
    chosen = chance.randrange(len(blocks))
    block = blocks[chosen]
    if chosen and chance.random() < 0.8:
        end = 4 + struct.unpack_from("<I", block)[0]
        head = json.dumps(changed_tree(json.loads(block[4:end]), chance)).encode("utf-8", "surrogatepass")
        block = struct.pack("<I", len(head)) + head + block[end:]
    else:
        block = changed_bytes(block, chance)
    blocks[chosen] = block
    crcs = [zlib.crc32(block) for block in blocks]
    parts = [struct.pack("<QI", len(block), crc) + block for block, crc in zip(blocks, crcs, strict=True)]
    end_crc = zlib.crc32(b"".join(struct.pack("<I", crc) for crc in crcs))
    return MAGIC + b"".join(parts) + struct.pack("<QI", 0, end_crc)


@pytest.mark.usefixtures("check_hdf5_in_process")
@pytest.mark.parametrize("what", ["000000.shard", "shard with right checksums", "plan.json", "sessions.jsonl"])
def test_what_an_extraction_goes_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out, whole = tmp_path / "a.h5", tmp_path / "whole.h5"
    folder, begun = tmp_path / "a.h5.parts", tmp_path / "begun"
    with pytest.raises(Interrupted):
        run(out, compute=stopped)
    folder.rename(begun)
    run(whole)
    sound = contents(whole)
    name = "000000.shard" if "shard" in what else what
    good = (begun / name).read_bytes()

    def change(chance: random.Random) -> None:
        out.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(begun, folder)
        change = changed_shard if "right" in what else changed_bytes
        (folder / name).write_bytes(change(good, chance))

    def work() -> None:
        run(out, resume=True)
        if "right" not in what:
            assert contents(out) == sound
        with store.open(out, again=True) as opened:
            assert len(opened[:]) == len(opened)

    fuzz(change, work, tmp_path)


def test_shards(tmp_path: Path) -> None:
    """What is read of a shard can be written again, and is of the types that a store has."""
    path = tmp_path / "0.shard"
    columns = PLAN.columns()
    with path.open("wb", 0) as file:
        writer = ShardWriter(file, {"shard": 0})
        writer.add(encode_all([make_regions(number, number) for number in range(3)], columns))
        writer.finish()
    good = path.read_bytes()

    def change(chance: random.Random) -> None:
        path.write_bytes(changed_shard(good, chance) if chance.random() < 0.8 else changed_bytes(good, chance))

    def work() -> None:
        with (tmp_path / "again").open("wb", 0) as file:
            again = ShardWriter(file, {"shard": 0})
            try:
                found = [decode(image) for image, _ in read(path, {"shard": 0}, PLAN)]
            except ShardError as error:
                raise InputError(str(error).partition(" (")[0]) from error
            for regions in found:
                assert is_id(regions.image_id) and not size_problem(regions.height, regions.width)
                with contextlib.suppress(RuntimeFailure):  # a number is not finite
                    again.add(encode_all([regions], columns))

    fuzz(change, work, tmp_path)
