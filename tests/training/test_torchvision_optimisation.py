"""The optimizer's groups, its steps and the learning rate beside torchvision's reference scripts and PyTorch's own."""

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


def test_norms_and_biases_have_no_weight_decay() -> None:
    """As with ``--norm-weight-decay 0`` of torchvision's scripts, and without it on biases, as in the reference."""
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


def test_steps_are_those_of_pytorchs_sgd() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    theirs = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    theirs.load_state_dict(ours.state_dict())
    options = TrainOptions(steps=100, lr=0.05, warmup_steps=4, lr_milestones=(0.06, 0.09), weight_decay=0.01)
    sgd = build_optimizer(ours, options)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    peer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.01}, {"params": [p for p in theirs.parameters() if p.ndim == 1]}],
        lr=0.05, momentum=0.9,
    )  # fmt: skip
    for step in range(12):
        x = torch.randn(6, 5, dtype=torch.float64)
        set_lr(sgd, learning_rate(step, options))
        for group in peer.param_groups:
            group["lr"] = learning_rate(step, options)
        for model, optimizer in ((ours, sgd), (theirs, peer)):
            optimizer.zero_grad()
            (model(x) ** 2).sum().backward()
            optimizer.step()
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 100), (100, 500)])
def test_learning_rate(steps: int, warmup: int) -> None:
    """Linear from a tenth, over a fifth of the run at most; then a tenth at each milestone."""
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
