from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.identity import ids, minute_of, new_id, new_ids, run_of, shared_by


@given(st.integers(0, 300))
def test_as_many_ids_are_made_as_asked_and_no_two_are_equal(count: int) -> None:
    assert len(set(new_ids(count))) == count


def test_an_id_is_a_uuid_of_version_7_in_its_usual_spelling() -> None:
    for found in new_ids(1000):
        parsed = uuid.UUID(found)
        assert (parsed.version, parsed.variant, str(parsed)) == (7, uuid.RFC_4122, found)


def test_an_id_carries_the_minute_in_which_it_was_made() -> None:
    before = int(time.time()) // 60
    assert before <= (minute_of(new_id()) or 0) <= int(time.time()) // 60


def test_a_later_millisecond_sorts_later() -> None:
    endless = ids()
    first = next(endless)
    made_at = uuid.UUID(first).int >> 80
    while time.time_ns() // 1_000_000 <= made_at:
        pass
    assert first < new_id()
    assert first < next(endless)


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**80 - 1))
def test_any_uuid_of_version_7_tells_its_minute(milliseconds: int, noise: int) -> None:
    bits = (milliseconds << 80 | noise) & ~(0xF << 76) & ~(3 << 62) | 7 << 76 | 2 << 62
    assert minute_of(str(uuid.UUID(int=bits))) == milliseconds // 60_000


@pytest.mark.parametrize("spell", [str.upper, "{{{}}}".format, "urn:uuid:{}".format, lambda job: job.replace("-", "")])
def test_an_id_that_is_spelled_otherwise_carries_the_same_minute(spell: Callable[[str], str]) -> None:
    job = new_id()
    assert minute_of(spell(job)) == minute_of(job)


@pytest.mark.parametrize("foreign", ["", "job-1", str(uuid.uuid4()), str(uuid.uuid1()), "0" * 32, "\ud800"])
def test_a_foreign_id_carries_no_minute(foreign: str) -> None:
    assert minute_of(foreign) is None


@given(st.text())
def test_no_text_raises(text: str) -> None:
    assert minute_of(text) is None or len(text) >= 32


def test_ids_that_are_made_together_follow_one_another() -> None:
    found = new_ids(100)
    assert run_of(found[0], 100) == tuple(found)
    assert {shared_by(each) for each in found} == {found[0][:-3]}


def test_a_run_does_not_outlast_the_moment_in_which_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    endless = ids()
    first = next(endless)
    now_ns += 60 * 10**9
    assert minute_of(next(endless)) == (minute_of(first) or 0) + 1


@pytest.mark.parametrize(
    ("first", "count"), [("job-1", 2), (new_id()[:-3] + "fff", 2), (new_id(), 0), (new_id(), 4097)]
)
def test_ids_that_cannot_follow_are_refused(first: str, count: int) -> None:
    with pytest.raises(ValueError, match="begin with"):
        run_of(first, count)


def test_a_foreign_id_shares_nothing() -> None:
    assert shared_by("job-1") is None
