"""Training: a recipe, an instances file and images make a run directory."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from refdet import checkpoint
from refdet.atomic import atomic_path
from refdet.checkpoint import Meta
from refdet.data.batches import Batch, TrainingBatches
from refdet.data.coco import CocoIndex
from refdet.data.image_orientation import OrientationNote
from refdet.data.images import ImageSource
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import usable_device
from refdet.errors import InputError, WorkError
from refdet.pretrained import difference, load_pretrained
from refdet.provenance import Provenance, file_sha256
from refdet.recipe import Recipe
from refdet.schedule import learning_rate, momentum_of, optimiser, restore_momentum, set_rate
from refdet.trained import load_weights, without_memory
from refdet.training_state import check_momentum, read_state

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Summary:
    """How a run went."""

    steps: int
    seconds: float
    images_per_second: float
    loss: float | None  # mean over the last steps logged; None if there was nothing left to do


def train(
    recipe: Recipe,
    instances: Path,
    images: Path,
    out: Path,
    weights: Path | None = None,
    resume: bool = False,
    device: str | None = None,
) -> Summary:
    """Train a detector.

    Args:
        recipe: what to train; ``model.norm`` auto becomes frozen with `weights` and batch without.
        instances: the split, a COCO instances JSON.
        images: folder or zip of its images.
        out: the run directory, new unless `resume`.
        weights: run directory of a detector to start from.
        resume: go on with the run in `out`.
        device: such as "cuda"; the best there is when None.

    Raises:
        InputError: something given does not fit.
        WorkError: the loss is not finite, or the run was stopped (what was done is kept).
    """
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists; choose another, remove it, or go on with it by --resume")
    recipe = _resolved(recipe, weights)
    # without masks nothing needs a segmentation
    index = CocoIndex.load(instances, need_segmentation=recipe.model.masks)
    source = ImageSource.open(images, recipe.input.exif)
    batches = TrainingBatches(index, source, recipe)
    target = usable_device(device)
    provenance = Provenance.of_instances(index)
    if weights is not None:
        folder = checkpoint.run_directory(weights)
        provenance = provenance.with_weights(
            f"{folder.name} (sha256 {file_sha256(folder / checkpoint.MODEL)[:12]}; "
            f"{checkpoint.load_meta(folder).provenance.one_line()})"
        )
    meta = Meta(recipe, tuple(index.categories.items()), provenance, 0)
    without_memory(recipe, len(meta.categories))  # an error where it is far too large
    torch.manual_seed(recipe.train.seed)
    model = MaskRCNN(recipe, len(meta.categories)).to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if resume:
        return _resume(model, meta, batches, out, weights)
    return _begin(model, meta, batches, out, weights)


def _begin(model: MaskRCNN, meta: Meta, batches: TrainingBatches, out: Path, weights: Path | None) -> Summary:
    if weights is None and meta.recipe.model.norm == "frozen":
        raise InputError(
            f"recipe {meta.recipe.name}: model.norm=frozen keeps norms and first layers as they are, which from "
            "nothing is noise; give --weights RUN_DIR (refdet import-weights makes one of an ImageNet ResNet)"
        )
    fresh = None if weights is None else load_pretrained(model, meta, weights)
    out.mkdir(parents=True, exist_ok=True)
    return _run(model, meta, batches, out, optimiser(model, meta.recipe.train, fresh), fresh, first=0)


def _resolved(recipe: Recipe, weights: Path | None) -> Recipe:
    if recipe.model.norm != "auto":
        return recipe
    norm = "batch" if weights is None else checkpoint.load_meta(weights).recipe.model.norm
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, norm=norm))


def _resume(model: MaskRCNN, meta: Meta, batches: TrainingBatches, out: Path, weights: Path | None) -> Summary:
    """Go on with the newest state of a run; from the start if it had none yet."""
    states = sorted((out / checkpoint.STATE).glob("step-*.safetensors"))
    if not states:
        if (out / checkpoint.META).exists():
            raise InputError(f"--resume: {out} holds weights but no state/ to go on from")
        return _begin(model, meta, batches, out, weights)
    state = read_state(states[-1])
    _check_same_run(state.meta, meta, out)
    load_weights(model, state.weights, states[-1], counters=True)
    check_momentum(model, state.momentum, states[-1])
    sgd = optimiser(model, meta.recipe.train, state.fresh)
    restore_momentum(model, sgd, state.momentum)
    # the run's own provenance: it may name the weights it started from
    meta = dataclasses.replace(meta, provenance=state.meta.provenance)
    return _run(model, meta, batches, out, sgd, state.fresh, first=state.meta.step)


def _check_same_run(before: Meta, now: Meta, out: Path) -> None:
    if before.categories != now.categories:
        raise InputError(f"--resume {out}: {difference(before.categories, now.categories)}")
    if before.provenance.image_ids_sha256 != now.provenance.image_ids_sha256:
        raise InputError(f"--resume {out}: the run was started with the images of another instances file")
    if before.provenance.annotations != now.provenance.annotations:
        raise InputError(f"--resume {out}: the run was started with other annotations of these images")
    # what may change without making it another run
    free = {"workers", "save_every", "log_every"}
    for part, options in dataclasses.asdict(before.recipe).items():
        other = dataclasses.asdict(now.recipe)[part]
        if part == "name" or options == other:
            continue
        for key in options:
            if options[key] != other[key] and key not in free:
                raise InputError(
                    f"--resume {out}: {part}.{key} was {options[key]} and is now {other[key]}; "
                    "give the recipe the run was started with"
                )


def _run(
    model: MaskRCNN,
    meta: Meta,
    batches: TrainingBatches,
    out: Path,
    sgd: torch.optim.SGD,
    fresh: tuple[str, ...] | None,
    first: int,
) -> Summary:
    options, device = meta.recipe.train, next(model.parameters()).device
    if first >= options.steps:
        checkpoint.save(out, model, dataclasses.replace(meta, step=first))
        return Summary(first, 0.0, 0.0, None)
    _forget_after(out / METRICS, first)
    for left_behind in (*out.glob(".model.*"), *(out / checkpoint.STATE).glob(".step-*")):
        left_behind.unlink()  # by a run that was killed while it saved
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, options.steps),
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_sigterm,
    )
    generator = torch.Generator(device)
    started, window, losses = time.perf_counter(), time.perf_counter(), []
    step = first
    loss: float | None = None
    model.train()
    with (
        _stop_on_sigterm() as stopped,
        _frozen_objects(),
        OrientationNote(batches.source, batches.epoch_steps) as orientations,
        SummaryWriter(str(out), purge_step=first + 1 if first else None) as board,
        (out / METRICS).open("a", encoding="utf-8") as log,
        tqdm(total=options.steps, initial=first, desc="train", unit="step", dynamic_ncols=True) as bar,
    ):
        for batch in loader:
            if not isinstance(batch, Batch):
                raise type(batch)(
                    f"{batch} (training stopped at step {step}; with a good file there, go on with --resume)"
                )
            orientations.add(batch.oriented)
            # seeded by the step, so that a resumed run draws what an undisturbed one draws
            generator.manual_seed(options.seed * 1_000_003 + step)
            terms = _step(model, sgd, batch, learning_rate(step, options), options.clip_norm, generator)
            losses.append(terms)
            step += 1
            bar.update()
            if step % options.log_every == 0 or step == options.steps:
                seconds, window = time.perf_counter() - window, time.perf_counter()
                row = {k: sum(t[k] for t in losses) / len(losses) for k in terms}
                row = {"loss": sum(row.values()), **row, "lr": learning_rate(step - 1, options)}
                row["images_per_second"] = len(losses) * options.batch_size / seconds
                log.write(json.dumps({"step": step, **row}) + "\n")
                log.flush()
                for name, value in row.items():
                    board.add_scalar(f"train/{name}", value, step)
                loss = row["loss"]
                parts = " ".join(f"{name} {row[name]:.2f}" for name in terms)
                bar.set_postfix_str(f"{row['images_per_second']:.1f} images/s, loss {loss:.2f}: {parts}")
                losses = []
            stop = stopped.is_set()
            if step % options.save_every == 0 or step == options.steps or stop:
                _save(out, model, sgd, dataclasses.replace(meta, step=step), fresh)
            if stop and step < options.steps:
                raise WorkError(f"stopped by SIGTERM after step {step}, which is saved; go on with --resume")
    seconds = time.perf_counter() - started
    return Summary(step, seconds, (step - first) * options.batch_size / seconds, loss)


def _step(
    model: MaskRCNN, sgd: torch.optim.SGD, batch: Batch, rate: float, clip_norm: float, generator: torch.Generator
) -> dict[str, float]:
    """One update. Returns the terms of the loss."""
    device = generator.device
    images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)
    targets = [target.to(device) for target in batch.targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=model.recipe.train.bf16):
        losses = model.losses(images, batch.sizes, targets, generator)
    total = torch.stack(list(losses.values())).sum()
    terms = {name: value.item() for name, value in losses.items()}
    if not all(map(math.isfinite, terms.values())):
        bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
        raise _not_finite(f"loss is not finite ({bad})", batch)
    set_rate(sgd, rate)
    sgd.zero_grad(set_to_none=True)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
    if not norm.isfinite():
        raise _not_finite("gradient is not finite", batch)
    sgd.step()
    return terms


def _not_finite(what: str, batch: Batch) -> WorkError:
    return WorkError(
        f"the {what} on images {', '.join(map(str, batch.image_ids))}; "
        "lower train.lr, or look at these images; the last checkpoint is kept"
    )


def _save(out: Path, model: MaskRCNN, sgd: torch.optim.SGD, meta: Meta, fresh: tuple[str, ...] | None) -> None:
    """Write the state, then the model; then remove older states. The state alone is enough to go on."""
    folder = out / checkpoint.STATE
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"momentum/{name}": t for name, t in momentum_of(model, sgd).items()}
    path = folder / f"step-{meta.step:08d}.safetensors"
    checkpoint.write_tensors(path, tensors, {"meta": json.dumps(meta.to_json()), "fresh": json.dumps(fresh)})
    checkpoint.save(out, model, meta)
    for old in folder.glob("step-*.safetensors"):
        if old != path:
            old.unlink()


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the rows that a resumed run writes again."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_path(metrics) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


@contextmanager
def _frozen_objects() -> Iterator[None]:
    """Hide what there is from the garbage collector, whose walks would copy it into every worker process."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _ignore_sigterm(_: int) -> None:
    """For worker processes: a scheduler signals them all, and the run needs them until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that a scheduler's notice becomes a clean save."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
