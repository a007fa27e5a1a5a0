"""How long a job may run: its own limit is the kernel's to heed, its worker's patience ends later."""

from __future__ import annotations

from collections.abc import Iterable

from lepton_ai.job import Estimate
from lepton_ai.kernel import KernelSpec
from lepton_ai.settings import Settings

__all__ = ["kill_after_s", "own_limit_s"]

#: A worker is not ended for a job that takes no longer than so many times what it was predicted to.
_PREDICTIONS = 3.0


def kill_after_s(
    limit_s: float | None, spec: KernelSpec, estimate: Estimate | None, settings: Settings
) -> tuple[float, bool]:
    """After how many seconds a job ends its worker, and whether that is the job's own limit, not its kernel's.

    A job's own limit only ever shortens the kernel's, and never below `least_limit_s` or what the job is predicted to
    take: nobody can end workers by asking for too little. Its result is refused all the same where it took longer.
    """
    most_s = spec.limit_s if spec.limit_s is not None else settings.limit_s
    if limit_s is None:
        return most_s, False
    predicted_s = estimate.run_s if estimate is not None else 0.0
    own_s = max(limit_s, settings.least_limit_s, _PREDICTIONS * predicted_s)
    return (own_s, True) if own_s < most_s else (most_s, False)


def own_limit_s(limits: Iterable[float | None]) -> float | None:
    """How long a launch of jobs with these limits may take; None where one of them has none."""
    together_s = 0.0
    for limit in limits:
        if limit is None:
            return None
        together_s += limit
    return together_s
