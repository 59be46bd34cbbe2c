"""Files that are hostile, damaged, or of another network are refused with a message that names the problem."""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_weights import Tensors, call, of_one_number, refused, resnet_shapes, seed_weights
from torch import Tensor, nn

from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import read_foreign
from refdet.errors import InputError


def opcodes(code: str, attack: str) -> bytes:
    """A pickle that runs a shell command when it is loaded, by one of the ways to do so."""
    text = b"X" + struct.pack("<I", len(code)) + code.encode()
    short = b"\x8c" + bytes([len(code)]) + code.encode()
    return {
        "reduce": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "reduce in C": b"\x80\x02cposix\nsystem\n" + text + b"\x85R.",
        "in a dict": b"\x80\x02}X\x0c\x00\x00\x00conv1.weightcos\nsystem\n" + text + b"\x85Rs.",
        "called later": b"\x80\x02cos\nsystem\nq\x00h\x00" + text + b"\x85R.",
        "eval": b"\x80\x02c__builtin__\neval\nX\x05\x00\x00\x001 + 1\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\npath\nX\x04\x00\x00\x00join\x86R.",
        "new object": b"\x80\x02csubprocess\nPopen\n](X\x02\x00\x00\x00shX\x02\x00\x00\x00-c" + text + b"e\x85\x81.",
        "build": b"\x80\x02csubprocess\nPopen\n}b.",
        "torch itself": b"\x80\x02ctorch.serialization\nload\n" + text + b"\x85R.",
        "inst": b"(S'" + code.encode() + b"'\nios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\n" + text + b"o.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + short + b"\x85R.",
        "extension": b"\x80\x02\x82\x01" + text + b"\x85R.",
    }[attack]


NAMED = {"reduce": "system'", "reduce in C": "'posix.system'", "in a dict": "system'", "called later": "system'",
         "eval": "'eval'", "getattr": "'getattr'", "new object": "'subprocess.Popen'", "build": "'subprocess.Popen'",
         "torch itself": "'torch.serialization.load'", "obj": "system'"}  # fmt: skip
UNNAMED = ("inst", "stack global", "extension")  # opcodes that torch's reader does not even know


def write_pickle(path: Path, code: bytes) -> None:
    path.write_bytes(code)


def write_legacy(path: Path, code: bytes) -> None:
    heads = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    path.write_bytes(b"".join(pickle.dumps(head, protocol=2) for head in heads) + code + pickle.dumps([], protocol=2))


def write_zip(path: Path, code: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/version", "3\n")


@pytest.mark.parametrize("container", [write_pickle, write_legacy, write_zip])
@pytest.mark.parametrize("attack", [*NAMED, *UNNAMED])
def test_code_in_a_file_is_not_run(
    tmp_path: Path, container: Callable[[Path, bytes], None], attack: str, recwarn: pytest.WarningsRecorder
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    container(path, opcodes(f"touch {canary}", attack))
    with pytest.raises(InputError) as refusal:
        read_foreign(path)
    assert not canary.exists() and not recwarn.list
    text = str(refusal.value)
    assert text.startswith(str(path)) and "weights_only" not in text
    if attack in NAMED:
        assert "refused to load " in text and NAMED[attack] in text


def test_plain_pickle_would_run_the_code(tmp_path: Path) -> None:
    for attack in ("reduce", "inst", "stack global"):
        pickle.loads(opcodes(f"touch '{tmp_path / attack}'".replace("'", '"'), attack))
        assert (tmp_path / attack).exists()


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())


def torch_saved(tree: object) -> Callable[[Path], object]:
    return lambda path: torch.save(tree, path)


ONES = torch.ones(2, 2)
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "a folder; give a file in it"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file, damaged or not weights; give a file of torch.save"),
    "text": (
        lambda path: path.write_text("resnet.conv1.weight 1 2 3\n"),
        "a text file, damaged or not weights; give a file of torch.save",
    ),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "not written by torch.save"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").close(), "not written by torch.save"),
    "tar": (tar, "a tar archive of PyTorch before 0.2, which cannot be read without running"),
    "module": (torch_saved(nn.Linear(2, 2)), "refused to load 'torch.nn.modules.linear.Linear', which is not a tensor"),
    "tensor": (torch_saved(ONES), "holds a Tensor instead of named tensors"),
    "list": (torch_saved([ONES]), "holds a list instead of named tensors"),
    "nothing": (torch_saved({}), "empty; save"),
    "numbers": (torch_saved({"epoch": 3, "conv1.weight": ONES}), "'epoch' is not a named tensor"),
    "no names": (torch_saved({0: ONES}), "0 is not a named tensor"),
    "sparse": (torch_saved({"conv1.weight": ONES.to_sparse()}), "'conv1.weight' is not a named tensor of real numbers"),
    "complex": (torch_saved({"conv1.weight": ONES * 1j}), "'conv1.weight' is not a named tensor of real numbers"),
    "meta": (torch_saved({"conv1.weight": ONES.to("meta")}), "'conv1.weight' is not a named tensor of real numbers"),
    "colors": (torch_saved({"\x1b[31m": ONES}), r"'\x1b[31m' is not a named tensor"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_error_names_the_problem_of_an_unreadable_file(tmp_path: Path, kind: str) -> None:
    make, message = UNREADABLE[kind]
    path, out = tmp_path / "weights.pth", tmp_path / "run"
    make(path)
    refused(call("import-weights", "--from", path, "--out", out), str(path), message)
    assert not out.exists()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_truncated_files_are_refused(tmp_path: Path, new: bool) -> None:
    memory = io.BytesIO()
    torch.save(of_one_number(resnet_shapes(18)), memory, _use_new_zipfile_serialization=new)
    data, path = memory.getvalue(), tmp_path / "weights.pth"
    for length in {*range(0, len(data), len(data) // 40), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"weights\.pth: damaged|weights\.pth: not written by torch\.save"):
            read_foreign(path)
    path.write_bytes(data)
    assert len(read_foreign(path)) == 102


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda given: {name: value for name, value in given.items() if name not in names}


def with_(name: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda given: {**given, name: value}


def no_block(given: Tensors) -> Tensors:
    return {name: value for name, value in given.items() if not name.startswith("resnet.layer3.5.")}


NAN = torch.tensor(float("nan"))
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "missing": (
        without("rpn_net.bias", "resnet.bn1.weight"),
        ("looks like the weights of reference-c4-res50, but missing: resnet.bn1.weight, rpn_net.bias",),
    ),
    "unexpected": (with_("rpn_extra.bias", torch.ones(1)), ("unexpected: rpn_extra.bias",)),
    "half a mask branch": (without("mask_up_sampling.weight"), ("missing: mask_up_sampling.weight",)),
    "misshapen": (
        with_("rpn_net.weight", torch.ones(512, 1024)), ("rpn_net.weight is (512, 1024), not (512, 1024, 3, 3)",),
    ),
    "no axis": (with_("cls_score_net.weight", torch.ones(())), ("cls_score_net.weight is ()",)),
    "odd scores": (with_("rpn_cls_score_net.bias", torch.ones(23)), ("rpn_cls_score_net.bias is (23,), not (24,)",)),
    "6 anchors": (
        with_("rpn_cls_score_net.weight", torch.ones(12, 512, 1, 1)), ("6 anchors per cell with a ResNet-50", "12 "),
    ),
    "15 anchors of res50": (with_("rpn_cls_score_net.weight", torch.ones(30, 512, 1, 1)), ("15 anchors per cell",)),
    "no anchors": (with_("rpn_cls_score_net.weight", torch.ones(())), ("0 anchors per cell",)),
    "NaN": (with_("resnet.layer4.0.bn1.bias", NAN.expand(512)), ("resnet.layer4.0.bn1.bias contains NaN, inf",)),
    "too large": (
        with_("resnet.layer4.0.bn1.bias", torch.full((512,), 1e300, dtype=torch.float64)), ("bias contains NaN, inf",)
    ),
    "quantized": (
        with_("rpn_net.weight", torch.ones(512, 1024, 3, 3, dtype=torch.int8)), ("rpn_net.weight holds int8, not",)
    ),
    "complex": (with_("rpn_net.bias", torch.ones(512, dtype=torch.complex64)), ("rpn_net.bias holds complex64, not",)),
    "huge": (
        with_("rpn_net.bias", torch.ones((), dtype=torch.float64).expand(10**7, 10**7)), ("rpn_net.bias is (10000",)
    ),
    "many misshapen": (
        lambda weights: weights | {f"resnet.layer3.{i}.conv1.weight": torch.ones(1) for i in range(6)},
        ("resnet.layer3.0.conv1.weight is (1,), not (256, 512, 1, 1)", "not (256, 1024, 1, 1) and 1 more"),
    ),
    "damaged block": (without("resnet.layer1.0.conv3.weight"), ("missing: resnet.layer1.0.conv3.weight",)),
    "no block": (no_block, ("unknown network", "blocks per stage: 3, 4, 5, 3")),
    "another network": (
        lambda _: {"features.0.weight": torch.ones(1), "classifier.bias": torch.ones(1)},
        ("unknown network", "missing: conv1.weight", "unexpected: classifier.bias, features.0.weight"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def seed50() -> Tensors:
    return seed_weights(50)


@pytest.mark.parametrize("kind", WRONG)
def test_an_error_names_the_problem_of_a_network(seed50: Tensors, kind: str) -> None:
    change, message = WRONG[kind]
    with pytest.raises(InputError) as refusal:
        identify_checkpoint(change(seed50))
    assert all(text in str(refusal.value) for text in message), str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("conv1.weight", torch.ones(())), ("bn1.running_var", torch.ones(63)), ("bn1.running_var", NAN.expand(64))],
)
def test_damaged_tensors_that_tell_the_format_are_refused(name: str, value: Tensor) -> None:
    with pytest.raises(InputError, match=rf"looks like the weights of .*-res50, but {name} (is|contains) "):
        identify_checkpoint({**of_one_number(resnet_shapes(50)), name: value})


def test_a_weight_format_without_a_recipe_is_refused(seed50: Tensors) -> None:
    with pytest.raises(InputError, match="`weight_format` caffe: this is a detector"):
        identify_checkpoint(seed50, "caffe")
    with pytest.raises(InputError, match="an ImageNet ResNet-(18|34) in Caffe style, for which there is no recipe; if"):
        identify_checkpoint(of_one_number(resnet_shapes(18)), "caffe")
