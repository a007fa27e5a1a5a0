"""The FPGA driver: kernels are OpenCL C, and what an OpenCL platform calls an accelerator runs them.

A vendor's board takes binaries that were made beforehand, one a kernel: `<kernel>.aocx` (Intel) or `<kernel>.xclbin`
(AMD) in the folder that LEPTON_FPGA_BINARY names, or one file for all. Making one takes hours; kernels without one are
refused, the others serve. No board was at hand when this was written: its path is tried with PoCL's binaries only.

Without a board the processor emulates one: PoCL compiles the OpenCL C while the worker warms up and keeps what it
compiled in its cache, so the next worker is warm in a fraction of a second. It gets as many threads as there are
slots, so that a slot takes a core at most, as on the cpu.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lepton_ai.device import DeviceState, Peaks
from lepton_ai.errors import InvalidKernel, InvalidSettings
from lepton_ai.kernel import Context, Inputs, Outputs, Run
from lepton_ai.settings import Settings
from tasks.caches import private_folder
from tasks.driver import Found, best_s, cores

__all__ = ["Array", "FpgaDriver", "Program", "open_device", "probe"]

_MATMUL_SIZE = 512
_COPY_BYTES = 16 * 2**20
_POCL = "Portable Computing Language"
_PIP = "pip install 'lepton-ai[fpga]'"


class Array:
    """An array that kernels of the device can read. `host` is its memory where the device reads the host's."""

    __slots__ = ("buffer", "dtype", "host", "shape")

    def __init__(self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any], host: NDArray[Any] | None) -> None:
        self.buffer = buffer
        self.shape = shape
        self.dtype = dtype
        self.host = host

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class FpgaDriver:
    """An opened OpenCL device: one context, and a queue in order for each thread that calls."""

    kind = "fpga"

    def __init__(
        self, device: Any, slots: int, *, emulated: bool, shares_memory: bool, binaries: Path | None = None
    ) -> None:
        import pyopencl

        self.slots = slots
        self.emulated = emulated
        self.model = f"{device.name.strip()}, {device.platform.version.strip()}"
        self._cl = pyopencl
        self._device = device
        self._context = pyopencl.Context([device])
        self._shares_memory = shares_memory
        self._binaries = binaries
        self._programs: dict[tuple[str, ...], Program] = {}
        self._building = threading.Lock()
        self._threads = threading.local()

    def program(self, source: str, name: str, **constants: int) -> Program:
        """The OpenCL C of the kernel `name`, compiled with these macros; on a board the binary made of it.

        InvalidSettings where there is no such binary, naming the file that is missing.
        """
        options = [f"-D{constant}={value}" for constant, value in constants.items()]
        key = (name, source, *options)
        with self._building:
            if (found := self._programs.get(key)) is None:
                if self.emulated:
                    program = self._cl.Program(self._context, source).build(options)
                else:
                    program = self._cl.Program(self._context, [self._device], [self._binary(name)]).build()
                found = self._programs[key] = Program(self, program)
        return found

    def _binary(self, name: str) -> bytes:
        where = self._binaries
        if where is None:
            raise InvalidSettings(
                f"the board needs a binary for {name}: name the folder with {name}.aocx or {name}.xclbin, or one file "
                "with all kernels, in LEPTON_FPGA_BINARY",
                "fpga_binary",
            )
        for path in (where, where / f"{name}.aocx", where / f"{name}.xclbin"):
            if path.is_file():
                return path.read_bytes()
        raise InvalidSettings(
            f"the board needs a binary for {name}: neither {name}.aocx nor {name}.xclbin is in {where}", "fpga_binary"
        )

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An output or scratch array for a kernel to fill; what stands in it is whatever stood there before."""
        kind, flags = np.dtype(dtype), self._cl.mem_flags
        size_bytes = math.prod(shape) * kind.itemsize
        if self._shares_memory:
            host = np.empty(shape, kind)
            if size_bytes:
                buffer = self._cl.Buffer(self._context, flags.READ_WRITE | flags.USE_HOST_PTR, hostbuf=host)
                return Array(buffer, tuple(shape), kind, host)
        # OpenCL knows no buffer of size 0; nothing reads or writes the one byte.
        return Array(self._cl.Buffer(self._context, flags.READ_WRITE, max(size_bytes, 1)), tuple(shape), kind, None)

    def upload(self, array: NDArray[Any]) -> Array:
        """The array on the device: its own memory where the device reads the host's, else a copy.

        On PoCL two images of 4 million pixels and back took 1.5 ms with their own memory and 7 ms copied.
        """
        view, cl = np.require(array, requirements=("C", "A")), self._cl
        flags = cl.mem_flags
        if self._shares_memory and view.size:
            buffer = cl.Buffer(self._context, flags.READ_ONLY | flags.USE_HOST_PTR, hostbuf=view)
            return Array(buffer, view.shape, view.dtype, view)
        buffer = cl.Buffer(self._context, flags.READ_ONLY, max(view.nbytes, 1))
        if view.size:
            # Not COPY_HOST_PTR, which copies while it holds the GIL (200 ms for 256 MB).
            cl.enqueue_copy(self._thread.queue, buffer, view, is_blocking=True)
        return Array(buffer, view.shape, view.dtype, None)

    def launch(self, run: Run, inputs: Inputs, context: Context) -> Outputs:
        """What the variant makes of uploaded inputs, finished."""
        outputs = run(inputs, context)
        self.synchronize()
        return outputs

    def download(self, value: Any) -> NDArray[Any]:
        """An output in host memory, without a copy where the device reads that."""
        if not isinstance(value, Array):
            return np.asarray(value)
        cl, queue = self._cl, self._thread.queue
        if value.host is None:
            array = np.empty(value.shape, value.dtype)
            if array.size:
                cl.enqueue_copy(queue, array, value.buffer, is_blocking=True)
            return array
        # A device may keep its own copy of shared memory until the host maps it.
        mapped, _ = cl.enqueue_map_buffer(queue, value.buffer, cl.map_flags.READ, 0, (value.host.nbytes,), np.uint8)
        mapped.base.release(queue)
        return value.host

    def synchronize(self) -> None:
        """Returns when everything that this thread launched has finished. Waits without the GIL."""
        self._thread.queue.finish()
        self._thread.launched.clear()

    @property
    def stream(self) -> Any:
        """The calling thread's command queue."""
        return self._thread.queue

    def state(self) -> DeviceState:
        """Nothing: OpenCL asks no sensors."""
        return DeviceState()

    def close(self) -> None:
        """Gives back every thread's queue, the programs and the context."""
        del self._threads, self._programs, self._context

    def peaks(self) -> Peaks:
        """Rates of the product of two matrices, of copies, and of the smallest job; best of a few runs (100 ms).

        A board without a good binary for `linalg.matmul` is taken to do one operation a byte until costs are learned.
        """
        from tasks.kernels.linalg_matmul import matmul

        nothing: Any = None
        source = np.ones(_COPY_BYTES, np.uint8)
        one, square = np.ones((1, 1), np.float32), np.ones((_MATMUL_SIZE, _MATMUL_SIZE), np.float32)
        read, written = self.upload(source), self.empty(source.shape, source.dtype)
        copy_s = best_s(lambda: self._copy(read, written))
        latency_s = best_s(lambda: self.download(self.upload(one)))
        both_ways_s = best_s(lambda: self.download(self.upload(source)))
        bytes_per_s = 2 * _COPY_BYTES / copy_s
        try:
            run = matmul.build("fpga", self)
        except (InvalidSettings, self._cl.Error):  # warm-up has told why
            flops_per_s, launch_s = bytes_per_s, latency_s
        else:
            small, large = self.upload(one), self.upload(square)

            def multiply(array: Array) -> None:
                run({"a": array, "b": array}, nothing)
                self.synchronize()

            flops_per_s = 2 * _MATMUL_SIZE**3 / best_s(lambda: multiply(large))
            launch_s = best_s(lambda: multiply(small))
        return Peaks(
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
            transfer_bytes_per_s=math.inf if self._shares_memory else 2 * _COPY_BYTES / both_ways_s,
            transfer_latency_s=latency_s,
            launch_s=launch_s,
        )

    def _copy(self, read: Array, written: Array) -> None:
        self._cl.enqueue_copy(self._thread.queue, written.buffer, read.buffer)
        self.synchronize()

    @property
    def _thread(self) -> _Thread:
        """What belongs to the calling thread."""
        try:
            found: _Thread = self._threads.own
        except AttributeError:
            found = self._threads.own = _Thread(self._cl.CommandQueue(self._context))
        return found


class _Thread:
    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.launched: list[object] = []
        """Arguments of what may still run: OpenCL keeps a buffer until then, but not the host's memory under it."""


class Program:
    """Compiled OpenCL C. Any number of threads may launch its functions."""

    def __init__(self, driver: FpgaDriver, program: Any) -> None:
        self._driver = driver
        self._program = program
        self._functions: dict[str, tuple[Any, tuple[int, ...]]] = {}
        self._setting = threading.Lock()

    def launch(self, function: str, groups: tuple[int, ...], *arguments: Array | np.generic) -> None:
        """Starts `function` on so many work-groups along each axis, each of its `reqd_work_group_size`.

        Arguments are arrays, and NumPy scalars of the types that the function declares. Nothing starts where there
        are no groups.
        """
        if 0 in groups:
            return
        thread, cl = self._driver._thread, self._driver._cl
        # A function's arguments are set one by one, and are its own only once it is launched.
        with self._setting:
            compiled, local = self._function(function)
            compiled.set_args(*(each.buffer if isinstance(each, Array) else each for each in arguments))
            sizes = tuple(count * size for count, size in zip(groups, local, strict=False))
            cl.enqueue_nd_range_kernel(thread.queue, compiled, sizes, local[: len(groups)])
        thread.launched.append(arguments)

    def _function(self, name: str) -> tuple[Any, tuple[int, ...]]:
        if name not in self._functions:
            cl = self._driver._cl
            compiled = cl.Kernel(self._program, name)
            asked = cl.kernel_work_group_info.COMPILE_WORK_GROUP_SIZE
            local = tuple(compiled.get_work_group_info(asked, self._driver._device))
            # PoCL compiles a function anew for every size of group, and a board is built for one.
            if 0 in local:
                raise InvalidKernel(f"{name} needs __attribute__((reqd_work_group_size(x, y, z)))")
            self._functions[name] = compiled, local
        return self._functions[name]


def open_device(device: str, slots: int) -> FpgaDriver:
    """The driver for `fpga` or any `fpga.<model>`; InvalidSettings says what is missing and how to get it."""
    chosen, found = _look(slots)
    if chosen is None:
        raise InvalidSettings(f"{found.what}; try: {found.fix}")
    binary = Settings.read().fpga_binary
    return FpgaDriver(
        chosen,
        slots,
        emulated=found.emulated,
        shares_memory=bool(chosen.host_unified_memory),
        binaries=Path(binary) if binary else None,
    )


def probe() -> Found:
    """The board, or the processor that stands in for one, or what is missing for that."""
    return _look(cores())[1]


def _look(slots: int) -> tuple[Any, Found]:
    """The OpenCL device to open, if there is one, and what to say of it."""
    _prepare(slots)
    try:
        import pyopencl as cl
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "pyopencl"
        return None, _missing("pyopencl is not installed" if missing else f"pyopencl does not import: {error}", _PIP)
    found: list[Any] = []
    try:
        platforms = cl.get_platforms()
    except cl.Error:  # the loader raises where it finds none
        platforms = []
    for each in platforms:
        with suppress(cl.Error):  # one vendor's broken runtime must not hide the others
            found += each.get_devices()
    # What compiles while it is open is no FPGA: that takes hours. So a vendor's emulator counts as one.
    boards = [each for each in found if each.type & cl.device_type.ACCELERATOR]
    boards.sort(key=lambda each: bool(each.compiler_available))
    processors = [each for each in found if each.type & cl.device_type.CPU]
    processors.sort(key=lambda each: each.platform.name != _POCL)
    if not (boards or processors):
        beside = ", ".join(each.name.strip() for each in found)
        what = "OpenCL finds neither an accelerator, by a vendor's runtime, nor a processor, by PoCL"
        return None, _missing(f"{what} (but {beside})" if beside else what, _opencl())
    device = (boards or processors)[0]
    emulated = bool(device.compiler_available)
    pocl = re.search(r"PoCL [\d.]+", device.platform.version)
    if device.platform.name == _POCL and shutil.which("ld") is None:
        # Without it PoCL ends the whole process at the first launch.
        return None, _missing("PoCL links with the program ld, which is not on the PATH", "apt-get install binutils")
    what = f"{pocl[0] if pocl else device.platform.name.strip()} on {device.name.strip().removeprefix('pthread-')}"
    count = device.max_compute_units
    units = f"{count} unit{'s' * (count != 1)}"
    return device, Found("fpga", True, ", ".join([what, *["emulated"] * emulated, units]), None, emulated)


def _missing(what: str, fix: str) -> Found:
    return Found("fpga", False, what, fix)


def _opencl() -> str:
    """The command that brings an OpenCL platform. PoCL is on PyPI for Linux on x86-64 only."""
    if sys.platform == "darwin":
        return "brew install pocl"
    on_pypi = platform.machine() == "x86_64" and find_spec("pocl_binary_distribution") is None
    return _PIP if on_pypi else "apt-get install pocl-opencl-icd"


def _prepare(slots: int) -> None:
    """Sets what PoCL and pyopencl read once, as they load; what the operator has set stays."""
    os.environ.setdefault("POCL_MAX_PTHREAD_COUNT", str(max(1, min(slots, cores()))))
    # Where it can write to none PoCL offers no device, and without a home it would take a folder that is open to all.
    os.environ.setdefault("POCL_CACHE_DIR", str(private_folder("pocl", "kcache")))
    # pyopencl would keep an SQLite file of its own; PoCL's cache does, and is safe for many processes.
    os.environ.setdefault("PYOPENCL_NO_CACHE", "1")
