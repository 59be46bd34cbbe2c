"""One process under torchrun, with NCCL, DistributedDataParallel and SyncBatchNorm on a GPU, and one without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import is_gpu, on_devices
from torch import nn
from training_examples import run, squares

from refdet.training import trainer
from refdet.training.sync_norm import SyncedBatchNorm

# what torchrun sets for the only process of a machine; the port is any free one
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0"}  # fmt: skip
CHANGES = ("model.norm=batch", "train.tf32=false", "train.steps=2")


def losses(folder: Path, *names: str) -> list[list[float]]:
    """The values of these loss terms in each row of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in names] for row in rows]


@pytest.mark.slow
@on_devices
def test_one_process_under_torchrun_has_the_losses_of_one_without(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path, images=6)
    run(tmp_path, *CHANGES, out="plain", device=device)
    start_step, norm_types = trainer.start_step, set()

    def record_norms(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        norm_types.update(map(type, norms))
        return start_step(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "start_step", record_norms)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    run(tmp_path, *CHANGES, out="torchrun", device=device)
    assert norm_types == {nn.SyncBatchNorm if is_gpu(device) else SyncedBatchNorm}
    assert (
        "train: 1 process on 1 machine" in caplog.text and f", {'nccl' if is_gpu(device) else 'gloo'};" in caplog.text
    )
    runs = [tmp_path / name for name in ("torchrun", "plain")]
    actual, expected = (losses(folder, "loss")[0] for folder in runs)
    np.testing.assert_allclose(actual, expected, rtol=1e-3)
    # In the second step, only the RPN's losses can be compared, as rounding may change the proposals. The first step
    # changes these losses by 0.5% and 2.5%, more than the tolerance.
    actual, expected = (losses(folder, "loss_objectness", "loss_rpn_box_reg")[1] for folder in runs)
    np.testing.assert_allclose(actual, expected, rtol=2e-3)
