"""A Kernel: one computation, its signature as data, a clear reference, and one variant a device kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from lepton_ai.errors import InvalidKernel
from lepton_ai.formula import Formula
from lepton_ai.signature import Dims, Signature

__all__ = ["DEVICE_KINDS", "Builder", "Context", "Kernel", "KernelSpec", "Run", "Work"]

DEVICE_KINDS = ("cpu", "gpu", "fpga", "tpu")
Batching = Literal["stack", "concat"] | None
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", re.ASCII)


class Context(Protocol):
    """What a running variant may ask and tell."""

    @property
    def cancelled(self) -> bool:
        """True once nobody wants the result any more; a long loop should look now and then."""

    @property
    def deadline(self) -> float | None:
        """Seconds left, or None where there is no limit."""

    @property
    def stream(self) -> Any:
        """The device's own stream or queue for this slot, or None where it has none."""

    def progress(self, fraction: float) -> None:
        """Tell how far the work is, 0 to 1."""


Inputs = Mapping[str, Any]
Outputs = Mapping[str, Any]
#: Runs a variant: inputs are the driver's arrays (with a leading axis where the kernel stacks) and plain numbers.
Run = Callable[[Inputs, Context], Outputs]
#: Called once on the opened device; imports its toolkit, compiles, and returns the Run.
Builder = Callable[[Any], Run]
Reference = Callable[..., Outputs]
Samples = Callable[[], Iterable[dict[str, Any]]]

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


class Work(msgspec.Struct, frozen=True):
    """What a job asks of a device: floating-point (or integer) operations, and bytes moved through memory."""

    flops: float
    bytes: float


class KernelSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What others may know of a kernel: data only, as a worker announces it."""

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    flops: str
    bytes: str
    limits: dict[str, str] = {}
    batch: Batching = None
    tolerance: float = 1e-5
    summary: str = ""

    def work(self, dims: Dims) -> Work:
        """The Work of a job with these dims; a formula that is not defined there counts as nought."""
        values = [Formula(text)(dims) for text in (self.flops, self.bytes)]
        return Work(*(value if value > 0 and math.isfinite(value) else 0.0 for value in values))

    def signature(self) -> Signature:
        """The parsed signature; InvalidKernel where a string does not parse."""
        return Signature(self.inputs, self.outputs, self.limits)


class Kernel:
    """One computation with its variants. See `docs/kernels.md` for how to write one.

    `inputs` and `outputs` are signature strings, `flops` and `bytes` formulas over their dims and scalars, `limits`
    conditions on single inputs. `batch` says how jobs of one kernel may run in one launch: `"stack"` (equal shapes
    and equal scalars get a new leading axis), `"concat"` (along the first axis), or None (one after another).
    `tolerance` is the largest difference to the reference, relative to the larger of 1 and the reference's values.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: dict[str, str],
        outputs: dict[str, str],
        flops: str,
        bytes: str,
        limits: dict[str, str] | None = None,
        batch: Batching = None,
        tolerance: float = 1e-5,
        summary: str = "",
    ) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidKernel(f"a kernel's name is like linalg.matmul, not {name!r}")
        self.spec = KernelSpec(name, inputs, outputs, flops, bytes, limits or {}, batch, tolerance, summary)
        self._builders: dict[str, Builder] = {}
        self._reference: Reference | None = None
        self._samples: Samples | None = None
        known = self.signature.names
        for field, text in (("flops", flops), ("bytes", bytes)):
            if unknown := Formula(text).names - known:
                raise InvalidKernel(f"{name}: {field} uses {sorted(unknown)}, which no input defines", field)

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def signature(self) -> Signature:
        return self.spec.signature()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The device kinds that have a variant."""
        return tuple(self._builders)

    def on(self, kind: str) -> Callable[[_Decorated], _Decorated]:
        """Decorates the builder of the variant for one device kind."""
        if kind not in DEVICE_KINDS:
            raise InvalidKernel(f"{self.name}: a device kind is one of {', '.join(DEVICE_KINDS)}, not {kind!r}")

        def register(builder: _Decorated) -> _Decorated:
            self._builders[kind] = builder
            return builder

        return register

    def reference(self, function: _Decorated) -> _Decorated:
        """Decorates the definition: clear NumPy, called with the inputs by name, returns the outputs by name."""
        self._reference = function
        return function

    def samples(self, function: _Decorated) -> _Decorated:
        """Decorates a function without arguments that yields inputs for warm-up, conformance and benches."""
        self._samples = function
        return function

    def build(self, kind: str, device: Any) -> Run:
        """The variant for `kind`, built on the opened device."""
        return self._builders[kind](device)

    def refer(self, inputs: Inputs) -> Outputs:
        """What the reference makes of these inputs."""
        if self._reference is None:
            raise InvalidKernel(f"{self.name} has no reference; decorate one with @kernel.reference")
        return self._reference(**inputs)

    def sample_inputs(self) -> list[dict[str, Any]]:
        """The kernel's own samples, checked against its signature."""
        if self._samples is None:
            raise InvalidKernel(f"{self.name} has no samples; decorate a function with @kernel.samples")
        return [self.signature.bind(sample)[0] for sample in self._samples()]

    def __repr__(self) -> str:
        return f"<Kernel {self.name} on {', '.join(self.kinds) or 'nothing'}>"
