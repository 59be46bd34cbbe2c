"""The state of a training: what its run directory holds so that it can go on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refdet import checkpoint
from refdet.atomic import left_behind
from refdet.checkpoint import Meta
from refdet.errors import InputError
from refdet.metrics_log import METRICS
from refdet.pretrained import difference
from refdet.run_card import CARD
from refdet.run_folder import states
from refdet.schedule import momentum_of, restore_momentum
from refdet.short_text import cut, shown
from refdet.small_files import strict_json

log = logging.getLogger(__name__)

# What may change without making it another run; train.steps has rules of its own.
_FREE = {("train", "workers"), ("train", "save_every"), ("train", "log_every"), ("train", "steps")}


@dataclass(frozen=True)
class State:
    """A state that was read.

    Attributes:
        path: its file.
        meta: recipe, categories, provenance and step.
        fresh: see `refdet.schedule.optimiser`.
        data_sha256: `TrainingObjects.sha256` of what it was trained on; None in states of older versions.
        tensors: of the model and of its momentum, under "model/" and "momentum/".
    """

    path: Path
    meta: Meta
    fresh: tuple[str, ...] | None
    data_sha256: str | None
    tensors: Mapping[str, Tensor]

    def restore(self, model: nn.Module, sgd: torch.optim.SGD) -> None:
        """Put the tensors into a model and its optimiser.

        Raises:
            InputError: they are not those of this model.
        """
        momentum = self._part("momentum/")
        wanted = dict(model.named_parameters())
        self._check(self._part("model/"), model.state_dict(), whole=True)
        self._check(momentum, wanted, whole=False)
        model.load_state_dict(self._part("model/"))
        restore_momentum(model, sgd, momentum)

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def _check(self, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], whole: bool) -> None:
        for name in wanted if whole else given:
            if name not in given or name not in wanted:
                raise self._damaged(f"{cut(name)} is {'missing' if name in wanted else 'not of this network'}")
            if given[name].shape != wanted[name].shape:
                sizes = f"{tuple(given[name].shape)}, the recipe wants {tuple(wanted[name].shape)}"
                raise self._damaged(f"{name} is {sizes}")
            if not given[name].isfinite().all():
                raise self._damaged(f"{name} has numbers that are not finite")
        if whole and (strange := sorted(given.keys() - wanted.keys())):
            raise self._damaged(f"{strange[0]} is not of this network")

    def _damaged(self, why: str) -> InputError:
        return _damaged(self.path, why)


def newest(out: Path) -> State:
    """The newest state of a run directory, which has one.

    Raises:
        InputError: it is damaged.
    """
    path = states(out)[-1]
    try:
        tensors, metadata = checkpoint.read_tensors(path)
    except InputError as error:
        raise _damaged(path, str(error).removeprefix(f"{path}: ")) from error
    try:
        if "meta" not in metadata:
            raise InputError("its metadata has no 'meta'")
        meta, fresh = Meta.parse(metadata["meta"]), strict_json(metadata.get("fresh", "null"))
        if not (fresh is None or (isinstance(fresh, list) and all(isinstance(part, str) for part in fresh))):
            raise InputError(f"fresh: a list of names is needed, not {shown(fresh)}")
    except InputError as error:
        raise _damaged(path, f"not the state of a run: {error}") from error
    return State(path, meta, None if fresh is None else tuple(fresh), metadata.get("training_data_sha256"), tensors)


def save(
    out: Path, model: nn.Module, sgd: torch.optim.SGD, meta: Meta, fresh: tuple[str, ...] | None, data_sha256: str
) -> None:
    """Write the state, then the model; then remove older states. The state alone is enough to go on."""
    folder = out / checkpoint.STATE
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"momentum/{name}": t for name, t in momentum_of(model, sgd).items()}
    path = folder / f"step-{meta.step:08d}.safetensors"
    metadata = {
        "meta": json.dumps(meta.to_json()),
        "fresh": json.dumps(fresh),
        "training_data_sha256": data_sha256,
    }
    checkpoint.write_tensors(path, tensors, metadata)
    checkpoint.save(out, model, meta)
    for old in states(out):
        if old != path:
            old.unlink()


def clean(out: Path) -> None:
    """Remove what a run that was killed while it saved has left half-written."""
    found = left_behind(out / checkpoint.STATE)
    for name in (checkpoint.MODEL, checkpoint.META, METRICS, CARD):
        found += left_behind(out, name)
    for path in found:
        path.unlink()


def check_same_run(before: State, now: Meta, data_sha256: str, out: Path) -> None:
    """See that a run goes on as it was begun; notes say what may differ and does.

    Raises:
        InputError: it would be another run, or has done more steps than are asked for.
    """
    then = before.meta
    if then.categories != now.categories:
        raise InputError(f"--resume {out}: {difference(then.categories, now.categories)}")
    if then.provenance.image_ids_sha256 != now.provenance.image_ids_sha256:
        raise InputError(f"--resume {out}: the run was started with the images of another instances file")
    if then.provenance.annotations != now.provenance.annotations:
        raise InputError(f"--resume {out}: the run was started with other annotations of these images")
    if before.data_sha256 is None:
        log.warning(
            "note: --resume %s: saved by an older refdet, which kept no hash of boxes, masks and file names: that they "
            "are the same is not checked", out,
        )  # fmt: skip
    elif before.data_sha256 != data_sha256:
        raise InputError(
            f"--resume {out}: the run was started with other boxes, masks, categories, crowds or file names of these "
            "images; give the file and the options that it was started with"
        )
    old, new = dataclasses.asdict(then.recipe), dataclasses.asdict(now.recipe)
    for part, options in old.items():
        for key in options if isinstance(options, dict) else ():
            if options[key] != new[part][key] and (part, key) not in _FREE:
                raise InputError(
                    f"--resume {out}: {part}.{key} was {_shown(options[key])} and is now {_shown(new[part][key])}; "
                    "give the recipe the run was started with"
                )
    _check_steps(then, now, out)


def _check_steps(then: Meta, now: Meta, out: Path) -> None:
    before, after = then.recipe.train.steps, now.recipe.train.steps
    if after < then.step:
        raise InputError(
            f"--resume {out}: train.steps={after}, but {then.step} steps are done; give {then.step} or more, or start "
            "another run"
        )
    if after != before:
        log.warning(
            "note: --resume %s: train.steps was %d and is now %d: the warm-up and the drops of the rate "
            "(train.lr_drops) are counted in parts of the new number", out, before, after,
        )  # fmt: skip


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _damaged(path: Path, why: str) -> InputError:
    others = [other for other in states(path.parent.parent) if other != path]
    mend = (
        f"remove it: --resume then goes on from {others[-1].name}"
        if others
        else "there is no older one: start again with another --out"
    )
    return InputError(f"{path}: damaged ({why}); {mend}")
