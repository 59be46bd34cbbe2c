"""One, two and four processes, and one and several passes a step, train the same network."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_examples import assert_same_network, losses, trained
from process_groups import Launcher

pytestmark = pytest.mark.slow

FROZEN = "model.norm=frozen"
FLOAT64 = {"float64": True, "weights": 1e-9, "loss": 1e-6}
FLOAT32 = {"float64": False, "weights": 1e-4, "loss": 1e-4}
C4 = ("model.neck=c4", "model.anchor_sizes=[16,32,64]")


@pytest.mark.parametrize("bounds", [FLOAT64, FLOAT32], ids=["float64", "float32"])
def test_any_number_of_processes_and_passes_trains_the_same_network(
    launcher: Launcher, noise: Path, bounds: dict
) -> None:
    exact, kind = bounds["float64"], "64" if bounds["float64"] else "32"
    options = ["--weights", str(noise / "weights")]
    trained(launcher, noise, f"alone{kind}", 1, FROZEN, options=options, float64=exact, variables={"WORLD_SIZE": ""})
    for processes, passes in ((2, 1), (4, 1), (1, 2), (2, 2)):
        out = f"{processes}-{passes}-{kind}"
        trained(
            launcher, noise, out, processes, FROZEN, f"train.accumulate={passes}", options=options, float64=exact
        )  # fmt: skip
        assert_same_network(noise / out, noise / f"alone{kind}", bounds["weights"], bounds["loss"])
