"""Audit the images that a detector's weights were selected on, which must not be REFER's val or test images either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.config.renamed_keys import KEYS_BEFORE_VALIDATION, rename_old_keys
from refdet.detector.checkpoint import was_validated
from refdet.errors import InputError
from refdet.files.short_text import format_count
from refdet.splits.file_claims import VALIDATION_FILE, claims_of, file_problem
from refdet.splits.held_out import SplitImages
from refdet.splits.leak_audit import AuditResult, audit
from refdet.store.hdf5_access import open_store_file
from refdet.structures.provenance import Provenance, Selection


@dataclass(frozen=True)
class SelectionAudit:
    """What is known about the images that a detector's weights were selected on.

    Attributes:
        selection: record of the selection, None if there is none.
        proof: audit of the validation file, None if none was given.
        problem: why the selection is not clean, "" if it is.
        proven: whether it is clean according to the validation file itself, not only by its own claim.
        notes: human-readable notes.
    """

    selection: Selection | None
    proof: AuditResult | None
    problem: str
    proven: bool
    notes: list[str]

    @property
    def proven_if_identified(self) -> bool:
        """`proven`, provided that the validation images which cannot be identified by id are not held out.

        Comparing their content (`refdet.splits.duplicates.audit_content`) can show that they are not.
        """
        is_judged_by_file = self.selection is not None and self.selection.by_validation
        return self.proven or (is_judged_by_file and self.proof is not None and not self.problem)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; ``notes`` are those of the whole audit."""
        return {
            "recorded": self.selection is not None,
            "by_validation": None if self.selection is None else self.selection.by_validation,
            "validated_on": [] if self.selection is None else [file.to_json() for file in self.selection.validated_on],
            "problem": self.problem,
            "proven": self.proven,
            "audit": None if self.proof is None else self.proof.to_json(),
        }


def audit_selection(
    path: Path,
    subject: str,
    provenance: Provenance,
    splits: Sequence[SplitImages],
    refer_root: str | Path,
    *,
    val_instances: str | Path | None = None,
    exclude: Sequence[str] = (),
    trust_weights: bool = False,
) -> SelectionAudit:
    """Check whether a detector's weights were selected on REFER's val and test images.

    Weights of the last step were not selected, whatever they were validated on: they are clean, and a note names each
    validation file. Weights in ``best/`` are judged by their validation file as a detector is by its training file: the
    provenance of the file is a claim, which the file itself proves.

    Args:
        path: a run directory or a store.
        subject: how messages name the detector.
        provenance: its provenance.
        splits: the splits to look for.
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        val_instances: the file that the weights were validated on.
        exclude: as in `refdet.splits.leak_audit.audit`.
        trust_weights: assume that weights without a record of their selection were not selected on held-out images.

    Raises:
        InputError: ``val_instances`` is not a list of images.
        refer.ReferError: invalid REFER data.
    """
    selection = provenance.selection
    notes: list[str] = []
    proof = None if val_instances is None else audit(val_instances, refer_root, exclude=exclude)
    if selection is None:
        problem = "" if provenance.is_unknown else _problem_without_record(path, subject, trust_weights)
        if not problem and proof is not None:
            problem = f"{subject}: has no record of a validation; leave out `val_instances`"
        return SelectionAudit(selection, proof, problem, not problem, notes)
    if selection.by_validation:
        (file,) = selection.validated_on
        problem = file_problem(
            subject, file, claims_of(file, splits, refer_root), proof, val_instances, VALIDATION_FILE
        )
        if proof is not None:
            notes += proof.notes
        proven = proof is not None and not proof.unknown and not problem
        return SelectionAudit(selection, proof, problem, proven, notes)
    for file in selection.validated_on:
        notes.append(_last_step_note(subject, file, splits, refer_root, proof))
    is_recorded = proof is None or any(
        proof.image_ids_sha256 == file.image_ids_sha256 for file in selection.validated_on
    )
    problem = "" if is_recorded else f"{subject}: was not validated on {val_instances}; leave it out"
    return SelectionAudit(selection, proof, problem, not problem, notes)


def _problem_without_record(path: Path, subject: str, trust_weights: bool) -> str:
    """Why weights without a record of their selection may be selected on held-out images, "" if they are not."""
    if path.is_dir():
        if not was_validated(path):
            return ""
        return (
            f"{subject}: cannot be proven: an older refdet validated this run without recording on which images, "
            "which may have chosen its weights; train again"
        )
    if trust_weights or _is_from_before_validation(path):
        return ""
    return (
        f"{subject}: cannot be proven: whether its weights are those of a run's best/, and on which images they were "
        "chosen, is not recorded; if they are those of a last step, add `trust_weights=True`"
    )


def _is_from_before_validation(store: Path) -> bool:
    """Whether a store is from refdet 0.1, which had no validation: its recipe has keys that were renamed before it."""
    with open_store_file(store) as file:
        try:
            renamed = rename_old_keys(json.loads(file.attrs.get("recipe", "null")))[1]
            return not KEYS_BEFORE_VALIDATION.keys().isdisjoint(renamed)
        except (TypeError, ValueError, RecursionError, InputError):
            return False


def _last_step_note(
    subject: str, file: Provenance, splits: Sequence[SplitImages], refer_root: str | Path, proof: AuditResult | None
) -> str:
    """Note about a file that weights of the last step were validated on, and the held-out images in it."""
    if proof is not None and proof.image_ids_sha256 == file.image_ids_sha256:
        held_out = f", with {format_count(len(proof.leaked), 'held-out image')}"
    elif any(claim.uncovered for claim in claims_of(file, splits, refer_root)):
        held_out = ", which may hold held-out images"
    else:
        held_out = ", without held-out images according to its record"
    return (
        f"{subject}: was validated on {file.source} during training ({format_count(file.images, 'image')}{held_out}), "
        "which did not choose these weights: they are those of the last step"
    )
