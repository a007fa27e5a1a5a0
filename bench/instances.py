"""Placement problems to measure policies on: files in Braun's form, and generated ones by documented laws, seeded.

**Braun's twelve classes** (T. D. Braun et al., "A comparison of eleven static heuristics for mapping a class of
independent tasks onto heterogeneous distributed computing systems", J. Parallel Distrib. Comput. 61, 2001): 512 jobs
on 16 machines, ETC[j, i] = q[j] u[j, i], q uniform in [1, 3000) (high job heterogeneity) or [1, 100) (low), u in
[1, 1000) or [1, 10) for machines. Consistent: every row sorted, so a machine that is faster once always is;
semi-consistent: the even columns of every row sorted; inconsistent: as drawn.

**Fleets**: what the router prices. Kernels have a Work of their own (flops log-normal, sigma 1 between kernels and 0.5
within one; 4 flops a byte in the median, sigma 1). A model of a device has a launch time, a link and a speed that
lie apart as those of CPUs, FPGAs, GPUs and TPUs do; how much of its speed a kernel gets is its own matter (log-normal,
sigma 0.7), and one pair of kernel and accelerator in ten cannot run at all. seconds = launch + bytes / link + flops /
(speed x efficiency). Devices of a model are alike (a class), or, where every device has a column, differ by a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from lepton_ai.errors import Malformed
from lepton_ai.placement.problem import Problem

__all__ = ["Instance", "braun", "fleet", "generated", "large", "read"]

_BRAUN = (512, 16)
_HETEROGENEITY = {"hi": (3000.0, 1000.0), "lo": (100.0, 10.0)}
#: Of each kind: launch (s), link (bytes/s; what is in its memory already costs nothing), speed (flops/s), slots.
_KINDS = ((2e-6, math.inf, 2e10, 4.0), (2e-4, 6e9, 1e11, 1.0), (3e-5, 1.2e10, 1e12, 1.0), (5e-5, 1e10, 2e12, 1.0))
_KERNELS = 40
_MEDIAN_FLOPS = 1e9


class Instance(msgspec.Struct, frozen=True):
    """A problem with a name."""

    name: str
    problem: Problem
    is_braun: bool = False
    """Counts in the summary."""


def braun(
    consistency: Literal["c", "i", "s"],
    jobs: Literal["hi", "lo"],
    machines: Literal["hi", "lo"],
    shape: tuple[int, int] = _BRAUN,
) -> Instance:
    """One of the twelve classes, always the same one for the same arguments."""
    name = f"u_{consistency}_{jobs}{machines}.g"
    random = np.random.default_rng([*name.encode()])
    of_job = random.uniform(1, _HETEROGENEITY[jobs][0], shape[0])
    seconds = of_job[:, np.newaxis] * random.uniform(1, _HETEROGENEITY[machines][1], shape)
    if consistency == "c":
        seconds.sort(axis=1)
    elif consistency == "s":
        seconds[:, ::2] = np.sort(seconds[:, ::2], axis=1)
    return Instance(name, _idle(seconds), is_braun=True)


def fleet(jobs: int, devices: int, models: int, *, shared: bool, seed: int = 0) -> Instance:
    """Jobs of forty kernels on devices of so many models; `shared` where a model is a column (`class_of`)."""
    random = np.random.default_rng([seed, jobs, devices, models])
    launch_s, link, speed, slots = np.array(_KINDS)[np.arange(models) % len(_KINDS)].T
    link, speed = link * random.lognormal(0, 0.3, models), speed * random.lognormal(0, 0.5, models)
    efficiency = random.lognormal(0, 0.7, (_KERNELS, models))
    runs = (random.random((_KERNELS, models)) > 0.1) | (np.arange(models) % len(_KINDS) == 0)
    of_kernel = _MEDIAN_FLOPS * random.lognormal(0, 1, _KERNELS)
    intensity = 4 * random.lognormal(0, 1, _KERNELS)
    kernel = random.integers(0, _KERNELS, jobs)
    flops = of_kernel[kernel] * random.lognormal(0, 0.5, jobs)
    per_byte = 1 / intensity[kernel]
    slower = np.where(runs, 1 / (speed * efficiency), np.inf)
    class_of = np.arange(devices) % models
    seconds = flops[:, np.newaxis] * (slower[kernel] + per_byte[:, np.newaxis] / link) + launch_s
    if not shared:
        seconds = np.ascontiguousarray(seconds[:, class_of] * random.lognormal(0, 0.1, devices))
    busy_s = float(seconds.min(axis=1).sum()) / devices
    problem = Problem(
        seconds, random.exponential(0.1 * busy_s, devices), slots[class_of], class_of=class_of if shared else None
    )
    return Instance(f"fleet_{jobs}x{devices}" + (f"_{models}_classes" if shared else ""), problem)


def generated(*, quick: bool = False) -> Iterator[Callable[[], Instance]]:
    """Braun's twelve classes and small fleets, each made when it is asked for."""
    shape = (96, 8) if quick else _BRAUN
    for consistency in ("c", "i", "s"):
        for jobs in ("hi", "lo"):
            for machines in ("hi", "lo"):
                yield lambda c=consistency, j=jobs, m=machines: braun(c, j, m, shape)  # type: ignore[misc]
    if quick:
        yield lambda: fleet(200, 12, 4, shared=True)
        return
    yield lambda: fleet(4_000, 64, 4, shared=True)
    yield lambda: fleet(4_000, 64, 16, shared=False)


def large() -> Iterator[Callable[[], Instance]]:
    """What takes up to a gigabyte of memory."""
    yield lambda: fleet(10_000, 64, 64, shared=False)
    yield lambda: fleet(100_000, 256, 32, shared=False)
    yield lambda: fleet(1_000_000, 1_024, 16, shared=True)


def read(folder: Path) -> list[Instance]:
    """Every instance in a folder. Malformed names the file that is none, and what is wrong with it."""
    if not folder.is_dir():
        raise Malformed(f"{folder} is no folder", "instances")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not _is_aside(path))
    if not paths:
        raise Malformed(f"{folder} has no instance files", "instances")
    return [Instance(path.name, _idle(_seconds(path)), is_braun=True) for path in paths]


def _is_aside(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix == ".md"


def _seconds(path: Path) -> np.ndarray:
    """[job, machine] of a file: one value a line, job by job, 512 x 16; or any size, behind a line `jobs machines`."""
    try:
        first, _, rest = path.read_text("ascii").partition("\n")
        head = first.split()
        jobs, machines = map(int, head) if len(head) == 2 else _BRAUN
        values = np.array((rest if len(head) == 2 else first + "\n" + rest).split(), np.float64)
    except ValueError as error:
        raise Malformed(f"{path.name} has something that is no number: {error}", "instances") from None
    if jobs < 0 or machines < 1:
        raise Malformed(f"{path.name} says {jobs} jobs and {machines} machines", "instances")
    if values.size != jobs * machines:
        raise Malformed(
            f"{path.name} has {values.size:,} values, and {jobs} jobs on {machines} machines have {jobs * machines:,}"
            " (any size but 512 x 16 needs a first line `jobs machines`)",
            "instances",
        )
    wrong = np.flatnonzero(~(values > 0))
    if wrong.size:
        raise Malformed(f"{path.name}: value {wrong[0] + 1} is {values[wrong[0]]}; seconds are above 0", "instances")
    return values.reshape(jobs, machines)


def _idle(seconds: np.ndarray) -> Problem:
    devices = seconds.shape[1]
    return Problem(seconds, np.zeros(devices), np.ones(devices))
