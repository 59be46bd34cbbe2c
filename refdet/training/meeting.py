"""Where the processes of torchrun exchange addresses: a store of their own for each time that they are started."""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from refdet.training.launch import Launch

_LOOK = 0.02  # seconds between looks at the store
_HERE, _CALL, _ANSWER = "refdet/here/{}", "refdet/call", "refdet/answer/{}/{}"


def meeting_store(launch: Launch, patience: timedelta) -> Store:
    """A store that holds nothing of earlier processes.

    torchrun may keep one store for all that it starts, in which restarted processes find the addresses of those that
    have ended. So the first process calls the others by marks that each has made for itself, until all have answered.

    Raises:
        RuntimeError: not all came in time.
    """
    url = f"env://?rank={launch.rank}&world_size={launch.world_size}"
    store, rank, world_size = next(iter(rendezvous(url, timeout=patience)))
    own, until = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    store.set(_HERE.format(rank), own)
    others = range(1, world_size)
    while time.monotonic() < until:
        if rank == 0:
            there = [store.get(_HERE.format(other)).decode() for other in others]
            store.set(_CALL, json.dumps([own, *there]))
            answers = [_ANSWER.format(own, other) for other in others]
            if not answers or store.check(answers):
                return PrefixStore(own, store)
        else:
            called = json.loads(store.get(_CALL))
            if len(called) == world_size and called[rank] == own:
                store.set(_ANSWER.format(called[0], rank), "1")
                return PrefixStore(called[0], store)
        time.sleep(_LOOK)
    raise RuntimeError(f"no answer within {patience}")
