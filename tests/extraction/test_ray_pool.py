"""The pool of Ray workers, with a stand-in for Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from refdet.extraction.ray_pool import Pool, Worker


class LostError(Exception):
    """Stands in for ``ray.exceptions.RayError``."""


def get(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.mark.parametrize("lost", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_the_times_of_workers_that_stop_are_kept_if_others_are_lost(lost: tuple[int, ...]) -> None:
    answers = [LostError() if i in lost else ({"compute": float(i)}, {}) for i in range(3)]
    ray: Any = SimpleNamespace(
        put=lambda value: value,
        remote=lambda **options: lambda kind: kind,
        wait=lambda calls, num_returns, timeout: (calls, []),
        get=get,
        kill=lambda actor: None,
        exceptions=SimpleNamespace(RayError=LostError),
    )
    cluster: Any = SimpleNamespace(ray=ray, resources={})
    pool = Pool(cluster, make=lambda *_: None, timeout=1.0)  # type: ignore[arg-type, return-value]
    for answer in answers:
        stop = SimpleNamespace(remote=lambda answer=answer: answer)
        pool.workers.append(Worker(SimpleNamespace(stop=stop), "node", work_sent=True))
    assert pool.stop() == [answer for i, answer in enumerate(answers) if i not in lost]
    assert not pool.workers
