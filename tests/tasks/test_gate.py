"""The gate: many inside, or one alone, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tasks.gate import Gate
from tests.tasks.workshop import until


class Visitor:
    """Somebody who enters a gate in a thread of their own, and leaves when they are told to."""

    def __init__(self, way_in: Callable[[], AbstractContextManager[None]]) -> None:
        self.came = threading.Event()
        self.may_leave = threading.Event()
        self.left = threading.Event()
        self._way_in = way_in
        threading.Thread(target=self._visit, daemon=True).start()

    def _visit(self) -> None:
        with self._way_in():
            self.came.set()
            self.may_leave.wait(20)
        self.left.set()

    @property
    def is_inside(self) -> bool:
        return self.came.is_set() and not self.left.is_set()

    def leave(self) -> None:
        self.may_leave.set()
        assert self.left.wait(5), "it does not leave"


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def enter() -> Iterator[Callable[[Callable[[], AbstractContextManager[None]]], Visitor]]:
    visitors: list[Visitor] = []

    def make(way_in: Callable[[], AbstractContextManager[None]]) -> Visitor:
        visitors.append(Visitor(way_in))
        return visitors[-1]

    yield make
    for each in visitors:
        each.may_leave.set()


def waits_alone(gate: Gate) -> bool:
    """Whether somebody has asked to be alone, so that nobody new is let in."""
    with gate._changed:
        return gate._alone


def test_many_are_inside_at_once(gate: Gate, enter) -> None:
    visitors = [enter(gate.shared) for _ in range(3)]
    assert all(each.came.wait(5) for each in visitors)
    assert all(each.is_inside for each in visitors)


def test_who_wants_to_be_alone_waits_for_all_who_are_inside(gate: Gate, enter) -> None:
    visitors = [enter(gate.shared) for _ in range(2)]
    assert all(each.came.wait(5) for each in visitors)
    alone = enter(gate.alone)
    until(lambda: waits_alone(gate), "it waits")
    for each in visitors:
        assert not alone.came.is_set()
        each.leave()
    assert alone.came.wait(5)


def test_nobody_new_is_let_in_once_somebody_waits_to_be_alone(gate: Gate, enter) -> None:
    inside = enter(gate.shared)
    assert inside.came.wait(5)
    alone = enter(gate.alone)
    until(lambda: waits_alone(gate), "it waits")
    new = enter(gate.shared)
    inside.leave()
    assert alone.came.wait(5)
    assert not new.came.is_set()
    alone.leave()
    assert new.came.wait(5)


def test_two_are_never_alone_together(gate: Gate, enter) -> None:
    one, two = enter(gate.alone), enter(gate.alone)
    until(lambda: one.came.is_set() or two.came.is_set(), "one of them comes in")
    first, second = (one, two) if one.came.is_set() else (two, one)
    assert not second.came.is_set()
    first.leave()
    assert second.came.wait(5)


@pytest.mark.parametrize("way_in", ["shared", "alone"])
def test_who_leaves_with_an_error_leaves_all_the_same(gate: Gate, enter, way_in: str) -> None:
    with pytest.raises(ValueError, match="wrong"), getattr(gate, way_in)():
        raise ValueError("wrong")
    assert enter(gate.alone).came.wait(5)
