"""torchrun's environment variables, and the device of each process."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from refdet.errors import InputError
from refdet.training.launch import Launch, repeats_usage_errors
from refdet.training.own_device import own_device

VARIABLES = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
LAUNCH = Launch(3, 4, 1, 2, 2, "")


def test_torchruns_variables_are_read() -> None:
    assert Launch.from_environment(VARIABLES) == LAUNCH
    for incomplete in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "many"}, VARIABLES | {"WORLD_SIZE": ""}):
        assert Launch.from_environment(incomplete) is None
    assert repeats_usage_errors(VARIABLES) and not repeats_usage_errors(VARIABLES | {"LOCAL_RANK": "0"})
    assert not repeats_usage_errors({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE: is 4, but RANK, MASTER_PORT are not set; start with torchrun"),
     ({"LOCAL_RANK": "x"}, "LOCAL_RANK: must be a number, not 'x'"),
     ({"RANK": "4"}, r"RANK: is 4 of 4 processes")],
)  # fmt: skip
def test_incomplete_or_invalid_variables_are_rejected(changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Launch.from_environment(VARIABLES | changes)


def test_a_process_takes_over_only_from_one_of_the_same_torchrun_job() -> None:
    own = LAUNCH.job()
    assert not LAUNCH.takes_over(own, 1)  # this very process
    assert LAUNCH.takes_over(own | {"process": "other"}, 0)
    assert not dataclasses.replace(LAUNCH, restarts=None).takes_over(own | {"process": "other"}, 1)
    assert not LAUNCH.takes_over({"run_id": "", "agent": "other", "process": "other"}, 1)
    with_id = dataclasses.replace(LAUNCH, run_id="7")
    on_other_machine = {"run_id": "7", "agent": "other", "process": "other"}
    assert with_id.takes_over(on_other_machine, 1) and not with_id.takes_over(on_other_machine, 0)


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(LAUNCH, None) == own_device(LAUNCH, "cuda") == "cuda:1" and own_device(LAUNCH, "cpu") == "cpu"
    with pytest.raises(InputError, match="`device` cuda:0: one GPU for the 2 processes of a machine; leave it out"):
        own_device(LAUNCH, "cuda:0")
    assert own_device(dataclasses.replace(LAUNCH, local_world_size=1), "cuda:0") == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes on .*, which has 1 GPU; start at most 1 there"):
        own_device(LAUNCH, None)
