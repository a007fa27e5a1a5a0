"""Batch and device together: jobs that are alike share a launch, so what each costs depends on how many go along.

A launch of n jobs takes `a + b n`. Priced one by one, each of 200 small jobs pays the whole launch of an accelerator,
and all of them go to a processor; priced together they pay it once. So jobs that are alike become few rows of a
Problem, each a batch, and a policy places those as it would place jobs.

How large the batches are is the question of divisible loads with start-up costs (Beaumont, Casanova, Legrand, Robert
and Yang, "Scheduling divisible loads on star and tree networks", IEEE Trans. Parallel Distrib. Syst. 16, 2005): all
devices that take part end at one time T, where the sum over them of `(T - ready - a) / b` is n; a device takes part
whose first job would end before T. Nobody waits for a batch to fill: only what is here already goes along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np

from lepton_ai.placement.problem import Floats, Indices, Plan, Problem

__all__ = ["Batches", "Group", "batched"]


#: What a job adds to a launch is at least this part of what it takes alone, whatever was learned.
_LEAST: Final = 1e-6


class Group(msgspec.Struct, frozen=True):
    """Rows of a Problem that may share launches: what a job in them costs is the same."""

    members: Indices
    launch: Floats
    """[device]: what they pay of a launch, however many are in it, in seconds."""
    limit: int
    """How many jobs a batch may have."""


class Batches(msgspec.Struct, frozen=True):
    """A Problem whose rows are batches, and in which of them the rows of another are."""

    problem: Problem
    row: Indices
    """[row of the other]: the batch that it is in."""
    size: Indices
    """[batch]: how many jobs are in it."""
    each_s: Floats
    """[batch, device]: seconds of each of its jobs, with its share of the launch."""

    def plan(self, batches: Plan) -> Plan:
        """The plan for the other's rows that follows from one for the batches: each waits as its batch does."""
        return Plan(batches.device[self.row], batches.wait[self.row])


def batched(problem: Problem, count: Indices, groups: Sequence[Group]) -> Batches:
    """The problem with each group as few rows. `count[row]` is how many jobs a row of it stands for."""
    row = np.arange(problem.jobs)
    heads: list[list[int]] = []
    for group in groups:
        heads.append([])
        for part in _parts(problem, count, group):
            row[part] = part[0]  # a batch stands where its first job stood
            heads[-1].append(part[0])
    is_first = row == np.arange(problem.jobs)
    first, number = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    row = number[row]
    size = np.bincount(row, count, len(first)).astype(np.intp)
    seconds = problem.seconds[first] / count[first, np.newaxis] * size[:, np.newaxis]
    for group, its_heads in zip(groups, heads, strict=True):
        its = number[its_heads]
        one = problem.seconds[group.members[0]] / count[group.members[0]]
        launch = _launch(one, group)
        seconds[its] = launch + (one - launch) * size[its, np.newaxis]
    tail = problem.tail
    if tail is not None:  # as much longer as the rows were
        with np.errstate(invalid="ignore"):
            longer = tail[first] / problem.seconds[first]
        tail = seconds * np.where(np.isfinite(longer), longer, 1.0)
    # A batch is as much to be hurried as all that is in it.
    weight = np.bincount(row, problem.weight, len(first)).astype(np.float64)
    deadline = None if problem.deadline is None else problem.deadline[first]
    found = msgspec.structs.replace(problem, seconds=seconds, weight=weight, deadline=deadline, tail=tail)
    return Batches(found, row, size, seconds / size[:, np.newaxis])


def _launch(one: Floats, group: Group) -> Floats:
    """All but a trifle at most of a job that is alone in its launch, and nothing where none can run."""
    return np.minimum(group.launch, np.where(np.isfinite(one), (1 - _LEAST) * one, 0.0))


def _parts(problem: Problem, count: Indices, group: Group) -> Iterator[Indices]:
    """The members of a group, batch by batch."""
    members = group.members
    its = count[members]
    one = problem.seconds[members[0]] / its[0]
    sizes = _sizes(one, _launch(one, group), problem, int(its.sum()), group.limit)
    if its.max() == 1:
        yield from np.split(members, np.cumsum(sizes)[:-1])
        return
    # A batch ends where the next member would be more too much than is lacking without it.
    ends, behind = np.cumsum(sizes), np.cumsum(its) - its / 2
    yield from (part for part in np.split(members, np.searchsorted(behind, ends[:-1])) if part.size)


def _sizes(one: Floats, launch: Floats, problem: Problem, count: int, limit: int) -> list[int]:
    """Into batches of which sizes so many jobs go that are done soonest together; the largest first.

    `one[device]` is what a job takes that is alone in its launch, `launch[device]` the part of it that others share.
    """
    able = np.flatnonzero(np.isfinite(one))
    if not able.size:
        return [count]
    each = np.maximum(one[able] - launch[able], 1e-12) / problem.slots[able]
    start = problem.ready[able] + launch[able]
    order = np.argsort(start + each)
    each, start = each[order], start[order]
    ends = (count + np.cumsum(start / each)) / np.cumsum(1 / each)
    # The next device takes part where its first job would end before the others are done without it.
    is_last = np.append(ends[:-1] <= (start + each)[1:], True)
    part = int(np.argmax(is_last)) + 1
    shares = np.maximum((ends[part - 1] - start[:part]) / each[:part], 0.0)
    sizes = np.floor(shares).astype(int)
    sizes[np.argsort(sizes - shares)[: max(0, count - int(sizes.sum()))]] += 1
    sizes[0] += count - int(sizes.sum())
    largest_first = sorted(sizes[sizes > 0].tolist(), reverse=True)
    return [part for size in largest_first for part in _equal(size, -(-size // limit))]


def _equal(size: int, count: int) -> list[int]:
    """A number as the sum of so many that differ by one at most."""
    return [size // count + (at < size % count) for at in range(count)]
