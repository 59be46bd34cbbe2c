"""The store in which the processes of torchrun exchange addresses, separate for each restart."""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from refdet.training.launch import Launch

_POLL_SECONDS = 0.02  # between reads of the store
# keys in the store: token of a rank; the tokens of all ranks, by the first; answer of a rank to the first's token
_TOKEN, _CALL, _ANSWER = "refdet/here/{}", "refdet/call", "refdet/answer/{}/{}"


def open_rendezvous_store(launch: Launch, timeout: timedelta) -> Store:
    """Open a store that all processes share, without entries of earlier processes.

    torchrun may keep one store across restarts, in which processes would find the addresses of those that have ended.
    So each process makes a token, and the first process calls the others by their tokens until all have answered. Its
    token is the prefix of all keys in the returned store.

    Raises:
        RuntimeError: a process did not answer in time.
    """
    url = f"env://?rank={launch.rank}&world_size={launch.world_size}"
    store, rank, world_size = next(iter(rendezvous(url, timeout=timeout)))
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(_TOKEN.format(rank), token)
    others = range(1, world_size)
    while time.monotonic() < deadline:
        if rank == 0:
            tokens = [store.get(_TOKEN.format(other)).decode() for other in others]
            store.set(_CALL, json.dumps([token, *tokens]))
            answers = [_ANSWER.format(token, other) for other in others]
            if not answers or store.check(answers):
                return PrefixStore(token, store)
        else:
            call = json.loads(store.get(_CALL))
            if len(call) == world_size and call[rank] == token:
                store.set(_ANSWER.format(call[0], rank), "1")
                return PrefixStore(call[0], store)
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"no answer within {timeout}")
