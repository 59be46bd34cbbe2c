"""Untrusted run directories and checkpoints, damaged at random: they load, or end in a short one-line error."""

import contextlib
import io
import json
import math
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
from fuzz_damage import damage
from fuzzing import change_tree, fuzz
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

TINY = recipe.load("demo").with_changes(["model.width=4", "model.fpn_channels=4", "model.fc_dim=8",
                                         "model.rpn_channels=4", "model.mask_channels=4"])  # fmt: skip
META = checkpoint.CheckpointMetadata(TINY, ((1, "cat"), (5, "dog")), Provenance.imported("synthetic", "0" * 64), 3)
# pieces of JSON, pickles and safetensors headers that damage inserts
JSON_WORDS = (
    *(b"NaN", b"1e999", b"-1", b"null", b"true", b"{}", b"[]", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b'"'),
    *(b'"\\ud800"', b'"step": 1, ', b'"id": 1, ', b"\\u0000", b"\xff", b"3000", b'"untrained": [""], '),
)
PICKLE_WORDS = (
    *(b"(", b")", b"}", b"]", b"t", b"\x85", b"\x86", b"R", b"Q", b"2", b"0", b"u", b"s", b".", b"h\x00", b"q\x00"),
    *(b"cos\nsystem\n", b"c__builtin__\nbytearray\n", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8, b"b", b"\x81"),
    *(b"X\xff\xff\xff\xff", b"ctorch._utils\n_rebuild_qtensor\n", b"ctorch\nFloatTensor\n"),
)
HEADER_WORDS = (
    b"[0,4]",
    b"[0,0]",
    b"[-1]",
    b"F64",
    b"I64",
    b"BOOL",
    b"[99999999999]",
    b"[]",
    b'"__metadata__"',
    b"\xff",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a training state."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    torch.manual_seed(0)
    model = MaskRCNN(TINY, 2)
    folder.mkdir()
    checkpoint.save(folder, model, META)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    metadata = {"meta": json.dumps(META.to_json()), "fresh": "null"}
    checkpoint.write_tensors(folder / "state" / "step-00000003.safetensors", tensors, metadata)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refer_root(tmp_path: Path) -> Path:
    return write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")]})


def test_damaged_metadata(copy: Path) -> None:
    path = copy / checkpoint.META
    good = path.read_bytes()

    def change(rng: random.Random) -> None:
        path.write_bytes(damage(good, rng, JSON_WORDS))

    fuzz(change, lambda: checkpoint.load_meta(copy), copy, 100)


def test_metadata_with_an_unexpected_value(copy: Path) -> None:
    """The JSON stays valid; the network is loaded if the metadata are."""
    path = copy / checkpoint.META
    good = path.read_text()
    unexpected = [None, True, -1, 0, 3, 2**70, 1.5, "", "x" * 10_000, [], {}, [[]], {"a": 1}, [None], "<b>", "\x1b[31m"]

    def change(rng: random.Random) -> None:
        tree = json.loads(good)
        parent = tree
        while True:
            key = rng.choice(list(parent) if isinstance(parent, dict) else list(range(len(parent))))
            if not isinstance(parent[key], (dict, list)) or not parent[key] or rng.random() < 0.2:
                break
            parent = parent[key]
        parent[key] = rng.choice(unexpected)
        path.write_text(json.dumps(tree))

    fuzz(change, lambda: loading.load(copy), copy, 30)


def test_damaged_log_and_best_record_when_training_resumes(copy: Path) -> None:
    """They are read for the run card and for the best AP so far."""
    rates = {"val_bbox_AP": 0.5, "val_segm_AP": 0.25}
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1}, {"step": 2, **rates}, {"step": 3, "loss": 0.0}]
    log = "".join(json.dumps(row) + "\n" for row in rows).encode()
    record = ValidationRecord("val_bbox_AP", 0.5, 2, "minival.json", 3, "0" * 64, rates)
    best = json.dumps(asdict(record)).encode()

    def change(rng: random.Random) -> None:
        (copy / METRICS).write_bytes(damage(log, rng, JSON_WORDS))
        (copy / "best").mkdir(exist_ok=True)
        (copy / "best/validation.json").write_bytes(damage(best, rng, JSON_WORDS))

    def read() -> None:
        assert card_text(META, read_rows(copy), "3 images of minival.json")
        best_so_far = read_best(copy)
        assert best_so_far is not None and not math.isnan(best_so_far.value)

    fuzz(change, read, copy, 100)


@pytest.mark.parametrize("command", ["inspect", "audit", "report"])
def test_damaged_metadata_and_log_in_commands_that_show_them(
    copy: Path, refer_root: Path, tmp_path: Path, command: str
) -> None:
    """The metadata are damaged as text or as a JSON tree, the log as text."""
    meta, log = copy / checkpoint.META, copy / METRICS
    tree = json.loads(meta.read_text())
    rows = b"".join(
        json.dumps({"step": n, "loss": 2.5, "rpn_score": 0.5, "lr": 0.02}).encode() + b"\n" for n in (1, 2, 3)
    )
    inputs = page.ReportInputs(copy, refer_root, tmp_path / "images")
    page.render_page(inputs, "report")  # matplotlib writes its font cache once, outside the watched folder

    def change(rng: random.Random) -> None:
        log.write_bytes(rows)
        if command == "report" and rng.random() < 0.5:
            log.write_bytes(damage(rows, rng, JSON_WORDS))
        elif rng.random() < 0.3:
            meta.write_bytes(damage(json.dumps(tree).encode(), rng, JSON_WORDS))
        else:
            meta.write_text(json.dumps(change_tree(tree, rng)), "utf-8", "surrogatepass")

    def work() -> None:
        if command == "report":
            text = page.render_page(inputs, "report")
            assert "<script" not in text and "\x1b" not in text
        elif command == "audit":
            result = audit_provenance(copy, refer_root)
            assert not result.proven
            json.dumps(result.to_json())
        else:
            json.dumps(describe(copy))

    fuzz(change, work, tmp_path)


def test_resuming_keeps_only_the_log_rows_of_earlier_steps(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"step": n, "loss": 2.5}).encode() + b"\n" for n in range(1, 7))

    def change(rng: random.Random) -> None:
        (tmp_path / METRICS).write_bytes(damage(rows, rng, JSON_WORDS))

    def work() -> None:
        truncate_after(tmp_path / METRICS, 4)
        kept = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
        assert all(row["step"] <= 4 for row in kept)

    (tmp_path / METRICS).write_bytes(rows)
    work()
    assert (tmp_path / METRICS).read_bytes().splitlines() == rows.splitlines()[:4]
    fuzz(change, work, tmp_path)


def header_and_data(data: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length], data[8 + length :]


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage the header, with or without correcting its length, or the tensors."""
    header, rest = header_and_data(data)
    kind = rng.randrange(3)
    if kind == 0:
        return damage(data[:400], rng, HEADER_WORDS) + data[400:]
    if kind == 1:
        header = damage(header, rng, (*JSON_WORDS, *HEADER_WORDS))
        return struct.pack("<Q", len(header)) + header + rest
    return data[: 8 + len(header)] + damage(rest, rng, (b"\xff" * 40, b"\x00\x00\xc0\x7f"))


def test_damaged_weights(run: Path, copy: Path, refer_root: Path, tmp_path: Path) -> None:
    good = (run / checkpoint.MODEL).read_bytes()

    def change(rng: random.Random) -> None:
        (copy / checkpoint.MODEL).write_bytes(damage_safetensors(good, rng))

    def work() -> None:
        with contextlib.suppress(InputError):
            audit_provenance(copy, refer_root)
        loading.load(copy)

    fuzz(change, work, tmp_path)


def test_damaged_states(run: Path, copy: Path) -> None:
    path = next((copy / "state").iterdir())
    good = path.read_bytes()

    def change(rng: random.Random) -> None:
        path.write_bytes(damage_safetensors(good, rng))

    def work() -> None:
        with contextlib.suppress(InputError):
            SavedRun.newest(copy)
        newest(copy)

    fuzz(change, work, copy)


def saved_checkpoint(zipped: bool) -> bytes:
    """A file of torch.save with weights of a ResNet-18 in shapes that are not a ResNet's."""
    buffer = io.BytesIO()
    shapes = resnet_shapes(18)
    weights = {name: value.clone() for name, value in of_one_number({n: s[:1] for n, s in shapes.items()}).items()}
    torch.save(weights, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def change_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Change the pickle in a zip of torch.save, with correct checksums and lengths."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, change(content) if info.filename.endswith("data.pkl") else content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "pickle in a zip", "legacy", "safetensors"])
def test_damaged_foreign_checkpoints(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    good = saved_checkpoint(kind != "legacy")
    if kind == "safetensors":
        tensors = torch.load(io.BytesIO(good), weights_only=True)
        good = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})

    def change(rng: random.Random) -> None:
        if kind == "pickle in a zip":
            data = change_pickle(good, lambda content: damage(content, rng, PICKLE_WORDS))
        elif kind == "zip":
            end = rng.choice((0, len(good) - 3000))
            data = good[:end] + damage(good[end : end + 3000], rng, PICKLE_WORDS) + good[end + 3000 :]
        elif kind == "legacy":
            data = damage(good[:5000], rng, PICKLE_WORDS) + good[5000:]
        else:
            data = damage_safetensors(good, rng)
        path.write_bytes(data)

    # none passes, as the shapes are not a ResNet's
    fuzz(change, lambda: identify_checkpoint(read_foreign(path)), tmp_path, 40, passes=False)
