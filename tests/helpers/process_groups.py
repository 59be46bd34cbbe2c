"""Training in several processes with torchrun's environment variables, forked from one that has imported everything.

    with Launcher() as launcher:
        ended = launcher.train(root, "run", processes=2, changes=[...])

Each process runs the command line. A `Fault` describes what goes wrong in one of them. A process that is still running
after the time limit is killed, and fails the test.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 120  # seconds of a training run on a busy machine


@dataclass(frozen=True)
class Fault:
    """A failure of one process, which does not happen again after torchrun has restarted it.

    Attributes:
        kind: "infinite" for an infinite loss, "full disk" for a disk that stays full, or the name of a signal
            that the process receives.
        rank: rank of the process.
        step: step, counted from 1, at the start of which it happens.
    """

    kind: str
    rank: int
    step: int


@dataclass(frozen=True)
class Ended:
    """Exit codes of the processes, negative for signals, and what each wrote to stdout and stderr."""

    codes: list[int]
    outputs: list[str]

    @property
    def said(self) -> list[str]:
        """The error messages of all processes."""
        return [line for text in self.outputs for line in text.splitlines() if line.startswith("error: ")]


class Launcher:
    """Context manager that runs the process from which the training processes are forked."""

    def __enter__(self) -> Launcher:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(10)

    def train(
        self,
        root: Path,
        out: str,
        processes: int,
        arguments: Sequence[str] = (),
        *,
        fault: Fault | None = None,
        variables: dict[str, str] | None = None,
        of_rank: dict[int, Sequence[str]] | None = None,
        float64: bool = False,
        restarts: int = 0,
    ) -> Ended:
        """Train on the instances and images under `root` into ``root/out``.

        Args:
            root: folder with instances.json and images.
            out: name of the run directory.
            processes: number of processes.
            arguments: further command line arguments.
            fault: failure of a process, None for none.
            variables: environment variables of all processes, overriding torchrun's; "" removes one.
            of_rank: further arguments of single processes, by rank.
            float64: compute in float64.
            restarts: if not 0, run under torchrun's own agent with this many restarts.
        """
        common = ["train", "--recipe", "demo", "--instances", str(root / "instances.json"), "--device", "cpu"]
        common += ["--images", str(root / "images"), "--out", str(root / out), *arguments]
        work: dict[str, Any] = {
            "commands": [[*common, *(of_rank or {}).get(rank, ())] for rank in range(processes)],
            "fault": None if fault is None else dataclasses.asdict(fault),
            "variables": variables or {},
            "float64": float64,
            "restarts": restarts,
        }
        self._process.stdin.write(json.dumps(work) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        answer = json.loads(self._process.stdout.readline())  # type: ignore[union-attr]
        assert not answer["late"], f"still running after {LIMIT} s: {answer}"
        return Ended(answer["codes"], answer["outputs"])


def _run_command(work: dict[str, Any], rank: int) -> None:
    """Run the command line of a rank, in a forked process."""
    import torch

    from refdet.cli.main import main

    if work["float64"]:
        torch.set_default_dtype(torch.float64)
    if work["fault"] is not None:
        _install_fault(Fault(**work["fault"]))
    main(work["commands"][rank], prog_name="refdet")


def _install_fault(fault: Fault) -> None:
    """Install a fault in this process, if its rank is that of the fault."""
    from refdet.detector.mask_rcnn import MaskRCNN
    from refdet.training import trainer

    if int(os.environ["RANK"]) != fault.rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    step, losses, calls = trainer.start_step, MaskRCNN.compute_losses, []

    def with_fault(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == fault.step and fault.kind == "full disk":
            trainer.state.save = full
        elif len(calls) == fault.step and fault.kind != "infinite":
            os.kill(os.getpid(), signal.Signals[fault.kind])
        return step(*given)

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def infinite(self: MaskRCNN, *given: Any) -> Any:
        terms = losses(self, *given)
        if len(calls) == fault.step and fault.kind == "infinite":
            terms["loss_box_reg"] = terms["loss_box_reg"] * float("inf")
        return terms

    trainer.start_step, MaskRCNN.compute_losses = with_fault, infinite  # type: ignore[method-assign]


def _fork(work: dict[str, Any], rank: int, port: int, output: Path) -> int:
    """Fork a process of a rank; returns its id."""
    count = str(len(work["commands"]))
    if child := os.fork():
        return child
    code = 1
    try:
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if work["restarts"]:
            _under_agent(work)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **work["variables"]}
        for name in [name for name, value in work["variables"].items() if not value]:
            del os.environ[name]
        _run_command(work, rank)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _under_agent(work: dict[str, Any]) -> None:
    """Run torchrun's own agent in a forked process; it starts and restarts the processes."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, len(work["commands"]), rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="none",
        max_restarts=work["restarts"], monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, _run_as_agent_worker)(work)
    sys.exit(0)


def _run_as_agent_worker(work: dict[str, Any]) -> None:
    _run_command(work, int(os.environ["RANK"]))


def _serve() -> None:
    """Run the work on each line of stdin, and print its result as a line."""
    import tempfile

    import torch._dynamo  # noqa: F401  # each optimizer imports it, which takes a second

    import refdet.cli.train
    import refdet.training.distributed
    import refdet.training.trainer  # noqa: F401

    for line in sys.stdin:
        work = json.loads(line)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            count = 1 if work["restarts"] else len(work["commands"])
            outputs = [Path(folder, str(rank)) for rank in range(count)]
            children = {_fork(work, rank, port, output): rank for rank, output in enumerate(outputs)}
            codes, late = [-1] * count, False
            until = time.monotonic() + LIMIT
            while children:
                child, status = os.waitpid(-1, os.WNOHANG)
                if child in children:
                    codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until and not late:
                    late = True
                    for child in children:
                        with suppress(ProcessLookupError):
                            os.kill(child, signal.SIGKILL)
                else:
                    time.sleep(0.01)
            texts = [path.read_text(errors="replace") for path in outputs]
        print(json.dumps({"codes": codes, "outputs": texts, "late": late}), flush=True)


if __name__ == "__main__":
    _serve()
