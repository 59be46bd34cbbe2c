"""The training loop: steps, checkpoints and logs, on inputs that `refdet.training.train` has checked."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from refdet.config.recipe import Recipe
from refdet.data.coco import TrainingObjects
from refdet.data.image_orientation import OrientationNote
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import Batch, TrainingBatches
from refdet.detector import checkpoint
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.detector.loading import without_memory
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import arithmetic, described, usable_device, usable_precision
from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.files.lock import alone
from refdet.files.progress import progress_bar
from refdet.files.short_text import counted
from refdet.interrupt import Stop, StopRequested
from refdet.ops._library import kernels_state, warn_of_plain_pytorch
from refdet.structures.provenance import Provenance, file_sha256
from refdet.training import state
from refdet.training.batch_workers import batches_ahead, check_shared_memory
from refdet.training.metrics_log import MetricsLog
from refdet.training.optim import GuardedSGD, learning_rate, optimiser
from refdet.training.pretrained import load_pretrained
from refdet.training.run_card import write_card
from refdet.training.run_folder import BUSY, LOCK, states
from refdet.training.saved_run import SavedRun
from refdet.training.step import StartedStep, in_bfloat16, start_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Result of a training.

    Attributes:
        steps: number of steps that are done.
        seconds: wall time of this run.
        images_per_second: mean throughput of this run.
        loss: mean over the last logging interval; None if all steps were already done.
    """

    steps: int
    seconds: float
    images_per_second: float
    loss: float | None


@dataclass(frozen=True)
class TrainingInputs:
    """Checked inputs of a training, made by `refdet.training.train.train`.

    Attributes:
        recipe: the recipe, its norm frozen or batch.
        objects: annotated objects and their instances file.
        source: folder or zip of the images.
        provenance: of the instances file.
        out: the run directory.
        weights: run directory of a detector to start from, or None.
        before: the state in `out` to resume from, or None.
        data_sha256: `TrainingObjects.sha256` of the objects.
    """

    recipe: Recipe
    objects: TrainingObjects
    source: ImageSource
    provenance: Provenance
    out: Path
    weights: Path | None
    before: SavedRun | None
    data_sha256: str


def train_on(given: TrainingInputs, device: str | None = None) -> Summary:
    """Train a detector on checked inputs."""
    target, recipe, out = usable_device(device), given.recipe, given.out
    index = given.objects.index
    batches = TrainingBatches(index, given.source, recipe, given.objects)
    provenance = given.provenance
    if given.weights is not None:
        folder = checkpoint.run_directory(given.weights)
        provenance = provenance.with_weights(
            f"{folder.name} (sha256 {file_sha256(folder / checkpoint.MODEL)[:12]}; "
            f"{checkpoint.load_meta(folder).provenance.one_line()})"
        )
    meta = CheckpointMetadata(recipe, tuple(index.categories.items()), provenance, 0)
    without_memory(recipe, len(meta.categories))  # raises InputError if it is far too large
    torch.manual_seed(recipe.train.seed)
    model = MaskRCNN(recipe, len(meta.categories)).to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = fresh = None
    if given.before is not None:
        before = state.newest(out)
        if (before.path, before.meta) != (given.before.path, given.before.meta):
            raise _written_meanwhile(out)
        fresh = before.fresh
        # the run's own provenance, which may name the weights it started from
        meta = dataclasses.replace(meta, provenance=before.meta.provenance, step=before.meta.step)
    elif given.weights is not None:
        fresh = load_pretrained(model, meta.categories, given.weights)
    sgd = optimiser(model, recipe.train, fresh)
    if before is not None:
        before.restore(model, sgd)
    start = f"resumes from step {meta.step}" if before else f"starts from {meta.provenance.weights or 'random weights'}"
    # weights, and a state of weights and momentum; each exists twice while it is replaced
    most = 6 * sum(value.numel() * value.element_size() for value in model.state_dict().values())
    warn_of_plain_pytorch(target)
    products = usable_precision("tf32" if recipe.train.tf32 else "float32", target)  # of what is not bfloat16
    log.warning(
        "train: %s, %s, %s; %s of %s; recipe %s, %s; %s, batch size %d; up to %d MiB on disk",
        described(device),
        "bfloat16" if in_bfloat16(model, target) else products,
        kernels_state(),
        counted(len(batches.records), "image"),
        index.path.name,
        recipe.name,
        start,
        counted(recipe.train.steps, "step"),
        recipe.train.batch_size,
        -(-most // 2**20),
    )
    check_shared_memory(batches, recipe.train.workers)
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, LOCK, BUSY):
        if states(out)[-1:] != ([before.path] if before else []):
            raise _written_meanwhile(out)
        state.clean(out)
        with arithmetic(products):
            return _Training(model, meta, batches, out, sgd, fresh, given.data_sha256).run()


def _written_meanwhile(out: Path) -> InputError:
    return InputError(f"{out}: another process was writing it just now; run it again")


@dataclass
class _Training:
    """A running training."""

    model: MaskRCNN
    meta: CheckpointMetadata  # of the last save
    batches: TrainingBatches
    out: Path
    sgd: GuardedSGD
    fresh: tuple[str, ...] | None
    data_sha256: str
    started: StartedStep | None = None  # the step whose losses were not read yet
    losses: list[dict[str, float]] = field(default_factory=list)  # of the steps since the last line of the log

    def run(self) -> Summary:
        """Run the remaining steps."""
        options, first, device = self.meta.recipe.train, self.meta.step, next(self.model.parameters()).device
        if first >= options.steps:
            log.warning("note: `resume`: all %d steps are done; increase train.steps to extend the run", first)
            checkpoint.save(self.out, self.model, self.meta)
            return Summary(first, 0.0, 0.0, None)
        generator = torch.Generator()  # on the CPU, so that samples are the same on every device
        step, loss = first, None
        steps = range(first, options.steps)
        self.model.train()
        with (
            Stop.watching() as stop,
            _frozen_objects(),
            OrientationNote(self.batches.source, self.batches.epoch_steps) as orientations,
            MetricsLog(self.out, first) as metrics,
            progress_bar(options.steps, "train", "step", initial=first) as bar,
            batches_ahead(self.batches, steps, options.workers, device, stop) as ahead,
        ):
            started = window = time.perf_counter()
            while step < options.steps:
                batch = self._next(ahead, step, stop)
                orientations.add(batch.oriented)
                # seeded by the step, so that a resumed run samples like an uninterrupted one
                generator.manual_seed(options.seed * 1_000_003 + step)
                rate = learning_rate(step, options)
                started_now = start_step(self.model, self.sgd, batch, rate, options.max_grad_norm, generator)
                del batch  # frees its shared memory for the next
                self._read()  # the step before, while a GPU computes this one
                self.started = started_now
                step += 1
                bar.update()
                if step % options.log_every == 0 or step == options.steps:
                    self._read()
                    seconds, window = time.perf_counter() - window, time.perf_counter()
                    row = {k: sum(terms[k] for terms in self.losses) / len(self.losses) for k in self.losses[0]}
                    parts = " ".join(f"{name} {value:.2f}" for name, value in row.items())
                    row = {"loss": sum(row.values()), **row, "lr": rate}
                    row["images_per_second"] = len(self.losses) * options.batch_size / seconds
                    metrics.write(step, row)
                    loss = row["loss"]
                    speed = f"{row['images_per_second']:.1f} images/s, loss {loss:.2f}: {parts}"
                    bar.set_postfix_str(speed, refresh=False)
                    self.losses = []
                if step % options.checkpoint_interval == 0 or step == options.steps:
                    self._save(step)
        seconds = time.perf_counter() - started
        return Summary(step, seconds, (step - first) * options.batch_size / seconds, loss)

    def _next(self, ahead: Iterator[Batch], step: int, stop: Stop) -> Batch:
        """The batch of a step; the steps so far are saved before an error is raised."""
        try:
            if stop.requested:
                raise StopRequested
            return next(ahead)
        except StopRequested:
            raise Interrupted(f"stopped by {stop.name} {self._keep(step)}") from None
        except RuntimeFailure as error:
            raise RuntimeFailure(f"{error} (training stopped {self._keep(step)})") from error
        except InputError as error:
            raise InputError(f"{error} (training stopped {self._keep(step, 'replace the file and ')})") from error

    def _keep(self, step: int, first: str = "") -> str:
        """Save a step; returns the end of a message, with what to do ``first`` before the run is resumed."""
        if step == 0:
            return f"before the first step; {first}start again with `resume=True`"
        if step != self.meta.step:
            self._save(step)
        return f"after step {step}, which is saved; {first}continue with `resume=True`"

    def _read(self) -> None:
        """Read the losses of the step whose losses were not read yet. RuntimeFailure if they are not finite."""
        if self.started is not None:
            self.losses.append(self.started.losses())
            self.started = None

    def _save(self, step: int) -> None:
        self._read()  # weights are saved only once the losses of all their steps were read
        self.meta = dataclasses.replace(self.meta, step=step)
        state.save(self.out, self.model, self.sgd, self.meta, self.fresh, self.data_sha256)
        write_card(self.out, self.meta)


@contextmanager
def _frozen_objects() -> Iterator[None]:
    """Hide existing objects from the garbage collector, which would copy their memory pages in every worker."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
