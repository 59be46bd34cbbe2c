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


def test_a_yaml_file_without_a_name_has_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text("train: {steps: 7}\n")
    assert recipe.load(str(file)).name == "mine"
    assert recipe.load(str(file)).train.steps == 7


def test_set_takes_yaml_values() -> None:
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
        ("train=5", ["train"]),
        ("train.steps.more=5", ["train.steps.more"]),
        ("train.steps", ["key=value"]),
        ("train.steps=many", ["train.steps", "int"]),
        ("train.steps=true", ["train.steps", "int"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.steps=100000000", ["train.steps", "at most 99,999,999,"]),
        ("train.ema=1", ["train.ema", "at most 0.9999999,"]),
        ("train.max_grad_norm=1e10", ["train.max_grad_norm", "at most 1,000,000,000,"]),
        ("train.lr=.nan", ["train.lr"]),
        ("train.lr=[", ["YAML"]),
        ("train.batch_size=010", ["integer 010 is not decimal"]),
        ("train.steps=1:30", ["integer 1:30 is not decimal"]),
        ("train.lr=1:30.5", ["number 1:30.5 is not decimal"]),
        ("input.mean=[1, 2:0.5, 3]", ["number 2:0.5 is not decimal"]),
        ("train.seed=0x10", ["integer 0x10 is not decimal"]),
        ("input.min_sizes=[0b1]", ["integer 0b1 is not decimal"]),
        ("model.depth=42", ["model.depth", "101"]),
        ("model.neck=bifpn", ["model.neck", "c4"]),
        ("input.mean=[1, 2]", ["input.mean", "3 values"]),
        ("model.anchor_sizes=[]", ["model.anchor_sizes"]),
        ("train.workers=-1", ["train.workers"]),
        ("train.seed=-1", ["train.seed"]),
        ("train.lr=.inf", ["train.lr"]),
        ("proposals.nms_threshold=2", ["proposals.nms_threshold", "0 to 1"]),
        ("proposals.negative_iou=0.9", ["proposals.negative_iou", "proposals.positive_iou"]),
        ("head.positive_fraction=3", ["head.positive_fraction"]),
    ],
)
def test_a_wrong_assignment_is_named(assignment: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        recipe.load("demo").with_changes([assignment])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["model: [", "- 1", "trian: {}", "model: 5", "train: {steps: soon}"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match="odd.yaml") as caught:
        recipe.load(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="demo"):
        recipe.load("c4-res500")
    with pytest.raises(InputError, match="no such file"):
        recipe.load(str(tmp_path / "none.yaml"))


def test_a_file_changes_its_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: reference-c4-res101\ninput: {min_sizes: [400]}\ntrain: {lr: 0.002}\n")
    found, base = recipe.load(str(tmp_path / "mine.yaml")), recipe.load("reference-c4-res101")
    assert found.name == "mine" and found.input.min_sizes == (400,) and found.train.lr == 0.002
    assert found.model == base.model and found.input.mean == base.input.mean
    assert (
        recipe.load("reference-c4-res50").model.depth == 50 and recipe.load("reference-c4-res50").model.legacy_plus_one
    )
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


def test_blocks_of_new_recipes_do_not_start_as_their_shortcut_and_those_of_older_runs_did() -> None:
    for name in recipe.names():
        found = recipe.load(name)
        assert found.model.zero_init_residual is False, name
        tree = found.to_dict()
        del tree["model"]["zero_init_residual"]
        older = recipe.from_dict(tree)
        assert older.model.zero_init_residual is True
        assert "zero_init_residual" not in older.to_dict()["model"]


def test_the_reference_keeps_its_box_losses() -> None:
    """Sigma 3 for the RPN and 1 for the head, which are beta 1 / 9 and 1."""
    for name in recipe.names():
        if name.startswith("reference-"):
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
def test_the_learning_rate_falls_at_the_step_of_the_original(name: str, steps: tuple[int, ...]) -> None:
    options = recipe.load(name).train
    for step in steps:
        before, after = (learning_rate(at, options) for at in (step - 1, step))
        assert after == pytest.approx(before / 10)
