"""How much of its usual work a device may be given in the state that it is in: 1 within its limits, 0 beyond one.

Below each limit there is a band in which the share falls linearly, so that a device is given less before it is given
nothing. One that was over a limit has half the band to go back before it counts again, so that it does not flap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from lepton_ai.device import ResourceState
from lepton_ai.settings import Settings

__all__ = ["Judge", "Level", "levels", "share_at"]


class Level(msgspec.Struct, frozen=True):
    """Something that has a limit, both as shares of what there is of it."""

    what: str
    value: float
    limit: float


class Judge:
    """Judges the states of one device in the order in which they were."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._over: frozenset[str] = frozenset()

    def judged(self, state: ResourceState) -> ResourceState:
        """The state with the share that follows from it, and why that is not all."""
        share, reason, over = 1.0, "", set()
        for each in levels(state, self._settings):
            here = share_at(each.value, each.limit, self._settings.limit_band, was_over=each.what in self._over)
            if here <= 0:
                over.add(each.what)
            if here < share:
                share, reason = here, _told(each, here)
        self._over = frozenset(over)
        return msgspec.structs.replace(state, share=share, reason=reason)


def share_at(value: float, limit: float, band: float, *, was_over: bool = False) -> float:
    """The share that one level leaves: 1 up to `limit - band`, 0 from `limit` on, linear between them."""
    if was_over and value > limit - band / 2:
        return 0.0
    return min(1.0, max(0.0, (limit - value) / band))


def levels(state: ResourceState, settings: Settings) -> Iterable[Level]:
    """What of a state has a limit."""
    return (each for each in _levels(state, settings) if each.limit > 0)


def _levels(state: ResourceState, settings: Settings) -> Iterator[Level]:
    yield _part("memory", state.memory_used_bytes, state.memory_total_bytes, settings.memory_limit)
    yield Level("network", state.network_utilization or 0.0, settings.network_limit)
    foreign = state.foreign_cpu if state.foreign_utilization is None else state.foreign_utilization
    yield Level("others' utilization", foreign, settings.utilization_limit)
    if (device := state.device) is not None:
        yield _part("device memory", device.memory_used_bytes, device.memory_total_bytes, settings.memory_limit)
        yield _part("temperature", device.temperature_c, device.temperature_limit_c, settings.temperature_limit)
        yield _part("power", device.power_w, device.power_limit_w, settings.power_limit)


def _part(what: str, value: float | None, whole: float | None, limit: float) -> Level:
    return Level(what, value / whole if value is not None and whole else 0.0, limit)


def _told(level: Level, share: float) -> str:
    at, limit = f"{level.what} at {level.value:.0%}", f"its limit of {level.limit:.0%}"
    if share > 0:
        return f"{at}, near {limit}: given {share:.0%} of its usual work"
    return f"{at}, over {limit}" if level.value >= level.limit else f"{at}, not yet well below {limit} again"
