"""Fixed routings: what a team writes into its code instead of letting a router choose. Pure: cards in, devices out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from bench.stream import DECK, KERNELS, Card

__all__ = ["Means", "Pins", "by_kernel", "by_size", "means", "one_device", "round_robin"]

#: Mean seconds that a device takes for a job of a card.
Means = Mapping[tuple[Card, str], float]
#: A device for each job of a stream; None leaves the choice to the router.
Pins = Sequence[str | None]


def means(costs: Iterable[tuple[Card, str, float]]) -> Means:
    """The means of what jobs cost: their card, their device, and seconds."""
    found: defaultdict[tuple[Card, str], list[float]] = defaultdict(list)
    for card, device, seconds in costs:
        found[card, device].append(seconds)
    return {key: sum(each) / len(each) for key, each in found.items()}


def one_device(cards: Sequence[Card], device: str) -> Pins:
    """`queue="gpu"`, for everything that it can run; the rest to the CPU, which can run all."""
    return [device if can_run(device, card) else "cpu" for card in cards]


def round_robin(cards: Sequence[Card], devices: Sequence[str]) -> Pins:
    """The next job to the next device that can run it."""
    turn = itertools.cycle(devices)
    return [next(device for device in turn if can_run(device, card)) for card in cards]


def can_run(device: str, card: Card) -> bool:
    """Whether a device has a variant of the kernel: a stand-in has one of each."""
    kind, _, model = device.partition(".")
    return model == "declared" or kind in KERNELS[card.kernel].kinds


def by_kernel(cards: Sequence[Card], devices: Sequence[str], known: Means) -> Pins:
    """Each kernel on a device of its own: of all such tables the one whose busiest device has the least to do.

    Nobody who writes `queue="gpu"` beside a kernel has measured so much; this is the best that could be written there.
    """
    kernels = sorted({card.kernel for card in DECK})

    def busiest(chosen: tuple[str, ...]) -> tuple[float, float]:
        table, load = dict(zip(kernels, chosen, strict=True)), defaultdict[str, float](float)
        for card in DECK:
            load[table[card.kernel]] += known.get((card, table[card.kernel]), math.inf)
        return max(load.values()), sum(load.values())

    best = min(itertools.product(devices, repeat=len(kernels)), key=busiest)
    table = dict(zip(kernels, best, strict=True))
    return [table[card.kernel] for card in cards]


def by_size(cards: Sequence[Card], devices: Sequence[str], known: Means) -> Pins:
    """Each kernel in each size on the device that is fastest for it: a table that somebody has to measure and keep."""
    return [min(devices, key=lambda device, card=card: known.get((card, device), math.inf)) for card in cards]
