"""The training loop: steps, checkpoints and logs, on inputs that `refdet.training.train` has checked."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from refdet.data.image_orientation import OrientationNote
from refdet.data.training_batches import Batch, TrainingBatches
from refdet.detector import checkpoint
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.detector.loading import build_on_meta
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import describe_device, float32_arithmetic, resolve_device, supported_precision
from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.files.progress import progress_bar
from refdet.files.short_text import format_count
from refdet.interrupt import Stop, StopRequested
from refdet.ops._library import describe_kernels, warn_without_cuda_kernels
from refdet.training import state
from refdet.training.batch_workers import check_shared_memory, freeze_gc, prefetch_batches
from refdet.training.clock import TrainingClock
from refdet.training.ema import WeightAverage
from refdet.training.inputs import TrainingInputs
from refdet.training.metrics_log import MetricsLog
from refdet.training.metrics_rows import read_rows
from refdet.training.optim import GuardedSGD, build_optimizer, learning_rate, momentum_of
from refdet.training.pretrained import load_pretrained, with_pretrained_weights
from refdet.training.processes import LostProcess, TrainingProcess
from refdet.training.run_card import write_card
from refdet.training.run_folder import concurrent_write_error, lock_run, state_paths
from refdet.training.saved_run import SavedRun
from refdet.training.selection import with_last_step_selection
from refdet.training.start_lines import describe_run, start_lines
from refdet.training.step import Passes, PendingStep, start_step, step_seed, uses_bfloat16
from refdet.training.summary import Summary
from refdet.training.validation import ValidationData, is_due, validations_after
from refdet.training.validator import Validator, format_ap

log = logging.getLogger(__name__)


def train_on(inputs: TrainingInputs, device: str | None = None, process: TrainingProcess | None = None) -> Summary:
    """Train a detector on checked inputs; raises the errors of `refdet.training.train.train`.

    Args:
        inputs: the inputs, the same in all processes.
        device: device given for all processes; None for a GPU if there is one.
        process: this process of the run; by default the only one.
    """
    process = process or TrainingProcess()
    target, recipe, out = resolve_device(process.select_device(device)), inputs.recipe, inputs.out
    index = inputs.objects.index
    batches = TrainingBatches(
        index, inputs.source, recipe, inputs.objects, rank=process.rank, world_size=process.world_size
    )
    provenance = inputs.provenance
    if inputs.weights is not None:
        provenance = with_pretrained_weights(provenance, inputs.weights)
    meta = CheckpointMetadata(recipe, tuple(index.categories.items()), provenance, 0)
    build_on_meta(recipe, len(meta.categories))  # raises InputError if the network is far too large
    torch.manual_seed(recipe.train.seed)
    model = MaskRCNN(recipe, len(meta.categories)).to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    saved_state = _read_state(inputs) if process.is_first else None  # `Passes` copies it to the other processes
    new_prefixes = None
    if inputs.saved_run is not None:
        new_prefixes, meta = inputs.saved_run.new_prefixes, _meta_of_saved_run(inputs, inputs.saved_run, meta)
    elif inputs.weights is not None:
        new_prefixes = load_pretrained(model, meta.categories, inputs.weights)
    validated_on = None if inputs.validation is None else inputs.validation.provenance
    meta = dataclasses.replace(meta, provenance=with_last_step_selection(meta.provenance, out, validated_on))
    sgd = build_optimizer(model, recipe.train, new_prefixes)
    average = WeightAverage(model, recipe.train.ema) if recipe.train.ema and process.is_first else None
    if saved_state is not None:
        saved_state.restore(model, sgd, average)
    warn_without_cuda_kernels(target)
    # of operations that do not run in bfloat16
    precision = supported_precision("tf32" if recipe.train.tf32 else "float32", target)
    arithmetic = "bfloat16" if uses_bfloat16(model, target) else precision
    disk_bytes = state.max_disk_bytes(model, recipe.train, validated=inputs.validation is not None)
    log.warning(
        "train: %s, %s, %s; %s",
        describe_device(device),
        arithmetic,
        describe_kernels(),
        describe_run(inputs, meta, len(batches.records), disk_bytes),
    )
    check_shared_memory(batches, recipe.train.workers, process.local_world_size)
    process.check_same({"the initial weights": meta.provenance.weights})
    with lock_run(out) if process.is_first else nullcontext():
        if process.is_first:
            if state_paths(out)[-1:] != ([saved_state.path] if saved_state else []):
                raise concurrent_write_error(out)
            state.clean(out)
        process.set_up(target, out)
        for line in start_lines(recipe, process):
            log.warning("%s", line)
        with float32_arithmetic(precision):
            return _Training(
                model, meta, batches, out, sgd, new_prefixes, inputs.data_sha256, process, average, inputs.validation
            ).run()


def _read_state(inputs: TrainingInputs) -> state.State | None:
    """Read the state to resume from, if any; raises InputError if it is no longer that of the checked inputs."""
    if inputs.saved_run is None:
        return None
    saved_state = state.newest(inputs.out)
    if (saved_state.path, saved_state.meta) != (inputs.saved_run.path, inputs.saved_run.meta):
        raise concurrent_write_error(inputs.out)
    return saved_state


def _meta_of_saved_run(inputs: TrainingInputs, saved_run: SavedRun, meta: CheckpointMetadata) -> CheckpointMetadata:
    """Give `meta` the step and the provenance of a run that is resumed, which may name the weights it started from."""
    saved_weights = saved_run.meta.provenance.weights
    if inputs.weights is not None and meta.provenance.weights != saved_weights:
        log.warning(
            "note: `weights` %s: not loaded, as the run in %s is resumed, which started from %s",
            inputs.weights,
            inputs.out,
            saved_weights or "random weights",
        )
    provenance = saved_run.provenance_with_data(inputs.provenance)
    return dataclasses.replace(meta, provenance=provenance, step=saved_run.meta.step)


@dataclass
class _Training:
    """A training run in progress."""

    model: MaskRCNN
    meta: CheckpointMetadata  # of the last save, or of the state from which the run resumes
    batches: TrainingBatches
    out: Path
    sgd: GuardedSGD
    new_prefixes: tuple[str, ...] | None
    data_sha256: str
    process: TrainingProcess
    average: WeightAverage | None  # only in the first process
    validation: ValidationData | None
    validator: Validator | None = None  # only in the first process
    pending_step: PendingStep | None = None  # the step whose losses have not been read yet
    losses: list[dict[str, float]] = field(default_factory=list)  # of the steps since the last logged row

    def run(self) -> Summary:
        """Run the remaining steps."""
        options, first, device = self.meta.recipe.train, self.meta.step, next(self.model.parameters()).device
        # whether a validation is missing of the step from which the run resumes
        validate_first = self.validation is not None and self.process.run_on_first(self._prepare_validation)
        if first >= options.steps and not validate_first:
            done = format_count(first, "step", "is")
            log.warning("note: `resume`: %s done; increase train.steps to extend the run", done)
            self.process.run_on_first(lambda: checkpoint.save(self.out, self.average or self.model, self.meta))
            return Summary(first, 0.0, 0.0, None)
        self.process.convert_sync_batchnorm(self.model, device)
        passes = Passes(self.model, self.process, list(momentum_of(self.model, self.sgd).values()))
        generator = torch.Generator()  # on the CPU, so that samples are the same on every device
        step, loss, ap_text = first, None, ""
        steps = range(first, options.steps)
        self.model.train()
        with (
            Stop.watch() as stop,
            freeze_gc(),
            OrientationNote(self.batches.source, self.batches.steps_per_epoch) as orientations,
            MetricsLog(self.out, first) if self.process.is_first else nullcontext() as metrics,
            progress_bar(options.steps, "train", "step", initial=first, disable=not self.process.is_first) as bar,
            prefetch_batches(self.batches, steps, options.workers, device, stop) as prefetched,
        ):
            clock = TrainingClock(first, options.steps)
            if validate_first:
                self.process.run_on_first(self._write)  # now with the validation file in its provenance
                with clock.pause(bar):
                    ap_text = self._validate(step, metrics, stop)
            while step < options.steps:
                batch = self._next(prefetched, step, stop)
                orientations.add(self._oriented_files(batch, step + 1, first))
                lr = learning_rate(step, options)
                new_step = self._start_step(step, batch, lr, generator, passes)
                del batch  # frees its shared memory
                self._read_losses()  # of the previous step, while a GPU computes this one
                self.pending_step = new_step
                step += 1
                if self.average is not None:
                    self.average.update(self.model, step)
                bar.update()
                validation_due = self.validation is not None and is_due(step, options)
                if step % options.log_every == 0 or step == options.steps:
                    row = self._take_row(lr, clock)
                    if metrics is not None:
                        metrics.write(step, row)
                    loss = row["loss"]
                    status = self._status(step, row, clock, validation_due)
                    bar.set_postfix_str(f"{ap_text}, {status}" if ap_text else status, refresh=False)
                if step % options.checkpoint_interval == 0 or step == options.steps or validation_due:
                    self._save(step)
                if validation_due:
                    with clock.pause(bar):
                        ap_text = self._validate(step, metrics, stop)
                    bar.set_postfix_str(ap_text, refresh=False)
        return Summary(step, clock.seconds, (step - first) * options.batch_size / clock.step_seconds, loss)

    def _next(self, prefetched: Iterator[Batch], step: int, stop: Stop) -> Batch:
        """Wait for the batch of a step; an error in any process is raised after the steps so far are saved."""
        try:
            return self.process.run_on_all(lambda: _next_or_interrupt(prefetched, stop))
        except Interrupted as error:
            raise Interrupted(f"{error} {self._save_before_exit(step)}") from None
        except RuntimeFailure as error:
            raise RuntimeFailure(f"{error} (training stopped {self._save_before_exit(step)})") from error
        except InputError as error:
            raise InputError(
                f"{error} (training stopped {self._save_before_exit(step, 'replace the file and ')})"
            ) from error

    def _start_step(
        self, step: int, batch: Batch, lr: float, generator: torch.Generator, passes: Passes
    ) -> PendingStep:
        """Compute a training step; if another process is lost, the steps so far are saved before the error is raised.

        Args:
            step: number of steps done.
            batch: the batch of the step.
            lr: learning rate of the step.
            generator: generator for samples, which is seeded for the step.
            passes: the passes of a step.
        """
        options = self.meta.recipe.train
        generator.manual_seed(step_seed(options.seed, step))
        torch.manual_seed(step_seed(options.seed, step))  # for dropout in a VGG's head
        try:
            with self.process.computing():
                return start_step(self.model, self.sgd, batch, lr, options.max_grad_norm, generator, passes)
        except LostProcess as error:
            passes.restore_buffers()
            raise RuntimeFailure(f"{error} (training stopped {self._save_before_exit(step)})") from error

    def _status(self, step: int, row: Mapping[str, float], clock: TrainingClock, validation_due: bool) -> str:
        """For the progress bar: speed and losses after a step, and with validations still to come the time left."""
        terms = " ".join(f"{name} {value:.2f}" for name, value in row.items() if name.startswith("loss_"))
        status = f"{row['images_per_second']:.1f} images/s, loss {row['loss']:.2f}: {terms}"
        if self.validation is None:
            return status
        validations_left = validations_after(step, self.meta.recipe.train) + validation_due
        left = clock.time_left(step, validations_left) if validations_left else ""
        return f"{left} left with {format_count(validations_left, 'validation')}, {status}" if left else status

    def _oriented_files(self, batch: Batch, step: int, first: int) -> dict[str, int]:
        """EXIF orientations to report after a step, counted from 1, in a run that resumed from `first`, by file name.

        They are those of the batch; but at the end of the first epoch and in the last step, when `OrientationNote` logs
        them, those of all files that any process has seen.
        """
        if step - first != self.batches.steps_per_epoch and step != self.meta.recipe.train.steps:
            return batch.orientations
        files = {**self.batches.source.orientations, **batch.orientations}
        gathered = self.process.all_gather(files)
        return {name: orientation for files in gathered for name, orientation in files.items()}

    def _prepare_validation(self) -> bool:
        """Make the validator; returns whether the step from which the run resumes still has to be validated."""
        assert self.validation is not None
        self.validator = Validator(self.validation, self.out, self.meta.recipe.train.workers)
        return self.validator.is_pending(self.meta)

    def _validate(self, step: int, metrics: MetricsLog | None, stop: Stop) -> str:
        """Validate the weights of a step, already saved; returns box and mask AP for the progress bar."""
        device = next(self.model.parameters()).device

        def work() -> str:
            assert self.validator is not None and metrics is not None
            try:
                row = self.validator.validate(self.average or self.model, self.meta, device, stop)
            except StopRequested:
                raise Interrupted(f"stopped by {stop.name}") from None
            metrics.write_validation(step, row)
            self._write_card()
            return format_ap(row)

        try:
            return self.process.run_on_first(work)
        except Interrupted as error:
            raise Interrupted(f"{error} during validation, {self._save_before_exit(step)}") from None
        except (InputError, RuntimeFailure) as error:
            raise type(error)(f"{error} (stopped during validation, {self._save_before_exit(step)})") from error

    def _save_before_exit(self, step: int, advice: str = "") -> str:
        """Save the steps done, if possible; returns where training stopped and how to continue, for an error message.

        Args:
            step: number of steps done.
            advice: what to do before continuing, such as "replace the file and ".
        """
        # The first process may be the lost one; if it is not, its GPU may wait for the lost one.
        if self.process.peer_lost and (not self.process.is_first or next(self.model.parameters()).is_cuda):
            return f"in step {step + 1}; what was saved before is kept: {advice}continue with `resume=True`"
        if step == 0:
            return f"before the first step; {advice}start again with `resume=True`"
        if step != self.meta.step:
            self._save(step)
        return f"after step {step}, which is saved; {advice}continue with `resume=True`"

    def _take_row(self, lr: float, clock: TrainingClock) -> dict[str, float]:
        """Row for metrics.jsonl: `lr`, and the mean losses and the throughput of the steps since the last call."""
        self._read_losses()
        steps, self.losses = self.losses, []
        terms = {name: sum(losses[name] for losses in steps) / len(steps) for name in steps[0]}
        images = len(steps) * self.meta.recipe.train.batch_size
        return {"loss": sum(terms.values()), **terms, "lr": lr, "images_per_second": images / clock.lap()}

    def _read_losses(self) -> None:
        """Wait for the losses of the pending step, if any; raises RuntimeFailure if they are not finite."""
        if self.pending_step is not None:
            try:
                self.losses.append(self.pending_step.losses())
            except RuntimeFailure as error:
                # All processes come here, as the losses are sums over them. The exchange raises one error in all.
                self.process.share_error(error)
            self.pending_step = None

    def _save(self, step: int) -> None:
        """Save the weights and the state after a step."""
        self._read_losses()  # weights are saved only after the losses of all their steps were checked
        self.meta = dataclasses.replace(self.meta, step=step)
        self.process.run_on_first(self._write)

    def _write(self) -> None:
        """Write the state, the weights and the card; in the first process only."""
        state.save(self.out, self.model, self.sgd, self.meta, self.new_prefixes, self.data_sha256, self.average)
        self._write_card()

    def _write_card(self) -> None:
        validated_on = self.validator.validated_on if self.validator else ""
        write_card(self.out, self.meta, read_rows(self.out), validated_on)


def _next_or_interrupt(prefetched: Iterator[Batch], stop: Stop) -> Batch:
    """Wait for the next batch; raises Interrupted after a signal."""
    try:
        if stop.requested:
            raise StopRequested
        return next(prefetched)
    except StopRequested:
        raise Interrupted(f"stopped by {stop.name}") from None
