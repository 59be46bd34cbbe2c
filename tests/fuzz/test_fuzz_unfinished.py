"""Unfinished extractions, damaged at random: damaged parts are computed again, or end in a one-line error."""

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
from fuzzing import change_bytes, change_tree, fuzz
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


def compute_until_third_batch(batch: list[ImageRecord], images: list[Any]) -> Finish:
    if batch == BATCHES[2]:
        raise KeyboardInterrupt
    return compute(batch, images)


def change_shard(data: bytes, rng: random.Random) -> bytes:
    """Change a block of a shard, and correct its lengths and checksums."""
    blocks, start = [], len(MAGIC)
    while length := struct.unpack_from("<Q", data, start)[0]:
        blocks.append(data[start + 12 : start + 12 + length])
        start += 12 + length
    chosen = rng.randrange(len(blocks))
    block = blocks[chosen]
    if chosen and rng.random() < 0.8:
        end = 4 + struct.unpack_from("<I", block)[0]
        head = json.dumps(change_tree(json.loads(block[4:end]), rng)).encode("utf-8", "surrogatepass")
        block = struct.pack("<I", len(head)) + head + block[end:]
    else:
        block = change_bytes(block, rng)
    blocks[chosen] = block
    crcs = [zlib.crc32(block) for block in blocks]
    parts = [struct.pack("<QI", len(block), crc) + block for block, crc in zip(blocks, crcs, strict=True)]
    end_crc = zlib.crc32(b"".join(struct.pack("<I", crc) for crc in crcs))
    return MAGIC + b"".join(parts) + struct.pack("<QI", 0, end_crc)


@pytest.mark.usefixtures("check_hdf5_in_process")
@pytest.mark.parametrize("kind", ["000000.shard", "shard with correct checksums", "plan.json", "sessions.jsonl"])
def test_resuming_a_damaged_extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Unless its checksums are correct, a damaged file leads to the same store or to an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out, complete = tmp_path / "a.h5", tmp_path / "complete.h5"
    folder, unfinished = tmp_path / "a.h5.parts", tmp_path / "unfinished"
    with pytest.raises(Interrupted):
        run(out, compute=compute_until_third_batch)
    folder.rename(unfinished)
    run(complete)
    expected = contents(complete)
    name = "000000.shard" if "shard" in kind else kind
    good = (unfinished / name).read_bytes()

    def change(rng: random.Random) -> None:
        out.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(unfinished, folder)
        change_file = change_shard if "correct" in kind else change_bytes
        (folder / name).write_bytes(change_file(good, rng))

    def work() -> None:
        run(out, resume=True)
        if "correct" not in kind:
            assert contents(out) == expected
        with store.open(out, again=True) as opened:
            assert len(opened[:]) == len(opened)

    # hardly any change of the plan is harmless
    fuzz(change, work, tmp_path, min_inputs=400 if kind == "plan.json" else 40)


def test_images_of_a_damaged_shard_are_valid_and_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "0.shard"
    columns = PLAN.columns()
    with path.open("wb", 0) as file:
        writer = ShardWriter(file, {"shard": 0})
        writer.add(encode_all([make_regions(number, number) for number in range(3)], columns))
        writer.finish()
    good = path.read_bytes()

    def change(rng: random.Random) -> None:
        path.write_bytes(change_shard(good, rng) if rng.random() < 0.8 else change_bytes(good, rng))

    def work() -> None:
        with (tmp_path / "again").open("wb", 0) as file:
            again = ShardWriter(file, {"shard": 0})
            try:
                images = [decode(image) for image, _ in read(path, {"shard": 0}, PLAN)]
            except ShardError as error:
                raise InputError(str(error).partition(" (")[0]) from error
            for regions in images:
                assert is_id(regions.image_id) and not size_problem(regions.height, regions.width)
                with contextlib.suppress(RuntimeFailure):  # a number is not finite
                    again.add(encode_all([regions], columns))

    fuzz(change, work, tmp_path)
