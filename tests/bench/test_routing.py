"""Fixed routings: what a team would write, and the best that it could have written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench import routing
from bench.stream import DECK, Card

DEVICES = ("cpu", "fpga")


def _known(seconds: dict[tuple[str, str], float]) -> routing.Means:
    return {(card, device): seconds[card.kernel, device] for card in DECK for device in DEVICES}


def test_means_are_by_card_and_device() -> None:
    card = DECK[0]
    assert routing.means([(card, "cpu", 1.0), (card, "cpu", 3.0), (card, "fpga", 5.0)]) == {
        (card, "cpu"): 2.0,
        (card, "fpga"): 5.0,
    }


def test_the_next_job_goes_to_the_next_device() -> None:
    cards = [Card("finance.black_scholes", 64)] * 3
    assert routing.round_robin(cards, DEVICES) == ["cpu", "fpga", "cpu"]


def test_what_a_device_has_no_variant_of_goes_to_one_that_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(routing.KERNELS, "retrieval.top_k", SimpleNamespace(kinds=("cpu",)))
    cards = [Card("retrieval.top_k", 64), Card("finance.black_scholes", 64)]
    assert routing.one_device(cards, "fpga") == ["cpu", "fpga"]
    assert routing.one_device(cards, "tpu.declared") == ["tpu.declared"] * 2
    assert routing.round_robin(cards[:1] * 2, DEVICES) == ["cpu", "cpu"]


def test_kernels_are_shared_out_so_that_the_busiest_device_has_the_least() -> None:
    """Each kernel is fastest on the CPU, which would have everything."""
    seconds = {}
    for kernel, (on_cpu, on_fpga) in {
        "retrieval.top_k": (2.0, 9.0),
        "medical.median_filter": (3.0, 4.0),
        "finance.black_scholes": (1.0, 9.0),
    }.items():
        seconds[kernel, "cpu"], seconds[kernel, "fpga"] = on_cpu, on_fpga
    pins = routing.by_kernel(DECK, DEVICES, _known(seconds))
    assert {(card.kernel, pin) for card, pin in zip(DECK, pins, strict=True)} == {
        ("retrieval.top_k", "cpu"),
        ("medical.median_filter", "fpga"),
        ("finance.black_scholes", "cpu"),
    }


def test_each_size_goes_where_it_is_fastest() -> None:
    small, large = Card("retrieval.top_k", 64), Card("retrieval.top_k", 512)
    known = {(small, "cpu"): 1.0, (small, "fpga"): 2.0, (large, "cpu"): 9.0, (large, "fpga"): 8.0}
    assert routing.by_size([large, small], DEVICES, known) == ["fpga", "cpu"]
