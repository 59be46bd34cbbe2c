"""Files in the format of Python 2.7 and PyTorch 0.2, in which the reference's checkpoints were published."""

import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from foreign_weights import Tensors, call, refused, seed_weights
from torch import Tensor

from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.detector import loading
from refdet.detector.weights.import_weights import read_foreign
from refdet.structures.provenance import file_sha256


class Storage:
    """Numbers, as `Python2` writes them."""

    def __init__(self, numbers: Tensor, kind: type, location: str) -> None:
        self.numbers, self.kind, self.location, self.key = numbers, kind, location, str(id(self))


class OldTensor:
    """A view of a storage, as PyTorch 0.2 pickled one."""

    def __init__(self, storage: Storage, like: Tensor) -> None:
        self.parts = (storage, like.storage_offset(), tuple(like.shape), like.stride())

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor, self.parts


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Protocol 2 from a Python whose text is bytes."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, text: str) -> None:
        data = text.encode("ascii")
        self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        self.memoize(text)

    def save_dict_in_order(self, tree: OrderedDict) -> None:
        self.save_reduce(OrderedDict, ([[key, value] for key, value in tree.items()],), obj=tree)

    dispatch[str] = save_text
    dispatch[OrderedDict] = save_dict_in_order

    def persistent_id(self, value: object) -> object:
        if isinstance(value, Storage):
            return ("storage", value.kind, value.key, value.location, value.numbers.numel(), None)
        return None


def write_old_file(path: Path, tree: object, storages: list[Storage]) -> None:
    """The layout before PyTorch 1.6: four pickles, the keys of the storages, their numbers."""
    sizes = {"short": 2, "int": 4, "long": 8}
    heads = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION,
             {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes})  # fmt: skip
    with path.open("wb") as file:
        for part in (*heads, tree, [storage.key for storage in storages]):
            Python2(file, protocol=2).dump(part)
        for storage in storages:
            file.write(struct.pack("<q", storage.numbers.numel()) + storage.numbers.numpy().tobytes())


def write_old_checkpoint(path: Path, tensors: Tensors, kind: type, location: str) -> None:
    storages = {}
    for value in tensors.values():
        pointer = value.untyped_storage().data_ptr()
        if pointer not in storages:
            flat = torch.tensor([], dtype=value.dtype).set_(value.untyped_storage())
            storages[pointer] = Storage(flat, kind, location)
    tree = OrderedDict((k, OldTensor(storages[v.untyped_storage().data_ptr()], v)) for k, v in tensors.items())
    write_old_file(path, tree, list(storages.values()))


@pytest.mark.parametrize(
    ("kind", "location"), [(torch.FloatStorage, "cpu"), (torch.cuda.FloatStorage, "cuda:0")], ids=["cpu", "cuda"]
)
def test_files_of_python_2_and_pytorch_0_2_are_read(tmp_path: Path, kind: type, location: str) -> None:
    whole = torch.arange(24.0) * 0.3
    tensors = {"plain": whole.reshape(2, 3, 4), "turned": whole.reshape(2, 3, 4).permute(2, 0, 1), "part": whole[5:9],
               "wide": torch.tensor(0.7).expand(2, 3), "alone": torch.randn(3, 1, 2, 2), "none": torch.zeros(1)[:0],
               "resnet.layer1.0." + "x" * 200: torch.ones(1)}  # fmt: skip
    write_old_checkpoint(tmp_path / "old.pth", tensors, kind, location)
    data = (tmp_path / "old.pth").read_bytes()
    assert (
        b"U\x05plain" in data and b"ctorch._utils\n_rebuild_tensor\n" in data and b"ccollections\nOrderedDict" in data
    )
    assert (b"ctorch.cuda\nFloatStorage" in data) == (location != "cpu")
    found = read_foreign(tmp_path / "old.pth")
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert torch.equal(found[name], value) and found[name].stride() == value.stride(), name
        assert found[name].device.type == "cpu"


def test_a_published_checkpoint_is_imported_to_a_run_directory(instances: Path, tmp_path: Path) -> None:
    """It has as many classes as the file that --trained-on names."""
    index = CocoIndex.load(instances)
    given = seed_weights(50, classes=len(index.categories))
    source, out = tmp_path / "res50_mask_rcnn_iter_1250000.pth", tmp_path / "run"
    write_old_checkpoint(source, given, torch.cuda.FloatStorage, "cuda:0")
    unnamed = call("import-weights", "--from", source, "--out", out)
    refused(
        unnamed,
        str(source),
        f"{len(index.categories)} classes instead of COCO's 80; give --trained-on to name them",
    )
    assert not out.exists()
    done = call("import-weights", "--from", source, "--out", out, "--trained-on", instances)
    assert done.exit_code == 0, done.output
    assert "is the reference's Mask R-CNN with a ResNet-50, 12 anchors per cell" in done.stderr
    assert done.stdout.split("\n")[1].split()[:2] == ["reference-c4-res50", str(len(index.categories))]
    loaded = loading.load(out)
    assert loaded.meta.categories == tuple(index.categories.items())
    assert loaded.meta.untrained == () and loaded.meta.step == 0 and not loaded.meta.warnings()
    state = loaded.model.state_dict()
    assert torch.equal(state["head.conv5.2.conv2.weight"], given["resnet.layer4.2.conv2.weight"])
    assert torch.equal(state["head.mask.logits.weight"], given["mask_pred_net.weight"])
    known = provenance_of_instances(index)
    assert loaded.meta.provenance.image_ids_sha256 == known.image_ids_sha256
    assert (loaded.meta.provenance.images, loaded.meta.provenance.source) == (len(index.images), instances.name)
    weights = loaded.meta.provenance.weights
    assert weights is not None
    assert weights.startswith(f"{source.name} (sha256 {file_sha256(source)}), imported") and "word" in weights
