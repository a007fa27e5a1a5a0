"""What a policy gets and gives. Plain arrays in, plain arrays out; no clock, no broker, no randomness of its own."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["UNPLACED", "Plan", "Policy", "Problem"]

#: The device index of a job that no device can run.
UNPLACED = -1


class Problem(msgspec.Struct, frozen=True):
    """Jobs to place, in the order in which they should be looked at."""

    seconds: NDArray[np.float64]
    """[job, device]: transfer and run time; infinite where the device cannot run the job."""
    ready: NDArray[np.float64]
    """[device]: seconds until the device has finished what it was already given."""
    slots: NDArray[np.float64]
    """[device]: how many jobs it runs at once."""


class Plan(msgspec.Struct, frozen=True):
    """A device for each job, and when each job is then predicted to finish."""

    device: NDArray[np.intp]
    """[job]: the device's index, or UNPLACED."""
    wait: NDArray[np.float64]
    """[job]: seconds before it starts, counting the jobs placed before it; infinite where unplaced."""


class Policy(Protocol):
    """From a Problem to a Plan, for a whole window."""

    name: str

    def place(self, problem: Problem) -> Plan: ...
