"""How fast every kernel is on every device that opens here: beside NumPy and SciPy, and beside what the device can do.

`./lepton bench kernels [--device KIND,...] [--kernel NAME ...] [--size SIZE,...] [--quick] [--rounds N] [--json]
[--plot FILE] [--batches]`. Of each kernel, device and size (bench/baselines/): the seconds of a launch whose inputs are
there already, what the transfers take besides, the fastest of the NumPy and SciPy expressions on the same inputs, and
the share of the roofline: the least time that the work could take at the device's peaks, over what it took.

One thread on each side: a slot of the CPU driver is one, BLAS gets one, and so do emulators, which compute on the same
processor. All take turns in one process. Who would take longer in one call than it may, by what a smaller size took, is
left out. Results are compared at the small size. `--batches` measures instead what one launch of many small jobs gains,
joining and splitting included. The exit code is 1 where something failed or gave other results.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from threadpoolctl import threadpool_limits

from bench import batches, kernel_chart, report
from bench.baselines import SIZES
from bench.contest import say
from bench.contestants import Pace, digits
from bench.kernel_rows import KernelBench
from bench.peaks import roof_of
from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import DEVICE_KINDS, Kernel
from lepton_ai.settings import Settings
from tasks.catalogue import load
from tasks.driver import Driver, cores, open_device

#: Calls NumPy's BLAS itself, and so has a bar of its own.
_BLAS = "linalg.matmul"
#: Runs of each peak for a round of the kernels.
_RUNS = 4
_PACE, _QUICK = Pace(5, 0.02, 10.0, 60.0), Pace(2, 0.003, 0.5, 3.0)


def main() -> int:
    parser = report.parser(__doc__)
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default=",".join(DEVICE_KINDS), metavar="KIND,...", help="default: %(default)s")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="these (default: all)")
    parser.add_argument("--size", default=",".join(SIZES), metavar="SIZE,...", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a chart: .html, .json, .svg or .png")
    parser.add_argument("--batches", action="store_true", help="what batching gains instead")
    options = parser.parse_args()
    kinds = _chosen(parser, "--device", options.device.split(","), DEVICE_KINDS)
    sizes = _chosen(parser, "--size", options.size.split(","), SIZES)
    known = load(Settings.read().kernel_modules).kernels
    kernels = [known[name] for name in _chosen(parser, "--kernel", options.kernel or known, sorted(known))]
    if options.plot and (reason := kernel_chart.unable(options.plot)):
        parser.error(f"--plot: {reason}")
    pace = msgspec.structs.replace(_PACE, rounds=max(1, options.rounds))
    if options.quick:
        pace, sizes = _QUICK, [size for size in sizes if size != "large"] or sizes
    found: dict[str, Any] = {}

    def measure() -> dict[str, Any]:
        with threadpool_limits(1, user_api="blas"):
            found.update((_measure_batches if options.batches else _measure)(kernels, kinds, sizes, pace))
        if options.plot and not options.batches:
            kernel_chart.chart(found["kernels"]).save(options.plot)
        return found

    return report.play(measure, _tables, plain=options.json) or int(bool(found["problems"]))


def _chosen(parser: argparse.ArgumentParser, option: str, asked: Iterable[str], known: Sequence[str]) -> list[str]:
    """What was asked for, in the order in which it is known; the parser's error where there is no such thing."""
    if unknown := [each for each in asked if each not in known]:
        parser.error(f"{option}: there is no {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return [each for each in known if each in asked]


def _measure(kernels: Sequence[Kernel], kinds: Sequence[str], sizes: Sequence[str], pace: Pace) -> dict[str, Any]:
    drivers, found = _opened(kinds)
    roofs = {kind: roof_of(driver, _RUNS * pace.rounds) for kind, driver in drivers.items()}
    rows: list[dict[str, Any]] = []
    for kernel in kernels:
        bench = KernelBench(kernel, drivers, pace, found["problems"])
        for size in sizes:
            rows += bench.rows(size, roofs)
    peaks = {kind: msgspec.to_builtins(roof) for kind, roof in roofs.items()}
    return {**found, "peaks": peaks, "kernels": rows, "summary": _summary(rows, sizes[-1], drivers)}


def _measure_batches(
    kernels: Sequence[Kernel], kinds: Sequence[str], sizes: Sequence[str], pace: Pace
) -> dict[str, Any]:
    drivers, found = _opened(kinds)
    rows: list[dict[str, Any]] = []
    for kernel in kernels:
        if kernel.spec.batch is not None:
            bench = KernelBench(kernel, drivers, pace, found["problems"])
            for kind, run in bench.variants.items():
                rows += batches.gains(kernel, bench.baseline.inputs("small"), drivers[kind], run, pace)
    return {**found, "batches": rows}


def _opened(kinds: Sequence[str]) -> tuple[dict[str, Driver], dict[str, Any]]:
    """The drivers, and the report's beginning. The CPU's comes first, as it limits threads for all."""
    drivers: dict[str, Driver] = {}
    closed: dict[str, str] = {}
    for kind in sorted(kinds, key=lambda kind: kind != "cpu"):
        try:
            drivers[kind] = open_device(kind, cores() if kind == "cpu" else 1)
        except (ImportError, InvalidSettings, OSError, RuntimeError) as error:
            closed[kind] = f"{type(error).__name__}: {error}"
            say(f"{kind} does not open: {error}")
    devices = {kind: importlib.import_module(f"tasks.devices.{kind}").probe().what for kind in drivers}
    machine = {"cores": cores(), "threads": 1, "devices": devices, "not_opened": closed}
    return drivers, {"machine": machine, "problems": []}


def _summary(rows: Sequence[dict[str, Any]], size: str, kinds: Iterable[str]) -> dict[str, Any]:
    """By device, what its kernels come to at the largest size measured; with the bars of the CPU."""
    found: dict[str, Any] = {}
    for kind in kinds:
        own = [row for row in rows if row["device"] == kind and row["size"] == size]
        if not (timed := [row for row in own if row.get("speedup") is not None]):
            continue
        slowest = min(timed, key=lambda row: row["speedup"])
        found[kind] = {
            "size": size,
            "kernels": len(timed),
            "left_out": len([row for row in own if "left_out" in row]),
            "emulated": timed[0]["emulated"],
            "geometric_mean_speedup": _mean(row["speedup"] for row in timed),
            "slowest": {key: slowest[key] for key in ("kernel", "speedup", "numpy_expression")},
        }
        if of_cpu := [row["cpu_seconds"] / row["seconds"] for row in timed if row["cpu_seconds"] is not None]:
            found[kind]["geometric_mean_over_cpu"] = _mean(of_cpu)
        if kind == "cpu":
            streams = [row for row in timed if "bandwidth_fraction" in row]
            least = min(streams, key=lambda row: row["bandwidth_fraction"], default=None)
            found[kind]["memory_bound_least_fraction"] = least["bandwidth_fraction"] if least else None
            found[kind]["bars"] = [*_bars(timed, streams, found[kind]["geometric_mean_speedup"])]
    return found


def _mean(values: Iterable[float]) -> float:
    return digits(statistics.geometric_mean(values))


def _bars(timed: Sequence[dict[str, Any]], streams: Sequence[dict[str, Any]], mean: float) -> Iterator[dict[str, Any]]:
    """What the CPU's variants are held to, where there is something to hold to it."""
    yield _bar("geometric mean over NumPy and SciPy", 4.0, mean, "")
    if others := [row for row in timed if row["kernel"] != _BLAS]:
        least = min(others, key=lambda row: row["speedup"])
        yield _bar(
            "every kernel over its best expression", 1.0, least["speedup"], least["kernel"], least["speedup_range"]
        )
    if streams:
        least = min(streams, key=lambda row: row["bandwidth_fraction"])
        what = "every kernel that streams, of the bandwidth of a copy"
        yield _bar(what, 0.6, least["bandwidth_fraction"], least["kernel"])
    for row in timed:
        if row["kernel"] == _BLAS:
            yield _bar(f"{_BLAS}, of NumPy's BLAS", 0.9, row["speedup"], _BLAS, row["speedup_range"])


def _bar(what: str, at_least: float, value: float, kernel: str, span: Sequence[float] | None = None) -> dict[str, Any]:
    found = {"bar": what, "at_least": at_least, "value": value, "range": span, "kernel": kernel}
    return {**found, "held": value >= at_least}


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    if "batches" in found:
        yield from batches.tables(found["batches"])
    else:
        yield from _speeds(found)
    notes = [*(f"{kind} does not open: {why}" for kind, why in found["machine"]["not_opened"].items())]
    notes += [f"PROBLEM: {each}" for each in found["problems"]]
    if notes:
        yield report.table("notes", ("",), [(each,) for each in notes])


def _speeds(found: dict[str, Any]) -> Iterator[Table]:
    columns = ("", "device", "ms", "range", "transfer ms", "NumPy ms", "by", "speedup", "over cpu", "roofline", "bound")
    for size in SIZES:
        rows = [_line(row) for row in found["kernels"] if row["size"] == size]
        if rows:
            yield report.table(f"one launch, {size}", columns, rows)
    yield report.table(
        "peaks of the rooflines (bytes that fit a cache move faster)",
        ("", "GB/s", "sgemm Gflop/s", "dgemm Gflop/s", "measured how"),
        [
            (
                kind,
                *(peak[key] / 1e9 for key in ("bytes_per_s", "float32_flops_per_s", "float64_flops_per_s")),
                peak["how"],
            )
            for kind, peak in found["peaks"].items()
        ],
    )
    yield report.table(
        "in the mean",
        ("", "size", "kernels", "left out", "over NumPy", "over cpu", "the slowest"),
        [
            (
                _device(kind, each["emulated"]),
                each["size"],
                each["kernels"],
                each["left_out"],
                each["geometric_mean_speedup"],
                each.get("geometric_mean_over_cpu"),
                f"{each['slowest']['kernel']} ({each['slowest']['speedup']:.3g})",
            )
            for kind, each in found["summary"].items()
        ],
    )
    for kind, each in found["summary"].items():
        if bars := each.get("bars"):
            yield report.table(
                f"what the {kind} variants are to reach at the large size ({each['size']} here)",
                ("", "to be at least", "is", "range", "by", ""),
                [(bar["bar"], bar["at_least"], bar["value"], bar["range"], bar["kernel"], _held(bar)) for bar in bars],
            )


def _held(bar: dict[str, Any]) -> str:
    return "held" if bar["held"] else "NOT held"


def _device(kind: str, emulated: bool) -> str:
    return f"{kind}, emulated" if emulated else kind


def _line(row: dict[str, Any]) -> tuple[Any, ...]:
    name = (row["kernel"], _device(row["device"], row["emulated"]))
    if "left_out" in row:
        return (*name, None, None, None, None, row["left_out"], None, None, None, None)
    numpy_ms = row["numpy_seconds"] * 1e3 if row["numpy_seconds"] is not None else None
    over_cpu = row["cpu_seconds"] / row["seconds"] if row["cpu_seconds"] is not None else None
    return (
        *name,
        row["seconds"] * 1e3,
        [each * 1e3 for each in row["seconds_range"]],
        row["transfer_seconds"] * 1e3,
        numpy_ms,
        row["numpy_expression"],
        row["speedup"],
        over_cpu if row["device"] != "cpu" else None,
        row["roofline_fraction"],
        row["bound"],
    )
