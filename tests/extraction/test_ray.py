"""Workers on a Ray cluster of several nodes, some of which die, write the store of one process."""

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
def limited(cluster: Any) -> Iterator[None]:
    with time_limit(60):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one process."""
    out = tmp_path_factory.mktemp("whole") / "a.h5"
    run(out)
    return out


def is_whole(out: Path, whole: Path) -> None:
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in out.parent.iterdir() if path.is_file()) == ["a.h5"]
    assert not out.with_name("a.h5.parts").exists()


def computed_by(who: Path) -> list[int]:
    """The processes that computed something."""
    return sorted({int(path.name.partition("-")[0]) for path in who.glob("[0-9]*-*")})


def when(condition: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    """Do something once a condition is met."""

    def wait() -> None:
        until = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_workers_write_the_same_store(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, who = tmp_path / "a.h5", tmp_path / "who"
    shown: list[dict[str, Any]] = []
    folder = tmp_path / "a.h5.parts"
    watch = when(
        lambda: list(folder.glob("*.shard")) and read_workers(folder), lambda: shown.extend(read_workers(folder))
    )
    done = run_on(cluster.address, out, SlowTools(who, seconds=0.3, together=2))
    watch.join()
    assert (done.images, done.errors, done.computed) == (len(RECORDS), 1, len(RECORDS))
    assert len(computed_by(who)) == 2 and done.stages["compute"] > 0.1
    is_whole(out, whole)
    assert {one["state"] for one in shown} == {"computing"} and all(one["host"] and one["pid"] for one in shown)


def test_a_worker_that_is_killed_is_replaced(
    tmp_path: Path, whole: Path, cluster: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    out, who = tmp_path / "a.h5", tmp_path / "who"
    caplog.set_level("INFO", "refdet")
    run_on(cluster.address, out, SlowTools(who, die_at=RECORDS[3].id, seconds=0.5))
    assert (who / "died").exists() and "was lost" in caplog.text
    assert capfd.readouterr().out == ""  # which is for results; Ray's own words are in the log
    assert "Ray: A worker died or was killed" in caplog.text
    is_whole(out, whole)


def test_a_worker_that_is_killed_is_not_replaced_on_a_machine_that_is_left_out(
    tmp_path: Path, whole: Path, cluster: Any
) -> None:
    for name in ("one", "other"):
        out, who = tmp_path / name / "a.h5", tmp_path / f"who-{name}"
        out.parent.mkdir()
        without_images = cluster.list_all_nodes()[1].node_id
        run_on(cluster.address, out, SlowTools(who, die_at=RECORDS[3].id, missing_node=without_images))
        assert (who / "died").exists()
        is_whole(out, whole)


def test_a_shard_that_kills_every_worker_is_named(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out = tmp_path / "a.h5"
    with pytest.raises(RuntimeFailure, match="workers were lost while they computed it|no worker is left"):
        run_on(cluster.address, out, SlowTools(tmp_path / "who", die_at=RECORDS[3].id, always=True))
    assert list((tmp_path / "a.h5.parts").glob("*.shard"))
    run_on(cluster.address, out, SlowTools(tmp_path / "again"), resume=True)
    is_whole(out, whole)


def test_a_worker_without_images_is_left_out_and_one_without_the_folder_sends_its_shards(
    tmp_path: Path, whole: Path, cluster: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, who = tmp_path / "a.h5", tmp_path / "who"
    unseen = lambda folder, token, workers: write_workers(folder, "of another folder", workers)  # noqa: E731
    monkeypatch.setattr("refdet.extraction.ray_engine.write_workers", unseen)
    run_on(cluster.address, out, SlowTools(who, missing_on=0))
    assert "note: a worker is left out: `images` /data: not found on node 0" in caplog.text
    assert len(computed_by(who)) == 1
    is_whole(out, whole)


def test_without_any_worker_that_sees_the_images_nothing_begins(tmp_path: Path, cluster: Any) -> None:
    with pytest.raises(InputError, match="^`images` /data: not found on node [01]$"):
        run_on(cluster.address, tmp_path / "a.h5", SlowTools(tmp_path / "who", missing_on=-1))
    assert not (tmp_path / "a.h5.parts").exists()


def test_a_full_disk_on_one_node_leaves_the_work_to_the_others(
    tmp_path: Path, whole: Path, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "a.h5"
    run_on(cluster.address, out, SlowTools(tmp_path / "who", full_on=0))
    assert "note: a worker is left out: " in caplog.text and "No space left on device" in caplog.text
    is_whole(out, whole)


def test_a_node_that_is_killed_loses_only_what_it_computed(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, who = tmp_path / "a.h5", tmp_path / "who"
    node = cluster.add_node(**NODE)
    kill = when(lambda: len(computed_by(who)) == 3, lambda: cluster.remove_node(node, allow_graceful=False))
    done = run_on(cluster.address, out, SlowTools(who, seconds=0.5, together=3))
    kill.join()
    assert done.computed == len(RECORDS)
    is_whole(out, whole)


def test_a_driver_that_is_killed_is_resumed(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, who = tmp_path / "a.h5", tmp_path / "who"
    code = (
        "import sys; from pathlib import Path; from ray_extraction import SlowTools, run_on; "
        "run_on(sys.argv[1], Path(sys.argv[2]), SlowTools(Path(sys.argv[3]), seconds=0.5))"
    )
    command = [sys.executable, "-c", code, cluster.address, str(out), str(who)]
    driver = subprocess.Popen(command, env=environment() | ENVIRONMENT, stderr=subprocess.DEVNULL)
    folder = tmp_path / "a.h5.parts"
    when(lambda: list(folder.glob("[0-9]*.shard")), lambda: driver.send_signal(signal.SIGKILL)).join()
    assert driver.wait(30) == -9
    kept = len(list(folder.glob("[0-9]*.shard")))
    assert kept and read_token(folder)
    done = run_on(cluster.address, out, SlowTools(tmp_path / "again"), resume=True)
    assert done.computed < len(RECORDS)
    is_whole(out, whole)


def test_a_signal_stops_the_workers(tmp_path: Path, whole: Path, cluster: Any) -> None:
    out, folder = tmp_path / "a.h5", tmp_path / "a.h5.parts"
    stop = when(lambda: list(folder.glob("[0-9]*.shard")), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="images are finished and kept in .*; continue with `resume=True`"):
        run_on(cluster.address, out, SlowTools(tmp_path / "who", seconds=0.5))
    stop.join()
    assert not (folder / "workers.json").exists()
    run_on(cluster.address, out, SlowTools(tmp_path / "again"), resume=True)
    is_whole(out, whole)


def test_ray_does_not_keep_its_signal_handler(cluster: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connect(cluster.address, "cpu"):
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("address", ["", "here", "a b:1", "host:0", "host:99999", "ray://host:10001", "http://host:80"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match=f"^`ray` {address}: "):
        check_address(address)


def test_what_does_not_answer_or_has_no_gpu(cluster: Any) -> None:
    for address, device, says in [
        ("127.0.0.1:9", None, r"`ray` 127.0.0.1:9: does not answer \(.*\); check the address"),
        (cluster.address, "cuda", "`device` cuda: the Ray cluster .* has no GPU"),
        (cluster.address, "cuda:1", "`device` cuda:1: with `ray` each worker has a GPU of its own"),
    ]:
        with pytest.raises(InputError, match=says), connect(address, device):
            pass


def test_commands_with_a_detector(
    tmp_path: Path, cluster: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts, and a worker on the cluster, give the store and the AP of one process, to the bit."""
    signal.alarm(240)  # each worker imports torch, so there is one at a time
    slots = Cluster.slots
    monkeypatch.setattr(Cluster, "slots", lambda self: dict([*slots(self).items()][:1]))
    folder, given = DetectorFolder(tmp_path / "d", 70), ("--regions", "annotations")  # three shards
    plain, parts, on_ray = (tmp_path / name for name in ("plain.h5", "parts.h5", "ray.h5"))
    for out, *more in [
        (plain,),
        (parts, "--part", "2/2"),
        (parts, "--part", "1/2"),
        (on_ray, "--ray", cluster.address),
    ]:
        done = folder.extract(out, *given, *more)
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
