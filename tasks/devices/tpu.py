"""The TPU driver: kernels are functions of JAX, which XLA compiles for the chip through PJRT.

XLA compiles for fixed shapes. So arrays are padded with zeros to buckets on their way up (`bucket`), a job of another
size in the same bucket compiles nothing, and results are cut back to their true shape on the host. What XLA compiled
is kept in the user's cache folder: the next worker is warm without compiling.

Without a TPU, XLA compiles the same programs for the processor, and the device is announced as emulated. It gets as
many threads as there are slots. No TPU was at hand when this was written.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import re
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.device import DeviceState, Peaks
from lepton_ai.errors import DeviceLost, DeviceOutOfMemory, InvalidKernel, InvalidSettings
from lepton_ai.kernel import Context, Inputs, Outputs, Run
from tasks.driver import Found, Unit, best_s, cache_folder, cores, instructions, processor

__all__ = ["Array", "Program", "TpuDriver", "bucket", "model_of", "open_device", "probe"]

_MATMUL_SIZE = 512
_COPY_BYTES = 16 * 2**20
#: Programs that a thread may have launched and not waited for.
_AHEAD = 8
_PIP = "pip install 'lepton-ai[tpu]'"
#: What leaves a process one chip, beside the number of that: the bounds of a slice of one.
_ALONE = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
#: What XLA's errors begin with, or hold, where the chip itself has failed.
_LOST = ("UNAVAILABLE", "DATA_LOSS", "halted unexpectedly")


class Array:
    """An array on the device, padded: `values` is JAX's own, of shape `padded`, in which `shape` is true."""

    __slots__ = ("shape", "values")

    def __init__(self, values: Any, shape: tuple[int, ...]) -> None:
        self.values = values
        self.shape = shape

    @property
    def padded(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = self.values.dtype
        return found

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def bucket(size: int) -> int:
    """The size to which an axis is padded: 8, 64, then powers of two. An empty axis is padded too."""
    return 8 if size <= 8 else 64 if size <= 64 else 1 << (size - 1).bit_length()


class TpuDriver:
    """An opened chip, or the processor in place of one. JAX is one for the whole process, and takes any threads."""

    kind = "tpu"
    stream = None

    def __init__(self, device: Any, slots: int, *, emulated: bool, model: str) -> None:
        import jax

        self.slots = slots
        self.emulated = emulated
        self.model = model
        self._jax = jax
        self._device = device
        self._threads = threading.local()

    def program(self, function: Callable[..., Any], static: Sequence[str] = (), donate: Sequence[str] = ()) -> Program:
        """`function` of padded JAX arrays and numbers, compiled when it is first called with new buckets.

        It returns an array, or a tuple of them. Arguments named in `static` are Python values, compiled in; inputs
        named in `donate` give their memory to outputs of equal shape and dtype, and are gone after the call.
        """
        return Program(self, function, tuple(static), tuple(donate))

    @staticmethod
    def bucket(size: int) -> int:
        """The size to which an axis is padded; for static values too."""
        return bucket(size)

    def upload(self, array: NDArray[Any]) -> Array:
        """The array on the device, zeros around it. One that fills its buckets is not copied on the host."""
        padded = tuple(bucket(size) for size in array.shape)
        if padded == array.shape:
            host = np.require(array, requirements=("C", "A"))
        else:
            host = np.zeros(padded, array.dtype)
            host[tuple(slice(size) for size in array.shape)] = array
        with self._translated():
            return Array(self._jax.device_put(host, self._device), array.shape)

    def launch(self, run: Run, inputs: Inputs, context: Context) -> Outputs:
        """What the variant makes of uploaded inputs, finished."""
        with self._translated():
            try:
                return run(inputs, context)
            finally:
                self.synchronize()

    def download(self, value: Any) -> NDArray[Any]:
        """An output in host memory, cut to its true shape."""
        if not isinstance(value, Array):
            return np.asarray(value)
        with self._translated():
            host = np.asarray(value.values)
        return np.ascontiguousarray(host[tuple(slice(size) for size in value.shape)]).reshape(value.shape)

    def read(self, array: Array) -> NDArray[Any]:
        """What stands in an array, for a variant whose outputs' shapes depend on it."""
        return self.download(array)

    def synchronize(self) -> None:
        """Returns when everything that this thread launched has finished. Waits without the GIL."""
        launched = self._launched
        while launched:
            self._wait(launched.popleft())

    def state(self) -> DeviceState:
        """The chip's memory, where PJRT tells of it (it does not of the processor's)."""
        found: dict[str, int] = {}
        with suppress(self._jax.errors.JaxRuntimeError):
            found = self._device.memory_stats() or {}
        return DeviceState(memory_used_bytes=found.get("bytes_in_use"), memory_total_bytes=found.get("bytes_limit"))

    def close(self) -> None:
        """Lets go of the device. JAX keeps its client until the process ends."""
        del self._threads, self._device

    def peaks(self) -> Peaks:
        """Rates of the product of two matrices, of a copy, and of the smallest job; best of a few runs (100 ms)."""
        from tasks.kernels.linalg_matmul import matmul

        nothing: Any = None
        # Less than its bucket, as most arrays are: padding is a part of what a transfer costs.
        source = np.ones(_COPY_BYTES // 4 - 1, np.float32)
        one, square = np.ones((1, 1), np.float32), np.ones((_MATMUL_SIZE, _MATMUL_SIZE), np.float32)
        run = matmul.build("tpu", self)
        copy = self.program(lambda values: values + 1)
        small, large, read = self.upload(one), self.upload(square), self.upload(source)

        def timed(work: Callable[[], object]) -> float:
            def finished() -> None:
                outputs = work()  # held: what is freed already is not waited for
                self.synchronize()
                del outputs

            return best_s(finished)

        return Peaks(
            flops_per_s=2 * _MATMUL_SIZE**3 / timed(lambda: run({"a": large, "b": large}, nothing)),
            bytes_per_s=2 * _COPY_BYTES / timed(lambda: copy({"copy": read.shape}, read)),
            transfer_bytes_per_s=2 * _COPY_BYTES / timed(lambda: self.download(self.upload(source))),
            transfer_latency_s=timed(lambda: self.download(self.upload(one))),
            launch_s=timed(lambda: run({"a": small, "b": small}, nothing)),
        )

    def _note(self, values: Any) -> None:
        """Keeps what a program returns until it is there. A thread that runs far ahead would keep much, so it waits."""
        launched = self._launched
        launched.append(values)
        while len(launched) > _AHEAD:
            self._wait(launched.popleft())

    def _wait(self, values: Any) -> None:
        self._jax.block_until_ready([each for each in values if not each.is_deleted()])  # donated in the meantime

    @property
    def _launched(self) -> deque[Any]:
        """What this thread launched since it last waited."""
        try:
            found: deque[Any] = self._threads.launched
        except AttributeError:
            found = self._threads.launched = deque()
        return found

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """XLA's errors of a device as the project's own."""
        try:
            yield
        except self._jax.errors.JaxRuntimeError as error:
            told = str(error)
            if told.startswith("RESOURCE_EXHAUSTED"):
                raise DeviceOutOfMemory(told) from error
            if told.startswith(_LOST[:2]) or _LOST[2] in told:
                raise DeviceLost(told) from error
            raise


class Program:
    """A function of JAX on the device. Any number of threads may call it."""

    def __init__(
        self, driver: TpuDriver, function: Callable[..., Any], static: tuple[str, ...], donate: tuple[str, ...]
    ) -> None:
        self._driver = driver
        self._static = static
        self._donate = donate
        self._signature = inspect.signature(function)
        self._compiled: dict[tuple[str, ...], Any] = {}
        self._usable: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self.compiled = 0
        """How many times the function was compiled: once for each set of buckets, dtypes and static values."""

        @wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.compiled += 1
            return function(*arguments, **named)

        self._function = function
        self._counted = counted

    def __call__(self, outputs: Mapping[str, tuple[int, ...]], *arguments: Any, **named: Any) -> dict[str, Array]:
        """Starts the program; `outputs` are the true shapes of what it returns, by name and in that order."""
        bound = self._signature.bind(*arguments, **named)
        given = {key: each.values if isinstance(each, Array) else each for key, each in bound.arguments.items()}
        found = self._jitted(self._donated(given) if self._donate else ())(**given)
        values = found if isinstance(found, tuple) else (found,)
        if len(values) != len(outputs):
            raise InvalidKernel(f"a program returned {len(values)} arrays for the outputs {', '.join(outputs)}")
        arrays = {}
        for (name, shape), each in zip(outputs.items(), values, strict=True):
            if each.ndim != len(shape) or any(map(int.__gt__, shape, each.shape)):
                raise InvalidKernel(f"{name} of shape {list(shape)} is not in the {list(each.shape)} of its program")
            arrays[name] = Array(each, tuple(shape))
        self._driver._note(values)
        return arrays

    def _jitted(self, donate: tuple[str, ...]) -> Any:
        if donate not in self._compiled:
            jit = self._driver._jax.jit
            self._compiled[donate] = jit(self._counted, static_argnames=self._static, donate_argnames=donate)
        return self._compiled[donate]

    def _donated(self, given: dict[str, Any]) -> tuple[str, ...]:
        """Those of the inputs to donate that an output fits into; JAX would warn of the others."""
        key = tuple((each.shape, each.dtype) if hasattr(each, "dtype") else each for each in given.values())
        if key not in self._usable:
            traced = {name: each for name, each in given.items() if name not in self._static}
            fixed = {name: each for name, each in given.items() if name in self._static}
            made = self._driver._jax.eval_shape(lambda **inputs: self._function(**inputs, **fixed), **traced)
            room = Counter((each.shape, each.dtype) for each in (made if isinstance(made, tuple) else (made,)))
            usable = []
            for name in self._donate:
                form = (given[name].shape, given[name].dtype)
                if room[form] > 0:
                    room[form] -= 1
                    usable.append(name)
            self._usable[key] = tuple(usable)
        return self._usable[key]


def open_device(device: str, slots: int) -> TpuDriver:
    """The driver for `tpu` or any `tpu.<model>`; InvalidSettings says what is missing and how to get it."""
    chosen, found = _look(slots)
    if chosen is None:
        raise InvalidSettings(found.what if found.fix is None else f"{found.what}; try: {found.fix}")
    # JAX is one for the process, so the last word on these is ours.
    import jax

    jax.config.update("jax_enable_x64", val=True)
    model = f"XLA on {processor()}" if found.emulated else str(chosen.device_kind)
    return TpuDriver(chosen, slots, emulated=found.emulated, model=model)


def probe() -> Found:
    """The chip, or the processor that stands in for one, or what is missing for that.

    Where only the processor can be meant JAX is not loaded to find it, which takes seconds.
    """
    if _chip() is None and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and find_spec("jax") and find_spec("jaxlib"):
        return Found("tpu", True, f"JAX {metadata.version('jax')} on {processor()}, emulated", None, True)
    return _look(cores())[1]


def _look(slots: int) -> tuple[Any, Found]:
    """The device to open, if there is one, and what to say of it."""
    _prepare(slots)
    try:
        import jax
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "jax"
        return None, Found("tpu", False, "jax is not installed" if missing else f"jax does not import: {error}", _PIP)
    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:  # another process has the chip, or JAX_PLATFORMS names what is not there
        return None, Found("tpu", False, f"JAX opens no device: {error}", None)
    emulated = device.platform != "tpu"
    on = processor() if device.platform == "cpu" else device.device_kind
    what = f"JAX {jax.__version__} on {on}"
    if not emulated:
        chips = len({tuple(each.coords) for each in jax.local_devices()})  # of some, each core is a device to JAX
        name = f"tpu.{model_of(device.device_kind)}"
        units = tuple(Unit(name, _ALONE | {"TPU_VISIBLE_CHIPS": str(chip)}) for chip in range(chips))
        return device, Found("tpu", True, f"{what}, {chips} chip{'s' * (chips != 1)}", None, False, units)
    lacking = _chip() is not None and find_spec("libtpu") is None
    beside = [f"although there is {_chip()}, for lack of libtpu"] if lacking else []
    fix = "pip install 'jax[tpu]'" if lacking else None
    return device, Found("tpu", True, ", ".join([what, "emulated", *beside]), fix, emulated)


def model_of(kind: str) -> str:
    """The model in the name that JAX has for a chip: `TPU v5 lite` is `v5lite`."""
    return re.sub(r"[^a-z0-9]", "", kind.lower().replace("tpu", "")) or "unknown"


def _chip() -> Path | None:
    """What a TPU leaves in /dev, by its own driver or by vfio."""
    found = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return min(found, default=None)


def _prepare(slots: int) -> None:
    """Sets what JAX reads once, as it loads; what the operator has set stays."""
    # Without a choice JAX would open every accelerator, and take three quarters of a GPU's memory.
    has_tpu = _chip() is not None and find_spec("libtpu") is not None
    os.environ.setdefault("JAX_PLATFORMS", "tpu,cpu" if has_tpu else "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The threads of XLA's client for the processor: 1 of it takes a core at most, however many there are.
    os.environ.setdefault("PJRT_NPROC", str(max(1, min(slots, cores()))))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _cache() -> Path:
    """Where XLA's programs are kept, one folder for each make of processor; a temporary one where there is none.

    A home may be shared by machines of which one lacks instructions that another compiled for. JAX checks files as it
    reads them, so one that is half written costs a compile and a warning.
    """
    make = hashlib.blake2b(instructions().encode(), digest_size=6).hexdigest()
    return cache_folder("jax", make) or Path(tempfile.mkdtemp(prefix="lepton-jax-"))
