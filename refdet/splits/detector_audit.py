"""Audit of a detector by its provenance: of a checkpoint, or of a store of features, which carries its detector's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.splits.held_out import HeldOut, held_out
from refdet.splits.inspect import describe
from refdet.splits.leak_audit import AuditResult, audit
from refdet.structures.provenance import Provenance


@dataclass(frozen=True)
class SplitClaim:
    """What a provenance says of one held-out split.

    Attributes:
        name: "refcoco/unc/val"; images: how many images it has.
        uncovered: how many of them no split that it excludes has.
    """

    name: str
    images: int
    uncovered: int


@dataclass(frozen=True)
class ProvenanceAudit:
    """What is known of the training images of a detector.

    Attributes:
        kind: "checkpoint" or "store"; path: where it is.
        provenance: what it says of itself, None if nothing.
        claims: what that says of each held-out split.
        proof: the audit of the file that it was trained on, None if that was not given.
        problem: why it is not clean, "" if it is.
        notes: warnings_of for people.
    """

    kind: str
    path: str
    provenance: Provenance | None
    claims: list[SplitClaim]
    proof: AuditResult | None
    problem: str
    notes: list[str]

    @property
    def proven(self) -> bool:
        """Whether it is clean and the file it was trained on was looked through, not only what it says."""
        return self.proof is not None and not self.problem

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
            "notes": self.notes,
        }


def audit_provenance(
    path: str | Path,
    refer_root: str | Path,
    instances: str | Path | None = None,
    exclude: Sequence[str] = (),
    trust_weights: bool = False,
) -> ProvenanceAudit:
    """Look for REFER's val and test images among those that a detector was trained on.

    A provenance holds a hash of the training images, and says which splits were excluded: that is a claim. With
    the file that it was trained on it is a proof: its hash must be the same, and all its images are looked through.
    The hash is of ids, so it proves something only where they tell the files; else the very file must be given.
    What images a store describes does not matter: features are meant to be of val and test images.

    Args:
        path: a run directory or a store.
        refer_root, exclude: what to look for; see `held_out`.
        instances: the file that it was trained on.
        trust_weights: take it that the weights it started from have not seen held-out images.

    Raises:
        InputError: bad input, or ``path`` is neither.
        refer.ReferError: bad REFER data.
    """
    about = describe(path)
    if about["kind"] not in ("checkpoint", "store"):
        raise InputError(f"{path}: not a run directory nor a store; audit such a file with --instances")
    if about["provenance"] is None:
        splits, notes = held_out(refer_root, exclude)
        problem = f"{path}: training data unknown: it has no provenance"
        return ProvenanceAudit(about["kind"], str(path), None, _claims(None, splits), None, problem, notes)
    provenance = Provenance.from_json(about["provenance"])
    splits, notes = held_out(refer_root, exclude)
    claims = _claims(provenance, splits)
    proof = None if instances is None else audit(instances, refer_root, exclude=exclude)
    if proof is not None:
        notes = proof.notes
    who = str(path) if about["kind"] == "checkpoint" else f"the detector of {path}"
    problem = _problem(who, provenance, claims, proof, instances)
    if provenance.weights is not None:
        if trust_weights:
            notes.append(f"on your word, its first weights have not seen held-out images: {provenance.weights}")
        elif not problem:
            problem = (
                f"{who}: clean but for the weights it started from, of which nothing is proven: {provenance.weights}; "
                "if they have seen no held-out image (ImageNet's have not, or audit their run), add --trust-weights"
            )
    return ProvenanceAudit(about["kind"], str(path), provenance, claims, proof, problem, notes)


def _claims(provenance: Provenance | None, splits: Sequence[HeldOut]) -> list[SplitClaim]:
    """A split is covered by those excluded; one whose number of images differs is another than that excluded."""
    excluded = {} if provenance is None else provenance.excluded
    there = [split for split in splits if excluded.get(split.name, {}).get("images") == len(split.image_ids)]
    covered = frozenset().union(*(split.image_ids for split in there))
    return [SplitClaim(split.name, len(split.image_ids), len(split.image_ids - covered)) for split in splits]


def _problem(
    who: str,
    provenance: Provenance,
    claims: Sequence[SplitClaim],
    proof: AuditResult | None,
    instances: str | Path | None,
) -> str:
    if not provenance.image_ids_sha256:
        return f"{who}: training data unknown: {provenance.note or 'its provenance has no hash of image ids'}"
    if proof is not None:
        if proof.image_ids_sha256 != provenance.image_ids_sha256:
            return (
                f"{who}: was not trained on {instances}: the image ids there hash to {proof.image_ids_sha256[:12]}, "
                f"the provenance has {provenance.image_ids_sha256[:12]}; give the file it was trained on"
            )
        if proof.leaked:
            return f"{who}: was trained on {instances}, into which {len(proof.leaked)} held-out images leak"
        # A provenance of a file without a record has that file's own hash, which is of its names too.
        same_file = not provenance.excluded and proof.file_sha256 == provenance.source_sha256
        if proof.not_known_by_id and not same_file:
            return (
                f"{who}: cannot be proven: ids of {proof.not_known_by_id} images of {instances} are not their COCO "
                "numbers, so other images may have the same hash; train on a file whose ids are those in its file names"
            )
        return ""
    if not provenance.excluded:
        why = provenance.note or "its provenance excludes nothing"
        return f"{who}: training data unknown: {why}; give the file it was trained on with --instances"
    open_ = [claim for claim in claims if claim.uncovered]
    if open_:
        names = ", ".join(f"{claim.name} ({claim.uncovered} of {claim.images} images)" for claim in open_)
        return f"{who}: its provenance does not exclude {names}; the file it was trained on, --instances, can tell more"
    return ""
