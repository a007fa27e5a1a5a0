"""Which Lepton a command talks to, and what to say where nothing answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import parse_qsl, urlencode

import msgspec

from lepton_ai.client import Client
from lepton_ai.errors import BrokerUnavailable, InvalidSettings, LeptonError, Unavailable
from lepton_ai.settings import Settings

__all__ = ["address", "check_address", "connected", "http_address", "masked"]

_SCHEMES = ("redis", "rediss", "unix", "http", "https")
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - what a service may listen on


def address(url: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The URL that was named, else LEPTON_REDIS_URL, else where `lepton up` listens."""
    return url or environ.get("LEPTON_REDIS_URL") or http_address(environ)


def http_address(environ: Mapping[str, str] = os.environ) -> str:
    """Where the ingest of this machine listens, by LEPTON_HTTP_HOST and LEPTON_HTTP_PORT."""
    host = environ.get("LEPTON_HTTP_HOST", Settings().http_host)
    host = _EVERYWHERE.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{environ.get('LEPTON_HTTP_PORT', Settings().http_port)}"


def check_address(url: str | None) -> None:
    """InvalidSettings where what was named is no address of a broker or an ingest."""
    if not url or url.partition("://")[0] in _SCHEMES:
        return
    scheme = "redis" if url.partition("/")[0].endswith(":6379") else "http"
    near = f"; did you mean {scheme}://{url}?" if "://" not in url and "@" not in url else ""
    raise InvalidSettings(f"an address begins with one of {', '.join(_SCHEMES)}://, not {masked(url)!r}{near}", "url")


def masked(url: str) -> str:
    """An address without its secrets: whatever stands before the last @, and a password among its options."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "***" if "@" in url else url
    secret, at, rest = rest.rpartition("@")
    user = secret.partition(":")[0]
    rest, question, query = rest.partition("?")
    options = [(name, "***" if "pass" in name.lower() else value) for name, value in parse_qsl(query)]
    who = f"{'' if {'?', '/'} & {*user} else user}:***@" if at else ""
    return f"{scheme}://{who}{rest}{question}{urlencode(options, safe='*/')}"


@contextmanager
def connected(url: str | None, tenant: str | None = None) -> Iterator[Client]:
    """A Client there, for a tenant. Raises Unavailable, with what to do, where nothing of Lepton's answers.

    Raises InvalidSettings where the address is none, or a LEPTON_ variable is misspelt: another Lepton would be asked.
    """
    Settings.read()
    check_address(url)
    url = address(url)
    try:
        with Client(url, tenant=tenant) as client:
            yield client
    except BrokerUnavailable as error:
        raise Unavailable(_told(url, error)) from error
    except msgspec.MsgspecError as error:
        raise Unavailable(f"{masked(url)} does not answer as Lepton does: {error}") from error
    except LeptonError as error:
        if type(error) is LeptonError and error.message.startswith("HTTP "):
            raise Unavailable(f"{masked(url)} does not answer as Lepton does: {error}") from error
        raise
    except _invalid_url() as error:
        raise InvalidSettings(f"{masked(url)!r} is not an address: {error}", "url") from None


def _invalid_url() -> type[Exception]:
    import httpx  # loaded by those who talk HTTP, and here only where something has failed

    return httpx.InvalidURL


def _told(url: str, error: BrokerUnavailable) -> str:
    """One line: what was tried, what came of it, and what to do."""
    import httpx
    import redis

    cause = error.__cause__
    if cause is None and not error.message.startswith("http"):  # the ingest's own words, and not our client's
        return f"{masked(url)}: {error}"
    if isinstance(cause, httpx.HTTPError):
        if not isinstance(cause, httpx.NetworkError | httpx.TimeoutException):
            return f"{masked(url)} does not answer as Lepton does: {cause}"
    elif isinstance(cause, redis.RedisError) and (
        isinstance(cause, redis.AuthenticationError)
        or not isinstance(cause, redis.ConnectionError | redis.TimeoutError)
    ):
        return f"{masked(url)} answers and refuses: {cause}"
    start = "start a Lepton here with `lepton up`" if url.startswith("http") else "start it"
    detail = str(cause or error.message.partition(": ")[2]).rstrip(".") or type(cause).__name__
    return f"nothing answers at {masked(url)} ({detail}); {start}, or name another with --url or LEPTON_REDIS_URL"
