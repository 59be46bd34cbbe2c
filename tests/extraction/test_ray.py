"""Workers on a Ray cluster of several nodes, some of which die, write the store that one process writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from detector_folder import DetectorFolder, one_thread
from interrupted_extraction import RECORDS, environment, run
from ray_extraction import ENVIRONMENT, NODE, SlowTools, cluster_of, run_on, time_limit
from store_examples import contents

from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.extraction.ray_cluster import Cluster, check_address, connect
from refdet.extraction.workers_file import read_token, read_workers, write_workers

_ = one_thread  # a fixture
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with time_limit(120), cluster_of(2) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def limit_time(cluster: Any) -> Iterator[None]:
    with time_limit(60):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process writes."""
    out = tmp_path_factory.mktemp("whole") / "a.h5"
    run(out)
    return out


def assert_whole(out: Path, whole: Path) -> None:
    """Check that a store has the contents of another, and that no shards are left."""
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in out.parent.iterdir() if path.is_file()) == ["a.h5"]
    assert not out.with_name("a.h5.parts").exists()


def computing_processes(records: Path) -> list[int]:
    """Ids of the processes that computed a batch, from the records of `SlowTools`."""
    return sorted({int(path.name.partition("-")[0]) for path in records.glob("[0-9]*-*")})


def run_when(condition: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    """Call ``then`` in a thread once a condition is met."""

    def wait() -> None:
        until = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_workers_write_the_store_of_one_process(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, records = tmp_path / "a.h5", tmp_path / "records"
    workers: list[dict[str, Any]] = []
    folder = tmp_path / "a.h5.parts"
    watch = run_when(
        lambda: list(folder.glob("*.shard")) and read_workers(folder), lambda: workers.extend(read_workers(folder))
    )
    done = run_on(cluster.address, out, SlowTools(records, seconds=0.3, together=2))
    watch.join()
    assert (done.images, done.errors, done.computed) == (len(RECORDS), 1, len(RECORDS))
    assert len(computing_processes(records)) == 2 and done.stages["compute"] > 0.1
    assert_whole(out, whole)
    assert {worker["state"] for worker in workers} == {"computing"}
    assert all(worker["host"] and worker["pid"] for worker in workers)


def test_a_killed_worker_is_replaced(
    tmp_path: Path, whole: Path, cluster: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    out, records = tmp_path / "a.h5", tmp_path / "records"
    caplog.set_level("INFO", "refdet")
    run_on(cluster.address, out, SlowTools(records, die_at=RECORDS[3].id, seconds=0.5))
    assert (records / "died").exists() and "was lost" in caplog.text
    assert capfd.readouterr().out == ""  # stdout is for results; messages of Ray go to the log
    assert "Ray: A worker died or was killed" in caplog.text
    assert_whole(out, whole)


def test_a_killed_worker_is_not_replaced_on_an_excluded_machine(tmp_path: Path, whole: Path, cluster: Any) -> None:
    for name in ("one", "other"):
        out, records = tmp_path / name / "a.h5", tmp_path / f"records-{name}"
        out.parent.mkdir()
        without_images = cluster.list_all_nodes()[1].node_id
        run_on(cluster.address, out, SlowTools(records, die_at=RECORDS[3].id, missing_node=without_images))
        assert (records / "died").exists()
        assert_whole(out, whole)


def test_a_shard_that_kills_every_worker_stops_the_extraction(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out = tmp_path / "a.h5"
    with pytest.raises(RuntimeFailure, match="workers were lost while they computed it|no worker is left"):
        run_on(cluster.address, out, SlowTools(tmp_path / "records", die_at=RECORDS[3].id, always=True))
    assert list((tmp_path / "a.h5.parts").glob("*.shard"))
    run_on(cluster.address, out, SlowTools(tmp_path / "again"), resume=True)
    assert_whole(out, whole)


def test_a_worker_without_images_is_excluded_and_one_without_the_folder_sends_its_shards(
    tmp_path: Path, whole: Path, cluster: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, records = tmp_path / "a.h5", tmp_path / "records"

    def write_another_token(folder: Path, token: str, workers: list[Any]) -> None:
        write_workers(folder, "token of another folder", workers)

    monkeypatch.setattr("refdet.extraction.ray_engine.write_workers", write_another_token)
    run_on(cluster.address, out, SlowTools(records, missing_on=0))
    assert "note: a worker is left out: `images` /data: not found on node 0" in caplog.text
    assert len(computing_processes(records)) == 1
    assert_whole(out, whole)


def test_without_any_worker_that_has_the_images_nothing_is_started(tmp_path: Path, cluster: Any) -> None:
    with pytest.raises(InputError, match="^`images` /data: not found on node [01]$"):
        run_on(cluster.address, tmp_path / "a.h5", SlowTools(tmp_path / "records", missing_on=-1))
    assert not (tmp_path / "a.h5.parts").exists()


def test_a_full_disk_on_one_node_leaves_the_work_to_the_others(
    tmp_path: Path, whole: Path, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "a.h5"
    run_on(cluster.address, out, SlowTools(tmp_path / "records", full_on=0))
    assert "note: a worker is left out: " in caplog.text and "No space left on device" in caplog.text
    assert_whole(out, whole)


def test_a_node_that_is_killed_loses_only_what_it_computed(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, records = tmp_path / "a.h5", tmp_path / "records"
    node = cluster.add_node(**NODE)
    kill = run_when(
        lambda: len(computing_processes(records)) == 3, lambda: cluster.remove_node(node, allow_graceful=False)
    )
    done = run_on(cluster.address, out, SlowTools(records, seconds=0.5, together=3))
    kill.join()
    assert done.computed == len(RECORDS)
    assert_whole(out, whole)


def test_a_killed_driver_is_resumed(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, records = tmp_path / "a.h5", tmp_path / "records"
    code = (
        "import sys; from pathlib import Path; from ray_extraction import SlowTools, run_on; "
        "run_on(sys.argv[1], Path(sys.argv[2]), SlowTools(Path(sys.argv[3]), seconds=0.5))"
    )
    command = [sys.executable, "-c", code, cluster.address, str(out), str(records)]
    driver = subprocess.Popen(command, env=environment() | ENVIRONMENT, stderr=subprocess.DEVNULL)
    folder = tmp_path / "a.h5.parts"
    run_when(lambda: list(folder.glob("[0-9]*.shard")), lambda: driver.send_signal(signal.SIGKILL)).join()
    assert driver.wait(30) == -9
    kept = len(list(folder.glob("[0-9]*.shard")))
    assert kept and read_token(folder)
    done = run_on(cluster.address, out, SlowTools(tmp_path / "again"), resume=True)
    assert 0 < done.computed < len(RECORDS)
    assert_whole(out, whole)


def test_a_signal_stops_the_workers(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, folder = tmp_path / "a.h5", tmp_path / "a.h5.parts"
    stop = run_when(lambda: list(folder.glob("[0-9]*.shard")), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="images are finished and kept in .*; continue with `resume=True`"):
        run_on(cluster.address, out, SlowTools(tmp_path / "records", seconds=0.5))
    stop.join()
    assert not (folder / "workers.json").exists()
    run_on(cluster.address, out, SlowTools(tmp_path / "again"), resume=True)
    assert_whole(out, whole)


def test_ray_does_not_keep_its_signal_handler(cluster: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connect(cluster.address, "cpu"):
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("address", ["", "here", "a b:1", "host:0", "host:99999", "ray://host:10001", "http://host:80"])
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=f"^`ray` {address}: "):
        check_address(address)


def test_a_cluster_that_does_not_answer_or_has_no_gpu_is_refused(cluster: Any) -> None:
    for address, device, message in [
        ("127.0.0.1:9", None, r"`ray` 127.0.0.1:9: does not answer \(.*\); check the address"),
        (cluster.address, "cuda", "`device` cuda: the Ray cluster .* has no GPU"),
        (cluster.address, "cuda:1", "`device` cuda:1: with `ray` each worker has a GPU of its own"),
    ]:
        with pytest.raises(InputError, match=message), connect(address, device):
            pytest.fail("connected")


def test_commands_on_ray_and_in_parts_give_the_results_of_one_process(
    tmp_path: Path, cluster: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store and the AP are equal to the bit."""
    signal.alarm(240)  # instead of a minute, as each worker imports torch; for the same reason, only one starts
    count_slots = Cluster.count_slots
    monkeypatch.setattr(Cluster, "count_slots", lambda self: dict([*count_slots(self).items()][:1]))
    folder = DetectorFolder(tmp_path / "d", 70)  # three shards
    plain, parts, on_ray = (tmp_path / name for name in ("plain.h5", "parts.h5", "ray.h5"))
    for out, *more in [
        (plain,),
        (parts, "--part", "2/2"),
        (parts, "--part", "1/2"),
        (on_ray, "--ray", cluster.address),
    ]:
        done = folder.extract(out, "--regions", "annotations", *more)
        assert done.exit_code == 0, done.output
    assert "device: Ray, " in done.output and " on 1 machine" in done.output
    assert contents(parts) == contents(plain) and contents(on_ray) == contents(plain)
    evaluated = [folder.command("evaluate", "--json", *more) for more in ((), ("--ray", cluster.address))]
    assert [one.exit_code for one in evaluated] == [0, 0], evaluated[1].output
    assert evaluated[0].stdout == evaluated[1].stdout
    (folder.images / "1.png").write_bytes(b"no image")
    broken = folder.command("evaluate", "--ray", cluster.address)
    assert broken.exit_code == 2 and "1.png: not a readable image" in broken.stderr.splitlines()[-1]
    assert "strict" not in broken.stderr and "resume" not in broken.stderr


def test_the_command_on_ray_notices_replaced_images(tmp_path: Path, cluster: Any) -> None:
    signal.alarm(240)  # as the workers import torch
    folder, out = DetectorFolder(tmp_path / "d", 40), tmp_path / "a.h5"
    assert folder.extract(out, "--regions", "annotations", "--part", "1/2").exit_code == 0
    folder.replace_images()
    done = folder.extract(out, "--regions", "annotations", "--ray", cluster.address, "--resume")
    assert done.exit_code == 0 and " images were replaced by another file" in done.stderr, done.output
