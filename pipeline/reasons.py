"""Why a device was chosen, in the words of a Placement."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Final

import msgspec

__all__ = ["Reason", "reason"]

#: Jobs whose own finish is later by less than this are taken to finish first.
_LEAST_S: Final = 1e-6
_ONLINE: Final = "costs the others least"
#: What a policy goes by that may pass over the device where a job finishes first.
_GOES_BY: Final = {"externality": _ONLINE, "priced": "lets all that wait end soonest"}


class Reason(msgspec.Struct, frozen=True):
    """What jobs that are alike must share to have one note: the numbers in it are told with one digit."""

    later_s: float = 0.0
    """By how much its own finish is later than on the device where it would finish first."""
    first: int = -1
    """Which device that is, where it is another."""
    is_probe: bool = False
    makes_deadline: bool | None = None
    """Whether it ends in time nineteen times in twenty; None where it has no deadline."""

    def text(self, devices: Sequence[str], kernel: str, chosen: int, able: int, policy: str) -> str:
        """A sentence for whoever asks why."""
        return f"{self._choice(devices, kernel, chosen, able, policy)}{_DEADLINE[self.makes_deadline]}"

    def _choice(self, devices: Sequence[str], kernel: str, chosen: int, able: int, policy: str) -> str:
        if able == 1:
            return "the only device that can run it"
        if self.is_probe:
            return f"a probe: {kernel} has not been measured often enough on {devices[chosen]}"
        if self.first < 0:
            return f"finishes first of {able} able devices"
        goes_by = _GOES_BY.get(policy, f"chosen by the policy {policy}")
        return f"{goes_by}: its own finish is {_readable(self.later_s)} later than on {devices[self.first]}"


_DEADLINE: Final = {
    None: "",
    True: "; makes its deadline",
    False: "; may miss its deadline, as on every other device",
}


def reason(
    chosen: int,
    waits: Sequence[float],
    seconds: Sequence[float],
    *,
    is_probe: bool = False,
    makes_deadline: bool | None = None,
) -> Reason:
    """Why a job goes to a device that would have it wait `waits[device]` and then need `seconds[device]`."""
    later_s = waits[chosen] + seconds[chosen] - min(map(add, waits, seconds))
    if is_probe or later_s < _LEAST_S:
        return _FIRST if not is_probe and makes_deadline is None else Reason(0.0, -1, is_probe, makes_deadline)
    finishes = list(map(add, waits, seconds))
    return Reason(float(f"{later_s:.0e}"), finishes.index(min(finishes)), is_probe, makes_deadline)


_FIRST: Final = Reason()


def _readable(seconds: float) -> str:
    """Such as 3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} us"
