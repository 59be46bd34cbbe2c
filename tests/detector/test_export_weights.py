"""Export to torchvision and detectron2: the exported weights, what torchvision computes with them, and the notes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from foreign_weights import call, refused
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data.transforms import input_size, network_inputs
from refdet.detector import checkpoint, loading
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights.detectron2_config import detectron2_config
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import read_foreign
from refdet.structures.provenance import Provenance

SMALL = ["model.depth=18", "model.norm=frozen", "input.min_sizes=[160]", "input.max_size=256",
         "proposals.post_nms_top_n_test=50"]  # fmt: skip


def save_run(folder: Path, recipe: Recipe, ids: Sequence[int] = (1, 2, 3)) -> MaskRCNN:
    """Write a run directory of random weights, scaled so that scores differ."""
    torch.manual_seed(0)
    model = MaskRCNN(recipe, len(ids)).eval()
    torch.nn.init.normal_(model.rpn.score.weight, std=0.2)
    torch.nn.init.normal_(model.head.get_submodule("box").score.weight, std=0.1)  # type: ignore[arg-type]
    names = tuple((id_, f"class {id_}") for id_ in ids)
    folder.mkdir()
    checkpoint.save(folder, model, CheckpointMetadata(recipe, names, Provenance.imported("x", "0" * 64), 1))
    return model


def export(run: Path, out: Path, format: str) -> str:
    """Run the command, and return its messages."""
    done = call("export-weights", "--checkpoint", run, "--format", format, "--out", out)
    assert done.exit_code == 0, done.output
    return done.stderr


@pytest.mark.parametrize(
    ("name", "masks"), [("torchvision-fpn-res50", True), ("torchvision-fpn-res50", False), ("fpn-res50", False)]
)
@torch.inference_mode()
def test_torchvision_loads_the_export_and_makes_the_same_proposals(tmp_path: Path, name: str, masks: bool) -> None:
    recipe = recipes.load(name).with_changes([*SMALL, f"model.masks={str(masks).lower()}"])
    ours = save_run(tmp_path / "run", recipe)
    notes = export(tmp_path / "run", tmp_path / "out.pth", "torchvision")
    assert ("pools half a cell off" in notes) == (name == "fpn-res50")
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    kind = TorchvisionMaskRCNN if masks else FasterRCNN
    theirs = kind(backbone, 4, min_size=160, max_size=256, rpn_post_nms_top_n_test=50).eval()
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3)).astype(np.uint8)
    images, _ = theirs.transform([torch.from_numpy(pixels).permute(2, 0, 1) / 255])
    proposals, _ = theirs.rpn(images, theirs.backbone(images.tensors))
    size = input_size(*pixels.shape[:2], recipe.input)
    if (
        name == "fpn-res50"
    ):  # it preprocesses images differently, so both get torchvision's input; its anchors are not rounded
        inputs, shape = images.tensors, images.image_sizes[0]
    else:
        inputs, shape = network_inputs([pixels], [size], recipe.input), (size.height, size.width)
        torch.testing.assert_close(inputs, images.tensors, atol=1e-5, rtol=1e-5)
    (found,) = ours.rpn.filter_proposals(ours.rpn(ours.extract_feature_maps(inputs)), [shape])
    distance = (found[:, None] - proposals[0]).abs().amax(2).amin(1)
    max_distance, min_count = (1.0, 40) if name == "fpn-res50" else (1e-3, 50)
    assert len(found) == 50 and (distance < max_distance).sum() >= min_count


@pytest.mark.parametrize("name", ["d2-fpn-res50", "d2-c4-res50"])
def test_an_export_to_detectron2_is_imported_again(tmp_path: Path, name: str) -> None:
    recipe = recipes.load(name)
    ours = save_run(tmp_path / "run", recipe)
    assert "note" not in export(tmp_path / "run", tmp_path / "out.pth", "detectron2")
    found = identify_checkpoint(read_foreign(tmp_path / "out.pth"))
    assert found.recipe == recipe and found.classes == 3
    # rows of the background, which detectron2 does not have
    background = {"head.box.delta.weight": 4, "head.box.delta.bias": 4, "head.mask.logits.weight": 1,
                  "head.mask.logits.bias": 1}  # fmt: skip
    for key, value in ours.state_dict().items():
        assert torch.equal(found.tensors[key][background.get(key, 0) :], value[background.get(key, 0) :]), key
    written = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert written == detectron2_config(recipe, 3) and written["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 3
    assert written["MODEL"]["ROI_BOX_HEAD"]["POOLER_SAMPLING_RATIO"] == 0 and written["INPUT"]["FORMAT"] == "BGR"


def test_networks_that_the_other_program_lacks_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", recipes.load("c4-res18").with_changes(["model.norm=frozen", "model.width=8"]))
    for format, message in (
        ("torchvision", "torchvision has no network with model.neck=c4, model.width=8, model.pooler_resolution=7"),
        ("detectron2", "detectron2 has no network with model.width=8, model.pooler_resolution=7"),
    ):
        done = call("export-weights", "--checkpoint", tmp_path / "run", "--format", format, "--out", tmp_path / "o.pth")
        refused(done, f"{tmp_path / 'run'}: {message}")
    loading.load(tmp_path / "run")
    (tmp_path / "o.pth").write_bytes(b"x")
    done = call(
        "export-weights", "--checkpoint", tmp_path / "run", "--format", "detectron2", "--out", tmp_path / "o.pth"
    )
    refused(done, "--out", "o.pth exists; choose another")


NARROW = ["model.norm=frozen", "model.width=8", "model.fpn_channels=8", "model.fc_dim=8", "model.rpn_channels=8",
          "model.mask_channels=8"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "format", "message"),
    [
        ("fpn-res50", ["model.stride_in_1x1=true"], "torchvision", "model.width=8, model.stride_in_1x1"),
        ("c4-res18", ["model.pooler_resolution=14"], "detectron2", "model.width=8, model.depth=18 and model.neck=c4"),
    ],
)
def test_networks_with_the_same_tensors_but_other_strides_or_blocks_are_refused(
    tmp_path: Path, name: str, changes: list[str], format: str, message: str
) -> None:
    """torchvision has the strides in 3x3 convolutions, and detectron2's C4 heads always have bottlenecks."""
    save_run(tmp_path / "run", recipes.load(name).with_changes([*NARROW, *changes]))
    done = call("export-weights", "--checkpoint", tmp_path / "run", "--format", format, "--out", tmp_path / "o.pth")
    refused(done, f"{format} has no network with {message}")


@pytest.mark.parametrize("name", ["fpn-res50", "d2-dc5-res50"])
def test_the_detectron2_configuration_has_the_pooler_resolution_in_use(name: str) -> None:
    recipe = recipes.load(name).with_changes(["model.pooler_resolution=14"])  # which applies to C4 networks only
    assert detectron2_config(recipe, 3)["MODEL"]["ROI_BOX_HEAD"]["POOLER_RESOLUTION"] == 7


TINY = ["model.depth=18", "model.norm=frozen", "model.fpn_channels=8", "model.fc_dim=8", "model.rpn_channels=8",
        "model.mask_channels=8"]  # fmt: skip


def notes_of(tmp_path: Path, changes: list[str], format: str, ids: Sequence[int]) -> str:
    save_run(tmp_path / "run", recipes.load("fpn-res50").with_changes([*TINY, *changes]), ids)
    return export(tmp_path / "run", tmp_path / "o.pth", format)


def test_a_note_lists_the_arguments_for_torchvisions_constructor(tmp_path: Path) -> None:
    changes = [
        "model.sampling_ratio=0",
        "model.pooling=align_legacy",
        "input.mean=[118, 118, 118]",
        "input.max_size=900",
        "model.anchor_sizes=[16, 32, 64, 128, 256]",
        "proposals.nms_threshold=0.6",
        "input.size_divisibility=0",
    ]
    notes = notes_of(tmp_path, changes, "torchvision", (1, 2, 4))
    for note in (
        "build torchvision's Mask R-CNN with max_size=900, image_mean=[0.462745, 0.462745, 0.462745], "
        "rpn_post_nms_top_n_test=300, rpn_nms_thresh=0.6, rpn_anchor_generator=AnchorGenerator(((16.0,), (32.0,), "
        "(64.0,), (128.0,), (256.0,)), ((0.5, 1.0, 2.0),) * 5), "
        "box_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], 7, 0), "
        "mask_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], 14, 0)\n",
        "label i of torchvision is category i of refdet inspect, counted from 1, not a category id\n",
        "torchvision pads images to multiples of 32 pixels, this network of 1\n",
    ):
        assert note in notes


def test_a_note_tells_that_detectron2_sorts_categories(tmp_path: Path) -> None:
    assert "detectron2 sorts the categories of a dataset by id" in notes_of(tmp_path, [], "detectron2", (2, 1, 3))
