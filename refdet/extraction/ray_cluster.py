"""Connect to a Ray cluster, with one-line errors. Imports Ray only when it connects."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from refdet.errors import InputError

log = logging.getLogger(__name__)

NOT_INSTALLED = "`ray`: Ray is not installed; install it with pip install 'refdet[ray]'"
_CONNECT_TIMEOUT = 10.0  # seconds to reach the address
_OBJECT_STORE_BYTES = 2**28  # of "local"; holds little more than the list of images
# Ray reads this variable when it is imported. At 0, Ray listens only on the loopback interface, on any system despite
# the name of the variable, instead of on the network address of this machine.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to which this process is connected.

    Attributes:
        ray: the package ``ray``.
        gpus: whether each worker has a GPU; otherwise it has one of Ray's CPU slots.
    """

    ray: Any
    gpus: bool

    def count_slots(self) -> dict[str, int]:
        """Id of each living node -> number of workers that it has room for: its GPUs or CPU slots, in use or not."""
        name = "GPU" if self.gpus else "CPU"
        return {node["NodeID"]: int(node["Resources"].get(name, 0)) for node in self.ray.nodes() if node["Alive"]}

    @property
    def resources(self) -> dict[str, float]:
        """Resources that a worker reserves, as options of ``ray.remote``."""
        return {"num_cpus": 0, "num_gpus": 1} if self.gpus else {"num_cpus": 1, "num_gpus": 0}


def check_address(address: str) -> None:
    """Check the form of a cluster's address, before slow imports.

    Raises:
        InputError: the address is not "local", "auto" or HOST:PORT.
    """
    if address in ("local", "auto"):
        return
    if address.startswith("ray://"):
        raise InputError(
            f"`ray` {address}: clients from outside a cluster are not supported; run the command on one of its "
            "machines with `ray='auto'`"
        )
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", address, re.ASCII)
    if not match or not 0 < int(match[2]) < 65536:
        raise InputError(f"`ray` {address}: must be local, auto or HOST:PORT, as printed by ray start --head")


@contextmanager
def connect(address: str, device: str | None) -> Iterator[Cluster]:
    """Connect to a Ray cluster, or start one on this machine, within the block.

    Args:
        address: "local" to start a cluster with this machine's GPUs, or else CPUs; "auto" for the cluster that this
            machine belongs to; or the HOST:PORT of a cluster.
        device: "cpu", "cuda", or "auto" or None for GPUs if the cluster has any.

    Raises:
        InputError: Ray is not installed, the cluster does not answer or has another version of Ray, or ``device`` is
            not one of the above or is "cuda" and the cluster has no GPU.
    """
    check_address(address)
    if device not in (None, "auto", "cpu", "cuda"):
        raise InputError(f"`device` {device}: with `ray` each worker has a GPU of its own; give cuda, cpu or auto")
    with _environment(_LOOPBACK if address == "local" else {}):
        try:
            import ray
        except ImportError:
            raise InputError(NOT_INSTALLED) from None
        started_here = not ray.is_initialized()
        with ExitStack() as stack:
            if started_here:
                stack.enter_context(_log_dead_processes(ray))
                _connect(ray, address)
                stack.callback(ray.shutdown)
            gpus = ray.cluster_resources().get("GPU", 0) >= 1
            if device == "cuda" and not gpus:
                raise InputError(
                    f"`device` cuda: the Ray cluster {address} has no GPU; start ray on a machine that has one, or "
                    "give `device='cpu'`"
                )
            yield Cluster(ray, gpus and device != "cpu")


@contextmanager
def _log_dead_processes(ray: Any) -> Iterator[None]:
    """Log Ray's messages about processes that died, which Ray prints on stdout even with log_to_driver=False."""
    module = ray._private.worker
    original = getattr(module, "print_to_stdstream", None)
    module.print_to_stdstream = lambda data, **_: log.info("Ray: %s", " ".join(data["lines"]))
    try:
        yield
    finally:
        module.print_to_stdstream = original


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block, also for processes that are started in it."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _connect(ray: Any, address: str) -> None:
    """Start or join a cluster; raises an InputError that says what is wrong, and keeps the handler of SIGTERM."""
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    if ":" in address:
        _check_reachable(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **options)
        else:
            ray.init(address, **options)
    except Exception as error:  # of many types, none of them documented
        with suppress(Exception):
            ray.shutdown()
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        problem = {
            "local": "Ray does not start on this machine",
            "auto": "no Ray cluster is found from this machine; start one with ray start --head",
        }.get(address, "the Ray cluster does not let this process in")
        raise InputError(f"`ray` {address}: {problem} ({reason})") from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:  # Ray's handler exits with 15 and no message
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _check_reachable(address: str) -> None:
    """Raise an InputError if nothing answers at HOST:PORT; Ray alone would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"`ray` {address}: does not answer ({reason}); check the address, which ray start --head prints, and the "
            "firewall"
        ) from None
