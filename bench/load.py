"""The job that every contender is given: a kernel's name, three scalars, 256 bytes; and what must come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench import synthetic

DATA = bytes(range(7, 256)) + bytes(range(7))


class Load(NamedTuple):
    """Jobs of one kernel. `n` is what each is given beside its number: for `bench.spin` the steps that it computes."""

    label: str
    kernel: str
    n: int

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The arguments of so many jobs, each with its own number."""
        return [{"x": float(number), "y": 2.0, "n": self.n, "data": DATA} for number in range(count)]

    def check(self, totals: Sequence[float]) -> None:
        """Raises ValueError where a result is not that of its job."""
        tail = 2.0 + (self.n + DATA[0] if self.kernel == "bench.noop" else synthetic.loop(self.n))
        for number, total in enumerate(totals):
            if total != number + tail:
                raise ValueError(f"job {number} of {self.label} gave {total!r} and not {number + tail!r}")


NOOP = Load("noop", "bench.noop", 3)


def spinning(seconds: float) -> Load:
    """Jobs that compute for so long on this machine."""
    label = f"{seconds * 1e6:g}us" if seconds < 1e-3 else f"{seconds * 1e3:g}ms"
    return Load(label, "bench.spin", synthetic.loops_of(seconds))
