from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.device import DeviceState, ResourceState
from lepton_ai.settings import Settings
from tasks.share import Judge, share_at

SETTINGS = Settings()
WELL = ResourceState(0, 0.0, 0.2, 10, 100)

LEVELS = st.floats(0.0, 2.0)
LIMITS = st.floats(0.1, 1.5)
BANDS = st.floats(0.01, 0.5)


def memory(used: int) -> ResourceState:
    return msgspec.structs.replace(WELL, memory_used_bytes=used)


def test_within_its_limits_a_device_is_given_all_of_its_work() -> None:
    found = Judge(SETTINGS).judged(WELL)
    assert (found.share, found.reason) == (1.0, "")


def test_near_a_limit_it_is_given_less_and_says_why() -> None:
    found = Judge(SETTINGS).judged(memory(93))
    assert found.share == pytest.approx(0.4)
    assert found.reason == "memory at 93%, near its limit of 95%: given 40% of its usual work"


def test_beyond_a_limit_it_is_given_nothing_and_says_why() -> None:
    found = Judge(SETTINGS).judged(memory(97))
    assert (found.share, found.reason) == (0.0, "memory at 97%, over its limit of 95%")


def test_the_worst_of_its_levels_decides() -> None:
    state = msgspec.structs.replace(memory(93), network_utilization=0.94)
    found = Judge(SETTINGS).judged(state)
    assert found.share == pytest.approx(0.2)
    assert found.reason.startswith("network at 94%")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (DeviceState(temperature_c=91.0, temperature_limit_c=90.0), "temperature at 101%, over its limit of 100%"),
        (DeviceState(memory_used_bytes=96, memory_total_bytes=100), "device memory at 96%, over its limit of 95%"),
        (DeviceState(power_w=350.0, power_limit_w=350.0), ""),
        (DeviceState(temperature_c=91.0), ""),
        (DeviceState(), ""),
    ],
)
def test_a_device_with_sensors_is_judged_by_them_too(state: DeviceState, reason: str) -> None:
    assert Judge(SETTINGS).judged(msgspec.structs.replace(WELL, device=state)).reason == reason


def test_power_has_a_limit_where_one_is_set() -> None:
    judge = Judge(Settings(power_limit=0.9))
    found = judge.judged(msgspec.structs.replace(WELL, device=DeviceState(power_w=95.0, power_limit_w=100.0)))
    assert found.reason == "power at 95%, over its limit of 90%"


def test_others_load_alone_has_no_limit_unless_one_is_set() -> None:
    busy = msgspec.structs.replace(WELL, host_cpu=1.0, foreign_cpu=1.0)
    assert Judge(SETTINGS).judged(busy).share == 1.0
    assert Judge(Settings(utilization_limit=0.9)).judged(busy).share == 0.0


def test_what_our_own_jobs_use_never_counts() -> None:
    busy = msgspec.structs.replace(WELL, utilization=1.0, host_cpu=1.0, own_cpu=1.0)
    assert Judge(Settings(utilization_limit=0.5)).judged(busy).share == 1.0


def test_a_device_that_tells_its_own_utilization_is_judged_by_that_of_others_on_it() -> None:
    state = msgspec.structs.replace(WELL, foreign_cpu=1.0, foreign_utilization=0.2)
    assert Judge(Settings(utilization_limit=0.9)).judged(state).share == 1.0


def test_a_limit_of_nought_is_none() -> None:
    assert Judge(Settings(memory_limit=0.0)).judged(memory(100)).share == 1.0


def test_a_device_that_was_over_a_limit_comes_back_well_below_it_and_not_just_below() -> None:
    judge = Judge(SETTINGS)
    shares = [judge.judged(memory(used)).share for used in (96, 94, 95, 94, 92, 94, 90)]
    assert shares == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.6, 0.2, 1.0])


def test_a_device_that_is_kept_out_says_that_it_is_not_far_enough_below() -> None:
    judge = Judge(SETTINGS)
    judge.judged(memory(96))
    assert judge.judged(memory(94)).reason == "memory at 94%, not yet well below its limit of 95% again"


@given(LEVELS, LIMITS, BANDS, st.booleans())
def test_a_share_is_one_below_the_band_and_nought_from_the_limit_on(
    value: float, limit: float, band: float, was_over: bool
) -> None:
    share = share_at(value, limit, band, was_over=was_over)
    assert 0 <= share <= 1
    if value >= limit:
        assert share == 0
    if value <= limit - 1.001 * band:
        assert share == 1


@given(LEVELS, LEVELS, LIMITS, BANDS, st.booleans())
def test_more_load_never_means_more_work(one: float, other: float, limit: float, band: float, was_over: bool) -> None:
    low, high = sorted((one, other))
    assert share_at(low, limit, band, was_over=was_over) >= share_at(high, limit, band, was_over=was_over)
