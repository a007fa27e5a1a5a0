"""What `lepton doctor` looks at: facts of this machine and of the broker. They are judged in `doctor.py`.

Nothing here raises: what could not be found out is a fact too, in words. Every look has a limit, and all of them run at
once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from lepton_ai import services, topology
from lepton_ai.accounts import ASK, Accounts, accounts_of, sizes_command
from lepton_ai.commands.address import address, http_address, masked
from lepton_ai.device import Announcement, read_leases
from lepton_ai.errors import InvalidSettings, LeptonError, Unavailable
from lepton_ai.settings import Settings

__all__ = ["Accelerator", "Facts", "Fleet", "Requirement", "Server", "gather"]

#: All looks together, and the longest of each: a command of our own, an answer from the network.
_ALL_S: Final = 4.5
_COMMAND_S: Final = 4.0
#: To compile kernels for several devices may take a while.
_COMPILE_S: Final = 600.0
_ANSWER_S: Final = 2.0
_PINGS = 5
_DISTRIBUTION = "lepton-ai"
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(\[[^\]]*\])?\s*(?P<limits>[^;]*?)\s*(;\s*(?P<marker>.*))?$")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([A-Za-z0-9._-]+)['"]""")
_SECRET = re.compile(r"PASS|SECRET|TOKEN", re.IGNORECASE)
_FIND_SERVER = """
import os
from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings
from queues.server import find_server
try:
    print(find_server(Settings(redis_server=os.environ.get("LEPTON_REDIS_SERVER"))))
except NoBroker as error:
    raise SystemExit(str(error))
"""


class Requirement(msgspec.Struct, frozen=True):
    """A package that an extra asks for (`extra` is empty for what every producer needs)."""

    extra: str
    name: str
    limits: str
    """Such as `>=5.7,<5.8`."""
    installed: str | None
    """The version that is there."""
    everywhere: bool = True
    """False where the extra asks for it on some platforms only."""


class Server(msgspec.Struct, frozen=True):
    """The broker that was reached. A setting that it would not tell is None."""

    name: str
    version: str
    role: str = "master"
    cluster: bool = False
    appendonly: str | None = None
    appendfsync: str | None = None
    maxmemory: int | None = None
    maxmemory_policy: str | None = None
    used_memory: int = 0
    ping_s: float = 0.0
    libraries: tuple[str, ...] | None = None


class Fleet(msgspec.Struct, frozen=True):
    """Who is alive, and what waits where."""

    workers: tuple[Announcement, ...] = ()
    routers: int | None = None
    """None where only an ingest was asked."""
    waiting: int = 0
    """Jobs that no router has claimed."""
    again: int = 0
    queued: dict[str, int] = {}
    """By device; of those that hold something or have ever been dispatched to."""
    parked: dict[str, int] = {}
    """By kernel."""
    scheduled: int = 0
    """Jobs that wait for their time, or for their next try."""
    dead: int = 0


class Accelerator(msgspec.Struct, frozen=True):
    """What `python -m tasks` says of one kind of device."""

    kind: str
    available: bool
    what: str = ""
    fix: str | None = None
    emulated: bool = False


class Facts(msgspec.Struct, frozen=True):
    """Everything that was found out. A `..._error` says why its neighbour is None."""

    python: tuple[int, ...]
    platform: str
    lepton: str | None
    """The version that is installed; None in a checkout that is not."""
    services: str
    """Where the services are."""
    services_found: bool
    from_checkout: bool
    executable: str = "python"
    """The Python that runs this."""
    requirements: tuple[Requirement, ...] = ()
    settings: dict[str, str] = {}
    """The variables that are set, their secrets masked."""
    settings_errors: tuple[str, ...] = ()
    embedded: str | None = None
    """The server program that an embedded broker would run, and its version."""
    embedded_error: str | None = None
    url: str | None = None
    """The broker that was asked, masked; None where none is named and none of `lepton up` answers."""
    url_from: str = ""
    """The file that names the broker, where it was not named but left by `lepton up`."""
    server: Server | None = None
    server_error: str | None = None
    fleet: Fleet | None = None
    accounts: Accounts | None = None
    """Where every job is; None where nobody could be asked, or the broker has no functions of ours yet."""
    http_url: str | None = None
    http_named: bool = False
    """True where the ingest was named, so that its silence is no mere absence."""
    http_status: int | None = None
    http_error: str | None = None
    accelerators: tuple[Accelerator, ...] | None = None
    accelerators_error: str | None = None


def gather(url: str | None = None, environ: Mapping[str, str] = os.environ) -> Facts:
    """Looks everywhere at once; returns within five seconds, and never raises."""
    named = address(url, environ)
    remote = named.startswith("http")
    broker = environ.get("LEPTON_REDIS_URL") if remote else named
    left_at, left = (None, None) if url or broker else _left_by_up(environ)
    http_url = named if remote else http_address(environ)
    looks: dict[str, Callable[[], dict[str, Any]]] = {
        "embedded_error": lambda: _embedded(environ),
        "accelerators_error": lambda: _accelerators(environ),
        "http_error": lambda: _ingest(http_url),
    }
    asked = broker or left
    if asked:
        looks["server_error"] = partial(_broker, asked)
    found = _at_once(looks)
    if left and found.get("server") is None:  # that `lepton up` has ended, and nobody named its broker
        left_at, asked = None, None
        found.pop("server_error", None)
    told = {name: found.pop(f"remote_{name}", None) for name in ("fleet", "accounts")}
    if found.get("fleet") is None:  # the broker's own word comes first
        found |= told
    return Facts(
        python=tuple(sys.version_info[:3]),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        lepton=_version(_DISTRIBUTION),
        services=str(services.root()),
        services_found=(services.root() / "pipeline" / "__main__.py").is_file(),
        from_checkout=services.root().name != "_services",
        executable=sys.executable,
        requirements=_requirements(),
        settings=_settings(environ),
        settings_errors=_settings_errors(environ),
        url=masked(asked) if asked else None,
        url_from=str(left_at or ""),
        http_url=masked(http_url),
        http_named=remote and (url is not None),
        **found,
    )


def _at_once(looks: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """What all looks found. Each runs in a thread of its own, and none is waited for longer than all may take."""
    answers: dict[str, dict[str, Any]] = {}

    def run(name: str) -> None:
        try:
            answers[name] = looks[name]()
        except Exception as error:  # noqa: BLE001 - a server that is none of ours may answer anything: say so
            answers[name] = {name: f"{type(error).__name__}: {error}"}

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in looks]
    deadline = time.monotonic() + _ALL_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    found: dict[str, Any] = dict.fromkeys(looks, f"no answer within {_ALL_S:g} s")
    for name in looks:
        found |= answers.get(name, {})
    return found


# -- this machine -----------------------------------------------------------------------------------------------------


def _left_by_up(environ: Mapping[str, str]) -> tuple[Path | None, str | None]:
    """The file in which a `lepton up` of this user keeps the address of its broker, and that address."""
    state = environ.get("XDG_STATE_HOME", "")
    path = Path(state if state.startswith("/") else "~/.local/state") / "lepton" / "broker" / "broker.url"
    try:
        path = path.expanduser()
        return path, path.read_text(encoding="utf-8").strip() or None
    except (OSError, RuntimeError, UnicodeError):
        return None, None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> tuple[Requirement, ...]:
    """What the extras ask for, as the installed package itself declares it."""
    try:
        declared = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ()
    found = []
    for text in declared:
        match = _REQUIREMENT.match(text)
        if match is None or match["name"] == _DISTRIBUTION:
            continue
        marker = match["marker"] or ""
        extra = _EXTRA.search(marker)
        everywhere = not _EXTRA.sub("", marker).strip(" ()")
        name = match["name"]
        found.append(Requirement(extra[1] if extra else "", name, match["limits"], _version(name), everywhere))
    return tuple(each for each in found if each.extra != "all")


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in environ.items() if name.startswith("LEPTON_")}
    return {name: "***" if _SECRET.search(name) else masked(value) for name, value in sorted(ours.items())}


def _settings_errors(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What is wrong with each variable that nobody knows, and the first thing that is wrong with the others."""
    errors, known = [], {}
    for name, value in environ.items():
        try:
            Settings.read({name: value})
        except InvalidSettings as error:
            if error.message.startswith("unknown setting"):
                errors.append(error.message)
                continue
        known[name] = value
    try:
        Settings.read(known)
    except InvalidSettings as error:
        errors.append(error.message)
    return tuple(errors)


def _run(*arguments: str, environ: Mapping[str, str], limit_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python where the services are, and not where the user stands: `tasks` may be a module of theirs."""
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        capture_output=True,
        text=True,
        timeout=_COMMAND_S if limit_s is None else limit_s,
        env=services.environ(environ),
        check=False,
        stdin=subprocess.DEVNULL,
    )


def _embedded(environ: Mapping[str, str]) -> dict[str, Any]:
    try:
        ran = _run("-c", _FIND_SERVER, environ=environ)
        if ran.returncode != 0:
            return {"embedded_error": _last_line(ran.stderr)}
        path = ran.stdout.strip()
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_ANSWER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"embedded_error": _reason(error)}
    version = re.search(r"v=([0-9.]+)", said)
    return {"embedded": f"{path} ({version[1] if version else said.strip()[:60]})", "embedded_error": None}


def _accelerators(environ: Mapping[str, str]) -> dict[str, Any]:
    try:
        ran = _run("-m", "tasks", environ=environ)
    except (OSError, subprocess.SubprocessError) as error:
        return {"accelerators_error": _reason(error)}
    try:
        found = msgspec.json.decode(_last_line(ran.stdout), type=tuple[Accelerator, ...])
    except msgspec.MsgspecError:
        return {"accelerators_error": _last_line(ran.stderr) or "it said nothing that could be read"}
    return {"accelerators": found, "accelerators_error": None}


class Examined(msgspec.Struct, frozen=True):
    """What `python -m tasks.examine` says of a kernel, or a module, on a kind of device."""

    kernel: str
    kind: str
    status: str
    """serves, refused, no variant, or no device."""
    reason: str = ""
    seconds: float = 0.0


def examined(modules: Sequence[str], environ: Mapping[str, str]) -> tuple[Examined, ...]:
    """What a worker here would say of the kernels of these modules. Raises Unavailable where it says nothing."""
    # As `lepton up` has it: modules of the current folder are found, after ours.
    path = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), str(Path.cwd())]))
    try:
        ran = _run("-m", "tasks.examine", *modules, environ={**environ, "PYTHONPATH": path}, limit_s=_COMPILE_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the kernels could not be examined: {_reason(error)}") from error
    try:
        return msgspec.json.decode(_last_line(ran.stdout), type=tuple[Examined, ...])
    except msgspec.MsgspecError:
        raise Unavailable(f"the kernels could not be examined: {_last_line(ran.stderr)}") from None


def _reason(error: Exception) -> str:
    """Not the whole command line, which may be a program."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {error.timeout:g} s"
    return str(error)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


# -- the broker -------------------------------------------------------------------------------------------------------


def _broker(url: str) -> dict[str, Any]:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        client = redis.Redis.from_url(
            url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S, retry=Retry(NoBackoff(), 0)
        )
        with client:
            looked = {"server": _server(client), "server_error": None, "fleet": _fleet(client)}
            return looked | {"accounts": _accounts(client)}
    except (redis.RedisError, ValueError, OSError) as error:
        return {"server_error": str(error) or type(error).__name__}


def _server(client: Any) -> Server:
    import redis

    info = client.info()
    is_valkey = info.get("server_name") == "valkey"
    config: dict[str, str] = {}
    libraries: tuple[str, ...] | None = None
    with suppress(redis.ResponseError):  # an ACL may forbid it
        config = client.config_get("append*", "maxmemory*")
    with suppress(redis.ResponseError):
        libraries = tuple(sorted(_libraries(client.function_list(library="lepton_*"))))
    pings = []
    for _ in range(_PINGS):
        start = time.perf_counter()
        client.ping()
        pings.append(time.perf_counter() - start)
    return Server(
        name="Valkey" if is_valkey else "Redis",
        version=str(info["valkey_version"] if is_valkey else info["redis_version"]),
        role=info.get("role", "master"),
        cluster=bool(info.get("cluster_enabled", 0)),
        appendonly=config.get("appendonly"),
        appendfsync=config.get("appendfsync"),
        maxmemory=int(config["maxmemory"]) if "maxmemory" in config else info.get("maxmemory"),
        maxmemory_policy=config.get("maxmemory-policy", info.get("maxmemory_policy")),
        used_memory=info.get("used_memory", 0),
        ping_s=sorted(pings)[_PINGS // 2],
        libraries=libraries,
    )


def _libraries(listed: Any) -> list[str]:
    """The names in an answer of FUNCTION LIST, which is a map in RESP3 and a flat list in RESP2."""
    names = []
    for each in listed:
        pairs = each if isinstance(each, Mapping) else dict(zip(each[::2], each[1::2], strict=False))
        name = pairs.get(b"library_name", pairs.get("library_name", b""))
        names.append(name.decode() if isinstance(name, bytes) else str(name))
    return names


def _accounts(client: Any) -> Accounts | None:
    import redis

    try:
        return accounts_of(client.execute_command(*sizes_command(client.execute_command(*ASK))))
    except (redis.ResponseError, LeptonError):  # an ACL may forbid it, or nobody has loaded the functions yet
        return None


def _fleet(client: Any) -> Fleet | None:
    import redis

    try:
        holders = [name.decode(errors="replace") for name in client.smembers(topology.HOLDERS)]
        parked = sorted(name.decode(errors="replace") for name in client.smembers(topology.PARKED))
        devices = {name.decode(errors="replace") for name in client.smembers(topology.DEVICES)}
        leases = client.mget([topology.lease(name) for name in holders]) if holders else []
        workers = read_leases(leases)
        queues = sorted(devices | {each.device for each in workers})
        tenants = [name.decode(errors="replace") for name in client.smembers(topology.LANES)]
        lanes = [each for lane in (topology.LANE, *tenants) for each in topology.lane_lists(lane)]
        again = [topology.AGAIN, topology.ALONE]
        with client.pipeline(transaction=False) as pipeline:
            for names in (
                lanes,
                again,
                *([topology.parked(kernel), topology.parked_alone(kernel)] for kernel in parked),
                *([topology.device_queue(name), topology.alone_queue(name)] for name in queues),
            ):
                for each in names:
                    pipeline.llen(each)
            pipeline.hlen(topology.ETA_MESSAGES)
            pipeline.xlen(topology.DEAD)
            pipeline.hmget(topology.BUNDLED, [topology.LANE, *tenants])
            *lengths, scheduled, dead, bundled = pipeline.execute()
    except redis.ResponseError:
        return None
    first, pairs = len(lanes), iter(lengths[len(lanes) + len(again) :])
    messages = sum(lengths[:first])
    extra = sum(max(0, int(count or 0)) for count in bundled)  # some of it may be in a router's claim already
    counts = [one + alone for one, alone in zip(pairs, pairs, strict=True)]
    return Fleet(
        workers=tuple(workers),
        routers=sum(
            lease is not None and name.startswith("router-") for name, lease in zip(holders, leases, strict=True)
        ),
        waiting=messages + min(extra, messages * (topology.MOST_BUNDLED - 1)),
        again=sum(lengths[first : first + len(again)]),
        parked={kernel: count for kernel, count in zip(parked, counts, strict=False) if count},
        queued=dict(zip(queues, counts[len(parked) :], strict=True)),
        scheduled=scheduled,
        dead=dead,
    )


# -- the ingest -------------------------------------------------------------------------------------------------------


def _ingest(url: str) -> dict[str, Any]:
    import httpx

    from lepton_ai.client import Client

    try:
        response = httpx.get(f"{url.rstrip('/')}/readyz", timeout=_ANSWER_S)
        found: dict[str, Any] = {"http_status": response.status_code, "http_error": None}
        if response.is_success:
            with suppress(LeptonError, msgspec.MsgspecError), Client(url) as client:
                found["remote_fleet"] = Fleet(workers=tuple(client.devices()))
                found["remote_accounts"] = client.accounts()
        elif "json" in response.headers.get("content-type", ""):
            with suppress(ValueError):
                found["http_error"] = json.loads(response.content).get("detail")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
        return {"http_error": str(error) or type(error).__name__}
    return found
