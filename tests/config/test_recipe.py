"""Loading, changing and validating recipes, and the values of the shipped ones."""

from pathlib import Path

import pytest
import yaml

from refdet.config import recipe
from refdet.errors import InputError
from refdet.training.optim import learning_rate


def test_every_shipped_recipe_loads_and_has_its_name() -> None:
    assert {"demo", "c4-res50", "c4-res101", "fpn-res50"} <= set(recipe.names())
    for name in recipe.names():
        assert recipe.load(name).name == name


def test_yaml_and_json_forms_round_trip(tmp_path: Path) -> None:
    before = recipe.load("demo").with_changes(["train.lr=0.125", "input.min_sizes=[100, 120]"])
    assert recipe.from_dict(before.to_dict()) == before
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(before.to_dict()))
    assert recipe.load(str(file)) == before


def test_a_yaml_file_without_a_name_is_named_after_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text("train: {steps: 7}\n")
    assert recipe.load(str(file)).name == "mine"
    assert recipe.load(str(file)).train.steps == 7


def test_changed_values_are_parsed_as_yaml() -> None:
    changed = recipe.load("demo").with_changes(["train.lr=1e-3", "model.masks=false", "train.lr_milestones=[0.5]"])
    assert changed.train.lr == 0.001
    assert recipe.load("demo").with_changes(["train.steps=+1_000"]).train.steps == 1000
    assert changed.model.masks is False
    assert changed.train.lr_milestones == (0.5,)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.stpes=5", ["train.stpes", "train.steps"]),
        ("steps=5", ["steps", "train.steps"]),
        ("train=5", ["train: no such recipe key"]),
        ("train.steps.more=5", ["train.steps.more: no such recipe key"]),
        ("train.steps", ["key=value"]),
        (" =5", ["`changes`", "no key; write key=value"]),
        ("foo.bar=1", ["foo.bar: no such recipe key; refdet recipes demo lists them all"]),
        ("train.steps=many", ["train.steps", "int"]),
        ("train.steps=true", ["train.steps", "int"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.steps=100000000", ["train.steps", "at most 99,999,999,"]),
        ("train.ema=1", ["train.ema", "at most 0.9999999,"]),
        ("train.max_grad_norm=1e10", ["train.max_grad_norm", "at most 1,000,000,000,"]),
        ("train.lr=.nan", ["train.lr: must be finite, not nan"]),
        ("train.lr=[", ["train.lr=[", "invalid or unsupported YAML"]),
        ("train.batch_size=010", ["integer 010 is not decimal"]),
        ("train.steps=1:30", ["integer 1:30 is not decimal"]),
        ("train.lr=1:30.5", ["number 1:30.5 is not decimal"]),
        ("input.mean=[1, 2:0.5, 3]", ["number 2:0.5 is not decimal"]),
        ("train.seed=0x10", ["integer 0x10 is not decimal"]),
        ("input.min_sizes=[0b1]", ["integer 0b1 is not decimal"]),
        ("model.depth=42", ["model.depth", "101"]),
        ("model.neck=bifpn", ["model.neck", "c4"]),
        ("input.mean=[1, 2]", ["input.mean", "3 values"]),
        ("model.anchor_sizes=[]", ["model.anchor_sizes: must have 5 values"]),
        ("train.workers=-1", ["train.workers: must be at least 0"]),
        ("train.seed=-1", ["train.seed: must be at least 0"]),
        ("train.lr=.inf", ["train.lr: must be finite, not inf"]),
        ("proposals.nms_threshold=2", ["proposals.nms_threshold", "0 to 1"]),
        ("proposals.negative_iou=0.9", ["proposals.negative_iou", "proposals.positive_iou"]),
        ("head.positive_fraction=3", ["head.positive_fraction: must be from 0 to 1"]),
    ],
)
def test_an_error_names_the_invalid_change(assignment: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        recipe.load("demo").with_changes([assignment])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: [", "invalid or unsupported YAML"),
        ("- 1", "must be a YAML mapping"),
        ("trian: {}", "trian: no such recipe key"),
        ("model: 5", "model: must be a mapping of options"),
        ("train: {steps: soon}", "train.steps: must be int"),
    ],
)
def test_an_error_names_the_invalid_file_and_its_problem(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"odd\.yaml: {problem}") as caught:
        recipe.load(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="demo"):
        recipe.load("c4-res500")
    with pytest.raises(InputError, match="no such file"):
        recipe.load(str(tmp_path / "none.yaml"))


def test_a_file_overrides_its_base_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: reference-c4-res101\ninput: {min_sizes: [400]}\ntrain: {lr: 0.002}\n")
    mine, base = recipe.load(str(tmp_path / "mine.yaml")), recipe.load("reference-c4-res101")
    assert mine.name == "mine" and mine.input.min_sizes == (400,) and mine.train.lr == 0.002
    assert mine.model == base.model and mine.input.mean == base.input.mean
    shipped = recipe.load("reference-c4-res50")  # which has reference-c4-res101 as its base
    assert shipped.model.depth == 50 and shipped.model.legacy_plus_one
    (tmp_path / "bad.yaml").write_text("base: nothing\n")
    with pytest.raises(InputError, match="base: must be one of .*reference-c4-res101"):
        recipe.load(str(tmp_path / "bad.yaml"))


def test_batches_of_new_recipes_are_padded_and_those_of_older_runs_are_not(tmp_path: Path) -> None:
    for name in recipe.names():
        padded = not name.startswith(("reference-", "d2-c4-", "d2-dc5-")) and name not in ("demo", "c4-res101-3x")
        assert recipe.load(name).input.size_divisibility == (32 if padded else 1), name
    (tmp_path / "mine.yaml").write_text("input: {max_size: 900}\n")
    mine = recipe.load(str(tmp_path / "mine.yaml"))
    assert mine.input.size_divisibility == 32 and mine.input.max_size == 900
    assert mine.with_changes(["train.steps=5"]).input.size_divisibility == 32
    (tmp_path / "mine.yaml").write_text("base: reference-c4-res50\n")
    assert recipe.load(str(tmp_path / "mine.yaml")).input.size_divisibility == 1
    older = mine.to_dict()
    del older["input"]["size_divisibility"]
    assert recipe.from_dict(older).input.size_divisibility == 0
    assert "size_divisibility" not in recipe.from_dict(older).to_dict()["input"]


def test_zero_init_residual_is_off_in_recipes_and_on_in_older_runs() -> None:
    for name in recipe.names():
        found = recipe.load(name)
        assert found.model.zero_init_residual is False, name
        tree = found.to_dict()
        del tree["model"]["zero_init_residual"]
        older = recipe.from_dict(tree)
        assert older.model.zero_init_residual is True
        assert "zero_init_residual" not in older.to_dict()["model"]


def test_reference_recipes_have_the_box_losses_of_the_reference() -> None:
    """Smooth L1 with sigma 3 in the RPN and sigma 1 in the head; beta is 1 / sigma**2."""
    names = [name for name in recipe.names() if name.startswith("reference-")]
    assert names
    for name in names:
        found = recipe.load(name)
        assert (found.proposals.smooth_l1_beta, found.head.smooth_l1_beta) == (1 / 9, 1.0), name
        assert "smooth_l1_beta" not in found.to_dict()["head"]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("d2-c4-res50", (210000, 250000)),
        ("d2-fpn-res50", (210000, 250000)),
        ("c4-res101-3x", (210000, 250000)),
        ("fpn-res50-lsj", (655556, 710184)),
        ("reference-c4-res101-from-frcn", (350000,)),
    ],
)
def test_the_learning_rate_drops_at_the_steps_of_the_original(name: str, steps: tuple[int, ...]) -> None:
    """The steps of detectron2's 3x schedule and 400-epoch LSJ schedule, and of the reference's training script."""
    options = recipe.load(name).train
    for step in steps:
        before, after = (learning_rate(at, options) for at in (step - 1, step))
        assert after == pytest.approx(before / 10)
