"""Run directories and checkpoints of strangers, damaged at random: they load, or end in one short line."""

import contextlib
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from foreign_weights import of_one_number, resnet_shapes
from fuzz_damage import damaged
from fuzzing import changed_tree, fuzz
from split_examples import write_refs

from refdet.config import recipe
from refdet.detector import checkpoint, loading
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import read_foreign
from refdet.errors import InputError
from refdet.report import page
from refdet.splits.detector_audit import audit_provenance
from refdet.splits.inspect import describe
from refdet.structures.provenance import Provenance
from refdet.training.best import ValidationRecord, read_best
from refdet.training.metrics_log import _truncate_after as truncate_after
from refdet.training.metrics_rows import METRICS, read_rows
from refdet.training.run_card import _text as card_text
from refdet.training.saved_run import SavedRun
from refdet.training.state import newest

pytestmark = pytest.mark.slow

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


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")]})


def test_damaged_metadata(copy: Path) -> None:
    path = copy / checkpoint.META
    good = path.read_bytes()

    def change(chance: random.Random) -> None:
        path.write_bytes(damaged(good, chance, JSON_WORDS))

    fuzz(change, lambda: checkpoint.load_meta(copy), copy, 100)


def test_metadata_that_is_valid_and_wrong(copy: Path) -> None:
    """A value of the tree replaced by a strange one, and the network loaded if that passes."""
    path = copy / checkpoint.META
    good = path.read_text()
    strange = [None, True, -1, 0, 3, 2**70, 1.5, "", "x" * 10_000, [], {}, [[]], {"a": 1}, [None], "<b>", "\x1b[31m"]

    def change(chance: random.Random) -> None:
        tree = json.loads(good)
        place = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = chance.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.2:
                break
            place = place[key]
        place[key] = chance.choice(strange)
        path.write_text(json.dumps(tree))

    fuzz(change, lambda: loading.load(copy), copy, 30)


def test_a_damaged_log_of_a_run_that_goes_on(copy: Path) -> None:
    """The log, and the record of the best weights, in what a training that resumes reads and writes of them."""
    rates = {"val_bbox_AP": 0.5, "val_segm_AP": 0.25}
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1}, {"step": 2, **rates}, {"step": 3, "loss": 0.0}]
    log = "".join(json.dumps(row) + "\n" for row in rows).encode()
    record = ValidationRecord("val_bbox_AP", 0.5, 2, "minival.json", 3, "0" * 64, rates)
    best = json.dumps(asdict(record)).encode()

    def change(chance: random.Random) -> None:
        (copy / METRICS).write_bytes(damaged(log, chance, JSON_WORDS))
        (copy / "best").mkdir(exist_ok=True)
        (copy / "best/validation.json").write_bytes(damaged(best, chance, JSON_WORDS))

    def read() -> None:
        assert card_text(META, read_rows(copy), "3 images of minival.json")
        found = read_best(copy)
        assert found is not None and found.value == found.value

    fuzz(change, read, copy, 100)


@pytest.mark.parametrize("what", ["inspect", "audit", "report"])
def test_what_a_run_says_of_itself(copy: Path, root: Path, tmp_path: Path, what: str) -> None:
    """The metadata and the log, damaged as text or as a tree, in what shows them."""
    meta, log = copy / checkpoint.META, copy / METRICS
    tree = json.loads(meta.read_text())
    rows = b"".join(
        json.dumps({"step": n, "loss": 2.5, "rpn_score": 0.5, "lr": 0.02}).encode() + b"\n" for n in (1, 2, 3)
    )
    inputs = page.ReportInputs(copy, root, tmp_path / "images")
    page.render_page(inputs, "report")  # matplotlib writes its font cache once, outside the watched folder

    def change(chance: random.Random) -> None:
        log.write_bytes(rows)
        if what == "report" and chance.random() < 0.5:
            log.write_bytes(damaged(rows, chance, JSON_WORDS))
        elif chance.random() < 0.3:
            meta.write_bytes(damaged(json.dumps(tree).encode(), chance, JSON_WORDS))
        else:
            meta.write_text(json.dumps(changed_tree(tree, chance)), "utf-8", "surrogatepass")

    def work() -> None:
        if what == "report":
            text = page.render_page(inputs, "report")
            assert "<script" not in text and "\x1b" not in text
        elif what == "audit":
            found = audit_provenance(copy, root)
            assert not found.proven
            json.dumps(found.to_json())
        else:
            json.dumps(describe(copy))

    fuzz(change, work, tmp_path)


def test_a_log_that_training_goes_on_with(tmp_path: Path) -> None:
    """Rows that are whole and of the steps so far are kept, nothing else is, whatever there is."""
    rows = b"".join(json.dumps({"step": n, "loss": 2.5}).encode() + b"\n" for n in range(1, 7))

    def change(chance: random.Random) -> None:
        (tmp_path / METRICS).write_bytes(damaged(rows, chance, JSON_WORDS))

    def work() -> None:
        truncate_after(tmp_path / METRICS, 4)
        kept = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
        assert all(row["step"] <= 4 for row in kept)

    fuzz(change, work, tmp_path)


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


def test_damaged_weights(run: Path, copy: Path, root: Path, tmp_path: Path) -> None:
    good = (run / checkpoint.MODEL).read_bytes()

    def change(chance: random.Random) -> None:
        (copy / checkpoint.MODEL).write_bytes(damaged_safetensors(good, chance))

    def work() -> None:
        with contextlib.suppress(InputError):
            audit_provenance(copy, root)
        loading.load(copy)

    fuzz(change, work, tmp_path)


def test_damaged_states(run: Path, copy: Path) -> None:
    path = next((copy / "state").iterdir())
    good = path.read_bytes()

    def change(chance: random.Random) -> None:
        path.write_bytes(damaged_safetensors(good, chance))

    def work() -> None:
        with contextlib.suppress(InputError):
            SavedRun.newest(copy)
        newest(copy)

    fuzz(change, work, copy)


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
@pytest.mark.parametrize("kind", ["zip", "pickle in a zip", "legacy", "safetensors"])
def test_damaged_foreign_checkpoints(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    good = checkpoint_of(kind != "legacy")
    if kind == "safetensors":
        tensors = torch.load(io.BytesIO(good), weights_only=True)
        good = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})

    def change(chance: random.Random) -> None:
        if kind == "pickle in a zip":
            data = rezipped(good, lambda inside: damaged(inside, chance, PICKLE_WORDS))
        elif kind == "zip":
            end = chance.choice((0, len(good) - 3000))
            data = good[:end] + damaged(good[end : end + 3000], chance, PICKLE_WORDS) + good[end + 3000 :]
        elif kind == "legacy":
            data = damaged(good[:5000], chance, PICKLE_WORDS) + good[5000:]
        else:
            data = damaged_safetensors(good, chance)
        path.write_bytes(data)

    # the shapes are no ResNet's
    fuzz(change, lambda: identify_checkpoint(read_foreign(path)), tmp_path, 40, passes=False)
