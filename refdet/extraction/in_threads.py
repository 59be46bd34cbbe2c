"""`map_in_threads`: look at many image files at once, as each waits for the disk or the network. No torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from refdet.files.progress import progress

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 8


def map_in_threads(function: Callable[[T], R], images: Sequence[T], desc: str) -> Generator[R, None, None]:
    """Call a function for each of many images, with a progress bar.

    Args:
        function: called in several threads at once; its result should be small, as all may be in memory.
        images: what to call it with.
        desc: what the work is.

    Yields:
        The results, in the order of ``images``; raises what the function raises.
    """
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield from progress(pool.map(function, images), desc, "image", total=len(images), leave=False)
    finally:
        pool.shutdown(cancel_futures=True)
