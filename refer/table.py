"""Convert the refs of a dataset to a pandas data frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ReferError
from .types import Annotation, Image, Ref, target_ids
from .validation import box_of

if TYPE_CHECKING:
    import pandas

_COLUMNS = (
    "sent_id",
    "sent",
    "tokens",
    "ref_id",
    "split",
    "image_id",
    "file_name",
    "ann_id",
    "category_id",
    "category",
    "targets",
    "x",
    "y",
    "width",
    "height",
)


class Dataset(Protocol):
    """The part of `refer.REFER` that `to_dataframe` needs."""

    DATA_DIR: str
    generalized: bool
    Anns: dict[Any, Annotation]
    Cats: dict[int, str]
    Imgs: dict[int, Image]

    def __iter__(self) -> Iterator[Ref]: ...


def to_dataframe(refer: Dataset) -> pandas.DataFrame:
    """Convert the refs of a dataset to a data frame.

    Args:
        refer: the dataset.

    Returns:
        One row per sentence in file order. Columns: ``sent_id``, ``sent``, ``tokens`` (list), ``ref_id``, ``split``,
        ``image_id``, ``file_name`` (of the image, None if it has none), ``ann_id``, ``category_id``, ``category`` (its
        name; in gRefCOCO these three are lists), ``targets`` (number of targets) and the box ``x``, ``y``, ``width``,
        ``height`` in pixels (NaN unless there is exactly one target).

    Raises:
        ReferError: pandas is not installed.
        ReferDataError: the annotation of a sentence's only target has no valid box.
    """
    try:
        import pandas
    except ImportError:
        raise ReferError("pandas is not installed; to_dataframe needs it: pip install pandas") from None
    rows: list[tuple[Any, ...]] = []
    for ref in refer:
        targets = target_ids(ref)
        box = box_of(refer.DATA_DIR, refer.Anns[targets[0]]) if len(targets) == 1 else [float("nan")] * 4
        # In gRefCOCO, category_id is a list; without a target it is [-1], which is no category.
        category: Any = (
            refer.Cats.get(ref["category_id"])
            if not refer.generalized
            else [refer.Cats.get(category_id) for category_id in ref["category_id"] if targets]
        )
        image = refer.Imgs[ref["image_id"]]
        common = (
            ref["ref_id"],
            ref["split"],
            ref["image_id"],
            image.get("file_name"),
            ref["ann_id"],
            ref["category_id"],
            category,
            len(targets),
            *box,
        )
        rows += [(sentence["sent_id"], sentence["sent"], sentence["tokens"], *common) for sentence in ref["sentences"]]
    with pandas.option_context("mode.string_storage", "python"):  # PyArrow's strings cannot have surrogates
        return pandas.DataFrame(rows, columns=list(_COLUMNS))
