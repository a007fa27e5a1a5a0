from __future__ import annotations

from pipeline.reasons import reason

NAMES = ["cpu", "gpu"]


def told(chosen: int, waits: list[float], seconds: list[float], policy: str = "externality", **terms: bool) -> str:
    able = sum(each < float("inf") for each in seconds)
    return reason(chosen, waits, seconds, **terms).text(NAMES, "test.spin", chosen, able, policy)


def test_a_job_that_finishes_nowhere_sooner_is_said_to_finish_first() -> None:
    assert told(1, [0.0, 0.5], [1.0, 0.4]) == "finishes first of 2 able devices"


def test_one_that_is_later_for_the_sake_of_others_says_by_how_much_and_than_where() -> None:
    assert told(1, [0.0, 0.5], [1.0, 0.503]) == "costs the others least: its own finish is 3 ms later than on cpu"
    assert told(1, [0.0, 2.0], [1.0, 1.0]) == "costs the others least: its own finish is 2 s later than on cpu"
    assert told(0, [0.0, 0.0], [5e-5, 1e-5]) == "costs the others least: its own finish is 40 us later than on gpu"


def test_another_policy_is_named() -> None:
    assert told(1, [0.0, 2.0], [1.0, 1.0], "priced").startswith("lets all that wait end soonest: its own finish")
    assert told(1, [0.0, 2.0], [1.0, 1.0], "mine").startswith("chosen by the policy mine: its own finish")


def test_where_there_was_no_choice_it_says_so() -> None:
    assert told(0, [9.0, 0.0], [1.0, float("inf")]) == "the only device that can run it"


def test_a_probe_says_that_it_is_one() -> None:
    assert told(0, [0.0, 0.0], [2.0, 1.0], is_probe=True).startswith("a probe: test.spin has not been measured")


def test_a_deadline_has_its_verdict() -> None:
    assert told(1, [0.0, 0.0], [2.0, 1.0], makes_deadline=True).endswith("; makes its deadline")
    assert "may miss its deadline" in told(1, [0.0, 0.0], [2.0, 1.0], makes_deadline=False)


def test_jobs_that_differ_by_less_than_a_digit_have_one_reason() -> None:
    assert reason(0, [0.0, 0.0], [1.0031, 1.0]) == reason(0, [0.0, 0.0], [1.0029, 1.0])
    assert reason(0, [0.0, 0.0], [1.0, 2.0]) is reason(1, [0.0, 0.0], [2.0, 1.0])
