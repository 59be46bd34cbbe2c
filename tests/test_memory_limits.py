"""`helpers/memory_limits.py`: memory runs out at the limit, however much is allocated or cached already."""

from __future__ import annotations

import pytest
import torch
from devices import on_devices
from memory_limits import memory_of, too_little_memory

MIB = 2**20


def allocates(device: str, *mebibytes: int) -> bool:
    """Try to allocate each of these sizes until one succeeds; returns whether one did."""
    for size in mebibytes:
        try:
            torch.empty(size * MIB, dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError:  # which the helper raises on the CPU too
            continue
        return True
    return False


@on_devices
@pytest.mark.parametrize("sizes", [(200,), (200, 100)], ids=["fixed-size", "smaller-if-out-of-memory"])
def test_memory_is_too_little_in_the_block_and_enough_after_it(device: str, sizes: tuple[int, ...]) -> None:
    with memory_of(device) as memory:
        kept = torch.empty(50 * MIB, dtype=torch.uint8, device=device)
        cached = [torch.empty(300 * MIB, dtype=torch.uint8, device=device)]
        cached.clear()
        with too_little_memory(memory, lambda: allocates(device, *sizes)):
            assert not allocates(device, *sizes)
            assert allocates(device, sizes[-1] // 2)  # the limit is just below what is needed
        memory.allow(None)
        assert allocates(device, *sizes) and len(kept) == 50 * MIB
    assert allocates(device, 500)


def test_a_computation_that_fits_into_any_limit_is_an_error() -> None:
    with (
        memory_of("cpu") as memory,
        pytest.raises(AssertionError, match="is enough"),
        too_little_memory(memory, lambda: allocates("cpu", 100, 1)),
    ):
        pass
