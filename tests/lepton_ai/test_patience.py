from __future__ import annotations

import pytest

from lepton_ai.errors import BrokerUnavailable, Overloaded, QuotaExceeded, Unavailable
from lepton_ai.patience import Patience


def after(error: Unavailable, retry_after_s: float) -> Unavailable:
    error.retry_after_s = retry_after_s
    return error


def test_pauses_grow_and_end_after_half_a_minute() -> None:
    now = [0.0]
    patience, pauses = Patience(lambda: now[0], was_there=True), []
    while now[0] < 30:
        pauses.append(patience.spend(BrokerUnavailable()).seconds)
        now[0] += pauses[-1]
    with pytest.raises(BrokerUnavailable):
        patience.spend(BrokerUnavailable())
    assert pauses[:7] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert 30 <= now[0] <= 32


def test_who_was_never_there_is_not_waited_for() -> None:
    with pytest.raises(Overloaded):
        Patience().spend(Overloaded())


@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(1.0, 1.0), (4.0, 4.0), (60.0, 5.0)])
def test_a_refusal_says_how_long_to_pause_within_reason(retry_after_s: float, pause_s: float) -> None:
    for error in (QuotaExceeded(), Overloaded()):
        assert Patience(was_there=True).spend(after(error, retry_after_s)).seconds == pause_s


def test_progress_begins_it_anew() -> None:
    now = [0.0]
    patience = Patience(lambda: now[0], was_there=True)
    for _ in range(10):
        patience.spend(QuotaExceeded())
        now[0] += 20
        patience.renew()
    patience.spend(QuotaExceeded())
    now[0] += 30
    with pytest.raises(QuotaExceeded):
        patience.spend(QuotaExceeded())
