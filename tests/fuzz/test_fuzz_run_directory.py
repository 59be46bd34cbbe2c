"""Run directories and checkpoints of strangers, damaged at random: they load, or end in one short line."""

import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_weights import of_one_number, resnet_shapes
from fuzz_damage import damaged, rounds, survives

from refdet.config import recipe
from refdet.detector import checkpoint, loading
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights.convert import identify_checkpoint
from refdet.detector.weights.import_weights import read_foreign
from refdet.structures.provenance import Provenance
from refdet.training.state import newest

TINY = recipe.load("demo").with_changes(["model.width=4", "model.fpn_channels=4", "model.fpn_hidden=8",
                                         "model.rpn_channels=4", "model.mask_channels=4"])  # fmt: skip
META = checkpoint.CheckpointMetadata(TINY, ((1, "cat"), (5, "dog")), Provenance.imported("drawn", "0" * 64), 3)
JSON_WORDS = (
    *(b"NaN", b"1e999", b"-1", b"null", b"true", b"{}", b"[]", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b'"'),
    *(b'"\\ud800"', b'"step": 1, ', b'"id": 1, ', b"\\u0000", b"\xff", b"3000", b'"untrained": [""], '),
)
PICKLE_WORDS = (
    *(b"(", b")", b"}", b"]", b"t", b"\x85", b"\x86", b"R", b"Q", b"2", b"0", b"u", b"s", b".", b"h\x00", b"q\x00"),
    *(b"cos\nsystem\n", b"c__builtin__\nbytearray\n", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8, b"b", b"\x81"),
    *(b"X\xff\xff\xff\xff", b"ctorch._utils\n_rebuild_qtensor\n", b"ctorch\nFloatTensor\n"),
)
PLACES = (b"[0,4]", b"[0,0]", b"[-1]", b"F64", b"I64", b"BOOL", b"[99999999999]", b"[]", b'"__metadata__"', b"\xff")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    torch.manual_seed(0)
    model = MaskRCNN(TINY, 2)
    folder.mkdir()
    checkpoint.save(folder, model, META)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    about = {"meta": json.dumps(META.to_json()), "fresh": "null"}
    checkpoint.write_tensors(folder / "state" / "step-00000003.safetensors", tensors, about)
    return folder


def test_damaged_metadata(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    good, passed = (run / checkpoint.META).read_bytes(), 0
    for numbers in rounds(100):
        data = damaged(good, numbers, JSON_WORDS)
        (tmp_path / "run" / checkpoint.META).write_bytes(data)
        passed += survives(f"{data!r}", lambda: checkpoint.load_meta(tmp_path / "run"))
    assert passed


def test_metadata_that_is_valid_and_wrong(run: Path, tmp_path: Path) -> None:
    """Every value of the tree replaced by every strange one, and the network loaded if that passes."""
    shutil.copytree(run, tmp_path / "run")
    strange = [None, True, -1, 0, 3, 2**70, 1.5, "", "x" * 10_000, [], {}, [[]], {"a": 1}, [None], "<b>", "\x1b[31m"]
    for numbers in rounds(30):
        tree = json.loads((run / checkpoint.META).read_text())
        place = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = numbers.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or numbers.random() < 0.2:
                break
            place = place[key]
        place[key] = numbers.choice(strange)
        (tmp_path / "run" / checkpoint.META).write_text(json.dumps(tree))
        survives(json.dumps(tree)[:3000], lambda: loading.load(tmp_path / "run"))


def header_and_data(data: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length], data[8 + length :]


def damaged_safetensors(data: bytes, numbers: random.Random) -> bytes:
    """Damage to the header, with its length corrected or not, or to the numbers."""
    header, rest = header_and_data(data)
    kind = numbers.randrange(3)
    if kind == 0:
        return damaged(data[:400], numbers, PLACES) + data[400:]
    if kind == 1:
        header = damaged(header, numbers, (*JSON_WORDS, *PLACES))
        return struct.pack("<Q", len(header)) + header + rest
    return data[: 8 + len(header)] + damaged(rest, numbers, (b"\xff" * 40, b"\x00\x00\xc0\x7f"))


def test_damaged_weights_and_states(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    model, state = run / checkpoint.MODEL, run / "state" / "step-00000003.safetensors"
    for numbers in rounds(40):
        data = damaged_safetensors(model.read_bytes(), numbers)
        (tmp_path / "run" / checkpoint.MODEL).write_bytes(data)
        survives(f"{data[:9000]!r}", lambda: loading.load(tmp_path / "run"))
        data = damaged_safetensors(state.read_bytes(), numbers)
        (tmp_path / "run" / "state").mkdir(exist_ok=True)
        (tmp_path / "run" / "state" / "step-00000003.safetensors").write_bytes(data)
        survives(f"{data[:9000]!r}", lambda: newest(tmp_path / "run"))


def checkpoint_of(new: bool) -> bytes:
    memory = io.BytesIO()
    shapes = resnet_shapes(18)
    given = {name: value.clone() for name, value in of_one_number({n: s[:1] for n, s in shapes.items()}).items()}
    torch.save(given, memory, _use_new_zipfile_serialization=new)
    return memory.getvalue()


def rezipped(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same zip with a changed pickle, whose checksum and lengths are right."""
    memory = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(memory, "w") as new:
        for info in old.infolist():
            inside = old.read(info)
            new.writestr(info.filename, change(inside) if info.filename.endswith("data.pkl") else inside)
    return memory.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "pickle in a zip", "legacy"])
def test_damaged_foreign_checkpoints(tmp_path: Path, kind: str) -> None:
    good, path, passed = checkpoint_of(kind != "legacy"), tmp_path / "weights.pth", 0

    def read() -> None:
        identify_checkpoint(read_foreign(path))

    for numbers in rounds(40):
        if kind == "pickle in a zip":
            data = rezipped(good, lambda inside, numbers=numbers: damaged(inside, numbers, PICKLE_WORDS))  # type: ignore[misc]
        elif kind == "zip":
            end = numbers.choice((0, len(good) - 3000))
            data = good[:end] + damaged(good[end : end + 3000], numbers, PICKLE_WORDS) + good[end + 3000 :]
        else:
            data = damaged(good[:5000], numbers, PICKLE_WORDS) + good[5000:]
        path.write_bytes(data)
        passed += survives(f"seed of {kind}: {data[:2000]!r}", read)
    assert not passed  # the shapes are no ResNet's
