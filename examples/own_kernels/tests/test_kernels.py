"""The two kernels by what sound should do; that variants equal their references, Lepton's own suite tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audio_kernels.kernels import comb, level

from lepton_ai.kernel import Kernel


def run(kernel: Kernel, **inputs: Any) -> Any:
    """What the cpu variant makes of these; it is given no device, since it asks for none."""
    given, _ = kernel.signature.bind(inputs)
    (output,) = kernel.build("cpu", None)(given, None).values()  # type: ignore[arg-type]
    return output


def test_a_sine_at_full_scale_has_three_decibels_less_than_full_scale() -> None:
    sine = np.sin(2 * np.pi * np.arange(480) / 48).astype(np.float32)
    assert run(level, samples=sine[None]) == pytest.approx([-3.01], abs=0.01)


def test_silence_has_no_level() -> None:
    assert run(level, samples=np.zeros((2, 8), np.float32)).tolist() == [-np.inf, -np.inf]


def test_an_impulse_comes_back_again_and_again_each_time_softer() -> None:
    impulse = np.zeros(9, np.float32)
    impulse[0] = 1
    assert run(comb, samples=impulse, delay=4, gain=0.5).tolist() == [1, 0, 0, 0, 0.5, 0, 0, 0, 0.25]


def test_a_delay_beyond_the_end_changes_nothing() -> None:
    samples = np.arange(5, dtype=np.float32)
    assert run(comb, samples=samples, delay=9).tolist() == samples.tolist()


@pytest.mark.parametrize("kernel", [level, comb], ids=lambda kernel: kernel.name)
def test_the_variant_equals_the_reference_on_the_samples(kernel: Kernel) -> None:
    for sample in kernel.sample_inputs():
        (expected,) = kernel.refer(sample).values()
        np.testing.assert_allclose(run(kernel, **sample), expected, rtol=kernel.spec.tolerance, atol=1e-5)
