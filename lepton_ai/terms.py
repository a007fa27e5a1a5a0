"""Terms: what a caller asks of a job beside its kernel and its arguments; and the name of whoever asks, the tenant."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from lepton_ai.errors import InvalidArguments, OptionNotSupported
from lepton_ai.job import LATEST_S, Options

__all__ = ["Terms", "check_tenant"]

_DAY_S: Final = 86_400
_LONGEST_DELAY_S: Final = round(LATEST_S)
_LONGEST_DEADLINE_S: Final = 3650 * _DAY_S
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII)
#: Names that lanes of ours have.
_RESERVED: Final = frozenset({"backfill"})


class Terms(msgspec.Struct, frozen=True):
    """The options that travel with a job, and when it may run, in seconds from its submission."""

    options: Options = Options()
    delay_s: float | None = None
    """It is not run before."""
    deadline_s: float | None = None
    """It is not run after: where it has not been begun by then, it has expired."""

    def checked(self) -> Terms:
        """These terms; OptionNotSupported names the first that is out of range."""
        self.options.checked()
        if self.delay_s is not None and not 0 <= self.delay_s <= _LONGEST_DELAY_S:
            raise OptionNotSupported(
                f"delay_s is 0 to {_LONGEST_DELAY_S} (30 days), not {self.delay_s:g}: submit later what is due later",
                "delay_s",
            )
        if self.deadline_s is not None and not 0 < self.deadline_s <= _LONGEST_DEADLINE_S:
            raise OptionNotSupported(
                f"deadline_s is above 0 and at most {_LONGEST_DEADLINE_S} (ten years), not {self.deadline_s:g}",
                "deadline_s",
            )
        if self.options.must_meet and self.deadline_s is None:
            raise OptionNotSupported("must_meet needs a deadline to meet: give deadline_s", "must_meet")
        if self.delay_s is not None and self.deadline_s is not None and self.deadline_s <= self.delay_s:
            raise OptionNotSupported(
                f"deadline_s ({self.deadline_s:g}) must be above delay_s ({self.delay_s:g}): the job could never run",
                "deadline_s",
            )
        return self

    def times(self, now: datetime | None = None) -> dict[str, str | None]:
        """The headers `eta` and `expires` of a job that is submitted now, as Celery writes them: ISO 8601 in UTC."""
        if not self.delay_s and self.deadline_s is None:
            return {}
        now = now or datetime.now(UTC)
        return {
            "eta": (now + timedelta(seconds=self.delay_s)).isoformat() if self.delay_s else None,
            "expires": None if self.deadline_s is None else (now + timedelta(seconds=self.deadline_s)).isoformat(),
        }


def check_tenant(name: str | None) -> str | None:
    """The name of a tenant, or None for the default lane; InvalidArguments where it cannot be one."""
    if name is None:
        return None
    if name in _RESERVED:
        raise InvalidArguments(f"{name!r} is the name of a lane of Lepton's own, and no tenant's", "tenant")
    if not _TENANT.fullmatch(name):
        raise InvalidArguments(
            f"a tenant's name is 1 to 63 of a-z, 0-9, _ and -, and begins with a letter or digit, not {name[:80]!r}",
            "tenant",
        )
    return name
