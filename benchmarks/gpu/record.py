"""Writes the results of a GPU check into docs/performance.md, between its markers.

    python benchmarks/gpu/record.py build/gpu-check [--docs docs/performance.md]

Only results from a GPU are written; a rehearsal is refused. Steps that did not finish are named, and missing rows are
left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from results import read_group

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
GROUPS = ("env", "tests", "parity", "ops", "extraction", "training")
Tree = dict[str, dict[str, Any]]


def number(value: Any) -> str:
    """A number with two or three significant digits, or all of a larger one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table, or nothing without rows."""
    lines = [f"| {' | '.join(number(cell) for cell in row)} |" for row in rows]
    return ["", f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines, ""] if lines else []


def machine(tree: Tree) -> list[str]:
    """The GPU, the versions, and the throughput and bandwidths measured on the machine."""
    env, build = tree["env"], tree.get("build", {})
    versions = env.get("versions", {})
    commit = f", commit {env['commit']}" if env.get("commit") else ""
    line = (
        f"`make gpu-check` on {env['date']}{commit}: {env['card']}, "
        f"{env.get('gpu_memory_gib', 0):.0f} GiB, {env.get('cores')} CPU cores; "
        f"Python {versions.get('python')}, torch {versions.get('torch')}, torchvision {versions.get('torchvision')}, "
        f"CUDA {versions.get('cuda')}, cuDNN {versions.get('cudnn')}."
    )
    rows = [
        ("bfloat16 matrix products, TFLOP/s", env.get("product_tflops_bf16")),
        ("float32 products (IEEE), TFLOP/s", env.get("product_tflops_float32")),
        ("copy within the GPU's memory, read and written, TB/s", env.get("copy_tb_per_s")),
        ("copy to the host, pinned, GB/s", env.get("to_host_gb_per_s")),
        ("copy to the GPU, pinned, GB/s", env.get("to_device_gb_per_s")),
        ("disk, written and synced, MB/s", env.get("disk_write_mb_per_s")),
        ("building the kernels, s", build.get("build_seconds")),
    ]
    return [line, *table(("this machine", "measured"), [row for row in rows if row[1] is not None])]


def steps(tree: Tree) -> list[str]:
    """The result of each step, with the names of failed checks."""
    rows = []
    for name, values in tree.items():
        checks = values.get("checks", [])
        failed = [check["name"] for check in checks if not check["passed"]]
        tests = values.get("tests")
        notes = (
            [f"{tests['passed']} tests passed, {tests['failed']} failed, {tests['skipped']} skipped"] if tests else []
        )
        notes += [f"{len(checks) - len(failed)} of {len(checks)} checks"] if checks else []
        notes += [f"failed: {'; '.join(failed)}"] if failed else []
        notes += [str(values["skipped"])] if "skipped" in values else []
        rows.append((name, values.get("status", "lost"), values.get("seconds", ""), ", ".join(notes)))
    return table(("step", "result", "seconds", ""), rows)


def goals(tree: Tree) -> list[str]:
    rows = [
        (goal["name"], goal["at_least"], goal["value"], "yes" if goal["reached"] else "no")
        for values in tree.values()
        for goal in values.get("goals", [])
    ]
    return table(("", "goal", "measured", "reached"), rows)


def parity(tree: Tree) -> list[str]:
    rows = [
        (check["name"], check["limit"], check["value"], "yes" if check["passed"] else "**no**")
        for step in ("network_parity", "runs")
        for check in tree.get(step, {}).get("checks", [])
        if "limit" in check
    ]
    return table(("GPU vs. CPU", "limit", "measured", "passed"), rows)


def extraction(tree: Tree) -> list[str]:
    values = tree.get("extraction", {})
    rows = [
        (name, found["images"], found["images_per_second"], found["regions_per_image"], found.get("peak_gib", ""))
        for name, found in values.items()
        if isinstance(found, dict) and "images_per_second" in found and "warm-up" not in name
    ]
    return table(("extraction to the finished file", "images", "images/s", "regions per image", "peak GiB"), rows)


def training(tree: Tree) -> list[str]:
    rows = [
        (name.replace("_", ", "), found["images_per_second"], found["steps"], found.get("peak_gib", ""))
        for name, found in tree.get("training", {}).items()
        if isinstance(found, dict) and "images_per_second" in found
    ]
    return table(("training, bfloat16", "images/s", "steps", "peak GiB"), rows)


def profile(tree: Tree) -> list[str]:
    """The profile, with the most important rows first."""
    values = tree.get("profile_gpu", {})
    names = {
        "extraction_share_elementwise": "extraction: share of element-wise passes",
        "training_share_elementwise": "training: share of element-wise passes",
        "new_input_size_ms": "a new input size costs the backbone, ms (batch of 8)",
        "known_input_size_ms": "a known one takes, ms",
        "new_portrait_size_ms": "a new portrait size costs it, ms",
        "known_portrait_size_ms": "a known one takes, ms",
        "new_portrait_size_with_products_ms": "a new portrait size costs it without cuDNN's fusion, ms",
        "known_portrait_size_with_products_ms": "a known one takes, ms",
        "new_number_of_rois_ms": "a new number of RoIs costs conv5, ms",
        "known_number_of_rois_ms": "a known one takes, ms",
        "new_training_batch_ms": "a training batch of new shapes costs, ms",
        "extraction_ms": "a batch of 16 images, ms",
        "training_ms": "a training step of 16 images, ms",
        "extraction_gpu_busy": "extraction: share of the time that the GPU works",
        "training_gpu_busy": "training: share of the time that the GPU works",
        "extraction_launches": "extraction: kernels and copies per batch",
        "training_launches": "training: kernels and copies per step",
        "extraction_host_waits": "extraction: host synchronizations per batch",
        "training_host_waits": "training: host synchronizations per step",
    }
    lines = table(("profile", ""), [(text, values[name]) for name, text in names.items() if name in values])
    for part in ("extraction", "training"):
        found = values.get(part, {})
        total = found.get("milliseconds", 0)
        rows = [(kind, ms, f"{ms / total:.1%}") for kind, ms in found.get("milliseconds_by_kind", {}).items()]
        lines += table((f"{part}: kind of kernel", "ms", "share"), rows)
    return lines


def kernels(tree: Tree) -> list[str]:
    lines: list[str] = []
    for name, rows in tree.get("kernels", {}).items():
        if isinstance(rows, list) and rows and "refdet_ms" in rows[0]:
            lines += table(("`" + name + "`: " + next(iter(rows[0])), *list(rows[0])[1:]), [r.values() for r in rows])
    return lines


def rendered(folder: Path) -> str:
    """The text between the markers. Exits with a message if there is nothing to record."""
    tree: Tree = {}
    for group in GROUPS:
        try:
            tree |= read_group(folder, group)
        except json.JSONDecodeError as error:
            raise SystemExit(f"error: {folder / group}.json: not JSON ({error})") from None
    env = tree.get("env", {})
    if env.get("device") == "cpu":
        raise SystemExit(f"error: {folder}: a rehearsal on the CPU; only measurements of a GPU are recorded")
    if "card" not in env:
        raise SystemExit(f"error: {folder}: no results of make gpu-check on a GPU (env.json has no card)")
    parts = (machine, goals, steps, parity, extraction, training, profile, kernels)
    return "\n".join(line for part in parts for line in part(tree)).strip()


def replace(text: str, new: str) -> str:
    """Replace the text between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: the page needs the lines {BEGIN} and {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    options.docs.write_text(replace(options.docs.read_text(), rendered(options.folder)))
    print(f"recorded in {options.docs}")


if __name__ == "__main__":
    main()
