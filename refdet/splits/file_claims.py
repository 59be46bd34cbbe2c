"""What the provenance of a training or validation file claims about held-out images, and what the file proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from refdet.errors import InputError
from refdet.files.short_text import agree, format_count, format_share
from refdet.splits.held_out import SplitImages, held_out
from refdet.splits.leak_audit import AuditResult
from refdet.structures.provenance import NAMES_DIFFER, Provenance
from refer import ReferError


@dataclass(frozen=True)
class SplitClaim:
    """What a provenance claims about one held-out split.

    Attributes:
        name: such as "refcoco/unc/val".
        images: number of images in the split.
        uncovered: number of those images that are in none of the excluded splits.
    """

    name: str
    images: int
    uncovered: int


@dataclass(frozen=True)
class FileRole:
    """What a detector used a file for, in the words of messages.

    Attributes:
        action: "trained", as in "was trained on F.json".
        data: "training data".
        verb: "train", as in "train on another file".
        argument: name of the argument that takes the file.
    """

    action: str
    data: str
    verb: str
    argument: str


TRAINING_FILE = FileRole("trained", "training data", "train", "instances")
VALIDATION_FILE = FileRole("chosen by validation", "validation data", "validate", "val_instances")


def claims_of(provenance: Provenance | None, splits: Sequence[SplitImages], refer_root: str | Path) -> list[SplitClaim]:
    """What a provenance claims about each split.

    A split that it excludes counts only if the number of its images is the same. A published training set without
    images of REFER excludes every split.

    Args:
        provenance: the provenance, None if there is none.
        splits: the splits.
        refer_root: their folder, which is read again if other splits that the provenance excludes may have the images.
    """
    training_set = None if provenance is None else provenance.training_set
    if training_set is not None and training_set.refer_overlap == "none":
        return [SplitClaim(split.name, len(split.image_ids), 0) for split in splits]
    excluded = {} if provenance is None else provenance.excluded
    covered = _covered(excluded, splits)
    is_covered = all(split.image_ids <= covered for split in splits)
    if not is_covered and excluded.keys() - {split.name for split in splits}:
        with suppress(InputError, ReferError):  # without the other splits, only less is covered
            covered |= _covered(excluded, held_out(refer_root)[0])
    return [SplitClaim(split.name, len(split.image_ids), len(split.image_ids - covered)) for split in splits]


def _covered(excluded: Mapping[str, Mapping[str, int]], splits: Sequence[SplitImages]) -> frozenset[int]:
    """Ids of the images of those splits that are excluded with the same number of images."""
    matching = (split for split in splits if excluded.get(split.name, {}).get("images") == len(split.image_ids))
    return frozenset().union(*(split.image_ids for split in matching))


def file_problem(
    subject: str,
    provenance: Provenance,
    claims: Sequence[SplitClaim],
    proof: AuditResult | None,
    instances: str | Path | None,
    role: FileRole = TRAINING_FILE,
) -> str:
    """Why a file on which a detector was trained, or its weights selected, is not clean; "" if it is clean.

    Args:
        subject: how the message names the detector.
        provenance: provenance of the file in the detector's record, with a hash of image ids.
        claims: what the provenance claims.
        proof: audit of the given file, None if none was given.
        instances: the given file.
        role: what the detector used the file for.
    """
    if proof is not None:
        if proof.image_ids_sha256 != provenance.image_ids_sha256:
            return (
                f"{subject}: was not {role.action} on {instances}: its image ids hash to "
                f"{proof.image_ids_sha256[:12]}, but the provenance has {provenance.image_ids_sha256[:12]}; give the "
                f"file it was {role.action} on"
            )
        if proof.leaked:
            leaked = format_count(len(proof.leaked), "held-out image")
            return f"{subject}: was {role.action} on {instances}, which contains {leaked}"
        # Without exclusions the provenance has the hash of the whole file, which covers the names too.
        same_file = not provenance.excluded and proof.file_sha256 == provenance.source_sha256
        if proof.not_known_by_id and not same_file:
            return (
                f"{subject}: cannot be proven: {format_count(proof.not_known_by_id, 'image')} in {instances} "
                f"{agree(proof.not_known_by_id, 'has')} an id that is not COCO's, so other images may have the same "
                f"hash; {role.verb} on a file whose ids match its file names"
            )
        if NAMES_DIFFER in provenance.note and not same_file:
            return (
                f"{subject}: cannot be proven: the file it was {role.action} on has file names that do not match its "
                f"image ids, so {instances} has the same ids but maybe other images; give the identical file"
            )
        if not provenance.excluded and not same_file and not _records_differing_names(provenance, role):
            return (
                f"{subject}: cannot be proven: the older refdet that trained it did not record whether the file names "
                f"match the image ids, so {instances} has the same ids but maybe other images; give the identical file"
            )
        return ""
    give = f"give the file it was {role.action} on with `{role.argument}`"
    if not provenance.excluded:
        why = provenance.note or "its provenance excludes no split"
        return f"{subject}: {role.data} unknown: {why}; {give}"
    uncovered = [claim for claim in claims if claim.uncovered]
    if uncovered:
        names = ", ".join(
            f"{claim.name} ({format_share(claim.uncovered, claim.images, 'image')})" for claim in uncovered
        )
        return f"{subject}: the provenance of its {role.data} does not exclude {names}; {give}"
    return ""


def _records_differing_names(provenance: Provenance, role: FileRole) -> bool:
    """Whether the refdet that wrote a record would have noted that file names do not match the image ids.

    Versions that record how weights were selected do; older ones noted it only for files of build-split.
    """
    return role is VALIDATION_FILE or provenance.selection is not None
