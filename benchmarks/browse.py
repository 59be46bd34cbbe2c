"""Benchmarks refdet browse on a synthetic store of real size: startup, first view, thumbnails, searches and memory.

Also benchmarks refdet report on the same store: time, memory and the size of the page.

    python benchmarks/browse.py [--json] [--images 28000] [--folder DIR]

The store has 100 regions per image, with masks and a narrow feature, since neither command reads features. For 28,000
images there are 50,000 refs with 150,000 sentences. Views are requested as by a browser, over six connections, before
and after the server has indexed all regions in the background.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from refdet import store
from refdet.structures.regions import Regions

HEIGHT, WIDTH, REGIONS, FEATURE = 480, 640, 100, 32
DISTINCT = 50  # different images and sets of regions; the others repeat them, so that drawing is fast
REFS, SENTENCES = 50 / 28, 3  # refs per image, sentences per ref
WORDS = [
    "man", "woman", "boy", "girl", "dog", "cat", "left", "right", "red", "blue", "green", "white", "black",
    "standing", "sitting", "holding", "tall", "small", "front", "back", "middle", "table", "chair", "car", "bus",
    "horse", "shirt", "hat", "pizza", "plate", "the", "a", "in", "on", "of", "with", "near", "behind",
]  # fmt: skip
PROVENANCE = {"source": "drawn", "source_sha256": "0" * 64, "images": 1, "annotations": 1,
              "image_ids_sha256": "1" * 64, "excluded": {}, "weights": None, "note": ""}  # fmt: skip
SPLITS = ["train"] * 17 + ["val", "testA", "testB"]  # of twenty images, about as in RefCOCO
CONNECTIONS, PAGES, SEARCHES = 6, 15, 30


def prepare(folder: Path, images: int) -> None:
    """Draw the files, unless an earlier run has; exits with a message if that run had another number of images."""
    if not (folder / "refer").exists():
        draw(folder, images)
        return
    with store.open(folder / "s.h5") as reader:
        found = len(reader.image_ids)
    if found != images:
        raise SystemExit(f"error: --folder {folder}: holds {found} images, not {images}; use --images {found}")


def draw(folder: Path, images: int) -> None:
    """Write the store, its images and its refs."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    mask = coco_mask.encode(np.asfortranarray((x - 300) ** 2 + (y - 200) ** 2 < 60**2, np.uint8))["counts"]
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(images)]
    rows = [store.ImageRow(i, name, HEIGHT, WIDTH, "", REGIONS, REGIONS * len(mask)) for i, name in enumerate(names)]
    header = store.Header([{"id": i, "name": f"category {i}"} for i in range(1, 81)], "", PROVENANCE, {})
    low = rng.uniform(0, (WIDTH, HEIGHT), (DISTINCT, REGIONS, 2))
    boxes = np.concatenate((low, (low + (WIDTH, HEIGHT)) / 2), axis=2).astype(np.float32)
    scores = rng.random((DISTINCT, REGIONS), np.float32)
    categories = rng.integers(1, 81, (DISTINCT, REGIONS))
    features = rng.random((DISTINCT, REGIONS, FEATURE), np.float32)
    with store.create(folder / "s.h5", header, store.Columns({"fc7": (FEATURE,)}, masks=True), rows) as writer:
        for i, name in enumerate(names):
            k = i % DISTINCT
            detections = (boxes[k], scores[k], categories[k])
            writer.put(
                Regions(i, name, HEIGHT, WIDTH, *detections, masks=(mask,) * REGIONS, features={"fc7": features[k]})
            )
    (folder / "images").mkdir()
    for i, name in enumerate(names):
        path = folder / "images" / name
        if i < DISTINCT:
            coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8))
            coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=92)
        else:
            path.hardlink_to(folder / "images" / names[i % DISTINCT])
    _refs(folder / "refer" / "refcoco", names)


def _refs(folder: Path, names: list[str]) -> None:
    rng = random.Random(0)
    refs, annotations = [], []
    for k in range(int(len(names) * REFS)):
        i = k % len(names)
        x, y = rng.uniform(0, WIDTH * 0.7), rng.uniform(0, HEIGHT * 0.7)
        box = [x, y, rng.uniform(10, WIDTH * 0.3), rng.uniform(10, HEIGHT * 0.3)]
        category = rng.randint(1, 80)
        annotations.append({"id": k, "image_id": i, "category_id": category, "bbox": box, "area": box[2] * box[3],
                            "iscrowd": 0, "segmentation": [[x, y, x + 9, y, x + 9, y + 9]]})  # fmt: skip
        texts = [" ".join(rng.choices(WORDS, k=4)) for _ in range(SENTENCES)]
        sentences = [{"sent_id": 3 * k + n, "sent": s, "raw": s, "tokens": s.split()} for n, s in enumerate(texts)]
        refs.append({"ref_id": k, "ann_id": k, "image_id": i, "category_id": category, "file_name": names[i],
                     "split": SPLITS[i % len(SPLITS)], "sentences": sentences,
                     "sent_ids": [s["sent_id"] for s in sentences]})  # fmt: skip
    images = [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(names)]
    categories = [{"id": i, "name": f"category {i}", "supercategory": ""} for i in range(1, 81)]
    folder.mkdir(parents=True)
    data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


class Browser:
    """Requests views as a browser does."""

    def __init__(self, address: str) -> None:
        self.parts = urlsplit(address)
        self.pool = ThreadPoolExecutor(CONNECTIONS)
        self.cookie = self.folder = ""

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(str(self.parts.hostname), self.parts.port, timeout=60)
        connection.request("GET", self.folder + path, headers={"Cookie": self.cookie})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status} {body[:200]!r}")
        if given := answer.headers["Set-Cookie"]:
            self.cookie, folder, *_ = given.split("; ")
            self.folder = folder.removeprefix("Path=").rstrip("/")
        return body

    def first_view(self) -> None:
        """Request the page, its scripts and the first thumbnails."""
        self.get("/?" + self.parts.query)
        scripts = ("main", "grid", "single", "state", "dom", "colors", "viewer", "rle")
        list(self.pool.map(self.get, [f"/static/{name}.js" for name in scripts] + ["/static/page.css"]))
        self.get("/api/about")
        self.page("show=images")

    def page(self, filters: str) -> None:
        """Request a list of 60 items and their thumbnails."""
        items = json.loads(self.get(f"/api/items?{filters}&limit=60"))["items"]
        list(self.pool.map(self.get, [f"/thumbnail/{item['position']}" for item in items]))

    def wait_for_index(self) -> None:
        while json.loads(self.get("/api/status"))["index"]["stage"]:
            time.sleep(0.2)


def elapsed_ms(action: Callable[[], object]) -> float:
    """Wall time of an action in milliseconds."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1000


def time_actions(name: str, server_pid: int, actions: list[Callable[[], object]]) -> dict[str, float]:
    """Median and maximum wall time of actions, and the server's CPU time per action, in milliseconds.

    CPU time, unlike wall time, hardly depends on other programs on the machine.
    """
    before, times = cpu_ms(server_pid), [elapsed_ms(action) for action in actions]
    row = {f"{name}_ms": statistics.median(times), f"{name}_cpu_ms": (cpu_ms(server_pid) - before) / len(actions)}
    if len(actions) > 1:
        row[f"{name}_slowest_ms"] = max(times)
    return row


@contextmanager
def server(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a server with its output in a pipe; ends it after the block, also if the block fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def measure(folder: Path, images: int, refs: bool) -> dict[str, float]:
    """Start the server and time its views."""
    command = [sys.executable, "-m", "refdet", "browse", str(folder / "s.h5"), "--images", str(folder / "images"),
               "--port", "0"]  # fmt: skip
    if refs:
        command += ["--refer-root", str(folder / "refer"), "--dataset", "refcoco", "--split-by", "unc"]
    start = time.perf_counter()
    with server(command) as process:
        assert process.stdout is not None
        browser = Browser(process.stdout.readline().strip())  # the first line is the address
        times = {"start_ms": (time.perf_counter() - start) * 1000, "start_cpu_ms": cpu_ms(process.pid)}
        times |= time_actions("first_view", process.pid, [browser.first_view])
        times["start_rss_mb"] = rss_mb(process.pid)
        times |= time_actions("index", process.pid, [browser.wait_for_index])
        times["index_rss_mb"] = rss_mb(process.pid)
        rng = random.Random(1)
        show = "refs" if refs else "images"
        pages = [f"show={show}&offset={rng.randrange(images - 60)}" for _ in range(PAGES)]
        times |= time_actions("page_of_60", process.pid, [partial(browser.page, filters) for filters in pages])
        sorts = [f"/api/items?show={show}&sort={order}" for order in ("iou", "score", "regions") * 3]
        times |= time_actions("sorted_list", process.pid, [partial(browser.get, path) for path in sorts])
        if refs:
            words = [f"{rng.choice(WORDS)}%20{rng.choice(WORDS)[:3]}" for _ in range(SEARCHES)]
            searches = [f"/api/items?show=refs&q={text}" for text in words]
            times |= time_actions("search", process.pid, [partial(browser.get, path) for path in searches])
        times["end_rss_mb"] = rss_mb(process.pid)
    return times


def measure_report(folder: Path) -> dict[str, float]:
    """Benchmark refdet report on the store and its refs."""
    out = folder / "report.html"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "refdet", "report", "--store", str(folder / "s.h5"), "--images",
               str(folder / "images"), "--refer-root", str(folder / "refer"), "--dataset", "refcoco", "--split-by",
               "unc", "--out", str(out)]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("refdet report failed")
    return {
        "report_s": time.perf_counter() - start,
        "report_cpu_s": used.ru_utime + used.ru_stime,
        "report_peak_rss_mb": used.ru_maxrss / 1e3,
        "report_kb": out.stat().st_size / 1e3,
    }


def cpu_ms(pid: int) -> float:
    """CPU time of a process so far in milliseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, default=28_000)
    parser.add_argument(
        "--folder", type=Path, help="folder for the synthetic files, reused by later runs; temporary by default"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, options.images)
        results = {name: measure(folder, options.images, name == "with refs") for name in ("store alone", "with refs")}
        results["report"] = measure_report(folder)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name, row in results.items():
        print(f"{options.images} images, {name}")
        for key, value in row.items():
            print(f"  {key:24} {value:10.0f}")


if __name__ == "__main__":
    main()
