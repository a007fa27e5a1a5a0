from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.errors import OptionNotSupported
from lepton_ai.job import Candidate, Cost, Elsewhere, Estimate, Meta, Options, Placement, Record, Setback, state_of
from lepton_ai.topology import PRIORITY_SEPARATOR, lane_list, lane_lists

seconds = st.floats(0, 1e6)
estimates = st.builds(Estimate, seconds, seconds, seconds, seconds)
candidates = st.builds(Candidate, st.text(), st.none() | estimates, st.none() | st.text())
placements = st.builds(
    Placement,
    job=st.text(),
    kernel=st.text(),
    state=st.sampled_from(["placed", "parked"]),
    reason=st.text(),
    placed_at=seconds,
    router=st.text(),
    device=st.none() | st.text(),
    estimate=st.none() | estimates,
    candidates=st.lists(candidates, max_size=3).map(tuple),
    policy=st.text(),
)
costs = st.builds(Cost, st.text(), st.text(), seconds, seconds, seconds, st.integers(1, 256))
records = st.builds(
    Record, st.none() | placements, st.none() | costs, st.none() | st.dictionaries(st.text(), st.text(), max_size=2)
)


@given(records)
def test_a_record_comes_back_from_either_encoding(record: Record) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Record) == record
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


@given(estimates)
def test_a_job_finishes_when_it_has_waited_moved_and_run(estimate: Estimate) -> None:
    assert math.isclose(estimate.finish_s, estimate.wait_s + estimate.transfer_s + estimate.run_s)


@pytest.mark.parametrize("priority", [None, *range(1, 10)])
def test_priorities_from_1_to_9_are_honoured(priority: int | None) -> None:
    assert Options(priority=priority).checked().priority == priority


@pytest.mark.parametrize(
    ("options", "field"),
    [(Options(priority=0), "priority"), (Options(priority=10), "priority"), (Options(result="pickle"), "result")],
)
def test_an_option_out_of_range_is_refused_by_name(options: Options, field: str) -> None:
    with pytest.raises(OptionNotSupported) as refused:
        options.checked()
    assert refused.value.field == field


def test_an_option_that_is_not_given_is_not_sent() -> None:
    assert msgspec.json.encode(Options()) == b"{}"


def test_without_a_priority_a_job_is_as_urgent_as_the_middle() -> None:
    assert Options().urgency == Options(priority=5).urgency


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_more_urgent_job_is_never_in_a_later_list(one: int, other: int) -> None:
    order = lane_lists()
    if one >= other:
        assert order.index(lane_list(one)) <= order.index(lane_list(other))


@pytest.mark.parametrize(
    ("priorities", "suffix"),
    [((9, 8, 7), "\x06\x16high"), ((6, 5, 4), ""), ((3,), "\x06\x163"), ((2,), "\x06\x166"), ((1,), "\x06\x169")],
)
def test_high_begins_at_7_and_the_middle_at_4(priorities: tuple[int, ...], suffix: str) -> None:
    assert {lane_list(priority) for priority in priorities} == {"lepton.ingest" + suffix}


def test_the_lists_of_a_lane_are_those_that_kombu_knows_and_one_more() -> None:
    kombus = ["lepton.ingest", *(f"lepton.ingest{PRIORITY_SEPARATOR}{step}" for step in (3, 6, 9))]
    assert list(lane_lists()[1:]) == kombus


PLACED = Placement("id", "a.b", "placed", "", 0.0, "r")
PARKED = Placement("id", "a.b", "parked", "", 0.0, "r")


@pytest.mark.parametrize(
    ("meta", "placement", "state"),
    [
        (None, None, "waiting"),
        (None, PLACED, "placed"),
        (None, PARKED, "parked"),
        (Meta("SUCCESS"), PLACED, "succeeded"),
        (Meta("FAILURE"), None, "failed"),
        (Meta("REVOKED"), None, "cancelled"),
        (Meta("STARTED"), PLACED, "placed"),
        (Meta("RETRY"), None, "waiting"),
        (Meta("PENDING"), PARKED, "parked"),
    ],
)
def test_a_jobs_state_is_its_results_if_final_and_its_placements_if_not(
    meta: Meta | None, placement: Placement | None, state: str
) -> None:
    assert state_of(meta, placement) == state


@pytest.mark.parametrize("value", [Options(), Estimate(0, 0, 0), PLACED, Record(), Meta("SUCCESS")])
def test_values_do_not_change(value: Any) -> None:
    with pytest.raises(AttributeError):
        setattr(value, value.__struct_fields__[0], "other")


@pytest.mark.parametrize("key", ["lepton.ingest", "lepton:again", "lepton:parked:a.b", "", "lepton:reply:" + "x" * 300])
def test_a_reply_goes_to_a_reply_list_and_nowhere_else(key: str) -> None:
    with pytest.raises(OptionNotSupported, match="reply_to"):
        Options(reply_to=key).checked()


def test_a_job_without_setbacks_is_pinned_as_it_says() -> None:
    assert Options().pin is None
    assert Options(device="gpu").pin == "gpu"


def test_a_job_with_setbacks_may_run_elsewhere_and_alike_ones_are_equal() -> None:
    options = Options(device="gpu", setbacks=(Setback("gpu.a", "device_out_of_memory", "5 GB"),))
    pin = options.pin
    assert isinstance(pin, Elsewhere)
    assert (pin.wanted, pin.code("gpu.a"), pin.code("gpu.b")) == ("gpu", "device_out_of_memory", None)
    assert str(pin) == "gpu, but not on gpu.a"
    other = msgspec.structs.replace(options, setbacks=(Setback("gpu.a", "device_out_of_memory", "6 GB"),))
    assert hash(other.pin) == hash(pin)
    assert other.pin == pin


@pytest.mark.parametrize("options", [Options(setbacks=()), Options(setbacks=(Setback("a", "b"),) * 65)])
def test_setbacks_are_a_few_and_never_none(options: Options) -> None:
    with pytest.raises(OptionNotSupported, match="setbacks"):
        options.checked()


def test_a_bundle_has_no_setbacks() -> None:
    with pytest.raises(OptionNotSupported, match="setbacks"):
        Options(bundle=4, setbacks=(Setback("a", "b"),)).checked()
