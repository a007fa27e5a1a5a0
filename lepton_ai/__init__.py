"""Lepton: every compute job on the device that finishes it soonest. What producers import; no celery, no numba."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lepton_ai.client import Client
from lepton_ai.device import Announcement, Peaks
from lepton_ai.errors import LeptonError
from lepton_ai.event import CloudEvent
from lepton_ai.handle import JobHandle
from lepton_ai.job import Cost, Estimate, Placement
from lepton_ai.kernel import Kernel, KernelSpec

if TYPE_CHECKING:
    from lepton_ai.async_client import AsyncClient
    from lepton_ai.async_events import AsyncEvents
    from lepton_ai.async_handle import AsyncJobHandle

__all__ = [
    "Announcement",
    "AsyncClient",
    "AsyncEvents",
    "AsyncJobHandle",
    "Client",
    "CloudEvent",
    "Cost",
    "Estimate",
    "JobHandle",
    "Kernel",
    "KernelSpec",
    "LeptonError",
    "Peaks",
    "Placement",
]

#: Loaded when they are asked for: asyncio takes a third as long to import as all the rest of this.
_LATER = {"AsyncClient": "async_client", "AsyncEvents": "async_events", "AsyncJobHandle": "async_handle"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found
