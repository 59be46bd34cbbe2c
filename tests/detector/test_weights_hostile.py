"""Checkpoints that would become far larger than they are, and those of other programs: refused before torch reads."""

import io
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_weights import call, of_one_number, refused, resnet_shapes
from safetensors.torch import save_file

from refdet.detector.checkpoint import read_tensors
from refdet.detector.weights import import_weights, torch_files
from refdet.detector.weights.import_weights import read_foreign
from refdet.detector.weights.torch_files import read_contents
from refdet.errors import InputError
from refdet.files import weight_files
from refdet.files.weight_programs import describe_checkpoint

TEXT = b"X\x01\x00\x00\x00a"  # 'a'
HEAD = b"\x80\x02"


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("torch read it")

    monkeypatch.setattr(import_weights.torch, "load", read)


def zip_of(path: Path, pickled: bytes, kind: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in {"archive/data.pkl": pickled, "archive/version": b"3\n", **(more or {})}.items():
            file.writestr(name, data)


def resnet(path: Path) -> None:
    torch.save(of_one_number(resnet_shapes(18)), path)


def repacked(path: Path, kind: int = zipfile.ZIP_DEFLATED) -> None:
    resnet(path)
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members.items():
            file.writestr(name, data)


def overlapping(path: Path) -> None:
    """A thousand members that all are the one that is there."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        file.writestr("a/data/0", bytes(100_000))
        for number in range(1, 1000):
            info = zipfile.ZipInfo(f"a/data/{number}")
            info.file_size = info.compress_size = 100_000
            info.header_offset, info.CRC = 0, file.infolist()[0].CRC
            file.filelist.append(info)
            file.NameToInfo[info.filename] = info
        file.writestr("a/data.pkl", HEAD + b"}.")
    path.write_bytes(memory.getvalue())


def two_directories(path: Path) -> None:
    """One reader counts offsets from the start of the file, the other from the start of the zip."""
    resnet(path)
    path.write_bytes(b"PK\x03\x04" + bytes(500) + path.read_bytes())


def commented(path: Path) -> None:
    resnet(path)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x16\x00" + data[-22:])


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        for data in (b"}.", b"}q\x00."):
            file.writestr("a/data.pkl", HEAD + data)


def laughs(levels: int) -> bytes:
    """Tuples of two of the same tuple: a hundred bytes whose hash takes 2 ** levels steps."""
    code = TEXT + b"\x85q\x00"
    for level in range(levels):
        code += b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return code


BOMBS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deflated": (repacked, "a member of the zip is compressed"),
    "deflated bomb": (
        lambda path: zip_of(path, bytes(50_000_000), zipfile.ZIP_DEFLATED), "a member of the zip is compressed",
    ),
    "lzma": (lambda path: repacked(path, zipfile.ZIP_LZMA), "a member of the zip is compressed"),
    "overlapping members": (overlapping, "duplicate or overlapping members"),
    "member twice": (twice, "duplicate or overlapping members"),
    "prefix": (two_directories, "the zip does not end with its directory"),
    "comment": (commented, "the zip's directory is not where it should be"),
    "no pickle": (lambda path: zip_of(path, b"") or repacked_without(path), "no data.pkl in the zip"),
    "laughs": (
        lambda path: zip_of(path, HEAD + b"}" + laughs(60) + b"K\x01s."), "it repeats itself, to more than 10000000",
    ),
    "laughs as a value": (
        lambda path: zip_of(path, HEAD + b"}" + TEXT + laughs(60) + b"s."), "it repeats itself",
    ),
    "bare laughs": (lambda path: path.write_bytes(HEAD + b"}" + laughs(60) + b"K\x01s."), "it repeats itself"),
    "dup laughs": (
        lambda path: path.write_bytes(HEAD + b"}" + TEXT + b"2\x86" * 60 + b"K\x01s."), "it repeats itself",
    ),
    "many instructions": (lambda path: zip_of(path, HEAD + b"]0" * 250_000 + b"}."), "more than 400000 instructions"),
    "many lists": (lambda path: path.write_bytes(HEAD + b"(" + b"]" * 500_000 + b"l."), "more than 400000"),
    "bytearray": (
        lambda path: zip_of(path, HEAD + b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."), "load 'bytearray'",
    ),
    "encode": (
        lambda path: zip_of(path, HEAD + b"c_codecs\nencode\n" + TEXT + TEXT + b"\x86R."), "load '_codecs.encode'",
    ),
    "long text": (lambda path: path.write_bytes(HEAD + b"X\xff\xff\xff\x7fa"), "damaged, or not written by torch.save"),
    "very long bytes": (lambda path: path.write_bytes(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0fa"), "damaged"),
    "long number": (lambda path: path.write_bytes(HEAD + b"\x8b\xff\xff\xff\x7f1"), "damaged"),
    "digits": (lambda path: path.write_bytes(b"L" + b"9" * 100_000 + b"L\n."), "damaged"),
    "dots": (lambda path: path.write_bytes(HEAD + b"." * 9), "damaged, or not written by torch.save"),
}  # fmt: skip


def repacked_without(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", "3\n")


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_torch_reads_it(tmp_path: Path, kind: str) -> None:
    make, says = BOMBS[kind]
    path = tmp_path / "weights.pth"
    make(path)
    started = time.process_time()
    refused(call("import-weights", "--from", path, "--out", tmp_path / "run"), str(path), says)
    assert time.process_time() - started < 15 and not (tmp_path / "run").exists()


def test_a_directory_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resnet(tmp_path / "resnet.pth")
    monkeypatch.setattr(torch_files, "MAX_DIRECTORY_BYTES", 1000)
    with pytest.raises(InputError, match="the zip's directory is not where it should be, or too large"):
        read_contents(tmp_path / "resnet.pth")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_passes(tmp_path: Path, new: bool) -> None:
    given = of_one_number(resnet_shapes(18))
    shared = torch.arange(6.0)
    tree = {"state_dict": {**given, "a": shared, "b": shared[2:], "p": torch.nn.Parameter(shared)}}
    torch.save(tree, tmp_path / "weights.pth", _use_new_zipfile_serialization=new)
    contents = read_contents(tmp_path / "weights.pth")
    assert contents.unsafe_global is None and {"state_dict", "conv1.weight"} <= set(contents.strings)
    found = read_foreign(tmp_path / "weights.pth")
    assert all(torch.equal(found[name], value) for name, value in tree["state_dict"].items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"conv1.weight": torch.ones(1).expand(10**5, 10**5)}, "10000000000 numbers in a file of"),
        ({f"a{i}": torch.ones(1).expand(2**20) for i in range(200)}, "its tensors are views"),
        ({"a": torch.ones(4).as_strided((2**14, 2**14), (0, 0))}, "save contiguous copies"),
        ({"a": torch.ones(2, dtype=torch.float8_e4m3fn)}, "'a' is not a named tensor of real numbers"),
        ({"a": torch.ones(2, dtype=torch.bool)}, "'a' is not a named tensor of real numbers"),
        ({"a": torch.ones(2, 2).to_sparse_csr()}, "'a' is not a named tensor"),
        ({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "'a' is not a named tensor"),
        ({("x" * 9999, 1): torch.ones(2)}, "..."),
        ({"x" * 99999: torch.ones(2)}, "unknown network"),
        ({f"{i}": torch.ones(1) for i in range(400)}, "400 tensors, more than the 300"),
    ],
    ids=["expanded", "many expanded", "strides", "float8", "bool", "csr", "nested", "key", "name", "many"],
)
def test_tensors_that_are_none_of_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict, says: str
) -> None:
    monkeypatch.setattr(import_weights, "MAX_TENSORS", 300)
    path = tmp_path / "weights.pth"
    torch.save(tensors, path)
    done = call("import-weights", "--from", path, "--out", tmp_path / "run")
    refused(done, str(path), says)
    assert len(done.stderr) < 1000


def numels(path: Path, claimed: int, new: bool) -> None:
    """A storage of 4 numbers that says it has more."""
    torch.save({"conv1.weight": torch.ones(4)}, path, _use_new_zipfile_serialization=new)
    wrong = b"J" + struct.pack("<i", claimed)
    if not new:
        data = path.read_bytes()
        path.write_bytes(data.replace(b"K\x04", wrong))
        return
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data.replace(b"K\x04", wrong) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("claimed", [5, 2**28, 2**31 - 1, -1])
def test_a_storage_that_claims_more_than_there_is(tmp_path: Path, claimed: int, new: bool) -> None:
    numels(tmp_path / "weights.pth", claimed, new)
    with pytest.raises(InputError, match=r"weights\.pth: damaged, or not written by torch\.save"):
        read_foreign(tmp_path / "weights.pth")


class Scripted(torch.nn.Module):
    """Something to be compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_called_one(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: a TorchScript archive, which cannot be read without running"):
        read_foreign(tmp_path / "model.pt")


def test_safetensors_headers_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"

    def header(text: bytes, length: int | None = None, data: bytes = bytes(8)) -> str:
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        with pytest.raises(InputError) as caught:
            read_tensors(path)
        assert len(str(caught.value)) < 600
        return str(caught.value)

    assert "header is larger than" in header(b"{}", 2**63)
    assert "truncated" in header(b"{}", 2**20)
    assert "nested too deeply" in header(b'{"a":' * 99_999)
    assert "duplicate key 'a'" in header(b'{"a":1,"a":2}')
    assert "malformed JSON" in header(b"{{")
    one = '{{"a":{{"dtype":"{}","shape":{},"data_offsets":{}}}}}'
    for dtype, shape, at in (("F32", "[4]", "[0,8]"), ("F32", "[2]", "[0,999999]"), ("F32", "[-1]", "[0,8]"),
                                ("X9", "[2]", "[0,8]"), ("F32", "[99999999999,99999999999]", "[0,8]"),
                                ("F32", "[1]", "[4,8]")):  # fmt: skip
        assert "not a readable safetensors file" in header(one.format(dtype, shape, at).encode())
    overlap = (
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    assert "not a readable safetensors file" in header(overlap.encode())
    save_file({f"{i}": torch.ones(1) for i in range(30)}, path)
    monkeypatch.setattr(weight_files, "MAX_TENSORS", 20)
    with pytest.raises(InputError, match="30 tensors, more than the limit of 20"):
        read_tensors(path)


PROGRAMS: dict[str, tuple[str, ...]] = {
    "a torchvision FCOS": (
        "backbone.body.conv1.weight", "head.classification_head.cls_logits.weight",
        "head.regression_head.bbox_ctrness.weight",
    ),
    "a torchvision SSD": ("backbone.features.0.weight", "head.classification_head.module_list.0.weight"),
    "a detectron2 semantic segmentation network": ("backbone.bottom_up.stem.conv1.weight", "sem_seg_head.p2.0.weight"),
    "a detectron2 region proposal network": ("backbone.res2.0.conv1.weight", "proposal_generator.rpn_head.conv.weight"),
    "a torchvision RetinaNet": ("backbone.body.conv1.weight", "head.classification_head.cls_logits.weight"),
    "a detectron2 RetinaNet": ("backbone.bottom_up.stem.conv1.weight", "head.cls_score.weight"),
    "a Caffe2 Detectron network": ("conv1_w", "res2_0_branch2a_w", "conv_rpn_w"),
    "an MMDetection Mask R-CNN": (
        "backbone.conv1.weight", "rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc_cls.weight",
        "roi_head.mask_head.conv_logits.weight",
    ),
    "an MMDetection Faster R-CNN": ("backbone.conv1.weight", "roi_head.bbox_head.fc_cls.weight"),
    "an MMDetection detector": ("backbone.conv1.weight", "neck.lateral_convs.0.conv.weight", "bbox_head.cls.weight"),
    "a maskrcnn-benchmark detector": ("module.backbone.body.stem.conv1.weight", "module.rpn.head.conv.weight"),
    "jwyang's faster-rcnn.pytorch": ("RCNN_base.0.weight", "RCNN_rpn.RPN_Conv.weight"),
    "a DETR": ("transformer.encoder.layers.0.linear1.weight", "class_embed.weight", "bbox_embed.layers.0.weight"),
    "a Hugging Face DETR": ("model.backbone.conv_encoder.model.conv1.weight", "class_labels_classifier.weight"),
    "an MDETR model": ("transformer.text_encoder.embeddings.weight", "bbox_embed.layers.0.weight"),
    "a Segment Anything model": ("image_encoder.patch_embed.proj.weight", "mask_decoder.iou_token.weight"),
    "a CLIP model": ("visual.conv1.weight", "transformer.resblocks.0.ln_1.weight", "token_embedding.weight"),
    "a Hugging Face ResNet": ("resnet.embedder.embedder.convolution.weight",),
    "a vision transformer": ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    "a YOLO network": ("model.0.conv.weight", "model.22.cv2.0.0.conv.weight"),
    "a VGG network": ("features.0.weight", "classifier.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_programs_are_named(tmp_path: Path, program: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    tensors = {name: torch.ones(2) for name in PROGRAMS[program]}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"model": tensors, "epoch": 3}, path)
    done = call("import-weights", "--from", path, "--out", tmp_path / "run")
    refused(done, f"{path}: {program}, which cannot be imported yet; the detectors of lichengunc/mask-faster-rcnn and")


class Stranger:
    """Pickled as an object of a class of another program."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    ("module", "program"),
    [("ultralytics.nn.tasks", "an Ultralytics YOLO model"), ("models.yolo", "a YOLOv5 or YOLOv7 model"),
     ("mmengine.logging", "an MMDetection checkpoint"), ("transformers.modeling", "a whole Hugging Face model")],
)  # fmt: skip
def test_programs_are_named_by_their_classes(tmp_path: Path, module: str, program: str) -> None:
    code = HEAD + b"}" + TEXT + b"c" + module.encode() + b"\nModel\n)\x81s."
    zip_of(tmp_path / "best.pt", code)
    with pytest.raises(InputError, match=f"best.pt: {program}, which cannot be imported yet"):
        read_foreign(tmp_path / "best.pt")


def test_a_pickle_of_arrays_is_named_by_what_it_holds(tmp_path: Path) -> None:
    import numpy as np

    names = PROGRAMS["a detectron2 RetinaNet"]
    tree = {"model": {name: np.ones(3) for name in names}, "__author__": "Detectron2 Model Zoo"}
    for protocol in (2, 4):
        (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(tree, protocol))
        with pytest.raises(InputError, match=r"model_final\.pkl: a detectron2 RetinaNet, which cannot be imported"):
            read_foreign(tmp_path / "model_final.pkl")


def test_networks_that_are_imported_are_no_other_program() -> None:
    from foreign_weights import seed_weights

    for names in (resnet_shapes(18), resnet_shapes(50), seed_weights(50), seed_weights(101, masks=False)):
        assert describe_checkpoint(names) is None
