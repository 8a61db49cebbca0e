"""What many threads need at the same time is made by one of them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qz.quantize.compute.once import once


def test_a_table_is_made_once_for_each_argument_by_whichever_thread_asks_first() -> None:
    made: list[str] = []
    together = threading.Barrier(8)

    @once
    def table(name: str) -> list[str]:
        made.append(name)
        time.sleep(0.05)  # the others arrive meanwhile
        return [name]

    def ask(number: int) -> list[str]:
        together.wait()
        return table("ab"[number % 2])

    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(ask, range(8)))
    assert sorted(made) == ["a", "b"]
    assert all(each is tables[number % 2] for number, each in enumerate(tables))


def test_what_fails_is_tried_again_by_the_next_who_asks() -> None:
    tries: list[int] = []

    @once
    def table() -> int:
        tries.append(1)
        return 1 // (len(tries) - 1)

    with pytest.raises(ZeroDivisionError):
        table()
    assert table() == table() == 1
    assert len(tries) == 2
