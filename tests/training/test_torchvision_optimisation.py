"""The optimizer's groups, steps and learning rate, compared with torchvision's reference scripts and PyTorch's SGD."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, MultiStepLR
from torchvision.ops._utils import split_normalization_params
from training_examples import tiny

from refdet.config.recipe import TrainOptions
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.training.optim import build_optimizer, learning_rate, set_lr


def test_norms_and_biases_have_no_weight_decay_as_in_torchvision() -> None:
    """Norms as with ``--norm-weight-decay 0`` of torchvision's scripts; biases as in lichengunc/mask-faster-rcnn."""
    model = MaskRCNN(tiny(), 3)
    norms, others = split_normalization_params(model)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and not any(p is n for n in norms)]
    groups = {
        group["weight_decay"]: {id(p) for p in group["params"]}
        for group in build_optimizer(model, TrainOptions()).param_groups
    }
    assert groups.keys() == {0.0, 0.0001} and len(norms) > 10 and len(biases) > 10
    assert groups[0.0] == {id(p) for p in [*norms, *biases]}
    assert groups[0.0001] == {id(p) for p in others} - groups[0.0]


def test_steps_are_the_same_as_those_of_pytorchs_sgd() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    theirs = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    theirs.load_state_dict(ours.state_dict())
    options = TrainOptions(steps=100, lr=0.05, warmup_steps=4, lr_milestones=(0.06, 0.09), weight_decay=0.01)
    sgd = build_optimizer(ours, options)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    their_sgd = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.01}, {"params": [p for p in theirs.parameters() if p.ndim == 1]}],
        lr=0.05, momentum=0.9,
    )  # fmt: skip
    for step in range(12):
        x = torch.randn(6, 5, dtype=torch.float64)
        set_lr(sgd, learning_rate(step, options))
        for group in their_sgd.param_groups:
            group["lr"] = learning_rate(step, options)
        for model, optimizer in ((ours, sgd), (theirs, their_sgd)):
            optimizer.zero_grad()
            (model(x) ** 2).sum().backward()
            optimizer.step()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 100), (100, 500)])
def test_the_learning_rate_is_that_of_pytorchs_schedulers(steps: int, warmup: int) -> None:
    """The warm-up is linear from a tenth, over a fifth of the run at most; each milestone divides the rate by ten."""
    options = dataclasses.replace(TrainOptions(), steps=steps, warmup_steps=warmup, lr=0.02, lr_milestones=(0.6, 0.9))
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    schedules = [
        LinearLR(sgd, start_factor=0.1, total_iters=min(warmup, steps // 5)),
        MultiStepLR(sgd, [int(0.6 * steps), int(0.9 * steps)]),
    ]
    for step in range(steps):
        assert learning_rate(step, options) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        for schedule in schedules:
            schedule.step()
