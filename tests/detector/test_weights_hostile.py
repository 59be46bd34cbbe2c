"""Malicious checkpoints, rejected before torch reads them; and checkpoints of other programs, named in the error."""

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
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

PUSH_A = b"X\x01\x00\x00\x00a"  # pickle code that pushes "a"
HEAD = b"\x80\x02"  # start of a pickle of protocol 2


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.load fail the test."""

    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("torch read it")

    monkeypatch.setattr(import_weights.torch, "load", read)


def write_zip(path: Path, pickled: bytes, kind: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in {"archive/data.pkl": pickled, "archive/version": b"3\n", **(more or {})}.items():
            file.writestr(name, data)


def save_resnet(path: Path) -> None:
    torch.save(of_one_number(resnet_shapes(18)), path)


def save_recompressed(path: Path, kind: int = zipfile.ZIP_DEFLATED) -> None:
    save_resnet(path)
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members.items():
            file.writestr(name, data)


def write_overlapping(path: Path) -> None:
    """Write a zip whose directory lists one member a thousand times under different names."""
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


def write_prefixed(path: Path) -> None:
    """Write bytes before a zip: some readers count offsets from the start of the file, others from that of the zip."""
    save_resnet(path)
    path.write_bytes(b"PK\x03\x04" + bytes(500) + path.read_bytes())


def write_commented(path: Path) -> None:
    save_resnet(path)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x16\x00" + data[-22:])


def write_duplicates(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        for data in (b"}.", b"}q\x00."):
            file.writestr("a/data.pkl", HEAD + data)


def nested_pairs(levels: int) -> bytes:
    """Pickle code of nested tuples, each of twice the next one: a hundred bytes whose hash takes 2 ** levels steps."""
    code = PUSH_A + b"\x85q\x00"
    for level in range(levels):
        code += b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return code


MALICIOUS_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deflated": (save_recompressed, "a member of the zip is compressed"),
    "deflated bomb": (
        lambda path: write_zip(path, bytes(50_000_000), zipfile.ZIP_DEFLATED),
        "a member of the zip is compressed",
    ),
    "lzma": (lambda path: save_recompressed(path, zipfile.ZIP_LZMA), "a member of the zip is compressed"),
    "overlapping members": (write_overlapping, "duplicate or overlapping members"),
    "member twice": (write_duplicates, "duplicate or overlapping members"),
    "prefix": (write_prefixed, "the zip does not end with its directory"),
    "comment": (write_commented, "the zip's directory is not where it should be"),
    "no pickle": (lambda path: write_zip(path, b"") or write_zip_without_pickle(path), "no data.pkl in the zip"),
    "nested pairs as a key": (
        lambda path: write_zip(path, HEAD + b"}" + nested_pairs(60) + b"K\x01s."),
        "it repeats itself, to more than 10000000",
    ),
    "nested pairs as a value": (
        lambda path: write_zip(path, HEAD + b"}" + PUSH_A + nested_pairs(60) + b"s."),
        "it repeats itself",
    ),
    "nested pairs without a zip": (
        lambda path: path.write_bytes(HEAD + b"}" + nested_pairs(60) + b"K\x01s."),
        "it repeats itself",
    ),
    "nested pairs by DUP": (
        lambda path: path.write_bytes(HEAD + b"}" + PUSH_A + b"2\x86" * 60 + b"K\x01s."),
        "it repeats itself",
    ),
    "many instructions": (
        lambda path: write_zip(path, HEAD + b"]0" * 250_000 + b"}."),
        "more than 400000 instructions",
    ),
    "many lists": (lambda path: path.write_bytes(HEAD + b"(" + b"]" * 500_000 + b"l."), "more than 400000"),
    "bytearray": (
        lambda path: write_zip(path, HEAD + b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."),
        "load 'bytearray'",
    ),
    "encode": (
        lambda path: write_zip(path, HEAD + b"c_codecs\nencode\n" + PUSH_A + PUSH_A + b"\x86R."),
        "load '_codecs.encode'",
    ),
    "long text": (lambda path: path.write_bytes(HEAD + b"X\xff\xff\xff\x7fa"), "damaged, or not written by torch.save"),
    "very long bytes": (lambda path: path.write_bytes(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0fa"), "damaged"),
    "long number": (lambda path: path.write_bytes(HEAD + b"\x8b\xff\xff\xff\x7f1"), "damaged"),
    "digits": (lambda path: path.write_bytes(b"L" + b"9" * 100_000 + b"L\n."), "damaged"),
    "dots": (lambda path: path.write_bytes(HEAD + b"." * 9), "damaged, or not written by torch.save"),
}


def write_zip_without_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", "3\n")


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("kind", MALICIOUS_FILES)
def test_a_malicious_file_is_rejected_before_torch_reads_it(tmp_path: Path, kind: str) -> None:
    make, message = MALICIOUS_FILES[kind]
    path = tmp_path / "weights.pth"
    make(path)
    started = time.process_time()
    refused(call("import-weights", "--from", path, "--out", tmp_path / "run"), str(path), message)
    assert time.process_time() - started < 15 and not (tmp_path / "run").exists()


def test_the_size_of_a_zips_directory_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_resnet(tmp_path / "resnet.pth")
    monkeypatch.setattr(torch_files, "MAX_DIRECTORY_BYTES", 1000)
    with pytest.raises(InputError, match="the zip's directory is not where it should be, or too large"):
        read_contents(tmp_path / "resnet.pth")


def with_zip64_records(data: bytes, wrong_by: int) -> bytes:
    """Move the size and offset of a zip's directory to a zip64 record, and its offset `wrong_by` bytes beyond it."""
    *_, size, offset, _ = struct.unpack("<4s4H2IH", data[-22:])
    end = len(data) - 22
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 0, 0, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end + wrong_by, 1)
    last = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:end] + record + locator + last


def test_zip64_records_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    save_recompressed(path, zipfile.ZIP_STORED)  # by zipfile, which writes no zip64 records
    data = path.read_bytes()
    path.write_bytes(with_zip64_records(data, wrong_by=0))
    assert "conv1.weight" in read_contents(path).strings
    for wrong_by in (1, 2**40, 2**63):
        path.write_bytes(with_zip64_records(data, wrong_by))
        with pytest.raises(InputError, match="the zip does not end with its directory"):
            read_contents(path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_files_of_torch_save_are_accepted(tmp_path: Path, new: bool) -> None:
    given = of_one_number(resnet_shapes(18))
    shared = torch.arange(6.0)
    tree = {"state_dict": {**given, "a": shared, "b": shared[2:], "p": torch.nn.Parameter(shared)}}
    torch.save(tree, tmp_path / "weights.pth", _use_new_zipfile_serialization=new)
    contents = read_contents(tmp_path / "weights.pth")
    assert contents.unsafe_global is None and {"state_dict", "conv1.weight"} <= set(contents.strings)
    found = read_foreign(tmp_path / "weights.pth")
    assert all(torch.equal(found[name], value) for name, value in tree["state_dict"].items())


def test_a_global_whose_name_comes_from_the_stack_is_unsafe(tmp_path: Path) -> None:
    """Even if its name seems to be one that torch.load checks, as the name may be another one from the memo."""
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(OrderedDict(a=1), protocol=4))
    contents = read_contents(tmp_path / "weights.pkl")
    assert [(used.name, used.guessed) for used in contents.globals] == [("collections.OrderedDict", True)]
    assert contents.unsafe_global == "collections.OrderedDict"
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(OrderedDict(a=1), protocol=2))
    assert read_contents(tmp_path / "weights.pkl").unsafe_global is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tensors", "message"),
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
def test_tensors_that_cannot_be_weights_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict, message: str
) -> None:
    monkeypatch.setattr(import_weights, "MAX_TENSORS", 300)
    path = tmp_path / "weights.pth"
    torch.save(tensors, path)
    done = call("import-weights", "--from", path, "--out", tmp_path / "run")
    refused(done, str(path), message)
    assert len(done.stderr) < 1000


def save_with_false_size(path: Path, claimed: int, new: bool) -> None:
    """Save a tensor of 4 numbers whose storage claims to have `claimed`."""
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
def test_a_storage_with_a_false_size_is_rejected(tmp_path: Path, claimed: int, new: bool) -> None:
    save_with_false_size(tmp_path / "weights.pth", claimed, new)
    with pytest.raises(InputError, match=r"weights\.pth: damaged, or not written by torch\.save"):
        read_foreign(tmp_path / "weights.pth")


class Scripted(torch.nn.Module):
    """A module to compile."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_named_in_the_error(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: a TorchScript archive, which cannot be read without running"):
        read_foreign(tmp_path / "model.pt")


def test_damaged_or_excessive_safetensors_headers_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    save_file({f"{i}": torch.ones(1) for i in range(20)}, path, {"format": "pt"})
    assert len(read_tensors(path)[0]) == 20


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
def test_checkpoints_of_other_programs_are_named_by_their_tensors(tmp_path: Path, program: str, suffix: str) -> None:
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
def test_checkpoints_of_other_programs_are_named_by_their_classes(tmp_path: Path, module: str, program: str) -> None:
    code = HEAD + b"}" + PUSH_A + b"c" + module.encode() + b"\nModel\n)\x81s."
    write_zip(tmp_path / "best.pt", code)
    with pytest.raises(InputError, match=f"best.pt: {program}, which cannot be imported yet"):
        read_foreign(tmp_path / "best.pt")


def test_a_pickle_of_arrays_is_named_by_its_tensors(tmp_path: Path) -> None:
    import numpy as np

    names = PROGRAMS["a detectron2 RetinaNet"]
    tree = {"model": {name: np.ones(3) for name in names}, "__author__": "Detectron2 Model Zoo"}
    for protocol in (2, 4):
        (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(tree, protocol))
        with pytest.raises(InputError, match=r"model_final\.pkl: a detectron2 RetinaNet, which cannot be imported"):
            read_foreign(tmp_path / "model_final.pkl")


def test_importable_networks_are_not_taken_for_other_programs() -> None:
    from foreign_weights import seed_weights

    for names in (resnet_shapes(18), resnet_shapes(50), seed_weights(50), seed_weights(101, masks=False)):
        assert describe_checkpoint(names) is None
