"""Audit a detector by its provenance, from a checkpoint or from a feature store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import format_count, shorten
from refdet.splits.file_claims import SplitClaim, claims_of, file_problem
from refdet.splits.held_out import held_out
from refdet.splits.inspect import describe
from refdet.splits.leak_audit import AuditResult, audit
from refdet.splits.selection_audit import SelectionAudit, audit_selection
from refdet.structures.known_weights import LEAKS, KnownFile, known_initial_weights
from refdet.structures.provenance import Provenance


@dataclass(frozen=True)
class ProvenanceAudit:
    """What is known about a detector's training images.

    Attributes:
        kind: "checkpoint" or "store".
        path: the audited run directory or store.
        provenance: its provenance, None if it has none.
        claims: what the provenance claims about each held-out split.
        proof: audit of the training file, None if none was given.
        selection: audit of the images that its weights were selected on, None if it has no provenance.
        problem: why it is not clean, "" if it is.
        notes: human-readable warnings.
    """

    kind: str
    path: str
    provenance: Provenance | None
    claims: list[SplitClaim]
    proof: AuditResult | None
    selection: SelectionAudit | None
    problem: str
    notes: list[str]

    @property
    def proven(self) -> bool:
        """Whether it is clean according to the training and validation files themselves, not only by its own claim."""
        selection_proven = self.selection is not None and self.selection.proven
        training_proven = self.proof is not None and not self.proof.unknown
        return self.proven_if_identified and training_proven and selection_proven

    @property
    def proven_if_identified(self) -> bool:
        """`proven`, provided that the images which cannot be identified by id are not held out.

        Comparing their content (`refdet.splits.duplicates.audit_content`) can show that they are not.
        """
        selection_proven = self.selection is not None and self.selection.proven_if_identified
        return self.proof is not None and not self.proof.leaked and not self.problem and selection_proven

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "clean": not self.problem,
            "proven": self.proven,
            "problem": self.problem,
            "kind": self.kind,
            "path": self.path,
            "provenance": None if self.provenance is None else self.provenance.to_json(),
            "claims": {c.name: {"images": c.images, "uncovered": c.uncovered} for c in self.claims},
            "audit": None if self.proof is None else self.proof.to_json(),
            "selection": None if self.selection is None else self.selection.to_json(),
            "notes": self.notes,
        }


def audit_provenance(
    path: str | Path,
    refer_root: str | Path,
    instances: str | Path | None = None,
    exclude: Sequence[str] = (),
    trust_weights: bool = False,
    val_instances: str | Path | None = None,
) -> ProvenanceAudit:
    """Check whether a detector was trained on any of REFER's val and test images.

    A provenance holds a hash of the training image ids and the names of the excluded splits, which is only a claim.
    The training file turns this claim into a proof: its hash must match, and every image in it is checked. The hash
    covers ids only, so it proves something only where the ids match the file names; otherwise the identical file is
    required. Images that chose the weights by validation must be as clean (`refdet.splits.selection_audit`).
    The images that a store describes are irrelevant, as features of val and test images are expected. If its boxes
    were given in a file, what made that file is not audited; a note says so.

    Args:
        path: a run directory or a store.
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        instances: the file that the detector was trained on.
        exclude: splits to look for, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...". Empty
            looks for all but train of every dataset found.
        trust_weights: assume that initial weights of unknown training have not seen held-out images, and that the
            weights of a store without a record of their selection were not selected on such images.
        val_instances: the file that the detector was validated on.

    Returns:
        The claims, the proofs if ``instances`` and ``val_instances`` were given, and the problem if there is one.

    Raises:
        InputError: invalid input, or ``path`` is neither a run directory nor a store.
        refer.ReferError: invalid REFER data.
    """
    description = describe(path)
    if description["kind"] not in ("checkpoint", "store"):
        raise InputError(f"{path}: neither a run directory nor a store; use `instances` to audit a list of images")
    splits, notes = held_out(refer_root, exclude)
    if description["provenance"] is None:
        problem = f"{path}: training data unknown: no provenance"
        return ProvenanceAudit(
            description["kind"], str(path), None, claims_of(None, splits, refer_root), None, None, problem, notes
        )
    provenance = Provenance.from_json(description["provenance"])
    claims = claims_of(provenance, splits, refer_root)
    proof = None if instances is None else audit(instances, refer_root, exclude=exclude)
    if proof is not None:
        notes = list(proof.notes)  # they include those of the held-out splits
    subject = str(path) if description["kind"] == "checkpoint" else f"the detector of {path}"
    n_held_out = len(frozenset().union(*(split.image_ids for split in splits)))
    problem = _find_problem(subject, provenance, claims, proof, instances, n_held_out)
    selection = audit_selection(
        Path(path),
        subject,
        provenance,
        splits,
        refer_root,
        val_instances=val_instances,
        exclude=exclude,
        trust_weights=trust_weights,
    )
    notes += [note for note in selection.notes if note not in notes]
    options = description.get("options")
    if isinstance(options, dict) and (boxes := options.get("boxes_sha256")):
        notes.append(
            f"{path}: its boxes, scores and categories are from a file (sha256 {shorten(boxes)}), not from its "
            "detector; what made that file is not audited, and may have seen held-out images"
        )
    if problem and selection.problem:
        notes.append(selection.problem)
    problem = problem or selection.problem
    if provenance.weights is not None:
        known = _clean_initial_weights(provenance.weights)
        if known is not None:
            notes.append(f"initial weights: {known.model}, {known.trained_on.leak_note()}")
        elif LEAKS in provenance.weights:  # `trust_weights` is for weights about which nothing is known
            leak = f"{subject}: its initial weights leak: {provenance.weights}"
            problem = problem or leak
            if problem != leak:
                notes.append(leak)
        elif trust_weights:
            notes.append(
                f"`trust_weights`: assumed that the initial weights have seen no held-out images: {provenance.weights}"
            )
        elif not problem:
            problem = (
                f"{subject}: clean except for its initial weights, which are unproven: {provenance.weights}; if they "
                "have seen no held-out images (ImageNet's have not; or audit their run), add `trust_weights=True`"
            )
    return ProvenanceAudit(description["kind"], str(path), provenance, claims, proof, selection, problem, notes)


def why_unproven(provenance: Provenance, proof: AuditResult, subject: str, instances: str | Path | None) -> list[str]:
    """Why the audit of a training file does not prove that a detector was trained on no held-out image.

    Held-out images that the file contains (``proof.leaked``) are not among the reasons, nor is the selection of the
    weights by validation (`audit_selection`).

    Args:
        provenance: provenance of the detector; its hash of image ids is that of the file.
        proof: audit of the file.
        subject: what messages call the detector.
        instances: the file.

    Returns:
        The reasons, [] if it is proven.
    """
    problem = "" if proof.leaked else file_problem(subject, provenance, [], proof, instances)
    reasons = [problem] if problem else []
    if proof.unknown:
        reasons.append(
            f"{instances}: {format_count(proof.unidentified, 'image')} cannot be identified as COCO's or others "
            f"(first: {shorten(proof.unknown[0])})"
        )
    if provenance.weights is not None and _clean_initial_weights(provenance.weights) is None:
        reasons.append(f"{subject}: its initial weights may have seen held-out images: {provenance.weights}")
    return reasons


def _clean_initial_weights(weights: str) -> KnownFile | None:
    """The published file that initial weights are from, if it was trained on no image of REFER, else None."""
    known = known_initial_weights(weights)
    return known if known is not None and known.trained_on.refer_overlap == "none" else None


def _find_problem(
    subject: str,
    provenance: Provenance,
    claims: Sequence[SplitClaim],
    proof: AuditResult | None,
    instances: str | Path | None,
    n_held_out: int,
) -> str:
    """Why the training data is not clean, "" if it is clean.

    What published detectors were trained on is known; a training file is judged by `file_problem`.
    """
    training_set = provenance.training_set
    if training_set is not None and training_set.refer_overlap == "none":
        # its provenance has no hash of image ids with which to compare a file
        message = (
            f"{subject}: was trained on {training_set.name}, about which {instances} proves nothing; leave out "
            "`instances`"
        )
        return "" if proof is None else message
    if training_set is not None:
        which = (
            f"all {format_count(n_held_out, 'val/test image')}"
            if training_set.refer_overlap == "all"
            else f"some of {format_count(n_held_out, 'val/test image')}"
        )
        return f"{subject}: leaks {which} of {', '.join(claim.name for claim in claims)}: {provenance.note}"
    if provenance.is_unknown:
        return f"{subject}: training data unknown: {provenance.note or 'its provenance has no hash of image ids'}"
    return file_problem(subject, provenance, claims, proof, instances)
