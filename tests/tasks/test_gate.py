"""The gate: many inside, or one alone, and whoever wants to be alone is not kept waiting by newcomers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.gate import Gate


class Visitor:
    """One who goes in, and leaves when the test says so."""

    def __init__(self, enter: Callable[[], AbstractContextManager[Any]]) -> None:
        self._enter = enter
        self.inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._visit, daemon=True)
        self._thread.start()

    def _visit(self) -> None:
        with self._enter():
            self.inside.set()
            assert self._leave.wait(10)

    def leave(self) -> None:
        self._leave.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


def is_kept_out(visitor: Visitor) -> bool:
    return not visitor.inside.wait(0.05)


def test_many_are_inside_at_once() -> None:
    gate = Gate()
    visitors = [Visitor(gate.shared) for _ in range(5)]
    assert all(visitor.inside.wait(5) for visitor in visitors)
    for visitor in visitors:
        visitor.leave()


def test_whoever_wants_to_be_alone_waits_until_all_have_left() -> None:
    gate = Gate()
    first, second = Visitor(gate.shared), Visitor(gate.shared)
    assert first.inside.wait(5)
    assert second.inside.wait(5)
    alone = Visitor(gate.alone)
    assert is_kept_out(alone)
    first.leave()
    assert is_kept_out(alone)
    second.leave()
    assert alone.inside.wait(5)
    alone.leave()


def test_nobody_is_let_in_beside_one_who_is_alone_or_waits_to_be() -> None:
    gate = Gate()
    inside = Visitor(gate.shared)
    assert inside.inside.wait(5)
    alone = Visitor(gate.alone)
    assert is_kept_out(alone)
    late = Visitor(gate.shared)
    assert is_kept_out(late), "while he waits"
    inside.leave()
    assert alone.inside.wait(5)
    assert is_kept_out(late), "while he is inside"
    alone.leave()
    assert late.inside.wait(5)
    late.leave()


def test_two_who_want_to_be_alone_are_so_one_after_the_other() -> None:
    gate = Gate()
    first = Visitor(gate.alone)
    assert first.inside.wait(5)
    second = Visitor(gate.alone)
    assert is_kept_out(second)
    first.leave()
    assert second.inside.wait(5)
    second.leave()


@pytest.mark.parametrize("enter", [Gate.shared, Gate.alone])
def test_one_who_falls_over_inside_keeps_nobody_out(enter: Callable[[Gate], AbstractContextManager[Any]]) -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), enter(gate):
        raise ZeroDivisionError
    for way in (gate.alone, gate.shared):
        visitor = Visitor(way)
        assert visitor.inside.wait(5)
        visitor.leave()


@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_in_any_order_of_visits_whoever_is_alone_is(visits: list[bool]) -> None:
    gate, lock = Gate(), threading.Lock()
    inside: list[bool] = []

    def visit(is_alone: bool) -> None:
        with gate.alone() if is_alone else gate.shared():
            with lock:
                inside.append(is_alone)
                met.append(len(inside) == 1 or not any(inside))
            with lock:
                inside.remove(is_alone)

    met: list[bool] = []
    threads = [threading.Thread(target=visit, args=[each]) for each in visits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(met) == len(visits)
    assert all(met)
