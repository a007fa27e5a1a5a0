"""What it takes to decide for a window: to price 1,000 jobs on 64 devices, and to place them by the policy externality.

`./lepton bench decision [--jobs N] [--devices N] [--rounds N] [--quick] [--json]`. The window is a router's: claimed
jobs with declared shapes, devices of eight makes that each serve two kernels, a cost model that has measured each of
them 100 times, on a part of the sizes. Milliseconds, medians of all rounds:

- `alike`: jobs of 4 sizes. `different`: each of its own size.
- `pricing_ms`: with the sizes of the jobs known, as for all that have been looked at once. `first_ms`: with their
  shapes still to be read, as for jobs of new sizes that have just been claimed. `tail_ms`: what deadlines add.
- `policy_ms`: the policy, compiled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.table import Table

from bench import report
from lepton_ai.device import Announcement, Peaks
from lepton_ai.event import Observation
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement import policies
from lepton_ai.placement.costs import CostModel
from pipeline.cluster import Cluster
from pipeline.pricing import Pricing, price
from pipeline.window import ClaimedJob, Window
from queues.broker import Kind

_MATMUL = KernelSpec(
    "bench.matmul",
    {"a": "float32[m,k]", "b": "float32[k,n]"},
    {"c": "float32[m,n]"},
    "2*m*k*n",
    "4*(m*k + k*n + m*n)",
)
_SCALE = KernelSpec("bench.scale", {"x": "float32[n]", "times": "int64"}, {"y": "float32[n]"}, "n*times", "8*n")
_MAKES = ("cpu.small", "cpu.large", "gpu.a", "gpu.b", "gpu.c", "tpu.a", "fpga.a", "fpga.b")
_LAUNCHES = 100


def main() -> int:
    parser = report.parser(__doc__, rounds=40)
    parser.add_argument("--jobs", type=int, default=1000, help="in the window (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=64, help="of the fleet (default: %(default)s)")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds = 3 if options.quick else options.rounds
    random = np.random.default_rng(0)
    cluster = _fleet(options.devices, random)
    found: dict[str, Any] = {"jobs": options.jobs, "devices": options.devices, "rounds": rounds}
    for name, sizes in (("alike", 4), ("different", options.jobs)):
        jobs = _window(options.jobs, sizes, random)
        found[name] = _timed(jobs, cluster, _taught(jobs, cluster, random), rounds)
    return found | {key: found["different"][key] for key in ("pricing_ms", "policy_ms")}


def _timed(jobs: list[ClaimedJob], cluster: Cluster, model: CostModel, rounds: int) -> dict[str, float]:
    policy = policies.load("externality")
    priced = price(jobs, cluster, model)
    policy.place(priced.problem)  # compiles
    return {
        "first_ms": _median_ms(lambda: price(jobs, cluster, model), rounds, lambda: _forget(jobs, cluster)),
        "pricing_ms": _median_ms(lambda: price(jobs, cluster, model), rounds),
        "tail_ms": _median_ms(priced.tail, rounds),
        "policy_ms": _median_ms(lambda: policy.place(priced.problem), rounds),
        "kinds": len(priced.candidates),
    }


def _median_ms(what: Callable[[], Any], rounds: int, before: Callable[[], None] = lambda: None) -> float:
    taken = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        what()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken) * 1e3, 3)


def _forget(jobs: list[ClaimedJob], cluster: Cluster) -> None:
    """As if they had just been claimed, and none of their sizes had come before."""
    cluster.sized.clear()
    for job in jobs:
        job.sized = None


def _fleet(devices: int, random: np.random.Generator) -> Cluster:
    """Devices of a few makes, with peaks that differ a little from one to the next, as measured ones do."""
    found = Cluster()
    announced = []
    for at in range(devices):
        make = _MAKES[at % len(_MAKES)]
        speed = 2.0 ** (at % len(_MAKES)) * random.uniform(0.95, 1.05)
        peaks = Peaks(1e10 * speed, 1e10 * speed, 1e10, 1e-5, 1e-5)
        device = f"{make}.{at}"
        announced.append(
            Announcement(f"{at}", device, device, make.split(".")[0], 2, False, peaks, (_MATMUL, _SCALE), 0.0)
        )
    found.refresh(announced)
    return found


def _window(count: int, sizes: int, random: np.random.Generator) -> list[ClaimedJob]:
    """Claimed jobs, half of each kernel."""
    window = Window("router", count, 2**30)
    claim, _ = window.open_claim(Kind.NEW)
    drawn = [[int(each) for each in random.integers(16, 1024, 3)] for _ in range(sizes)]
    jobs = []
    for at in range(count):
        m, k, n = drawn[at % sizes]
        spec, shapes = (_MATMUL, {"a": [m, k], "b": [k, n]}) if at % 2 else (_SCALE, {"x": [m * k], "times": n})
        jobs.append(window.add((f"job-{at}",), spec.name, Options(shapes=shapes), b"", claim))
    return jobs


def _taught(jobs: list[ClaimedJob], cluster: Cluster, random: np.random.Generator) -> CostModel:
    """A model that has seen some of the jobs on each device."""
    model = CostModel()
    priced: Pricing = price(jobs, cluster, model)
    for device in cluster.devices:
        for at in random.integers(0, len(jobs), _LAUNCHES):
            job = jobs[at]
            size = priced.candidates.sizes[priced.kinds[at]].size
            run_s = (1e-5 + 3 * size.flops / device.peaks.flops_per_s) * float(np.exp(random.normal(0, 0.05)))
            model.learn(
                Observation(
                    job.kernel, device.name, 1, size.flops, size.bytes, 1e-5, run_s, size.transfer_bytes, size.dims
                ),
                device.peaks,
            )
    return model


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    keys = ("first_ms", "pricing_ms", "tail_ms", "policy_ms", "kinds")
    rows = [(name, *(found[name][key] for key in keys)) for name in ("alike", "different")]
    yield report.table(f"{found['jobs']} jobs on {found['devices']} devices, in ms", ("sizes", *keys), rows)
