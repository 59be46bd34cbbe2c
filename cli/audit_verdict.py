"""What an audit that found no leak has proven, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refdet.files.short_text import format_count

if TYPE_CHECKING:
    from refdet.splits.detector_audit import ProvenanceAudit
    from refdet.splits.duplicates import ContentResult
    from refdet.splits.leak_audit import AuditResult
    from refdet.splits.selection_audit import SelectionAudit


def chosen_by_validation(detector: ProvenanceAudit | None) -> SelectionAudit | None:
    """Audit of the validation images that chose a detector's weights; None if no recorded validation chose them."""
    audit = None if detector is None else detector.selection
    return audit if audit is not None and audit.selection is not None and audit.selection.by_validation else None


def selection_proven(detector: ProvenanceAudit | None, content: ContentResult | None) -> bool:
    """Whether the validation images that chose a detector's weights are proven clean, by id or by content."""
    audit = chosen_by_validation(detector)
    if audit is None or not audit.proven_if_identified:
        return False
    return not unidentified_in(audit.proof, content) and (content is None or not content.copies)


def unidentified_in(result: AuditResult | None, content: ContentResult | None) -> str:
    """Which images are not proven clean, in words; "" if all are.

    Without ``content``, those that the audited file does not identify; with it, those whose pixels were not compared.
    """
    if content is None:
        unknown = [] if result is None else result.unknown
        return f"{format_count(len(unknown), 'image')} unknown (first: {unknown[0]})" if unknown else ""
    not_compared = {  # noun -> images
        "image": [*content.missing, *content.unreadable],
        "held-out image": [*content.refer_missing, *content.refer_unreadable],
    }
    return ", ".join(
        f"{format_count(len(images), noun)} not compared (first: {images[0]})"
        for noun, images in not_compared.items()
        if images
    )


def _selection_verdict(detector: ProvenanceAudit, content: ContentResult | None) -> list[str]:
    """Lines about the validation images on which the weights were selected; none if no validation selected them."""
    audit = chosen_by_validation(detector)
    if audit is None or audit.selection is None:
        return []
    if audit.proof is None:
        return [
            f"its weights are {audit.selection.one_line()}, which is clean according to its own record; this is only "
            "a claim; to prove it, pass that file with --val-instances"
        ]
    if not selection_proven(detector, content):
        why = f"{format_count(audit.proof.unidentified, 'image')} not identified by id"
        if content is not None:
            why = unidentified_in(audit.proof, content)
        return [f"its weights are {audit.selection.one_line()}, with {why}; not proven"]
    lines = [
        f"proven: its weights are {audit.selection.one_line()}, of which "
        f"{format_count(audit.proof.images, 'image', 'was')} checked"
    ]
    return lines + ([] if content is None else [f"{_compared(content)} of that file"])


def verdict(
    result: AuditResult | None,
    detector: ProvenanceAudit | None,
    content: ContentResult | None,
    val_content: ContentResult | None,
) -> list[str]:
    """Lines that say what is clean, and whether that is proven or only claimed; for an audit that found no leak."""
    lines = []
    if detector is not None and detector.provenance is not None:
        subject = detector.path if detector.kind == "checkpoint" else f"the detector of {detector.path}"
        if result is None:
            lines.append(f"clean according to the provenance of {subject}: {detector.provenance.one_line()}")
            # For imported published weights, no file proves anything.
            fix = "" if detector.provenance.training_set else "; to prove it, pass the training file with --instances"
            lines.append(f"this is only a claim{fix}")
            lines += _selection_verdict(detector, val_content)
        else:
            lines.append(f"proven: {subject} was trained on the images of this file (the image ids have the same hash)")
            lines += _selection_verdict(detector, val_content)
    if result is not None:
        lines.append(
            f"clean: {format_count(result.images, 'image')} checked against "
            f"{format_count(result.held_out_images, 'val/test image')} of {format_count(len(result.splits), 'split')}"
        )
        if result.unidentified:
            lines.append(f"except for {format_count(result.unidentified, 'image')} not identified by id")
        has_ids = result.unidentified < result.images
        lines.append(f"image_ids_sha256 {result.image_ids_sha256}" if has_ids else f"file_sha256 {result.file_sha256}")
    if content is not None:
        lines.append(_compared(content))
    return lines


def _compared(content: ContentResult) -> str:
    """That no copies were found, and among how many images."""
    return (
        f"no copies: {format_count(content.compared, 'image')} compared with "
        f"{format_count(content.refer_compared, 'held-out image')}"
    )
