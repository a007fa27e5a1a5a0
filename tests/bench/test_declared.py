"""The stand-in takes as long as it declares, and its results are right."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from bench.declared import SPEEDS, DeclaredDriver, Speed, open_device, variant
from bench.stream import DECK, KERNELS, Card, expected
from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import Kernel
from tasks import driver as drivers
from tasks.warmup import IdleContext, difference, launch, warm

CARD = SPEEDS["gpu"]
#: Nothing takes time.
AT_ONCE = Speed(0.0, np.inf, np.inf, 0.0, np.inf, CARD.share)


def _inputs(card: Card) -> dict[str, Any]:
    return KERNELS[card.kernel].signature.bind(card.arguments())[0]


def _run(kernel: Kernel, inputs: dict[str, Any], speed: Speed = AT_ONCE) -> dict[str, Any]:
    driver = DeclaredDriver("gpu", 1, speed)
    return launch(variant(kernel, driver), inputs, driver, IdleContext())


def _timed_s(kernel: Kernel, inputs: dict[str, Any], speed: Speed) -> float:
    driver = DeclaredDriver("gpu", 1, speed)
    run = variant(kernel, driver)
    start = time.perf_counter()
    launch(run, inputs, driver, IdleContext())
    return time.perf_counter() - start


@pytest.mark.parametrize("card", sorted(set(DECK))[::7], ids=str)
def test_a_job_of_the_stream_gets_its_result(card: Card) -> None:
    found = _run(KERNELS[card.kernel], _inputs(card))
    assert difference(found, expected(card)) == 0


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=str)
def test_other_jobs_are_computed_by_the_reference(kernel: Kernel) -> None:
    for sample in kernel.sample_inputs()[:2]:
        assert difference(_run(kernel, sample), kernel.refer(sample)) <= kernel.spec.tolerance


def test_stacked_jobs_get_their_results_stacked() -> None:
    card = Card("medical.median_filter", 64, 3)
    inputs = _inputs(card)
    other = inputs["image"][::-1].copy()
    stacked = {"image": np.stack([inputs["image"], other]), "radius": 3}
    found = _run(KERNELS[card.kernel], stacked)["filtered"]
    assert np.array_equal(found[0], expected(card)["filtered"])
    assert np.array_equal(found[1], KERNELS[card.kernel].refer({"image": other, "radius": 3})["filtered"])


def test_concatenated_jobs_are_told_apart() -> None:
    cards = [Card("finance.black_scholes", size) for size in (128, 64, 128)]
    parts = [_inputs(card) for card in cards]
    joined = {
        name: np.concatenate([part[name] for part in parts]) if isinstance(value, np.ndarray) else value
        for name, value in parts[0].items()
    }
    found = _run(KERNELS["finance.black_scholes"], joined)
    assert np.array_equal(found["call"], np.concatenate([expected(card)["call"] for card in cards]))


def test_a_launch_and_the_link_take_what_is_declared() -> None:
    card = Card("medical.median_filter", 64, 3)
    kernel, inputs = KERNELS[card.kernel], _inputs(card)
    flops, moved = 16 * 64 * 64 * 7, 2 * inputs["image"].nbytes
    speed = Speed(0.02, flops / 0.03 / 0.04, np.inf, 0.01, moved / 0.04, CARD.share)
    due_s = 0.02 + 0.03 + 2 * 0.01 + 0.04
    assert due_s <= _timed_s(kernel, inputs, speed) < due_s + 0.5


def test_a_stack_takes_one_launch_and_the_arithmetic_of_all() -> None:
    card = Card("medical.median_filter", 64, 3)
    inputs = _inputs(card)
    stacked = {"image": np.stack([inputs["image"]] * 3), "radius": 3}
    flops = 16 * 64 * 64 * 7
    speed = Speed(0.02, flops / 0.03 / 0.04, np.inf, 0.0, np.inf, CARD.share)
    due_s = 0.02 + 3 * 0.03
    assert due_s <= _timed_s(KERNELS[card.kernel], stacked, speed) < due_s + 0.5


def test_its_variants_warm_up_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = DeclaredDriver("gpu", 1, AT_ONCE)
    kernels = list(KERNELS.values())
    for kernel in kernels:
        builders = {**kernel._builders, "gpu": lambda opened, kernel=kernel: variant(kernel, opened)}
        monkeypatch.setattr(kernel, "_builders", builders)
    found = warm(kernels, driver, {})
    assert found.kernels.keys() == KERNELS.keys()
    assert not found.refused


def test_no_user_is_offered_it() -> None:
    try:
        found = drivers.open_device("gpu.declared", 1)
    except InvalidSettings:
        return  # there is no gpu here, or no driver for one
    assert not isinstance(found, DeclaredDriver)


@pytest.mark.parametrize("kind", SPEEDS)
def test_it_announces_what_a_data_sheet_says_and_not_what_it_takes(kind: str) -> None:
    driver = open_device(f"{kind}.declared", 1)
    peaks = driver.peaks()
    assert driver.kind == kind
    assert driver.emulated
    assert peaks.are_possible()
    assert peaks.launch_s < driver.speed.launch_s
    assert peaks.transfer_bytes_per_s > driver.speed.link_bytes_per_s
