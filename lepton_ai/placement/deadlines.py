"""Deadlines by p95: a job that must have ended by a time goes where it does so nineteen times in twenty.

A job that can be in time nowhere is placed as if it had no deadline: late is better than never, and whoever thinks
otherwise has it expire.
"""

from __future__ import annotations

import msgspec
import numpy as np

from lepton_ai.placement.problem import Problem

__all__ = ["in_time"]


def in_time(problem: Problem) -> Problem:
    """The problem without the devices on which a job would miss its deadline, for each job that can make it on others.

    Goes by what devices have to do already, not by the other jobs of the problem. For every policy: none has to know.
    """
    deadline = problem.deadline
    if deadline is None:
        return problem
    problem = problem.expanded()
    tail = problem.seconds if problem.tail is None else problem.tail
    makes = np.logical_and(problem.ready + tail <= deadline.reshape(-1, 1), np.isfinite(problem.seconds))
    late = np.logical_and(makes.any(axis=1, keepdims=True), np.logical_not(makes))
    return msgspec.structs.replace(problem, seconds=np.where(late, np.inf, problem.seconds))
