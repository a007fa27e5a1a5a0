"""A stream of jobs from the real data in `data/`: what a mixed fleet gets on an ordinary day.

`python examples/workload.py` prints the mix. Demos, benches and tests take `jobs(...)`; the same seed gives the same
stream. Needs NumPy only, and knows nothing of Lepton: a job is a kernel's name and its arguments.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arguments = dict[str, Any]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

#: Per year, continuously compounded. One rate for all, as a desk has: jobs of one rate can be priced in one batch.
RATE = 0.03
YEAR_DAYS = 365


@dataclass(frozen=True, eq=False)
class Sources:
    """The files of `data/`, read once. Images are 0 to 1."""

    prices: dict[str, Floats]
    """Monthly prices by symbol, oldest first."""
    returns: Floats
    """Log returns [month, symbol] of the months in which all symbols were traded."""
    weather: Floats
    """Daily precipitation, highest and lowest temperature, wind: [day, 4]."""
    retina: Singles
    red: Singles
    nir: Singles
    """Not measured: derived from the photograph's green band, see `_near_infrared`."""


@cache
def read(data_dir: Path) -> Sources:
    """The sources in a folder that has the files of `data/`."""
    by_month: defaultdict[str, dict[str, float]] = defaultdict(dict)
    prices: defaultdict[str, list[float]] = defaultdict(list)
    for row in _rows(data_dir / "stocks.csv"):
        price = float(row["price"])
        by_month[row["date"]][row["symbol"]] = price
        prices[row["symbol"]].append(price)
    together = [[month[symbol] for symbol in prices] for month in by_month.values() if len(month) == len(prices)]
    measured = ("precipitation", "temp_max", "temp_min", "wind")
    photo = _bands(data_dir / "summer_palace.npz")
    return Sources(
        prices={symbol: np.array(values) for symbol, values in prices.items()},
        returns=np.diff(np.log(together), axis=0),
        weather=np.array([[float(row[name]) for name in measured] for row in _rows(data_dir / "seattle-weather.csv")]),
        retina=_bands(data_dir / "retina.npz")["green"],
        red=photo["red"],
        nir=_near_infrared(photo["green"]),
    )


def jobs(data_dir: Path, count: int, seed: int) -> Iterator[tuple[str, Arguments]]:
    """`count` jobs as (kernel, arguments), thirteen kernels mixed; small jobs are many, large ones few.

    Sizes come from a few fixed shapes each, so that a worker finds jobs to stack.
    """
    sources, random = read(data_dir), np.random.default_rng(seed)
    shares = np.array([share for _, share, _, _ in _MIX])
    for choice in random.choice(len(_MIX), size=count, p=shares / shares.sum()):
        kernel, _, make, sizes = _MIX[choice]
        # Each size half as often as the one before it.
        weights = 0.5 ** np.arange(len(sizes))
        size = sizes[random.choice(len(sizes), p=weights / weights.sum())]
        yield kernel, make(sources, random, *size)


def _scenarios(
    sources: Sources, random: np.random.Generator, scenarios: int, months: int, portfolios: int
) -> Arguments:
    """Historical simulation: what each portfolio (column of b) makes in each scenario (row of a).

    A scenario is months drawn with replacement, each with all its companies (so their covariance stays real); a
    portfolio holds the same shares, which sum to 1, in each month.
    """
    drawn = random.integers(len(sources.returns), size=(scenarios, months))
    companies = sources.returns.shape[1]
    shares = random.dirichlet(np.ones(companies), portfolios)
    return {
        "a": sources.returns[drawn].reshape(scenarios, months * companies).astype(np.float32),
        "b": np.tile(shares, months).T.astype(np.float32, order="C"),
    }


def _options(sources: Sources, random: np.random.Generator, strikes: int, maturities: int) -> Arguments:
    """A grid of options on one company in one month, at the volatility of the twelve months before."""
    prices = sources.prices[random.choice(list(sources.prices))]
    month = random.integers(12, len(prices))
    volatility = np.diff(np.log(prices[month - 12 : month + 1])).std(ddof=1) * np.sqrt(12)
    strike, years = np.meshgrid(prices[month] * np.linspace(0.7, 1.3, strikes), np.linspace(1 / 12, 2, maturities))
    n = strikes * maturities
    return {
        "spot": np.full(n, prices[month]),
        "strike": strike.ravel(),
        "years": years.ravel(),
        "volatility": np.full(n, volatility),
        "rate": RATE,
    }


def _portfolio(sources: Sources, random: np.random.Generator, paths: int) -> Arguments:
    """What a portfolio of these companies may lose in a month, by the mean and covariance of their real returns."""
    companies = sources.returns.shape[1]
    return {
        "positions": 1e6 * random.dirichlet(np.ones(companies)),
        "mean": sources.returns.mean(axis=0),
        "factor": np.linalg.cholesky(np.cov(sources.returns, rowvar=False)),
        "paths": paths,
        "seed": int(random.integers(2**31)),
    }


def _months(sources: Sources, random: np.random.Generator, n: int) -> Arguments:
    """Highest temperatures by month of the year, of days drawn from the four years with replacement."""
    drawn = random.integers(len(sources.weather), size=n)
    return {
        "keys": (drawn % YEAR_DAYS * 12 // YEAR_DAYS).astype(np.int32),
        "values": sources.weather[drawn, 1],
        "groups": 12,
    }


def _brightness(sources: Sources, random: np.random.Generator, side: int, bins: int) -> Arguments:
    """How bright the pixels of a tile of the retina are."""
    tile = np.ascontiguousarray(sources.retina[_tile(random, sources.retina, side)])
    return {"values": tile.ravel(), "low": 0.0, "high": 1.0, "bins": bins}


def _machines(sources: Sources, random: np.random.Generator, machines: int, days: int) -> Arguments:
    """When will it be 35 degrees? Stretches of the highest temperatures stand in for the heat of as many machines."""
    starts = random.integers(len(sources.weather) - days, size=machines)
    return {"series": sources.weather[starts[:, None] + np.arange(days), 1], "limit": 35.0, "horizon": 24}


def _readings(sources: Sources, random: np.random.Generator, n: int, window: int) -> Arguments:
    """A long series of one sensor: real years in random order, each from the same day on, so that seasons go on."""
    sensor = sources.weather[:, random.integers(sources.weather.shape[1])]
    first_day = random.integers(YEAR_DAYS)
    starts = first_day + YEAR_DAYS * random.integers(3, size=-(-n // YEAR_DAYS))
    return {"series": sensor[starts[:, None] + np.arange(YEAR_DAYS)].ravel()[:n], "window": window}


def _similar_days(sources: Sources, random: np.random.Generator, days: int, queries: int, k: int) -> Arguments:
    """Which days came after weather like this one's? Rows have length 1, so the dot product is the cosine."""
    items = _day_features(sources, days)
    chosen = random.choice(len(items), size=queries, replace=False)
    return {"items": items, "queries": items[chosen], "k": k}


@cache
def _day_features(sources: Sources, days: int) -> Singles:
    """For each day its last `days` days of weather, standardised and scaled to length 1."""
    standard = (sources.weather - sources.weather.mean(axis=0)) / sources.weather.std(axis=0)
    spans = np.lib.stride_tricks.sliding_window_view(standard, days, axis=0)
    rows = spans.reshape(len(spans), -1)
    features: Singles = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    features.flags.writeable = False  # shared by every job of this size
    return features


def _vegetation(sources: Sources, random: np.random.Generator, side: int) -> Arguments:
    """A tile of the photograph, in two bands."""
    tile = _tile(random, sources.red, side)
    return {"red": np.ascontiguousarray(sources.red[tile]), "nir": np.ascontiguousarray(sources.nir[tile])}


def _retina(sources: Sources, random: np.random.Generator, side: int, radius: int) -> Arguments:
    """A tile of the retina, with the noise of its camera."""
    return {"image": np.ascontiguousarray(sources.retina[_tile(random, sources.retina, side)]), "radius": radius}


def _smooth(sources: Sources, random: np.random.Generator, side: int, sigma: int) -> Arguments:
    """The same, to be smoothed."""
    return {"image": np.ascontiguousarray(sources.retina[_tile(random, sources.retina, side)]), "sigma": float(sigma)}


def _vessels(sources: Sources, random: np.random.Generator, side: int) -> Arguments:
    """The same in 256 greys, to be parted into vessels and the rest."""
    tile = sources.retina[_tile(random, sources.retina, side)]
    return {"image": np.rint(tile * np.float32(255)).astype(np.uint8)}


def _fields(sources: Sources, random: np.random.Generator, side: int, across: int) -> Arguments:
    """How green each field is: the index of a tile of the photograph, by a made-up grid of fields."""
    bands = _vegetation(sources, random, side)
    index = (bands["nir"] - bands["red"]) / np.maximum(bands["nir"] + bands["red"], np.float32(1e-6))
    row = np.arange(side) * across // side
    return {"values": index, "zone": (row[:, None] * across + row).astype(np.int32), "zones": across * across}


def _tile(random: np.random.Generator, image: Singles, side: int) -> tuple[slice, slice]:
    top, left = (int(random.integers(size - side + 1)) for size in image.shape)
    return slice(top, top + side), slice(left, left + side)


def _near_infrared(green: Singles) -> Singles:
    """A stand-in for the near-infrared band that an ordinary camera does not have: 1.6 x green, at most 1.

    Only the red band is real. With this one the index grows with green over red, so leaves still come out on top,
    but its values are no measurement of vegetation.
    """
    near_infrared: Singles = np.minimum(np.float32(1.6) * green, np.float32(1))
    return near_infrared


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _bands(path: Path) -> dict[str, Singles]:
    with np.load(path) as stored:
        return {name: stored[name].astype(np.float32) / np.float32(255) for name in stored.files}


#: Kernel, share of the jobs, what makes the arguments, and its sizes from small to large. Measured on one core from the
#: smallest to the largest, in ms: matmul 0.1 to 3, black_scholes 0.1 to 0.9, value_at_risk 0.3 to 2, anomaly to 0.4,
#: failure_forecast 0.04 to 0.2, top_k 0.2 to 24, zonal_stats 0.05 to 0.7, median_filter 0.4 to 20, gaussian_filter 0.05
#: to 0.8, group_by and histogram 0.02 to 0.4. ndvi and otsu take 0.01 to 0.1: jobs that are not worth a long way.
#: Driving, cities, recommendation and networks have no real data here, so they are left to the benches.
_MIX: tuple[tuple[str, float, Callable[..., Arguments], tuple[tuple[int, ...], ...]], ...] = (
    ("linalg.matmul", 0.14, _scenarios, ((256, 24, 128), (512, 24, 128), (512, 48, 256), (512, 96, 512))),
    ("finance.black_scholes", 0.1, _options, ((200, 20), (200, 50), (400, 50), (800, 50))),
    ("finance.value_at_risk", 0.06, _portfolio, ((2_000,), (10_000,), (40_000,))),
    ("monitor.anomaly", 0.1, _readings, ((8_000, 7), (16_000, 30), (32_000, 90), (64_000, 365))),
    ("monitor.failure_forecast", 0.06, _machines, ((50, 200), (200, 200), (400, 500))),
    ("retrieval.top_k", 0.14, _similar_days, ((7, 30, 5), (7, 365, 10), (30, 365, 10), (30, 1_400, 10))),
    ("vision.ndvi", 0.06, _vegetation, ((64,), (128,), (256,), (320,))),
    ("farming.zonal_stats", 0.06, _fields, ((128, 4), (256, 8), (320, 16))),
    ("medical.median_filter", 0.12, _retina, ((64, 2), (128, 2), (128, 5), (256, 3), (256, 8), (512, 5))),
    ("medical.gaussian_filter", 0.06, _smooth, ((128, 1), (256, 2), (512, 3))),
    ("medical.otsu", 0.04, _vessels, ((128,), (256,), (512,))),
    ("data.group_by", 0.03, _months, ((5_000,), (20_000,), (50_000,))),
    ("data.histogram", 0.03, _brightness, ((128, 64), (256, 64), (512, 256))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the mix of the example workload.")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for kernel, arguments in jobs(options.data, options.count, options.seed):
        sizes[kernel].append(sum(np.asarray(value).nbytes for value in arguments.values()))
    print(f"{'kernel':24}{'jobs':>6}{'smallest':>12}{'median':>12}{'largest':>12}  bytes of arguments")
    for kernel, found in sorted(sizes.items()):
        print(f"{kernel:24}{len(found):6}{min(found):12,}{int(np.median(found)):12,}{max(found):12,}")


if __name__ == "__main__":
    main()
