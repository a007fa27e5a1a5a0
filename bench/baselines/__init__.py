"""What NumPy and SciPy make of each kernel: a file a kernel, `vision_ndvi.py` for `vision.ndvi`.

An entry has

- `inputs(size)`: seeded, realistic inputs by name for `"small"` (10 to 100 us of CPU), `"medium"` and `"large"` (the
  size of a real job);
- `expressions()`: honest candidates by name, each called with these inputs and returning the kernel's outputs by name,
  on one thread; the fastest is what the kernel is measured against;
- `BOUND`: what limits the CPU variant at large sizes: `"memory"` (it streams arrays), `"compute"`, or `"latency"`
  (chains, scattered accesses, branches);
- `AGREES = False` where a library's definition differs from the kernel's, so that their results are not compared.

A kernel without an entry, a user's own say, is measured on its samples against its reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lepton_ai.kernel import Kernel

__all__ = ["BOUNDS", "SIZES", "Baseline", "baseline_of"]

SIZES = ("small", "medium", "large")
BOUNDS = ("memory", "compute", "latency")
Expression = Callable[..., Mapping[str, Any]]


class Baseline(msgspec.Struct, frozen=True):
    """What a kernel is measured against, and on what."""

    inputs: Callable[[str], dict[str, Any]]
    """By size."""
    expressions: Mapping[str, Expression]
    bound: str | None
    """None where nobody has said."""
    agrees: bool
    """Whether the expressions and the kernel are to give the same."""


def baseline_of(kernel: Kernel) -> Baseline:
    """The kernel's entry here, or its own samples and reference where it has none.

    ValueError where an entry lacks expressions or names a bound that there is not.
    """
    name = f"{__name__}.{kernel.name.replace('.', '_')}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return Baseline(lambda size: _sample(kernel, size), {"the reference": _referring(kernel)}, None, True)
    if module.BOUND not in BOUNDS:
        raise ValueError(f"{name}: BOUND is one of {', '.join(BOUNDS)}, not {module.BOUND!r}")
    expressions = dict(module.expressions())
    if not expressions:
        raise ValueError(f"{name}: expressions() returns none")
    return Baseline(module.inputs, expressions, module.BOUND, getattr(module, "AGREES", True))


def _sample(kernel: Kernel, size: str) -> dict[str, Any]:
    """One of the kernel's own samples: of those in the order of their bytes the one at a third, two thirds, the end."""
    samples = sorted(
        kernel.sample_inputs(), key=lambda sample: sum(getattr(each, "nbytes", 0) for each in sample.values())
    )
    return samples[(len(samples) - 1) * (SIZES.index(size) + 1) // len(SIZES)]


def _referring(kernel: Kernel) -> Expression:
    return lambda **inputs: kernel.refer(inputs)
