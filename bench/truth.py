"""Truth to learn: what launches take on devices that are no straight lines, made up by a law or measured by others.

The law of the made-up fleets is not the cost model's own: work is done in tiles, and tiles in waves over a device's
units, so that time goes up in steps; what fits a cache is read several times as fast as what does not; computing and
reading overlap in part; and a kernel has its own efficiency on each device. Their constants are drawn, log-uniform,
between those of a small CPU and of a large accelerator.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from lepton_ai.device import Peaks
from lepton_ai.placement.size import Size

__all__ = ["Case", "Truth", "generated", "measured"]


class Case(msgspec.Struct, frozen=True):
    """A size of job, and the noise-free seconds that each device takes for it."""

    size: Size
    seconds: tuple[float, ...]
    """[device]"""


class Truth(msgspec.Struct, frozen=True):
    """One kernel on one fleet."""

    name: str
    devices: tuple[tuple[str, Peaks], ...]
    cases: tuple[Case, ...]
    """Of different sizes, in no order."""
    is_sized: bool = True
    """Whether anything is known of a size before it was launched, but that it is another."""


class _Made(msgspec.Struct, frozen=True):
    """A made-up device."""

    peaks: Peaks
    cache_bytes: float
    cache_speedup: float
    tile: int
    units: int
    overlap: float
    """The share of the shorter of computing and reading that hides behind the longer."""


#: Published rates of no device at all, where a file of timings does not say what it ran on.
_UNKNOWN = Peaks(1e13, 5e11, math.inf, 0.0, 1e-5)


def generated(seed: int, devices: int = 10, cases: int = 400) -> list[Truth]:
    """Four kernels on a fleet of made-up devices."""
    random = np.random.default_rng(seed)
    fleet = [_device(random) for _ in range(devices)]
    names = tuple((f"device.{at}", each.peaks) for at, each in enumerate(fleet))
    found = []
    for name, (dims, seconds) in _KERNELS.items():
        efficiency = random.uniform(0.15, 0.85, devices).tolist()
        sizes = list(dict.fromkeys(_size(name, dims(random)) for _ in range(cases)))
        found.append(
            Truth(
                f"{name}, fleet {seed}",
                names,
                tuple(
                    Case(size, tuple(seconds(size, each, share) for each, share in zip(fleet, efficiency, strict=True)))
                    for size in sizes
                ),
            )
        )
    return found


def measured(folder: Path) -> list[Truth]:
    """The public timings of a folder: matrix products, and networks. Their origin is in its README."""
    return [_matrix_products(folder / "gemm_timings.csv"), _networks(folder / "network_timings.csv")]


# -- the law ----------------------------------------------------------------------------------------------------------


def _device(random: np.random.Generator) -> _Made:
    def between(least: float, most: float) -> float:
        return float(math.exp(random.uniform(math.log(least), math.log(most))))

    peaks = Peaks(between(5e10, 1e13), between(1e10, 1e12), math.inf, 0.0, between(2e-6, 1e-4))
    return _Made(
        peaks,
        cache_bytes=between(1e6, 6e7),
        cache_speedup=between(2.0, 8.0),
        tile=2 ** int(random.integers(3, 8)),
        units=2 ** int(random.integers(2, 8)),
        overlap=float(random.uniform(0.5, 1.0)),
    )


def _together(device: _Made, compute_s: float, size: Size) -> float:
    """Seconds of a launch that computes so long and reads its bytes."""
    hit = min(1.0, device.cache_bytes / max(1.0, size.bytes))
    read_s = size.bytes / device.peaks.bytes_per_s * (1 - hit + hit / device.cache_speedup)
    longer, shorter = max(compute_s, read_s), min(compute_s, read_s)
    return device.peaks.launch_s + longer + (1 - device.overlap) * shorter


def _waves(device: _Made, tiles: float, flops_per_tile: float, efficiency: float) -> float:
    """Seconds of so many tiles, each on one unit."""
    waves = math.ceil(tiles / device.units)
    return waves * flops_per_tile * device.units / (device.peaks.flops_per_s * efficiency)


def _matmul_s(size: Size, device: _Made, efficiency: float) -> float:
    m, k, n = size.dims
    tile = device.tile
    tiles = math.ceil(m / tile) * math.ceil(n / tile)
    return _together(device, _waves(device, tiles, 2 * tile * tile * (k + tile), efficiency), size)


def _filter_s(size: Size, device: _Made, efficiency: float) -> float:
    height, width, radius = size.dims
    lanes = math.ceil(width / device.tile) * device.tile
    return _together(device, _waves(device, height, lanes * (2 * radius + 1) ** 2 * 2, efficiency), size)


def _paths_s(size: Size, device: _Made, efficiency: float) -> float:
    (n,) = size.dims
    tiles = math.ceil(n / device.tile) ** 2
    sweeps = math.ceil(n / device.tile)  # a launch each
    return sweeps * _together(device, _waves(device, tiles, 2 * device.tile**3, efficiency), size)


def _pricing_s(size: Size, device: _Made, efficiency: float) -> float:
    (n,) = size.dims
    tiles = math.ceil(n / (device.tile * 8))
    return _together(device, _waves(device, tiles, 60 * device.tile * 8, efficiency), size)


def _drawn(random: np.random.Generator, least: float, most: float) -> float:
    """A dim, log-uniform; every other one is a multiple of 16, as people like them."""
    found = math.exp(random.uniform(math.log(least), math.log(most)))
    return float(max(1, round(found / 16) * 16 if random.random() < 0.5 else round(found)))


_Dims = Callable[[np.random.Generator], tuple[float, ...]]
_Seconds = Callable[[Size, _Made, float], float]
_KERNELS: dict[str, tuple[_Dims, _Seconds]] = {
    "matmul": (lambda random: tuple(_drawn(random, 16, 4096) for _ in range(3)), _matmul_s),
    "filter": (
        lambda random: (_drawn(random, 64, 4096), _drawn(random, 64, 4096), float(random.integers(1, 8))),
        _filter_s,
    ),
    "paths": (lambda random: (_drawn(random, 16, 2048),), _paths_s),
    "pricing": (lambda random: (_drawn(random, 1e3, 1e7),), _pricing_s),
}


def _size(kernel: str, dims: Sequence[float]) -> Size:
    """The Work that the kernel's formulas give for its dims."""
    a, b, c = (*dims, 0.0, 0.0)[:3]
    flops, size_bytes = {
        "matmul": (2 * a * b * c, 4 * (a * b + b * c + a * c)),
        "filter": (2 * a * b * (2 * c + 1) ** 2, 8 * a * b),
        "paths": (2 * a**3, 8 * a * a),
        "pricing": (60 * a, 24 * a),
    }[kernel]
    return Size(flops, size_bytes, 0.0, tuple(dims))


# -- public timings ---------------------------------------------------------------------------------------------------


def _matrix_products(path: Path) -> Truth:
    """DeepBench's products on the devices that have all of them. A transpose counts as a dim of 1 or 0."""
    times: dict[str, dict[tuple[float, ...], float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            dims = (*(float(row[name]) for name in ("M", "N", "K")), *(float(row[t] == "T") for t in ("ta", "tb")))
            times.setdefault(f"{row['device']}.{row['mode']}.{row['sheet']}", {})[dims] = float(row["time_ms"]) / 1e3
    most = max(len(each) for each in times.values())
    devices = [name for name, each in times.items() if len(each) == most]
    common = [dims for dims in times[devices[0]] if all(dims in times[each] for each in devices)]
    sizes = {
        dims: Size(2 * m * n * k, 4 * (m * k + k * n + m * n), 0.0, dims) for dims in common for m, n, k in [dims[:3]]
    }
    return _of_table("matrix products", devices, sizes, lambda device, dims: times[device][dims])


def _networks(path: Path, served: int = 100) -> Truth:
    """The first networks, as a model server would have them: each has a number, which says nothing of its size."""
    with path.open(newline="") as file:
        rows = {(float(row["network"]),): row for row in itertools.islice(csv.DictReader(file), served)}
    devices = [name for name in next(iter(rows.values())) if name != "network"]
    sizes = {dims: Size(0.0, 0.0, 0.0, dims) for dims in rows}
    found = _of_table("networks", devices, sizes, lambda device, dims: float(rows[dims][device]) / 1e3)
    return msgspec.structs.replace(found, is_sized=False)


def _of_table(
    name: str,
    devices: Iterable[str],
    sizes: dict[tuple[float, ...], Size],
    seconds: Callable[[str, tuple[float, ...]], float],
) -> Truth:
    named = tuple((device, _UNKNOWN) for device in devices)
    cases = [Case(size, tuple(seconds(device, dims) for device, _ in named)) for dims, size in sizes.items()]
    order = np.random.default_rng(0).permutation(len(cases))
    return Truth(name, named, tuple(cases[at] for at in order))
