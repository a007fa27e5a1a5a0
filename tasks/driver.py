"""The contract of a driver: the code that runs variants on one kind of device. One file a kind in `tasks/devices/`."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from lepton_ai.device import Peaks, kind_of
from lepton_ai.errors import InvalidSettings

__all__ = ["Driver", "open_device"]


class Driver(Protocol):
    """An opened device. Methods may be called by several slots (threads) at once."""

    kind: str
    emulated: bool
    slots: int

    def peaks(self) -> Peaks:
        """What the device can do at best, measured now (well under a second)."""

    def upload(self, array: NDArray[Any]) -> Any:
        """The array where kernels of this device can read it. May share memory; kernels never write to inputs."""

    def download(self, value: Any) -> NDArray[Any]:
        """An output back in host memory."""

    def synchronize(self) -> None:
        """Returns when everything that this thread launched has finished."""

    def close(self) -> None:
        """Gives the device back. Nothing may be called after it."""


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
