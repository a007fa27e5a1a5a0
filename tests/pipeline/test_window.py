from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.job import Options
from pipeline.window import ClaimedJob, Window
from queues.broker import CLAIM_LIMIT, WAKE, Kind

numbers = itertools.count()
ROOMY = 2**40


def fill(window: Window, count: int, *, priority: int | None = None) -> list[bytes]:
    """Claims `count` messages, all of which are jobs, as the router does."""
    messages = [f"message {next(numbers)}".encode() for _ in range(count)]
    for message in messages:
        claim, _ = window.open_claim(Kind.NEW)
        window.hold(claim, [message])
        window.add((message.decode(),), "test.kernel", Options(priority=priority), message, claim)
    return messages


def messages_of(jobs: list[ClaimedJob]) -> list[bytes]:
    return [job.message for job in jobs]


def test_jobs_are_looked_at_in_the_order_of_their_arrival() -> None:
    window = Window("router-1", 100, ROOMY)
    sent = fill(window, 10)
    assert messages_of(window.first(10)) == sent


def test_the_most_urgent_jobs_come_first_and_unset_is_the_middle() -> None:
    window = Window("router-1", 100, ROOMY)
    low, unset, high, mid = (fill(window, 2, priority=priority) for priority in (1, None, 9, 5))
    assert messages_of(window.first(8)) == high + unset + mid + low


def test_no_more_jobs_are_looked_at_than_asked_for() -> None:
    window = Window("router-1", 100, ROOMY)
    sent = fill(window, 10)
    assert messages_of(window.first(3)) == sent[:3]


def test_a_claim_takes_no_more_than_its_limit_and_then_another_is_opened() -> None:
    window = Window("router-1", 2 * CLAIM_LIMIT, ROOMY)
    fill(window, CLAIM_LIMIT + 1)
    sizes = sorted({job.claim.number: len(job.claim.messages) for job in window.first(1000)}.items())
    assert sizes == [(0, CLAIM_LIMIT), (1, 1)]


def test_of_two_claims_with_room_the_fuller_is_filled_first() -> None:
    window = Window("router-1", 4 * CLAIM_LIMIT, ROOMY)
    fill(window, CLAIM_LIMIT + 10)
    window.left(window.first(5))  # the first claim has room again, and is still the fuller
    assert window.open_claim(Kind.NEW)[0].number == 0


def test_an_empty_claim_is_closed_and_its_number_used_again() -> None:
    window = Window("router-1", 4 * CLAIM_LIMIT, ROOMY)
    fill(window, CLAIM_LIMIT + 10)
    window.left(window.first(CLAIM_LIMIT))
    fill(window, CLAIM_LIMIT - 10)
    assert {job.claim.number for job in window.first(1000)} == {1}
    assert window.open_claim(Kind.NEW)[0].number == 0


@pytest.mark.parametrize(("kind", "name"), [(Kind.NEW, "claim"), (Kind.AGAIN, "reclaim"), (Kind.ALONE, "suspects")])
def test_claims_are_named_for_their_incarnation_and_what_they_hold(kind: Kind, name: str) -> None:
    assert Window("router-7", 10, ROOMY).open_claim(kind)[0].key == f"lepton:{name}:router-7:0"


def test_what_came_back_is_never_in_one_claim_with_what_is_new() -> None:
    window = Window("router-1", 100, ROOMY)
    for at, kind in enumerate([*Kind, *Kind]):
        claim, _ = window.open_claim(kind)
        window.hold(claim, [b"%d" % at])
        window.add((str(at),), "test.kernel", Options(), claim.messages[-1], claim)
    held = {job.claim.kind: job.claim.messages for job in window.jobs()}
    assert held == {Kind.NEW: [b"0", b"3"], Kind.AGAIN: [b"1", b"4"], Kind.ALONE: [b"2", b"5"]}
    assert [job.id for job in window.jobs() if job.alone] == ["2", "5"]


def test_the_claim_that_wake_ups_land_in_is_nobody_elses() -> None:
    window = Window("router", 1000, 10**9)
    wake = window.wake_claim()
    window.hold(wake, [b"woken"])
    claim, _ = window.open_claim(Kind.NEW)
    assert claim.key != wake.key


def test_a_window_has_room_for_jobs_however_many_are_in_a_message() -> None:
    window = Window("router", 1000, 10**9)
    claim, _ = window.open_claim(Kind.NEW)
    for at in range(9):
        window.hold(claim, [b"message"])
        window.add(tuple(f"{at}-{n}" for n in range(100)), "test.kernel", Options(), claim.messages[-1], claim)
    assert 1 <= window.room <= 5
    window.hold(claim, [b"message"])
    window.add(tuple(f"9-{n}" for n in range(100)), "test.kernel", Options(), claim.messages[-1], claim)
    assert window.room == 0


def test_jobs_have_expired_once_their_deadline_has_passed() -> None:
    window = Window("router-1", 100, ROOMY)
    claim, _ = window.open_claim(Kind.NEW)
    for name, deadline_at in (("never", None), ("early", 5.0), ("late", 7.0)):
        window.hold(claim, [name.encode()])
        window.add((name,), "test.kernel", Options(), claim.messages[-1], claim, deadline_at)
    assert [[job.id for job in window.expired(now)] for now in (4.9, 5.0, 8.0)] == [[], ["early"], ["early", "late"]]


def test_the_claim_of_the_wake_up_is_never_opened_however_large_the_window() -> None:
    window = Window("router-1", 10**9, ROOMY)
    fill(window, window.room)
    assert {job.claim.number for job in window.first(10**6)} == set(range(WAKE))


def test_a_message_that_is_no_job_takes_room_until_it_is_forgotten() -> None:
    window = Window("router-1", 10, ROOMY)
    claim, _ = window.open_claim(Kind.NEW)
    window.hold(claim, [b"unreadable"])
    assert (len(window), window.room) == (0, 9)
    window.forget([(claim, claim.messages[0])])
    assert window.room == 10


def test_of_two_equal_messages_only_the_one_that_left_is_gone() -> None:
    window = Window("router-1", 10, ROOMY)
    claim, _ = window.open_claim(Kind.NEW)
    twins = [bytes(bytearray(b"twin")), bytes(bytearray(b"twin"))]
    window.hold(claim, twins)
    for message in twins:
        window.add(("twin",), "test.kernel", Options(), message, claim)
    window.left(window.first(1))
    assert claim.messages == [b"twin"]
    assert len(window) == 1


@given(st.lists(st.one_of(st.integers(1, 400), st.integers(-400, -1)), max_size=30))
def test_claims_hold_exactly_the_jobs_that_have_not_left(steps: list[int]) -> None:
    window = Window("router-1", 2000, ROOMY)
    for step in steps:
        if step > 0:
            fill(window, min(step, window.room), priority=1 + step % 9)
        else:
            window.left(window.first(-step))
        jobs = window.first(10**6)
        claims = {job.claim.key: job.claim for job in jobs}
        held = [message for claim in claims.values() for message in claim.messages]
        assert sorted(held) == sorted(messages_of(jobs))
        assert all(len(claim.messages) <= CLAIM_LIMIT for claim in claims.values())
        assert window.room == 2000 - len(jobs)


# -- sizes ------------------------------------------------------------------------------------------------------

MEGABYTE = 2**20


def test_a_window_is_full_by_bytes_long_before_it_is_by_number() -> None:
    window = Window("router-1", 4096, 10 * MEGABYTE)
    count = 0
    while window.room:
        claim, room = window.open_claim(Kind.NEW)
        assert room >= 1
        window.hold(claim, [bytes(MEGABYTE)])
        count += 1
    assert count == 10


def test_a_large_message_counts_at_once_and_small_ones_make_room_again() -> None:
    window = Window("router-1", 4096, 64 * MEGABYTE)
    before = window.room
    claim, _ = window.open_claim(Kind.NEW)
    large = bytes(4 * MEGABYTE)
    window.hold(claim, [large])
    assert window.room <= 15 < before
    window.forget([(claim, large)])
    claim, _ = window.open_claim(Kind.NEW)
    window.hold(claim, [b"%d" % at for at in range(200)])
    assert window.room > 1000


def test_a_claim_of_large_messages_holds_few() -> None:
    window = Window("router-1", 4096, 64 * MEGABYTE)
    for _ in range(8):
        claim, _ = window.open_claim(Kind.NEW)
        window.hold(claim, [bytes(3 * MEGABYTE)])
        window.add(("job",), "test.kernel", Options(), claim.messages[-1], claim)
    assert max(len(job.claim.messages) for job in window.first(100)) <= 3


def test_what_a_wake_up_brings_finds_a_claim_even_where_all_are_full() -> None:
    window = Window("router-1", 4096, 2**50)
    for _ in range(200):
        claim, room = window.open_claim(Kind.NEW)
        assert room >= 1
        window.hold(claim, [bytes(8 * MEGABYTE)] * 1)


def test_what_waits_is_told_by_its_urgency() -> None:
    window = Window("router", 10, 2**20)
    claim = window.open_claim(Kind.NEW)[0]
    jobs = [
        window.add(("x",), kernel, Options(priority=priority), b"", claim) for kernel in "ab" for priority in (9, 1)
    ]
    assert window.waiting() == {9: 2, 1: 2}
    bundle = window.add(("x", "y", "z"), "a", Options(priority=1), b"", claim)
    assert window.waiting() == {9: 2, 1: 5}
    window.remove([jobs[0], bundle])
    assert window.waiting() == {9: 1, 1: 2}
