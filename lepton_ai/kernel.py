"""A Kernel: one computation, its signature as data, a clear reference, and one variant a device kind."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from lepton_ai.errors import InvalidKernel
from lepton_ai.formula import Formula
from lepton_ai.signature import Dims, Signature

__all__ = ["DEVICE_KINDS", "Builder", "Context", "Kernel", "KernelSpec", "Retry", "Run", "Work"]

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
    dims: tuple[float, ...] = ()
    """The values of what its kernel's two formulas are over, in the order of their names: what it is sized by."""


@lru_cache(maxsize=4096)
def _estimator(flops: str, size: str) -> tuple[tuple[str, ...], Callable[..., Work]]:
    """The dims that two formulas use, and what makes the Work of their values: the jobs of a batch are much alike."""
    formulas = Formula(flops), Formula(size)
    names = tuple(sorted(formulas[0].names | formulas[1].names))

    @lru_cache(maxsize=1024)
    def work_of(*values: float) -> Work:
        dims = dict(zip(names, values, strict=True))
        flops, size_bytes = (found if 0 < (found := formula(dims)) < math.inf else 0.0 for formula in formulas)
        return Work(flops, size_bytes, values)

    return names, work_of


class Retry(msgspec.Struct, frozen=True, omit_defaults=True):
    """When a kernel that raised is run again: at most `times`, after growing delays."""

    times: int = 3
    delay_s: float = 1.0
    """Before the first retry; each next is `factor` times as long, up to `longest_s`."""
    factor: float = 2.0
    longest_s: float = 600.0
    jitter: float = 0.5
    """The share of each delay that chance may take away, 0 to 1, so that many retries do not come at once."""
    errors: tuple[str, ...] = ()
    """The exceptions, by the name of their class or of one above it (`OSError`); empty for every one."""

    def checked(self) -> Retry:
        """This policy; InvalidKernel where a number is out of range."""
        numbers = (self.delay_s, self.factor, self.longest_s)
        if self.times < 0 or not all(0 <= each < math.inf for each in numbers) or not 0 <= self.jitter <= 1:
            raise InvalidKernel(f"retry: times, delays and factor are not below 0, jitter is 0 to 1: {self}", "retry")
        return self

    def applies(self, error: BaseException, retries: int) -> bool:
        """Whether a job whose kernel raised this, after so many retries, is run once more."""
        names = {each.__name__ for each in type(error).__mro__}
        return retries < self.times and (not self.errors or not names.isdisjoint(self.errors))

    def wait_s(self, retries: int, chance: float) -> float:
        """Seconds before the retry that follows `retries` earlier ones; `chance` is 0 to 1."""
        grown = self.delay_s * self.factor ** min(retries, 64)
        return min(self.longest_s, grown) * (1 - self.jitter * chance)


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
    limit_s: float | None = None
    """The longest that one of its jobs may run; the fleet's own limit where it is unset."""
    retry: Retry | None = None
    carries: tuple[str, ...] = ()
    """Inputs that become outputs of the same names, which jobs of one state key hand on from one to the next."""

    def work(self, dims: Dims) -> Work:
        """The Work of a job with these dims; a formula that is not defined there counts as nought."""
        names, work_of = _estimator(self.flops, self.bytes)
        return work_of(*[dims[name] for name in names])

    def signature(self) -> Signature:
        """The parsed signature; InvalidKernel where a string does not parse."""
        return Signature(self.inputs, self.outputs, self.limits, self.carries)


class Kernel:
    """One computation with its variants. See `docs/kernels.md` for how to write one.

    `inputs` and `outputs` are signature strings, `flops` and `bytes` formulas over their dims and scalars, `limits`
    conditions on single inputs. `batch` says how jobs of one kernel may run in one launch: `"stack"` (equal shapes
    and equal scalars get a new leading axis), `"concat"` (along the first axis), or None (one after another).
    `tolerance` is the largest difference to the reference, relative to the larger of 1 and the reference's values.
    `limit_s` is the longest that a job may run before its worker is ended; `retry` says which failures run again when.
    `parity` is False where two runs on equal inputs may differ, or do something outside of their outputs; or it names
    the outputs that must agree, where others hang on how a sum was rounded.
    `carries` names inputs that are outputs too: jobs with a state key get what the last one of that key left.
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
        limit_s: float | None = None,
        retry: Retry | None = None,
        parity: bool | Iterable[str] = True,
        carries: Iterable[str] = (),
    ) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidKernel(f"a kernel's name is like linalg.matmul, not {name!r}")
        if limit_s is not None and not 0 < limit_s < math.inf:
            raise InvalidKernel(f"{name}: limit_s must be above 0 and finite, not {limit_s}", "limit_s")
        self.spec = KernelSpec(
            name,
            inputs,
            outputs,
            flops,
            bytes,
            limits or {},
            batch,
            tolerance,
            summary,
            limit_s,
            retry.checked() if retry is not None else None,
            tuple(carries),
        )
        self.parity = frozenset(outputs if parity is True else parity or ())
        """The outputs by which its variants are compared, on a share of its jobs; none where they are not."""
        if unknown := self.parity - outputs.keys():
            raise InvalidKernel(f"{name}: parity names {sorted(unknown)}, which are no outputs", "parity")
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

    def source(self, kind: str) -> Path | None:
        """The file that the variant for `kind` stands in; None where it stands in none."""
        code = getattr(inspect.unwrap(self._builders[kind]), "__code__", None)
        found = Path(code.co_filename) if code is not None else None
        return found if found is not None and found.is_file() else None

    def refer(self, inputs: Inputs) -> Outputs:
        """What the reference makes of these inputs."""
        if self._reference is None:
            raise InvalidKernel(f"{self.name} has no reference; decorate one with @kernel.reference")
        return self._reference(**inputs)

    def sample_inputs(self) -> list[dict[str, Any]]:
        """The kernel's own samples, checked against its signature."""
        return [inputs for inputs, _ in self.sample_dims()]

    def sample_dims(self) -> list[tuple[dict[str, Any], Dims]]:
        """The same, each with the dims and numbers that it fixes."""
        if self._samples is None:
            raise InvalidKernel(f"{self.name} has no samples; decorate a function with @kernel.samples")
        return [self.signature.bind(sample) for sample in self._samples()]

    def __repr__(self) -> str:
        return f"<Kernel {self.name} on {', '.join(self.kinds) or 'nothing'}>"
