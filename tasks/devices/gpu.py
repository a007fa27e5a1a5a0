"""The GPU driver: kernels are Python that numba-cuda compiles, and an NVIDIA GPU runs them.

One process has one GPU, the first that CUDA_VISIBLE_DEVICES leaves it; each thread (slot) has a stream, blocks of
device memory and pinned host memory of its own. No card was at hand when this was written: every variant is tried on
Numba's CUDA simulator, and compiled to PTX.

With NUMBA_ENABLE_CUDASIM=1 the simulator stands in for a card, for tests: each CUDA thread is a thread of Python, so it
takes a hundred thousand times as long. It never does so unasked.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lepton_ai.device import DeviceState, Peaks
from lepton_ai.errors import DeviceLost, DeviceOutOfMemory, InvalidKernel, InvalidSettings, LeptonError
from lepton_ai.kernel import Context, Inputs, Outputs, Run
from tasks.cuda_memory import Lease, Memory, Staging
from tasks.driver import Found, Unit, best_s
from tasks.nvml import gpu_state

__all__ = ["Array", "GpuDriver", "Launcher", "bound", "model_of", "open_device", "probe"]

#: Threads of a block, and blocks for each multiprocessor, of a launch that goes over its items in a loop.
_THREADS, _BLOCKS_EACH = 256, 32
#: The simulator's: it starts a thread of Python for each, so a launch may not have many.
_SIMULATED_THREADS, _SIMULATED_BLOCKS = 4, 2
_MOST_SIMULATED = 2000
#: After these errors nothing works on the context any more; CUDA clears none of them while the process lives.
_LOST = frozenset(
    {
        "ASSERT",
        "CONTAINED",
        "CONTEXT_IS_DESTROYED",
        "DEINITIALIZED",
        "DEVICE_NOT_LICENSED",
        "DEVICE_UNAVAILABLE",
        "ECC_UNCORRECTABLE",
        "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_CONTEXT",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
        "MPS_CLIENT_TERMINATED",
        "MPS_CONNECTION_FAILED",
        "MPS_RPC_FAILURE",
        "MPS_SERVER_NOT_READY",
        "NO_DEVICE",
        "NVLINK_UNCORRECTABLE",
        "SYSTEM_NOT_READY",
        "TENSOR_MEMORY_LEAK",
        "UNKNOWN",
    }
)
_ERROR = re.compile(r"CUDA_ERROR_([A-Z_]+)")


class Array:
    """An array on the GPU, contiguous. What is in it, only kernels see."""

    __slots__ = ("_driver", "_native", "dtype", "lease", "shape")

    def __init__(self, driver: GpuDriver, lease: Lease | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.lease = lease
        """The memory; None where there is nothing to hold."""
        self._driver = driver
        self._native: Any = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int | Sequence[int]) -> Array:
        """The same memory under another shape of as many elements; one size may be -1."""
        given: Any = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        known = math.prod(size for size in given if size != -1)
        rest = self.size // known if known else 0
        sizes = tuple(rest if size == -1 else int(size) for size in given)
        if math.prod(sizes) != self.size:
            raise ValueError(f"an array of shape {self.shape} has no shape {tuple(given)}")
        return Array(self._driver, self.lease, sizes, self.dtype)

    def view(self, dtype: DTypeLike) -> Array:
        """The same memory, its bits read as another type of the same size."""
        kind = np.dtype(dtype)
        if kind.itemsize != self.dtype.itemsize:
            raise ValueError(f"{self.dtype} and {kind} are not of one size")
        return Array(self._driver, self.lease, self.shape, kind)

    @property
    def native(self) -> Any:
        """What numba-cuda takes for it."""
        if self._native is None:
            self._native = self._driver._native(self.lease, self.shape, self.dtype)
        return self._native


class GpuDriver:
    """An opened GPU. `cuda` is the module numba.cuda."""

    kind = "gpu"

    def __init__(self, cuda: Any, slots: int, *, simulated: bool) -> None:
        self.slots = slots
        self.simulated = simulated
        """Whether Numba's simulator stands in for a card: tiles may be smaller then."""
        self.emulated = simulated
        self._cuda = cuda
        self._threads = threading.local()
        self._memories: weakref.WeakSet[Memory] = weakref.WeakSet()
        self._context = cuda.current_context()
        self.processors = 1 if simulated else int(self._context.device.MULTIPROCESSOR_COUNT)
        """The multiprocessors of the card: it is busy with a few blocks for each."""
        self.model = "Numba's CUDA simulator" if simulated else f"{_name(self._context.device)}, CUDA {_cuda_version()}"
        self._array_type, self._memset = _numba_parts()
        self._types: dict[tuple[np.dtype[Any], int], Any] = {}
        self._read_state = None if simulated else gpu_state(str(self._context.device.uuid))

    # -- what kernels are built with --------------------------------------------------------------------------------

    def compile(
        self,
        function: Callable[..., None],
        threads: Sequence[int] | None = None,
        helpers: Sequence[Callable[..., Any]] = (),
        constants: Mapping[str, int] | None = None,
    ) -> Launcher:
        """What launches a function that stands at module level, compiled for the types of each first launch.

        Without `threads` it is called with a number of items and its arguments, and goes over the items in a loop
        (`for i in range(cuda.grid(1), size, cuda.gridsize(1))`) that is right for any number of threads. With them
        it is called with the blocks to start, each of so many threads that may share memory and wait for each other.
        `helpers` are the functions that it calls, and those that they call; `constants` are globals of theirs that
        are not what their module says.
        """
        own = bound(self._cuda, function, helpers, constants or {}, simulated=self.simulated)
        jitted = self._cuda.jit(cache=not self.simulated)(own)
        return Launcher(self, jitted, None if threads is None else tuple(threads))

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An output or scratch array for a kernel to fill; what stands in it is whatever stood there before."""
        kind, sizes = np.dtype(dtype), tuple(int(size) for size in shape)
        size_bytes = math.prod(sizes) * kind.itemsize
        with _translated():
            return Array(self, self._lease(size_bytes) if size_bytes else None, sizes, kind)

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An array of zeros."""
        array = self.empty(shape, dtype)
        if array.lease is not None:
            flat = _flat(array)
            with _translated():
                self._memset(flat.native, 0, flat.size, stream=self.stream)
        return array

    def full(self, shape: Sequence[int], value: Any, dtype: DTypeLike) -> Array:
        """An array that holds `value` everywhere."""
        array = self.empty(shape, dtype)
        self._fill(array.size, array.reshape(-1), array.dtype.type(value))
        return array

    def read(self, array: Array) -> NDArray[Any]:
        """What is in an array, once everything that this thread launched has finished."""
        return self.download(array)

    @cached_property
    def _fill(self) -> Launcher:
        return self.compile(_fill)

    # -- the contract of a driver -----------------------------------------------------------------------------------

    @property
    def stream(self) -> Any:
        """The calling thread's CUDA stream."""
        return self._thread.stream

    def upload(self, array: NDArray[Any]) -> Array:
        """A copy of the array on the GPU: it may still be on its way, and the launches of this thread wait for it."""
        source = np.require(array, requirements=("C", "A"))
        found = self.empty(source.shape, source.dtype)
        if found.lease is not None:
            with _translated():
                self._thread.staging.upload(source.reshape(-1).view(np.uint8), _flat(found).native)
        return found

    def launch(self, run: Run, inputs: Inputs, context: Context) -> Outputs:
        """What the variant returns, finished."""
        with _translated():
            outputs = run(inputs, context)
            self.synchronize()
        return outputs

    def download(self, value: Any) -> NDArray[Any]:
        """The output as new host memory."""
        if not isinstance(value, Array):
            return np.asarray(value)
        if value.lease is None:
            return np.empty(value.shape, value.dtype)
        with _translated():
            return self._thread.staging.download(_flat(value).native).view(value.dtype).reshape(value.shape)

    def synchronize(self) -> None:
        """Returns when everything that this thread launched has finished. Waits without the GIL."""
        with _translated():
            self._thread.stream.synchronize()

    def state(self) -> DeviceState:
        """What the GPU tells by NVML; nothing where it is simulated."""
        return DeviceState() if self._read_state is None else self._read_state()

    def peaks(self) -> Peaks:
        """Rates of the product of two matrices, of copies, and of the smallest job; best of a few runs."""
        from tasks.kernels.linalg_matmul import matmul

        nothing: Any = None
        # A card needs much to do before it shows what it can; the simulator shows nothing, and would take for ever.
        side, copy_bytes, both_bytes = (8, 2**12, 2**12) if self.simulated else (4096, 2**28, 2**26)
        run = matmul.build("gpu", self)
        one, square = (self.upload(np.ones((size, size), np.float32)) for size in (1, side))
        source, target = self.zeros((copy_bytes,), np.uint8), self.empty((copy_bytes,), np.uint8)
        host, small = np.ones(both_bytes, np.uint8), np.ones((1, 1), np.float32)

        def multiply(array: Array) -> None:
            run({"a": array, "b": array}, nothing)
            self.synchronize()

        def copy() -> None:
            target.native.copy_to_device(source.native, stream=self.stream)
            self.synchronize()

        return Peaks(
            flops_per_s=2 * side**3 / best_s(lambda: multiply(square)),
            bytes_per_s=2 * copy_bytes / best_s(copy),
            transfer_bytes_per_s=2 * both_bytes / best_s(lambda: self.download(self.upload(host))),
            transfer_latency_s=best_s(lambda: self.download(self.upload(small))),
            launch_s=best_s(lambda: multiply(one)),
        )

    def close(self) -> None:
        """Gives the memory back; the context stays until the process ends, for Numba knows only one."""
        self._give_up()
        self._threads = threading.local()

    # -- memory -----------------------------------------------------------------------------------------------------

    @property
    def _thread(self) -> _Thread:
        """What belongs to the calling thread."""
        try:
            found: _Thread = self._threads.own
        except AttributeError:
            with _translated():
                found = self._threads.own = _Thread(self._cuda)
            self._memories.add(found.memory)
        return found

    def _lease(self, size_bytes: int) -> Lease:
        memory = self._thread.memory
        try:
            return memory.take(size_bytes)
        except Exception as error:
            if _code(error) != "OUT_OF_MEMORY":
                raise
        self._give_up()
        return memory.take(size_bytes)

    def _give_up(self) -> None:
        """Frees the blocks of every thread that are not in use, once nothing runs that might still read them."""
        with _translated():
            self._cuda.synchronize()
            for memory in list(self._memories):
                memory.give_up()

    def _native(self, lease: Lease | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        block = None if lease is None else lease.block
        if self.simulated:
            return self._array_type(np.ndarray(shape, dtype, b"" if block is None else block))
        strides = tuple(math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape)))
        array = self._array_type(shape, strides, dtype, gpu_data=block)
        # Numba would find out each array's type anew, which takes half as long as all else of a launch.
        kind = (dtype, len(shape))
        if kind not in self._types:
            self._types[kind] = array._numba_type_
        array._numba_type_ = self._types[kind]
        return array


class _Thread:
    """What each thread has of its own."""

    def __init__(self, cuda: Any) -> None:
        context = cuda.current_context()
        self.stream = cuda.stream()
        self.memory = Memory(context.memalloc)
        self.staging = Staging(cuda, self.stream)


class Launcher:
    """A compiled function. Any number of threads may launch it, each on its own stream."""

    def __init__(self, driver: GpuDriver, jitted: Any, threads: tuple[int, ...] | None) -> None:
        self._driver = driver
        self._jitted = jitted
        self._threads = threads
        self._most_blocks = _SIMULATED_BLOCKS if driver.simulated else _BLOCKS_EACH * driver.processors

    def __call__(self, blocks: int | Sequence[int], *arguments: Array | np.generic) -> None:
        """Starts it on so many items, or blocks, and returns before it is done; nothing starts where there are none.

        Arguments are arrays of the driver's, and NumPy scalars: their types decide what is compiled.
        """
        threads = self._threads
        grid = tuple(int(each) for each in blocks) if isinstance(blocks, Sequence) else (int(blocks),)
        if threads is None:
            threads = (_SIMULATED_THREADS if self._driver.simulated else _THREADS,)
            grid = (min(-(-grid[0] // threads[0]), self._most_blocks),)
        if 0 in grid:
            return
        given = [each.native if isinstance(each, Array) else _scalar(each) for each in arguments]
        with _translated():
            if not self._driver.simulated:
                self._jitted[grid, threads, self._driver.stream](*given)
                return
            total = math.prod(grid) * math.prod(threads)
            assert total <= _MOST_SIMULATED, f"{grid} blocks of {threads} are {total} threads, too many to simulate"
            with _SIMULATING:
                self._jitted[grid, threads](*given)


#: The simulator runs one launch at a time, in the whole process.
_SIMULATING = threading.Lock()


def _scalar(value: Any) -> Any:
    if not isinstance(value, np.generic):
        raise InvalidKernel(f"a launch takes arrays of the GPU and NumPy scalars, not {type(value).__name__}")
    return bool(value) if isinstance(value, np.bool_) else value


def bound(
    cuda: Any,
    function: Callable[..., Any],
    helpers: Sequence[Callable[..., Any]] = (),
    constants: Mapping[str, int] | None = None,
    *,
    simulated: bool = False,
) -> Callable[..., Any]:
    """The function as numba-cuda wants it: `cuda`, its constants and its helpers, compiled, among its globals.

    It gets globals of its own, copied from its module's: there the helpers stay what they were, for other devices
    compile them too.
    """
    changed = dict(constants or {})
    own = {each: {**each.__globals__, "cuda": cuda, **changed} for each in (function, *helpers)}
    copies = {each: _copy(each, globals_) for each, globals_ in own.items()}
    for copy in copies.values():
        # Numba's cache knows a function by its name, and nothing of its globals.
        copy.__qualname__ += "".join(f"_{name}_{value}" for name, value in sorted(changed.items()))
    compiled = {each.__name__: cuda.jit(device=True)(copies[each]) for each in helpers}
    for globals_ in own.values():
        globals_.update(compiled)
    return _quiet(copies[function], own[function]) if simulated else copies[function]


def _copy(function: Any, globals_: dict[str, Any]) -> Callable[..., Any]:
    copy = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def _quiet(function: Callable[..., Any], globals_: dict[str, Any]) -> Callable[..., Any]:
    """The function without NumPy's warnings of what a GPU does silently: the simulator's threads have no errstate.

    It has the same globals, by which the simulator gives it its `cuda`.
    """

    def quiet(*arguments: Any) -> None:
        with silence():
            function(*arguments)

    silence: Callable[[], Any] = lambda: np.errstate(all="ignore")  # noqa: E731 - a closure: the globals are another's
    return _copy(quiet, globals_)


def _fill(array: NDArray[Any], value: Any) -> None:
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = value


cuda: Any  # numba.cuda, in the copies that are compiled


def _flat(array: Array) -> Array:
    """The bytes of an array."""
    return Array(array._driver, array.lease, (array.size * array.dtype.itemsize,), np.dtype(np.uint8))


# -- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _translated() -> Iterator[None]:
    """Turns what CUDA raises for want of memory, or because the GPU is gone, into what Lepton calls it."""
    try:
        yield
    except LeptonError:
        raise
    except Exception as error:
        code = _code(error)
        if code == "OUT_OF_MEMORY":
            raise DeviceOutOfMemory(f"the GPU has too little memory for this: {error}") from error
        if code in _LOST:
            raise DeviceLost(f"the GPU fails whatever it is asked, until its worker starts anew: {error}") from error
        raise


def _code(error: Exception) -> str | None:
    """The name of a CUDA driver's error, without `CUDA_ERROR_`; None where it is no such error."""
    if not type(error).__module__.startswith(("numba.cuda", "numba_cuda", "cuda.")):
        return None
    found = _ERROR.search(str(error))
    return found[1] if found else None


# -- opening ----------------------------------------------------------------------------------------------------------


def open_device(device: str, slots: int) -> GpuDriver:
    """The driver for `gpu` or `gpu.<model>`; InvalidSettings says what is missing and how to get it."""
    cuda, found = _look()
    if cuda is None:
        raise InvalidSettings(f"{found.what}; try: {found.fix}" if found.fix else found.what)
    simulated = found.emulated
    name = _name(cuda.current_context().device)
    wanted = device.partition(".")[2]
    if wanted and wanted != model_of(name):
        raise InvalidSettings(f"{device} is not here: the GPU is {name}, which is called gpu.{model_of(name)}")
    return GpuDriver(cuda, slots, simulated=simulated)


def probe() -> Found:
    """The GPUs, or what is missing for them."""
    return _look()[1]


def model_of(name: str) -> str:
    """The model in the name that a card has from its vendor: `NVIDIA A100-SXM4-40GB` is `a100`.

    Without the brand, up to the word with its number and what tells it from its siblings (`Ti`, `SUPER`, `Ada`); a
    part of a card (MIG) is a model of its own, for it is slower.
    """
    words = [word for word in re.split(r"[\s-]+", name.lower()) if word not in _BRANDS]
    numbered = next((at for at, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    kept = words[: numbered + 1]
    for word in words[numbered + 1 :]:
        if not word.isalpha() or word in _BUILDS:
            break
        kept.append(word)
    if "mig" in words[numbered + 1 :]:
        kept += words[words.index("mig") :]
    return re.sub(r"[^a-z0-9]", "", "".join(kept)) or "unknown"


_BRANDS = ("nvidia", "geforce", "tesla", "quadro")
#: How a card is built, not which it is.
_BUILDS = ("edition", "generation", "gpu", "mig", "nvl", "pcie", "pg", "with")
_PIP = "pip install 'lepton-ai[gpu]'"


def _look() -> tuple[Any, Found]:
    """The module numba.cuda where a GPU is there, or simulated, and what to say of it."""
    # Asked first, because numba-cuda takes most of a second to import.
    if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1" and not _has_driver():
        return None, Found("gpu", False, "CUDA finds no GPU: no NVIDIA driver is installed", None)
    try:
        cuda = importlib.import_module("numba.cuda")
        from numba.cuda.core import config
    except ImportError as error:
        return None, Found("gpu", False, f"numba-cuda does not import: {error}", _PIP)
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a small job is no mistake
    if config.ENABLE_CUDASIM:
        return cuda, Found("gpu", True, "Numba's CUDA simulator, as NUMBA_ENABLE_CUDASIM=1 asks", None, True)
    from numba.cuda.cudadrv import nvrtc, nvvm
    from numba.cuda.cudadrv.driver import driver

    with suppress(ImportError):  # what numba-cuda raises where the driver has no device, or is too old
        driver.ensure_initialized()
    if driver.initialization_error is not None:
        reason = " ".join(str(driver.initialization_error).split())
        return None, Found("gpu", False, f"CUDA finds no GPU, or CUDA_VISIBLE_DEVICES hides it: {reason:.200}", None)
    devices = list(cuda.list_devices())
    if not devices:
        return None, Found("gpu", False, "CUDA finds no GPU, or CUDA_VISIBLE_DEVICES hides it", None)
    try:
        nvvm.NVVM()
        nvrtc.get_supported_ccs()
    except Exception as error:  # noqa: BLE001 - whatever keeps them from being loaded, kernels cannot be compiled
        reason = " ".join(str(error).split())
        what = f"{_name(devices[0])} is here, but not the compiler of CUDA's toolkit: {reason:.200}"
        return None, Found(
            "gpu", False, what, f"pip install 'numba-cuda[cu{min(13, max(12, driver.get_version()[0]))}]'"
        )
    return cuda, _several([(_name(each), str(each.uuid)) for each in devices])


def _has_driver() -> bool:
    """Whether the library of NVIDIA's driver loads from where numba-cuda looks for it."""
    for name in ("nvcuda.dll",) if sys.platform == "win32" else _DRIVERS:
        with suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


_DRIVERS = ("libcuda.so.1", "libcuda.so", "/usr/lib64/libcuda.so.1", "/usr/lib/libcuda.so.1")


def _several(cards: Sequence[tuple[str, str]]) -> Found:
    """What to say of cards, by their names and UUIDs."""
    units = tuple(Unit(f"gpu.{model_of(name)}", {"CUDA_VISIBLE_DEVICES": uuid}) for name, uuid in cards)
    counts = Counter((name, unit.device) for (name, _), unit in zip(cards, units, strict=True))
    what = [
        f"{count} x {name} ({device})" if count > 1 else f"{name} ({device})"
        for (name, device), count in counts.items()
    ]
    return Found("gpu", True, ", ".join(what), None, units=units)


def _name(device: Any) -> str:
    name = getattr(device, "name", "simulator")
    return name.decode() if isinstance(name, bytes) else str(name)


def _cuda_version() -> str:
    """The newest CUDA that the installed driver can serve."""
    from numba.cuda.cudadrv.driver import driver

    major, minor = driver.get_version()
    return f"{major}.{minor}"


def _numba_parts() -> tuple[Any, Any]:
    """What numba-cuda makes arrays of, and what fills memory with a byte: the simulator has other names for them."""
    from numba.cuda.cudadrv import devicearray, driver

    kind = getattr(devicearray, "FakeCUDAArray", None) or devicearray.DeviceNDArray
    return kind, driver.device_memset
