"""``refdet audit``: look for REFER's val and test images in the training data of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refdet.errors import RuntimeFailure
from refdet.files.short_text import format_count

from .arguments import check_images, check_refer_root, check_run_directory, check_store, check_text_file
from .common import echo_json, echo_line, echo_table, json_option, note, renamed_option, store_option
from .option_names import as_options

if TYPE_CHECKING:
    from refdet.splits.detector_audit import ProvenanceAudit
    from refdet.splits.duplicates import ContentResult
    from refdet.splits.leak_audit import AuditResult

MAX_SHOWN = 10  # image ids in a cell of the table


@click.command("audit", short_help="Check training data for REFER's val and test images.")
@click.option("--instances", metavar="F.json", help="COCO instances file or image list to audit.")
@click.option("--refer-root", required=True, metavar="DIR", help="Folder with DATASET/refs(SPLIT_BY).p.")
@click.option("--checkpoint", metavar="RUN_DIR", help="Run directory of the detector whose provenance to audit.")
@store_option(metavar="F.h5", help="Store whose detector's provenance to audit.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="DATASET:SPLIT_BY[:SPLIT,...]",
    help="Audit only these splits; may be repeated. Default: val and test of all datasets under --refer-root.",
)
@click.option(
    "--benchmark",
    multiple=True,
    metavar="FILE",
    help="Another benchmark to look for: Ref-L4's Parquet, or any list of images; may be repeated.",
)
@click.option("--val-instances", metavar="F.json", help="Instances file of the validation that chose best/.")
@click.option(
    "--trust-weights",
    is_flag=True,
    help="Vouch that unknown initial weights saw no held-out image and no unrecorded validation chose the weights.",
)
@click.option("--allow-unidentified", is_flag=True, help="Exit 0 even if some images cannot be identified.")
@renamed_option(
    "--find-duplicates",
    "--by-content",
    "find_duplicates",
    is_flag=True,
    help="Also find copies under other ids, by image content.",
)
@click.option("--images", metavar="DIR", help="Folder or zip of the images in F.json, for --find-duplicates.")
@click.option("--refer-images", metavar="DIR", help="Folder or zip of the held-out images.  [default: --images]")
@json_option
def command(
    instances: str | None,
    refer_root: str,
    checkpoint: str | None,
    store: str | None,
    exclude: tuple[str, ...],
    benchmark: tuple[str, ...],
    val_instances: str | None,
    trust_weights: bool,
    allow_unidentified: bool,
    find_duplicates: bool,
    images: str | None,
    refer_images: str | None,
    as_json: bool,
) -> None:
    """Check training images for REFER's val and test images; exits 0 if there are none and 1 if there are.

    Audits the images of F.json. For a checkpoint or a store, it audits the provenance of its detector, which is only a
    claim; if --instances gives the file that the detector was trained on, the result is a proof. Weights in a best/
    folder were chosen on a validation file, which must be clean too. Images identified neither by id nor by
    --find-duplicates are not proven clean: exits 1 unless --allow-unidentified is given. A store of val images is not a
    leak: what counts is what its detector was trained on.
    """
    if instances is None and checkpoint is None and store is None:
        raise click.UsageError("nothing to audit: give --instances, --checkpoint or --store")
    if checkpoint is not None and store is not None:
        raise click.UsageError("--checkpoint and --store: audit them one after the other")
    if find_duplicates and (instances is None or images is None):
        raise click.UsageError("--find-duplicates needs --instances and --images")
    if not find_duplicates and (images is not None or refer_images is not None):
        raise click.UsageError("--images and --refer-images are for --find-duplicates; add it or leave them out")
    detector = checkpoint if checkpoint is not None else store  # a path; None to audit F.json alone
    if benchmark and detector is not None:
        raise click.UsageError("--benchmark is for --instances alone; audit the detector without it")
    if trust_weights and detector is None:
        raise click.UsageError("--trust-weights is for --checkpoint and --store")
    if val_instances is not None and detector is None:
        raise click.UsageError("--val-instances is for --checkpoint and --store; audit the file alone by --instances")
    check_refer_root(Path(refer_root))
    if instances is not None:
        check_text_file("--instances", Path(instances), "an instances JSON or a list of images")
    if val_instances is not None:
        check_text_file("--val-instances", Path(val_instances), "an instances JSON or a list of images")
    if checkpoint is not None:
        check_run_directory("--checkpoint", Path(checkpoint))
    if store is not None:
        check_store("--store", Path(store))
    for option, path in (("--images", images), ("--refer-images", refer_images)):
        if path is not None:
            check_images(option, Path(path))
    provenance_audit: ProvenanceAudit | None = None
    result: AuditResult | None = None
    content: ContentResult | None = None
    if detector is not None:
        from refdet.splits.detector_audit import audit_provenance

        provenance_audit = audit_provenance(detector, refer_root, instances, exclude, trust_weights, val_instances)
        provenance_audit = replace(
            provenance_audit,
            problem=as_options(provenance_audit.problem),
            notes=[as_options(text) for text in provenance_audit.notes],
        )
        result, notes = provenance_audit.proof, provenance_audit.notes
    else:
        from refdet.splits.leak_audit import audit

        assert instances is not None
        result = audit(instances, refer_root, exclude=exclude, benchmark=benchmark, allow_unknown=find_duplicates)
        notes = result.notes
    if instances is not None and images is not None:
        from refdet.splits.duplicates import audit_content

        content = audit_content(instances, refer_root, images, refer_images, exclude, benchmark)
        notes = [*notes, *(f"--find-duplicates: {text}" for text in content.notes())]
    for text in notes:
        note(f"note: {text}")
    unidentified = _unidentified(result, content)
    fix = "compare them with --find-duplicates" if content is None else "add or repair their files"
    if not unidentified and provenance_audit is not None:
        unidentified = _unidentified_selection(provenance_audit, str(val_instances))
        fix = "compare them with --find-duplicates in an audit of that file alone"
    unproven = "" if allow_unidentified else unidentified
    if as_json:
        echo_json(_to_json(result, provenance_audit, content, unidentified, unproven))
    else:
        _print_tables(result, provenance_audit, content)
    _raise_leaks(instances, result, provenance_audit, content)
    if unproven:
        raise RuntimeFailure(
            f"{instances or detector}: not proven: {unproven}; {fix}, or accept them with --allow-unidentified"
        )
    if not as_json:
        echo_line()
        for line in _verdict(result, provenance_audit, content):
            echo_line(line)


def _to_json(
    result: AuditResult | None,
    detector: ProvenanceAudit | None,
    content: ContentResult | None,
    unidentified: str,
    unproven: str,
) -> dict[str, Any]:
    """The results as a JSON object.

    Args:
        result: audit of F.json, None without --instances.
        detector: audit of the provenance of a checkpoint or a store, None if only F.json is audited.
        content: comparison of the images' pixels, None without --find-duplicates.
        unidentified: which images are not proven clean, in words; "" if all are.
        unproven: like ``unidentified``, but "" with --allow-unidentified.
    """
    if detector is not None:
        tree = detector.to_json()
    else:
        assert result is not None
        tree = result.to_json()
    is_clean = tree["clean"] and not unproven
    if content is not None:
        is_clean = is_clean and not content.copies
        tree["content"] = content.to_json()
    tree |= {"clean": is_clean, "unproven": unproven}
    if detector is not None:
        tree["proven"] = detector.proven_if_identified and is_clean and not unidentified
    return tree


def _print_tables(result: AuditResult | None, detector: ProvenanceAudit | None, content: ContentResult | None) -> None:
    """Print the leaks, or without F.json the claims, of each split, and the copies; arguments as in `_to_json`."""
    rows: list[tuple[str, ...]]
    if result is not None:
        rows = [
            (leak.name, str(leak.images), str(len(leak.image_ids)), str(leak.annotations), _first_ids(leak.image_ids))
            for leak in result.splits
        ]
        echo_table(rows, ("split", "images", "leaked", "annotations", "image ids"))
    elif detector is not None:
        rows = [
            (claim.name, str(claim.images), "no" if claim.uncovered else "yes", str(claim.uncovered))
            for claim in detector.claims
        ]
        echo_table(rows, ("split", "images", "claimed excluded", "images not excluded"))
    if content is not None and content.copies:
        echo_line()
        rows = [
            (
                str(copy.image),
                str(copy.refer_image_id),
                str(copy.hamming_distance),
                f"{copy.correlation:.3f}",
                "mirrored" if copy.mirrored else "",
                " ".join(copy.splits),
            )
            for copy in content.copies
        ]
        echo_table(rows, ("image", "copy of", "hamming distance", "correlation", "", "splits"))


def _first_ids(ids: Sequence[int]) -> str:
    """At most `MAX_SHOWN` ids, for a cell of the table."""
    return " ".join(map(str, ids[:MAX_SHOWN])) + (" ..." if len(ids) > MAX_SHOWN else "")


def _raise_leaks(
    instances: str | None, result: AuditResult | None, detector: ProvenanceAudit | None, content: ContentResult | None
) -> None:
    """Raise RuntimeFailure if a held-out image or a copy was found, or the provenance has a problem."""
    if detector is not None and detector.problem:
        raise RuntimeFailure(detector.problem)
    if result is not None and result.leaked:
        raise RuntimeFailure(
            f"{instances}: contains {format_count(len(result.leaked), 'held-out image')}; make a clean file with "
            "refdet build-split"
        )
    if content is not None and content.copies:
        count = len({copy.image for copy in content.copies})
        raise RuntimeFailure(
            f"{instances}: contains copies of held-out images under other ids ({format_count(count, 'image')}); "
            "inspect and remove them"
        )


def _unidentified(result: AuditResult | None, content: ContentResult | None) -> str:
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


def _selection_verdict(detector: ProvenanceAudit) -> list[str]:
    """Lines about the validation images on which the weights were selected; none if no validation selected them."""
    audit = detector.selection
    if audit is None or audit.selection is None or not audit.selection.by_validation:
        return []
    if audit.proof is None:
        return [
            f"its weights are {audit.selection.one_line()}, which is clean according to its own record; this is only "
            "a claim; to prove it, pass that file with --val-instances"
        ]
    if audit.proof.unknown:
        unidentified = format_count(audit.proof.unidentified, "image")
        return [f"its weights are {audit.selection.one_line()}, with {unidentified} not identified by id; not proven"]
    return [
        f"proven: its weights are {audit.selection.one_line()}, of which "
        f"{format_count(audit.proof.images, 'image', 'was')} checked"
    ]


def _unidentified_selection(detector: ProvenanceAudit, val_instances: str) -> str:
    """Which images of the validation file are not proven clean, in words.

    "" if all are, or if no validation selected the weights.
    """
    audit = detector.selection
    if audit is None or audit.proof is None or audit.selection is None or not audit.selection.by_validation:
        return ""
    images = _unidentified(audit.proof, content=None)
    return f"{images} in {val_instances}" if images else ""


def _verdict(result: AuditResult | None, detector: ProvenanceAudit | None, content: ContentResult | None) -> list[str]:
    """Lines that say what is clean, and whether that is proven or only claimed; for an audit that found no leak."""
    lines = []
    if detector is not None and detector.provenance is not None:
        subject = detector.path if detector.kind == "checkpoint" else f"the detector of {detector.path}"
        if result is None:
            lines.append(f"clean according to the provenance of {subject}: {detector.provenance.one_line()}")
            # For imported published weights, no file proves anything.
            fix = "" if detector.provenance.training_set else "; to prove it, pass the training file with --instances"
            lines.append(f"this is only a claim{fix}")
            lines += _selection_verdict(detector)
        else:
            lines.append(f"proven: {subject} was trained on the images of this file (the image ids have the same hash)")
            lines += _selection_verdict(detector)
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
        lines.append(
            f"no copies: {format_count(content.compared, 'image')} compared with "
            f"{format_count(content.refer_compared, 'held-out image')}"
        )
    return lines
