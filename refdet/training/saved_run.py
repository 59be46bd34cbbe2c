"""Metadata of a training state, and checks that a run is resumed with the settings it was started with. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from refdet.config.recipe import Recipe
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.errors import InputError
from refdet.files.short_text import format_count, short_repr, shorten
from refdet.files.strict_json import strict_json
from refdet.files.weight_files import check_safetensors
from refdet.structures.provenance import NAMES_DIFFER, Provenance
from refdet.training.pretrained import Categories, describe_difference
from refdet.training.run_folder import state_paths

# keys of the recipe's "train" that may change on resuming; `check_recipe` checks steps separately
_MAY_CHANGE = ("workers", "checkpoint_interval", "log_every", "steps", "accumulate", "keep", "eval_every")


@dataclass(frozen=True)
class SavedRun:
    """Metadata of a training state.

    Attributes:
        path: the state file.
        meta: recipe, categories, provenance and step.
        new_prefixes: prefixes of the parameters that pretrained weights did not have; None without pretrained weights.
        data_sha256: `TrainingObjects.sha256` of the training data; None in states of older versions.
    """

    path: Path
    meta: CheckpointMetadata
    new_prefixes: tuple[str, ...] | None
    data_sha256: str | None

    @classmethod
    def newest(cls, out: Path) -> SavedRun:
        """Read the metadata of the newest state in a run directory that has one.

        Raises:
            InputError: the state is damaged.
        """
        path = state_paths(out)[-1]
        try:
            check_safetensors(path)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
        except InputError as error:
            raise damaged_state(path, str(error).removeprefix(f"{path}: ")) from error
        except (OSError, SafetensorError) as error:
            raise damaged_state(path, f"not a readable safetensors file ({shorten(error, 200)})") from error
        return cls.parse(path, metadata)

    @classmethod
    def parse(cls, path: Path, metadata: Mapping[str, str]) -> SavedRun:
        """Parse the metadata of the state at `path`; raises InputError if they are damaged."""
        try:
            if "meta" not in metadata:
                raise InputError("its metadata has no 'meta'")
            meta, prefixes = CheckpointMetadata.parse(metadata["meta"]), strict_json(metadata.get("fresh", "null"))
            if not (prefixes is None or (isinstance(prefixes, list) and all(isinstance(p, str) for p in prefixes))):
                raise InputError(f"fresh: a list of names is needed, not {short_repr(prefixes)}")
        except InputError as error:
            raise damaged_state(path, f"not the state of a run: {error}") from error
        new_prefixes = None if prefixes is None else tuple(prefixes)
        return SavedRun(path, meta, new_prefixes, metadata.get("training_data_sha256"))

    def with_older_defaults(self, recipe: Recipe, out: Path) -> tuple[Recipe, list[str]]:
        """Give a recipe the defaults with which the run was started, where the defaults of recipes have changed since.

        Args:
            recipe: the recipe with which the run is resumed.
            out: the run directory, for the notes.

        Returns:
            The recipe, and notes for the user on defaults that affect the result.
        """
        saved, current = self.meta.recipe, recipe
        changes: list[tuple[str, object, object]] = []
        if saved.input.size_divisibility == 0:  # in all runs before this key existed
            changes.append(("input.size_divisibility", 0, current.input.size_divisibility))
        if saved.input.short_side_per == "step":  # in all runs before this key existed
            changes.append(("input.short_side_per", "step", current.input.short_side_per))
        network = (current.model.neck, current.model.depth)
        if network == ("fpn", 50) and not saved.train.bf16:  # fpn-res50 was trained in float32
            changes.append(("train.bf16", False, current.train.bf16))
        for part, old_default in (("proposals", 1 / 9), ("head", 1.0)):  # of all recipes
            old_beta, new_beta = (getattr(options, part).smooth_l1_beta for options in (saved, current))
            if old_beta == old_default:
                changes.append((f"{part}.smooth_l1_beta", old_beta, new_beta))
        # new values with the same result as the old ones
        equivalent: list[tuple[str, object]] = [("input.size_divisibility", 1)]
        if len(saved.input.min_sizes) == 1 or saved.input.crop_size:  # nothing is drawn
            equivalent.append(("input.short_side_per", "image"))
        notes = [
            f"`resume` {out}: {key} stays {json.dumps(old)}, as the run was started; new runs have {json.dumps(new)}"
            for key, old, new in changes
            if new != old and (key, new) not in equivalent
        ]
        if saved.model.zero_init_residual:  # without a note, as weights are initialized once
            changes.append(("model.zero_init_residual", True, current.model.zero_init_residual))
        return current.with_changes([f"{key}={json.dumps(old)}" for key, old, _ in changes]), notes

    def check_recipe(self, recipe: Recipe, out: Path) -> None:
        """Check that the recipe is the one the run was started with.

        Raises:
            InputError: the recipe differs, or has fewer steps than were already done.
        """
        old, new = dataclasses.asdict(self.meta.recipe), dataclasses.asdict(recipe)
        for part, options in old.items():
            for key in options if isinstance(options, dict) else ():
                if options[key] != new[part][key] and not (part == "train" and key in _MAY_CHANGE):
                    before, now = _format_value(options[key]), _format_value(new[part][key])
                    raise InputError(
                        f"`resume` {out}: {part}.{key} was {before} and is now {now}; "
                        "give the recipe the run was started with"
                    )
        if recipe.train.steps < self.meta.step:
            raise InputError(
                f"`resume` {out}: train.steps={recipe.train.steps}, but {format_count(self.meta.step, 'step', 'is')} "
                f"done; give {self.meta.step} or more, or start another run"
            )

    def check_data(self, categories: Categories, provenance: Provenance, data_sha256: str, out: Path) -> None:
        """Check that the training data is the same as when the run was started.

        Raises:
            InputError: the data differs.
        """
        saved = self.meta
        if saved.categories != categories:
            raise InputError(f"`resume` {out}: {describe_difference(saved.categories, categories)}")
        if saved.provenance.image_ids_sha256 != provenance.image_ids_sha256:
            raise InputError(f"`resume` {out}: the run was started with the images of another instances file")
        if saved.provenance.annotations != provenance.annotations:
            raise InputError(f"`resume` {out}: the run was started with other annotations of these images")
        if self.data_sha256 is not None and self.data_sha256 != data_sha256:
            raise InputError(
                f"`resume` {out}: the run was started with other boxes, masks, categories, crowds or file names of "
                "these images; give the file and the options it was started with"
            )

    def provenance_with_data(self, data: Provenance) -> Provenance:
        """The saved provenance, which may name the run's initial weights, with what older versions did not record.

        That is the note on file names that do not match the image ids.

        Args:
            data: provenance of the instances file, which `check_data` has checked.
        """
        saved = self.meta.provenance
        if NAMES_DIFFER not in data.note or NAMES_DIFFER in saved.note:
            return saved
        return dataclasses.replace(saved, note="; ".join(filter(None, (saved.note, NAMES_DIFFER))))

    def resume_notes(self, recipe: Recipe, out: Path) -> list[str]:
        """Notes for the user on resuming, one line each."""
        lines, old_steps, new_steps = [], self.meta.recipe.train.steps, recipe.train.steps
        if self.data_sha256 is None:
            lines.append(
                f"`resume` {out}: saved by an older refdet, which stored no hash of boxes, masks and file "
                "names, so they cannot be compared"
            )
        if new_steps != old_steps:
            cosine = recipe.train.schedule == "cosine"
            schedule = "the cosine (train.schedule)" if cosine else "the learning rate milestones (train.lr_milestones)"
            lines.append(
                f"`resume` {out}: train.steps was {old_steps} and is now {new_steps}: the warm-up and {schedule} are "
                "fractions of the new number"
            )
        return lines


def damaged_state(path: Path, why: str) -> InputError:
    """The error of a damaged state, which says whether there is an older one."""
    others = [other for other in state_paths(path.parent.parent) if other != path]
    fix = (
        f"remove it: `resume=True` then continues from {others[-1].name}"
        if others
        else "there is no older one: start again with another `out`"
    )
    return InputError(f"{path}: damaged ({why}); {fix}")


def _format_value(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
