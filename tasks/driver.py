"""The contract of a driver: the code that runs variants on one kind of device. One file a kind in `tasks/devices/`."""

from __future__ import annotations

import importlib
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
from numpy.typing import NDArray

from lepton_ai.device import DeviceState, Peaks, kind_of
from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import DEVICE_KINDS, Context, Inputs, Outputs, Run

__all__ = [
    "Driver",
    "Found",
    "Unit",
    "best_s",
    "cache_folder",
    "cores",
    "instructions",
    "open_device",
    "probe",
    "processor",
]

_REPEATS = 5
_INFO = Path("/proc/cpuinfo")


class Driver(Protocol):
    """An opened device. Methods may be called by several slots (threads) at once."""

    kind: str
    emulated: bool
    slots: int
    model: str
    """The make of the device, and the version of its driver where it has one: what its peaks depend on."""

    def peaks(self) -> Peaks:
        """What the device can do at best, measured now (well under a second)."""

    @property
    def stream(self) -> Any:
        """The calling thread's own stream or queue; None where the device has none."""

    def upload(self, array: NDArray[Any]) -> Any:
        """The array where kernels of this device can read it. May share memory; kernels never write to inputs."""

    def launch(self, run: Run, inputs: Inputs, context: Context) -> Outputs:
        """What a variant makes of uploaded inputs, finished.

        What the kernel raises comes through. What the toolkit raises because the device is short of memory becomes
        DeviceOutOfMemory, and what it raises because the device is gone, DeviceLost; so do `upload` and `download`.
        """

    def download(self, value: Any) -> NDArray[Any]:
        """An output back in host memory."""

    def synchronize(self) -> None:
        """Returns when everything that this thread launched has finished."""

    def state(self) -> DeviceState:
        """What the device says of its memory, its utilization and its sensors now; nothing of what it has none of.

        Asked once a heartbeat, from a thread of its own, so it may take long.
        """

    def close(self) -> None:
        """Gives the device back. Nothing may be called after it."""


class Unit(msgspec.Struct, frozen=True):
    """One of several devices of a kind, which take a worker each: its name with its model, as in `gpu.h100`."""

    device: str
    environ: dict[str, str]
    """What leaves a worker this one alone."""


class Found(msgspec.Struct, frozen=True):
    """Whether a kind of device would open on this machine. Each driver's module has a `probe() -> Found`."""

    kind: str
    available: bool
    what: str
    """The device found, or what is missing."""
    fix: str | None
    """The one command that helps, where one does."""
    emulated: bool = False
    units: tuple[Unit, ...] = ()
    """Those that there are, where there may be several."""


def open_device(device: str, slots: int) -> Driver:
    """The driver of a device name such as `cpu` or `gpu.h100`; InvalidSettings where there is none."""
    kind = kind_of(device)
    try:
        module = importlib.import_module(f"tasks.devices.{kind}")
    except ModuleNotFoundError as error:
        if error.name != f"tasks.devices.{kind}":
            raise
        raise InvalidSettings(f"no driver for {kind!r} in this release: tasks/devices/{kind}.py is missing") from None
    return cast(Driver, module.open_device(device, slots))


def probe() -> list[Found]:
    """Every kind of device and whether it would open here. It loads vendors' libraries: ask in a process of its own."""
    return [_probed(kind) for kind in DEVICE_KINDS]


def _probed(kind: str) -> Found:
    try:
        module = importlib.import_module(f"tasks.devices.{kind}")
        return cast(Found, module.probe())
    except ModuleNotFoundError as error:
        if error.name == f"tasks.devices.{kind}":
            return Found(kind, False, f"no driver in this release, {_hardware(kind)}", None)
        return Found(kind, False, f"{error.name} is not installed", "pip install 'lepton-ai[worker]'")
    except Exception as error:  # noqa: BLE001 - a broken installation is what is asked for, not a failure to answer
        return Found(kind, False, f"{type(error).__name__}: {error}", None)


def _hardware(kind: str) -> str:
    """What a kind without a driver leaves on a machine that has one."""
    traces = {"gpu": ("/dev/nvidia0", "/dev/kfd"), "tpu": ("/dev/accel0", "/dev/vfio/0")}
    seen = [path for path in traces.get(kind, ()) if Path(path).exists()]
    if kind == "gpu" and (tool := shutil.which("nvidia-smi")):
        seen.append(tool)
    return f"although the machine seems to have one ({seen[0]})" if seen else "and no sign of such a device"


# -- what drivers share ---------------------------------------------------------------------------------------------


def cores() -> int:
    """The cores that this process may use, which a container's affinity can make fewer than the host has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The make of the host's processor."""
    return _told("model name") or platform.machine()


def instructions() -> str:
    """What code compiled for the host's processor may use: of a cache that machines share, each has its own part."""
    return f"{platform.machine()} {processor()} {_told('flags') or _told('Features')}"


def _told(of: str) -> str:
    lines = _INFO.read_text(errors="replace").splitlines() if _INFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(of)), "")


def cache_folder(*names: str) -> Path | None:
    """A folder of ours in the user's cache, in which nobody else can write; None where there can be none.

    What is kept there is run, or believed, by the next worker.
    """
    with suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lepton"
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in (folder, *(folder.joinpath(*names[: count + 1]) for count in range(len(names)))):
            each.mkdir(mode=0o700, exist_ok=True)
            found = each.stat()
            if found.st_uid != os.getuid() or found.st_mode & 0o022 or not os.access(each, os.W_OK):
                return None
        return folder.joinpath(*names)
    return None


def best_s(run: Callable[[], object]) -> float:
    """The shortest of a few runs in seconds; the first, which touches fresh pages, does not count."""
    run()
    shortest_s = math.inf
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        run()
        shortest_s = min(shortest_s, time.perf_counter() - started_s)
    return max(shortest_s, 1e-9)
