"""`python -m bench NAME [ARGUMENT...]`, from the repository's root: runs one of the benches."""

from __future__ import annotations

import importlib
import sys

_BENCHES = {
    "closed-loop": "learned placement against fixed routings, real workers of three kinds",
    "crossover": "small jobs to the CPU, large ones to the accelerator: whether placement finds the size between them",
    "decision": "what it takes to price and place a window of jobs",
    "durability": "what it costs that an acceptance is on the disk",
    "efficiency": "how much of the machine the kernels get",
    "faults": "kills, freezes and cuts what Lepton runs on, and counts what is lost",
    "foreign": "what others' load on a host does to predictions, with and without the correction",
    "http": "jobs a second through the ingest, beside a bare echo",
    "kernels": "every kernel on every device, beside NumPy and SciPy and beside the roofline",
    "latency": "from submit to result in hand, one job in flight, beside its peers",
    "online": "response of every policy that places jobs as they come, over the best device's time",
    "learning": "how well, and how soon, costs are predicted",
    "payload": "large arrays in, beside ray and a copy in memory",
    "placement": "how near each policy comes to the optimum, and in how many milliseconds",
    "scale": "what a job costs while a million wait",
    "throughput": "jobs a second and CPU a job, beside its peers and the floor",
}


def main() -> int:
    name = next(iter(sys.argv[1:]), "--help")
    if name in _BENCHES:
        sys.argv = [f"lepton bench {name}", *sys.argv[2:]]
        return int(importlib.import_module(f"bench.{name.replace('-', '_')}").main() or 0)
    asked = name in ("-h", "--help")
    print("usage: lepton bench NAME [ARGUMENT...]\n", file=sys.stdout if asked else sys.stderr)
    for each, what in _BENCHES.items():
        print(f"  {each:12} {what}", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    raise SystemExit(main())
