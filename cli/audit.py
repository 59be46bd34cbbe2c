"""``refdet audit``: look for REFER's val and test images in the training data of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refdet.errors import RuntimeFailure
from refdet.files.short_text import format_count

from .arguments import check_images, check_refer_root, check_run_directory, check_store, check_text_file
from .audit_verdict import chosen_by_validation, selection_proven, unidentified_in, verdict
from .common import echo_json, echo_line, echo_table, json_option, note, renamed_option, store_option
from .given_options import reject_unused
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
@click.option(
    "--val-images", metavar="DIR", help="Folder or zip of the images in --val-instances, to compare them too."
)
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
    val_images: str | None,
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
    if val_images is not None and (val_instances is None or not find_duplicates):
        raise click.UsageError("--val-images is for --val-instances with --find-duplicates; add them or leave it out")
    detector = checkpoint if checkpoint is not None else store  # a path; None to audit F.json alone
    if benchmark and detector is not None:
        raise click.UsageError("--benchmark is for --instances alone; audit the detector without it")
    if trust_weights and detector is None:
        raise click.UsageError("--trust-weights is for --checkpoint and --store")
    if val_instances is not None and detector is None:
        raise click.UsageError("--val-instances is for --checkpoint and --store; audit the file alone by --instances")
    if instances is None and val_instances is None:
        reject_unused(
            "allow_unidentified", "is for the images of --instances or --val-instances; give one of them or omit it"
        )
    check_refer_root(Path(refer_root))
    _check_files(
        {"--instances": instances, "--val-instances": val_instances},
        checkpoint,
        store,
        {"--images": images, "--refer-images": refer_images, "--val-images": val_images},
    )
    provenance_audit: ProvenanceAudit | None = None
    result: AuditResult | None
    content: ContentResult | None = None
    val_content: ContentResult | None = None
    if detector is not None:
        provenance_audit = _audit_detector(detector, refer_root, instances, exclude, trust_weights, val_instances)
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
        if val_instances is not None and val_images is not None:
            if chosen_by_validation(provenance_audit) is None:
                notes.append("--val-images: not compared, as no validation chose these weights")
            else:
                val_content = audit_content(
                    val_instances, refer_root, val_images, refer_images or images, exclude, argument="val_images"
                )
                notes += [f"--find-duplicates, --val-images: {text}" for text in val_content.notes()]
    for text in notes:
        note(f"note: {text}")
    unidentified = unidentified_in(result, content)
    fix = "compare them with --find-duplicates" if content is None else "add or repair their files"
    selection = chosen_by_validation(provenance_audit)
    if not unidentified and selection is not None and (images_of_file := unidentified_in(selection.proof, val_content)):
        unidentified = f"{images_of_file} in {val_instances}"
        if val_content is None:
            fix = "compare them with --find-duplicates in an audit of that file alone, or here with --val-images"
    unproven = "" if allow_unidentified else unidentified
    if as_json:
        echo_json(_to_json(result, provenance_audit, content, val_content, unidentified, unproven))
    else:
        _print_tables(result, provenance_audit, [content, val_content])
    _raise_leaks(instances, result, provenance_audit, content)
    _raise_copies(val_instances, val_content)
    if unproven:
        raise RuntimeFailure(
            f"{instances or detector}: not proven: {unproven}; {fix}, or accept them with --allow-unidentified"
        )
    if not as_json:
        echo_line()
        for line in verdict(result, provenance_audit, content, val_content):
            echo_line(line)


def _check_files(
    lists: Mapping[str, str | None], checkpoint: str | None, store: str | None, images: Mapping[str, str | None]
) -> None:
    """Check that the files and folders exist; ``lists`` and ``images`` are paths by option."""
    for option, path in lists.items():
        if path is not None:
            check_text_file(option, Path(path), "an instances JSON or a list of images")
    if checkpoint is not None:
        check_run_directory("--checkpoint", Path(checkpoint))
    if store is not None:
        check_store("--store", Path(store))
    for option, path in images.items():
        if path is not None:
            check_images(option, Path(path))


def _audit_detector(
    detector: str,
    refer_root: str,
    instances: str | None,
    exclude: tuple[str, ...],
    trust_weights: bool,
    val_instances: str | None,
) -> ProvenanceAudit:
    """Audit the provenance of a run directory or a store, with messages that name the options of this command."""
    from refdet.splits.detector_audit import audit_provenance

    found = audit_provenance(detector, refer_root, instances, exclude, trust_weights, val_instances)
    return replace(found, problem=as_options(found.problem), notes=[as_options(text) for text in found.notes])


def _to_json(
    result: AuditResult | None,
    detector: ProvenanceAudit | None,
    content: ContentResult | None,
    val_content: ContentResult | None,
    unidentified: str,
    unproven: str,
) -> dict[str, Any]:
    """The results as a JSON object.

    Args:
        result: audit of F.json, None without --instances.
        detector: audit of the provenance of a checkpoint or a store, None if only F.json is audited.
        content: comparison of the images' pixels, None without --find-duplicates.
        val_content: the same for the validation images, None without --val-images.
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
    if val_content is not None:
        is_clean = is_clean and not val_content.copies
        tree["selection"] |= {"proven": selection_proven(detector, val_content), "content": val_content.to_json()}
    tree |= {"clean": is_clean, "unproven": unproven}
    if detector is not None:
        tree["proven"] = detector.proven_if_identified and is_clean and not unidentified
    return tree


def _print_tables(
    result: AuditResult | None, detector: ProvenanceAudit | None, contents: Sequence[ContentResult | None]
) -> None:
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
    for content in contents:
        if content is None or not content.copies:
            continue
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
    _raise_copies(instances, content)


def _raise_copies(instances: str | None, content: ContentResult | None) -> None:
    """Raise RuntimeFailure if the images of a file are copies of held-out images."""
    if content is not None and content.copies:
        count = len({copy.image for copy in content.copies})
        raise RuntimeFailure(
            f"{instances}: contains copies of held-out images under other ids ({format_count(count, 'image')}); "
            "inspect and remove them"
        )
