"""Any number of processes, and of passes per step, trains the same network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from distributed_examples import assert_same_network, losses, train, trained
from process_groups import Fault, Launcher

pytestmark = pytest.mark.slow

FROZEN = "model.norm=frozen"
# largest absolute difference of weights and momentum, and relative difference of losses, by precision
FLOAT64, FLOAT32 = (1e-9, 1e-6), (1e-4, 1e-4)
WITHOUT_TORCHRUN = {"WORLD_SIZE": ""}  # environment variables


@pytest.mark.parametrize(
    ("float64", "bounds", "divisions"),
    [(True, FLOAT64, [(2, 1), (4, 1), (2, 2)]), (False, FLOAT32, [(4, 1)])],
    ids=["float64", "float32"],
)
def test_any_number_of_processes_and_passes_trains_the_same_network(
    launcher: Launcher, noise: Path, float64: bool, bounds: tuple[float, float], divisions: list[tuple[int, int]]
) -> None:
    """`divisions` are pairs of a number of processes and a number of passes per step."""
    more = {"options": ["--weights", str(noise / "weights")], "float64": float64}
    alone = noise / f"alone-{float64}"
    trained(launcher, noise, alone.name, 1, FROZEN, variables=WITHOUT_TORCHRUN, **more)
    for processes, passes in divisions:
        out = f"{processes}-{passes}-{float64}"
        trained(launcher, noise, out, processes, FROZEN, f"train.accumulate={passes}", **more)
        assert_same_network(noise / out, alone, *bounds)


@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_batch_norms_use_the_images_of_all_processes(launcher: Launcher, noise: Path, neck: str) -> None:
    changes = ["model.norm=batch", "train.steps=4"]
    changes += ["model.neck=c4", "model.anchor_sizes=[16,32,64]"] if neck == "c4" else []
    trained(launcher, noise, f"{neck}-1", 1, *changes, variables=WITHOUT_TORCHRUN, float64=True)
    trained(launcher, noise, f"{neck}-2", 2, *changes, float64=True)
    assert_same_network(noise / f"{neck}-2", noise / f"{neck}-1", *FLOAT64)


def test_a_run_resumes_with_another_number_of_processes_and_passes(launcher: Launcher, noise: Path) -> None:
    more = {"options": ["--weights", str(noise / "weights")], "float64": True}
    trained(launcher, noise, "whole", 1, FROZEN, "train.steps=6", **more)
    fault = Fault("SIGTERM", rank=0, step=2)
    ended = train(launcher, noise, "parts", 4, FROZEN, "train.steps=6", fault=fault, **more)
    assert ended.codes == [130] * 4
    more["options"].append("--resume")
    ended = train(launcher, noise, "parts", 1, FROZEN, "train.steps=6", fault=fault, **more)
    assert ended.codes == [130] and "resumes from step 2" in ended.outputs[0]
    more["of_rank"] = {1: ["--out", str(noise / "elsewhere")]}  # as on a machine with its own disk
    for message in ("resumes from step 4", "6 steps are done"):
        ended = trained(launcher, noise, "parts", 2, FROZEN, "train.steps=6", "train.accumulate=2", **more)
        assert message in ended.outputs[0]
        assert_same_network(noise / "parts", noise / "whole", *FLOAT64)
    assert [path.name for path in (noise / "elsewhere").rglob("*")] == ["logs", "rank-1.log"]


def test_only_the_first_process_prints_and_the_others_write_logs(launcher: Launcher, noise: Path) -> None:
    ended = trained(launcher, noise, "said", 2, "model.norm=batch", "train.steps=2", "train.accumulate=2")
    first, other = ended.outputs
    line = (
        "train: 2 processes on 1 machine, 2 x cpu, gloo; 4 images per step, 2 in each process, in 2 passes of 1 image"
    )
    assert line in first and "note: train.accumulate: batch norms" in first
    assert "trained" in first and other == ""
    log = (noise / "said" / "logs" / "rank-1.log").read_text()
    assert line in log and not (noise / "said" / "logs" / "rank-0.log").exists()
    trained(launcher, noise, "one-pass", 2, "model.norm=batch", "train.steps=2")
    assert not np.allclose(losses(noise / "said"), losses(noise / "one-pass"), rtol=1e-4)  # as the note says
