"""After another process was lost, no process takes its own values for those of all; errors are not hidden."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from refdet.errors import Interrupted
from refdet.training import distributed
from refdet.training.distributed import TorchrunProcess, join_torchrun
from refdet.training.processes import LostProcess, ReportedElsewhere


def process_after_a_loss(rank: int) -> TorchrunProcess:
    """Process `rank` of two that were never connected, as if the other had ended."""
    process = TorchrunProcess.__new__(TorchrunProcess)
    process.rank, process.world_size, process.peer_lost = rank, 2, True
    return process


def test_the_first_process_works_alone_and_the_others_have_no_result() -> None:
    assert process_after_a_loss(0).run_on_first(lambda: "saved") == "saved"
    with pytest.raises(LostProcess, match="another process of this training ended"):
        process_after_a_loss(1).run_on_first(lambda: "saved")


@pytest.mark.parametrize("rank", [0, 1])
def test_values_are_neither_gathered_nor_compared(rank: int) -> None:
    process = process_after_a_loss(rank)
    for exchange in (lambda: process.all_gather(rank), lambda: process.check_same({"rank": rank})):
        with pytest.raises(LostProcess):
            exchange()


@pytest.mark.parametrize("rank", [0, 1])
def test_errors_of_this_process_are_still_raised(rank: int) -> None:
    process = process_after_a_loss(rank)
    process.share_error()
    with pytest.raises(OSError, match="mine"):
        process.share_error(OSError("mine"))
    assert process.run_on_all(lambda: rank) == rank


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_of_the_log_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Mock(finish_with=lambda error: ReportedElsewhere(str(error), 130))
    monkeypatch.setattr(distributed, "TorchrunProcess", lambda *_: process)
    monkeypatch.setattr(distributed, "RankLog", Mock())
    with open("/dev/full", "w", buffering=1) as log:
        monkeypatch.setattr(sys, "stdout", log)
        with pytest.raises(ReportedElsewhere, match="stopped") as raised, join_torchrun(Mock(rank=1)):
            raise Interrupted("stopped")
        assert raised.value.exit_code == 130
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # so that closing the file does not fail
