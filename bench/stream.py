"""The stream of `bench closed-loop`: real kernels of mixed sizes, seeded, by a law.

Sizes are log-uniform, as Downey found the running times of jobs on shared machines to be ("A parallel workload model
and its implications for processor allocation", HPDC 1997): as many jobs in each octave, so that most are small and the
few large ones are most of the work. A third of the jobs each are searches in a catalogue (`retrieval.top_k`, so many
queries at once; no FPGA variant), image filters (`medical.median_filter`) and quotes (`finance.black_scholes`, of so
many options, which always take less than a launch). They compute much for what they return, because results travel
through the broker: with products of matrices, and with larger images, that took more of the cores than the kernels
did, wherever the jobs ran.

Jobs are dealt from decks, each shuffled, that hold every size equally often: whoever plays a deck has the same work.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tasks.kernels.finance_black_scholes import black_scholes
from tasks.kernels.medical_median_filter import median_filter
from tasks.kernels.retrieval_top_k import top_k
from tasks.warmup import IdleContext, difference

__all__ = ["DECK", "KERNELS", "LADDER", "Card", "check", "expected", "stream"]

KERNELS = {kernel.name: kernel for kernel in (top_k, median_filter, black_scholes)}
#: Queries, sides of images and options, half an octave apart.
SIZES = tuple(round(64 * 2 ** (step / 2)) for step in range(7))
RADII = (3, 7, 15)
#: A catalogue of so many items with so many features: 4 MiB.
ITEMS, FEATURES = 4096, 256
#: Numbers of an output that are compared with what is expected.
_LOOKED_AT = 256


class Card(NamedTuple):
    """A kind of job: jobs of one card are the same computation."""

    kernel: str
    size: int
    radius: int = 0

    def arguments(self) -> dict[str, Any]:
        """The same arrays each time, seeded by what the card says; never written to."""
        return _arguments(self)


DECK: tuple[Card, ...] = (
    *(Card(top_k.name, size) for size in SIZES for _ in RADII),
    *(Card(median_filter.name, size, radius) for size in SIZES for radius in RADII),
    *(Card(black_scholes.name, size) for size in SIZES for _ in RADII),
)
#: The sizes of `bench crossover`: one kernel in sides a quarter of an octave apart, three decades of pixels.
LADDER: tuple[Card, ...] = tuple(Card(median_filter.name, round(12 * 2 ** (step / 4)), 7) for step in range(21))


def stream(seed: int, decks: int) -> list[Card]:
    """So many decks, each shuffled, one after the other."""
    chance = random.Random(seed)
    return [card for _ in range(decks) for card in chance.sample(DECK, len(DECK))]


@cache
def _arguments(card: Card) -> dict[str, Any]:
    chance = np.random.default_rng([*card.kernel.encode(), card.size])
    if card.kernel == top_k.name:
        # Small whole numbers, whose sums are exact in any order.
        items, queries = (chance.integers(-9, 10, (count, FEATURES)) for count in (ITEMS, card.size))
        return {"items": items.astype(np.float32), "queries": queries.astype(np.float32), "k": 10}
    if card.kernel == median_filter.name:
        return {"image": chance.random((card.size, card.size), np.float32), "radius": card.radius}
    ranges = {"spot": (50, 150), "strike": (50, 150), "years": (0.1, 2), "volatility": (0.1, 0.5)}
    return {**{name: chance.uniform(*ends, card.size) for name, ends in ranges.items()}, "rate": 0.03}


@cache
def expected(card: Card) -> dict[str, Any]:
    """What the CPU's variant, which conformance tests hold to the reference, makes of a card."""
    inputs = KERNELS[card.kernel].signature.bind(card.arguments())[0]
    return dict(_on_cpu(card.kernel)(inputs, IdleContext()))


@cache
def _on_cpu(kernel: str) -> Any:
    return KERNELS[kernel].build("cpu", None)


def check(card: Card, outputs: Any) -> None:
    """Raises ValueError where a result is not that of its card: shapes, and numbers from all over each output."""
    right = expected(card)
    if outputs.keys() != right.keys() or any(outputs[name].shape != right[name].shape for name in right):
        raise ValueError(f"{card} gave { ({name: value.shape for name, value in outputs.items()}) }")
    found, due = (dict(_looked_at(each)) for each in (outputs, right))
    if (apart := difference(found, due)) > KERNELS[card.kernel].spec.tolerance:
        raise ValueError(f"{card} gave a result that is {apart:.3g} from what it should be")


def _looked_at(outputs: Any) -> Iterator[tuple[str, Any]]:
    for name, value in outputs.items():
        flat = np.asarray(value).reshape(-1)
        yield name, flat[:: max(1, flat.size // _LOOKED_AT)]
