"""Prefetch the images of batches in threads. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.extraction.steps import Load

_MAX_PIXELS = 1 << 28  # of prefetched images, unless a single batch has more; 0.8 GB


def load_ahead(
    load: Load, batches: Iterable[list[ImageRecord] | None], workers: int, ahead: int = 3
) -> Generator[list[np.ndarray | str], None, None]:
    """Prefetch the images of batches.

    Args:
        load: loads an image, raising InputError if it is unusable.
        batches: the batches. An iterator that does not know the next batch yet may return None instead; then the images
            of a prefetched batch are yielded, if there is one, before it is asked again.
        workers: number of threads.
        ahead: maximum number of prefetched batches.

    Yields:
        The images of the next batch, with the reason in place of an unusable image.
    """

    def attempt(record: ImageRecord) -> np.ndarray | str:
        try:
            return load(record)
        except InputError as error:
            # The message may contain a file name, but strings in the store must be valid Unicode, and HDF5 ends them
            # at a null character.
            return str(error).replace("\0", "?").encode(errors="replace").decode()

    pool = ThreadPoolExecutor(max(1, workers))
    waiting: deque[tuple[int, list[Future[np.ndarray | str]]]] = deque()  # pixels and images of each batch
    pixels = 0  # of all batches in `waiting`
    try:
        for batch in batches:
            batch_pixels = sum(record.height * record.width for record in batch or ())
            while waiting and (batch is None or len(waiting) > ahead or pixels + batch_pixels > _MAX_PIXELS):
                first_pixels, futures = waiting.popleft()
                pixels -= first_pixels
                yield [future.result() for future in futures]
                if batch is None:
                    break
            if batch is None:
                continue
            pixels += batch_pixels
            waiting.append((batch_pixels, [pool.submit(attempt, record) for record in batch]))
        while waiting:
            yield [future.result() for future in waiting.popleft()[1]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
