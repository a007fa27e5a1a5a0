"""Lepton: every compute job on the device that finishes it soonest. What producers import; no celery, no numba."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ai.accounts import Accounts
    from lepton_ai.async_client import AsyncClient
    from lepton_ai.async_events import AsyncEvents
    from lepton_ai.async_handle import AsyncJobHandle
    from lepton_ai.client import Client
    from lepton_ai.dead import DeadLetter
    from lepton_ai.device import Announcement, DeviceState, Peaks, ResourceState
    from lepton_ai.errors import LeptonError
    from lepton_ai.event import CloudEvent
    from lepton_ai.handle import JobHandle
    from lepton_ai.idempotency import job_id
    from lepton_ai.job import Cost, Estimate, Placement
    from lepton_ai.kernel import Kernel, KernelSpec

__all__ = [
    "Accounts",
    "Announcement",
    "AsyncClient",
    "AsyncEvents",
    "AsyncJobHandle",
    "Client",
    "CloudEvent",
    "Cost",
    "DeadLetter",
    "DeviceState",
    "Estimate",
    "JobHandle",
    "Kernel",
    "KernelSpec",
    "LeptonError",
    "Peaks",
    "Placement",
    "ResourceState",
    "job_id",
]

#: Where each is. They are loaded when they are asked for: NumPy and asyncio take a third of a second, and not everybody
#: who imports something of ours needs them.
_MODULES = {
    "Accounts": "accounts",
    "Announcement": "device",
    "AsyncClient": "async_client",
    "AsyncEvents": "async_events",
    "AsyncJobHandle": "async_handle",
    "Client": "client",
    "CloudEvent": "event",
    "Cost": "job",
    "DeadLetter": "dead",
    "DeviceState": "device",
    "Estimate": "job",
    "JobHandle": "handle",
    "Kernel": "kernel",
    "KernelSpec": "kernel",
    "LeptonError": "errors",
    "Peaks": "device",
    "Placement": "job",
    "ResourceState": "device",
    "job_id": "idempotency",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
