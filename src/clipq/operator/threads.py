"""Our own threads for compiled loops that release the GIL.

Not Numba's threading layer: its OpenMP one kills a process that forks after use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run all tasks at once, the first of them in the calling thread, and wait for them.

    Raises:
        Exception: what a task raised, once all have ended.
    """
    if not tasks:
        return
    futures = [_executor(len(tasks) - 1).submit(task) for task in tasks[1:]]
    try:
        tasks[0]()
    finally:
        for future in futures:
            future.exception()
    for future in futures:
        future.result()


def _executor(workers: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < workers:
        _pool, _pool_size = ThreadPoolExecutor(workers, thread_name_prefix="clipq"), workers
    return _pool


def _forget_pool() -> None:
    global _pool, _pool_size
    _pool, _pool_size = None, 0


os.register_at_fork(after_in_child=_forget_pool)  # a forked child has none of its parent's threads
