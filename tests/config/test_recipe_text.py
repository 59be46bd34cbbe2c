"""Recipes printed as YAML: complete, with a comment on each key, and equal to the original when loaded again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from refdet.config import recipe
from refdet.config.recipe import Recipe
from refdet.config.recipe_text import complete_yaml, option_comments, recipe_summaries

SECTIONS = {
    field.name: type(getattr(Recipe(), field.name)) for field in dataclasses.fields(Recipe) if field.name != "name"
}


@pytest.mark.parametrize("name", recipe.names())
def test_a_printed_recipe_is_complete_and_loads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    text = complete_yaml(recipe.load(name), name)
    (tmp_path / "printed.yaml").write_text(text)
    assert recipe.load(str(tmp_path / "printed.yaml")) == recipe.load(name)
    assert all(len(line) <= 120 for line in text.splitlines())
    printed = yaml.safe_load(text)
    for section, kind in SECTIONS.items():
        assert printed[section].keys() == {option.name for option in dataclasses.fields(kind)}


def test_printing_keeps_changes_older_defaults_and_the_first_comment(tmp_path: Path) -> None:
    # the size divisibility is 0 in recipes of before it was a key
    changed = recipe.load("demo").with_changes(
        ["train.ema=0.9998", "train.lr_milestones=[]", "input.size_divisibility=0", "name='a: b #c'", "train.lr=1e-9"]
    )
    (tmp_path / "printed.yaml").write_text(complete_yaml(changed))
    assert recipe.load(str(tmp_path / "printed.yaml")) == changed
    (tmp_path / "mine.yml").write_text("# Mine.\n# For cats.\nbase: demo\n# not this\n")
    path = str(tmp_path / "mine.yml")
    assert complete_yaml(recipe.load(path), path).startswith(
        "# Mine.\n# For cats.\nname: mine\n\n# The network.\nmodel:\n"
    )
    # the former name of reference-c4-res50
    assert complete_yaml(recipe.load("seed-c4-res50"), "seed-c4-res50").startswith(
        "# reference-c4-res101 with a ResNet-50"
    )


def test_every_key_has_a_comment() -> None:
    for section, kind in SECTIONS.items():
        comments = option_comments(kind)
        assert comments.keys() == {option.name for option in dataclasses.fields(kind)}
        assert not [f"{section}.{name}" for name, comment in comments.items() if len(comment) < 5]
    assert option_comments(SECTIONS["model"])["width"].startswith(
        "channels of the backbone's first stage; 64 in the published networks"
    )
    assert option_comments(SECTIONS["model"])["neck"].startswith(
        "c4: conv5 on the RoIs (in a VGG, linear layers); fpn: a feature pyramid, then"
    )


def test_every_shipped_recipe_has_a_summary() -> None:
    summaries = {summary.name: summary for summary in recipe_summaries()}
    assert list(summaries) == recipe.names()
    found = summaries["c4-res101-3x"]
    assert (found.network, found.steps, found.batch_size) == ("ResNet-101 C4", 270000, 16)
    assert found.published.startswith("42.6 box AP, 36.7 mask AP on val2017")
    demo = summaries["demo"]
    assert demo.network == "ResNet-18 FPN" and demo.published == ""
    assert demo.about.startswith("For the synthetic dataset, from scratch")
    assert [summaries[f"reference-{name}"].network for name in ("vgg16", "mobilenet-v1")] == ["VGG-16", "MobileNet v1"]


# settings of detectron2's model zoo (configs/Base-RCNN-*.yaml, config/defaults.py)
@pytest.mark.parametrize(
    ("name", "base", "depth", "neck"),
    [("c4-res101-3x", "d2-c4-res101", 101, "c4"), ("fpn-res50-3x", "d2-fpn-res50", 50, "fpn"),
     ("fpn-res101-3x", "d2-fpn-res101", 101, "fpn")],
)  # fmt: skip
def test_the_recipes_of_the_model_zoo_have_its_settings(name: str, base: str, depth: int, neck: str) -> None:
    found, base_recipe = recipe.load(name), recipe.load(base)
    assert (found.model.depth, found.model.neck, found.model.norm) == (depth, neck, "frozen")
    assert found.model == base_recipe.model and found.input == base_recipe.input
    options = found.train
    assert (options.steps, options.batch_size, options.lr, options.warmup_steps) == (270_000, 16, 0.02, 1000)
    drops = [next(s for s in range(200_000, 270_000) if s >= m * options.steps) for m in options.lr_milestones]
    assert drops == [210_000, 250_000]
    assert found.input.min_sizes == (640, 672, 704, 736, 768, 800) and found.input.max_size == 1333
    assert found.head.batch_size_per_image == 512 and options.max_grad_norm == 0 and options.bf16


def test_large_scale_jitter_is_as_in_the_new_baselines() -> None:
    found = recipe.load("fpn-res50-lsj")
    assert (found.input.crop_size, found.input.scale_range) == (1024, (0.1, 2.0))
    assert (found.model.norm, found.model.rpn_convs, found.model.box_convs, found.model.box_fcs) == ("batch", 2, 4, 1)
    options = found.train
    assert (options.steps, options.batch_size, options.lr) == (4 * 184_375, 64, 0.1)
    # detectron2 gives the warm-up as a fraction of the run: 500 of the steps of 100 epochs, so 2000 of 400 epochs
    assert (options.weight_decay, options.warmup_steps) == (4e-5, 2000)
    drops = [next(s for s in range(600_000, 737_500) if s >= m * options.steps) for m in options.lr_milestones]
    assert drops == [4 * 163_889, 4 * 177_546]
