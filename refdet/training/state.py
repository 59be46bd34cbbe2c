"""The training state in a run directory, from which a run resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from refdet.config.recipe import TrainOptions
from refdet.detector import checkpoint
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.errors import InputError
from refdet.files.atomic import find_temporary_files
from refdet.files.short_text import shorten
from refdet.training.best import recover_best
from refdet.training.ema import WeightAverage
from refdet.training.metrics_rows import METRICS
from refdet.training.optim import momentum_of, restore_momentum
from refdet.training.run_card import CARD
from refdet.training.run_folder import state_paths
from refdet.training.saved_run import SavedRun, damaged_state


@dataclass(frozen=True)
class State(SavedRun):
    """A training state with its tensors.

    Attributes:
        tensors: model tensors, their momentum and their moving averages, with the prefixes "model/", "momentum/" and
            "ema/".
    """

    tensors: Mapping[str, Tensor]

    def restore(self, model: nn.Module, sgd: torch.optim.SGD, average: WeightAverage | None = None) -> None:
        """Load the tensors into a model, its optimizer and, if given, the moving average of its weights.

        Raises:
            InputError: the tensors do not match the model, or contain NaN or inf.
        """
        momentum = self._part("momentum/")
        parameters = dict(model.named_parameters())
        self._check(self._part("model/"), model.state_dict(), complete=True)
        self._check(momentum, parameters, complete=False)
        if average is not None:
            self._check(self._part("ema/"), model.state_dict(), complete=True)
            average.load_state_dict(self._part("ema/"))
        model.load_state_dict(self._part("model/"))
        restore_momentum(model, sgd, momentum)

    def _part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors with a prefix, by their names without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def _check(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], complete: bool) -> None:
        """Raise InputError for wrong shapes, NaN or inf, unexpected tensors and, if `complete`, missing tensors."""
        for name in expected if complete else actual:
            if name not in actual or name not in expected:
                raise self._damaged(f"{shorten(name)} is {'missing' if name in expected else 'not in this network'}")
            if actual[name].shape != expected[name].shape:
                sizes = f"{tuple(actual[name].shape)}, the recipe expects {tuple(expected[name].shape)}"
                raise self._damaged(f"{name} is {sizes}")
            if not actual[name].isfinite().all():
                raise self._damaged(f"{name} contains NaN or inf")
        if complete and (unexpected := sorted(actual.keys() - expected.keys())):
            raise self._damaged(f"{unexpected[0]} is not in this network")

    def _damaged(self, why: str) -> InputError:
        return damaged_state(self.path, why)


def newest(out: Path) -> State:
    """Read the newest state of a run directory that has one.

    Raises:
        InputError: the state is damaged.
    """
    path = state_paths(out)[-1]
    try:
        tensors, metadata = checkpoint.read_tensors(path)
    except InputError as error:
        raise damaged_state(path, str(error).removeprefix(f"{path}: ")) from error
    saved = SavedRun.parse(path, metadata)
    return State(saved.path, saved.meta, saved.new_prefixes, saved.data_sha256, tensors)


def save(
    out: Path,
    model: nn.Module,
    sgd: torch.optim.SGD,
    meta: CheckpointMetadata,
    new_prefixes: tuple[str, ...] | None,
    data_sha256: str,
    average: WeightAverage | None = None,
) -> None:
    """Write the state, then the weights (or their average), then remove old states beyond ``train.keep``.

    The state alone is enough to resume, so a process may be killed at any point.

    Args:
        out: the run directory.
        model: the network.
        sgd: its optimizer.
        meta: metadata of the weights, with the step.
        new_prefixes: as in `SavedRun`.
        data_sha256: as in `SavedRun`.
        average: moving average of the weights, which is then written as the weights; None without ``train.ema``.
    """
    folder = out / checkpoint.STATE
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"momentum/{name}": t for name, t in momentum_of(model, sgd).items()}
    if average is not None:
        tensors |= {f"ema/{name}": t for name, t in average.state_dict().items()}
    path = folder / f"step-{meta.step:08d}.safetensors"
    metadata = {
        "meta": json.dumps(meta.to_json()),
        "fresh": json.dumps(new_prefixes),  # the key keeps its first name
        "training_data_sha256": data_sha256,
    }
    checkpoint.write_tensors(path, tensors, metadata)
    checkpoint.save(out, average or model, meta)
    keep = meta.recipe.train.keep
    for old in state_paths(out)[:-keep] if keep else ():
        old.unlink()


def max_disk_bytes(model: nn.Module, options: TrainOptions, validated: bool) -> int:
    """Largest size of a run directory in bytes.

    Counts the weights and the weights in ``best/``, each of which exists twice while it is replaced; and the states, of
    which the newest is written before an old one is removed.

    Args:
        model: the network.
        options: options of the run.
        validated: whether the run is validated.
    """
    saves = -(-options.steps // options.checkpoint_interval)
    if validated and options.eval_every:
        saves += options.steps // options.eval_every
    states = min(options.keep or saves, saves) + 1
    copies_per_state = 3 if options.ema else 2  # weights, momentum and perhaps the average
    copies = 2 + states * copies_per_state + (2 if validated else 0)
    return copies * sum(value.numel() * value.element_size() for value in model.state_dict().values())


def clean(out: Path) -> None:
    """Remove the temporary files of a run that was killed while saving, and recover ``best/``."""
    leftovers = find_temporary_files(out / checkpoint.STATE)
    for name in (checkpoint.MODEL, checkpoint.META, METRICS, CARD):
        leftovers += find_temporary_files(out, name)
    for path in leftovers:
        path.unlink()
    recover_best(out)
