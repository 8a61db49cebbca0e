"""Threads for work that an interrupt does not wait for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose work is waited for at the end; after an error only the work that has begun.

    After an interrupt nothing is: the Hub may be silent for minutes. The threads end with the process then, or when
    their requests time out.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="qz-pool")
    try:
        yield pool
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
