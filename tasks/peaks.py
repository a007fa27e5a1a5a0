"""What a device can do at best, kept in the user's cache from one start of a worker to the next.

Measuring takes a tenth of a second to a second, and while other workers start it sees what they leave.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import msgspec
import structlog

from lepton_ai.device import Peaks
from tasks.driver import Driver, cache_folder, cores

__all__ = ["peaks_of"]

_KEPT_S = 7 * 24 * 3600.0
#: What peaks depend on beside the device.
_TOOLKITS = ("lepton-ai", "numpy", "numba", "numba-cuda", "jax", "jaxlib", "pyopencl", "pocl-binary-distribution")

log = structlog.get_logger()


class _Kept(msgspec.Struct, frozen=True):
    of: str
    measured_at: float
    """Seconds since the epoch."""
    peaks: Peaks


_KEPT = msgspec.msgpack.Decoder(_Kept)


def peaks_of(driver: Driver, *, anew: bool = False) -> Peaks:
    """The driver's peaks: those kept for such a device on this machine, or else measured now, and kept.

    Kept are those of the last week, by kind, model, slots, processors and versions of the toolkits. What cannot be
    read or written is passed over.
    """
    of, now = _subject(driver), time.time()
    folder = cache_folder("peaks")
    if folder is None:
        return driver.peaks()
    path = folder / hashlib.blake2b(of.encode(), digest_size=8).hexdigest()
    if not anew and (kept := _read(path, of, now)) is not None:
        log.info("peaks_kept", device=driver.kind, days=round((now - kept.measured_at) / 86400, 1), file=str(path))
        return kept.peaks
    peaks = driver.peaks()
    _write(path, _Kept(of, now, peaks))
    return peaks


def _subject(driver: Driver) -> str:
    """Whatever the peaks depend on, in words."""
    versions = []
    for name in _TOOLKITS:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    on = f"{platform.node()}, {cores()} cores, {driver.slots} slots"
    return f"{driver.kind}: {driver.model} on {on}; {', '.join(versions)}"


def _read(path: Path, of: str, now: float) -> _Kept | None:
    with suppress(OSError, msgspec.DecodeError):
        kept = _KEPT.decode(path.read_bytes())
        if kept.of == of and 0 <= now - kept.measured_at < _KEPT_S and kept.peaks.are_possible():
            return kept
    return None


def _write(path: Path, kept: _Kept) -> None:
    """All of it or nothing, for the owner's eyes: mkstemp's files are."""
    with suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.msgpack.encode(kept))
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
