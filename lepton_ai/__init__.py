"""Lepton: every compute job on the device that finishes it soonest. What producers import; no celery, no numba."""

from lepton_ai.client import Client
from lepton_ai.device import Announcement, Peaks
from lepton_ai.errors import LeptonError
from lepton_ai.handle import JobHandle
from lepton_ai.job import Cost, Estimate, Placement
from lepton_ai.kernel import Kernel, KernelSpec

__all__ = [
    "Announcement",
    "Client",
    "Cost",
    "Estimate",
    "JobHandle",
    "Kernel",
    "KernelSpec",
    "LeptonError",
    "Peaks",
    "Placement",
]
