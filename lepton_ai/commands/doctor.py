"""What `lepton doctor` makes of the facts: each check is a function from Facts to Findings that asks nobody."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from shlex import quote
from typing import Final, Literal

import msgspec

from lepton_ai.commands.facts import Facts, Requirement

__all__ = ["CHECKS", "Finding", "examine"]


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was looked at. `problem`: it will not work; `warning`: it will hurt; `absent`: it is not there."""

    check: str
    status: Literal["ok", "warning", "problem", "absent"]
    text: str
    fix: str = ""


Check = Callable[[Facts], Iterator[Finding]]

#: What an extra is for.
_FOR: Final = {
    "cli": "this command line",
    "broker": "an embedded broker",
    "worker": "workers on this machine",
    "services": "router, ingest and telemetry on this machine",
    "fpga": "OpenCL devices",
    "tpu": "JAX, for TPUs",
    "flower": "Flower",
    "backfill": "backfills",
}
_OLDEST: Final = {"Valkey": (8,), "Redis": (7, 0)}
#: By branch, the first release with the fixes of the last round of advisories by which an authenticated client may run
#: code. A branch that is older than the newest here and missing ended before that round.
_SECURE: Final[dict[str, dict[tuple[int, ...], int]]] = {
    # CVE-2026-23479, CVE-2026-25243, CVE-2026-23631 (May 2026; github.com/redis/docs/pull/3292). The October 2025 round
    # (CVE-2025-49844) came before: 7.2.11, 7.4.6, 8.0.4, 8.2.2.
    "Redis": {(7, 2): 14, (7, 4): 9, (8, 2): 6, (8, 4): 3, (8, 6): 3},
    # CVE-2026-56684, CVE-2026-63639 (21 July 2026; github.com/valkey-io/valkey/releases/tag/9.1.1 and its siblings),
    # which hold those above too.
    "Valkey": {(8, 0): 10, (8, 1): 9, (9, 0): 5, (9, 1): 1},
}
_ADVISORIES: Final = {
    "Redis": "CVE-2026-23479, CVE-2026-25243, CVE-2026-23631",
    "Valkey": "CVE-2026-56684, CVE-2026-63639",
}
_SLOW_PING_S: Final = 0.005
_UP = "`lepton up` starts everything on this machine"


def examine(facts: Facts) -> list[Finding]:
    """Every finding, in the order of the checks."""
    return [finding for check in CHECKS for finding in check(facts)]


# -- this machine -----------------------------------------------------------------------------------------------------


def _python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if facts.python < (3, 11):
        yield Finding("python", "problem", f"Python {version}", "Lepton needs Python 3.11 or newer")
    else:
        yield Finding("python", "ok", f"Python {version} on {facts.platform}")


def _lepton(facts: Facts) -> Iterator[Finding]:
    where = f"services from {'the checkout' if facts.from_checkout else 'the wheel'}, {facts.services}"
    if not facts.services_found:
        text = f"lepton-ai {facts.lepton or ''}: the services are not at {facts.services}"
        yield Finding("lepton", "problem", text, f"install it again: {_install(facts)} --force-reinstall --no-deps")
    elif facts.lepton is None:
        yield Finding("lepton", "warning", f"not installed; {where}", _install(facts))
    else:
        yield Finding("lepton", "ok", f"lepton-ai {facts.lepton}; {where}")


def _packages(facts: Facts) -> Iterator[Finding]:
    for extra, group in groupby(sorted(facts.requirements, key=lambda each: each.extra), lambda each: each.extra):
        yield _extra(facts, extra, list(group))


def _install(facts: Facts, extra: str = "") -> str:
    """The command that brings Lepton, with an extra: it is in no registry, so from the checkout or from a wheel."""
    wanted = f"[{extra}]" if extra else ""
    if facts.from_checkout:
        return f"{quote(facts.executable)} -m pip install -e {quote(facts.services + wanted)}"
    wheel = f"lepton_ai-{facts.lepton or 'VERSION'}-py3-none-any.whl{wanted}"
    return f"{quote(facts.executable)} -m pip install {quote('./' + wheel)}"


def _extra(facts: Facts, extra: str, asked: list[Requirement]) -> Finding:
    check = f"extra {extra}" if extra else "packages"
    missing = [each.name for each in asked if each.installed is None and each.everywhere]
    unfit = [
        f"{each.name} {each.installed} (needs {each.limits})"
        for each in asked
        if each.installed is not None and not _fits(each.installed, each.limits)
    ]
    fix = _install(facts, extra)
    purpose = f", for {_FOR[extra]}" if extra in _FOR else ""
    if unfit:
        return Finding(check, "problem", f"of another version than Lepton needs: {', '.join(unfit)}", fix)
    if missing:
        return Finding(check, "absent" if extra else "problem", f"missing: {', '.join(missing)}{purpose}", fix)
    there = ", ".join(f"{each.name} {each.installed}" for each in asked if each.installed is not None)
    return Finding(check, "ok", f"{there}{purpose}")


def _settings(facts: Facts) -> Iterator[Finding]:
    for error in facts.settings_errors:
        yield Finding("settings", "problem", error, "unset it or set it right; every service refuses to start with it")
    listed = ", ".join(f"{name}={value}" for name, value in facts.settings.items())
    if not facts.settings_errors:
        yield Finding("settings", "ok", listed or "no LEPTON_ variable is set: the defaults hold")
    elif listed:
        yield Finding("settings", "ok", f"set: {listed}")


def _embedded(facts: Facts) -> Iterator[Finding]:
    if facts.embedded is not None:
        yield Finding("embedded broker", "ok", f"would run {facts.embedded}")
    else:
        text = facts.embedded_error or "no server program"
        fix = f"{_install(facts, 'broker')}, or LEPTON_REDIS_SERVER=PATH"
        yield Finding("embedded broker", "absent", text, fix)


def _accelerators(facts: Facts) -> Iterator[Finding]:
    if facts.accelerators is None:
        told = facts.accelerators_error or "not looked for"
        fix = _install(facts, "worker") if re.search(r"No module named '(?!tasks)", told) else ""
        yield Finding("accelerators", "absent", told, fix)
    for each in facts.accelerators or ():
        what = each.what or each.kind
        text = f"{what} (emulated)" if each.emulated and "emulated" not in what else what
        yield Finding(each.kind, "ok" if each.available else "absent", text, each.fix or "")


# -- the broker -------------------------------------------------------------------------------------------------------


def _broker(facts: Facts) -> Iterator[Finding]:
    if facts.url is None:
        yield Finding("broker", "absent", "LEPTON_REDIS_URL is not set: `lepton up` would bring its own")
    elif facts.server is None:
        fix = "start it, or name another with --url or LEPTON_REDIS_URL"
        if re.search(r"auth|password|WRONGPASS|NOPERM", facts.server_error or "", re.IGNORECASE):
            fix = "put user and password into the URL: redis://user:password@host:6379/0"
        yield Finding("broker", "problem", f"{facts.url} does not answer: {facts.server_error}", fix)
    else:
        source = f" (of a `lepton up`, by {facts.url_from})" if facts.url_from else ""
        yield _version(facts.server.name, facts.server.version, f"{facts.url}{source}")


def _version(name: str, version: str, url: str) -> Finding:
    what = f"{name} {version} at {url}"
    number = _numbers(version)
    if number < _OLDEST[name]:
        return Finding("broker", "problem", what, "Lepton needs Valkey 8 or newer, or Redis 7.0 or newer")
    branches = _SECURE[name]
    newest = max(branches)
    floor = branches.get(number[:2])
    if floor is None and number[:2] > newest:
        return Finding("broker", "ok", what)
    if floor is None or number < (*number[:2], floor):
        branch = number[:2] if floor is not None else newest
        wanted = f"{branch[0]}.{branch[1]}.{branches[branch]}"
        text = f"{what} lacks the fixes of {_ADVISORIES[name]}, unless its packager has backported them"
        return Finding("broker", "warning", text, f"upgrade to {name} {wanted} or newer")
    return Finding("broker", "ok", what)


def _serving(facts: Facts) -> Iterator[Finding]:
    server = facts.server
    if server is None:
        return
    if server.cluster:
        fix = "Lepton moves messages between keys of many slots: use one server without cluster-enabled"
        yield Finding("broker", "problem", "it is a Redis Cluster", fix)
    if server.role not in ("master", "primary"):
        yield Finding("broker", "problem", f"it is a {server.role}, which takes no writes", "name its primary")
    if server.ping_s > _SLOW_PING_S:
        text = f"PING takes {server.ping_s * 1e3:.1f} ms (median), and every move of a job pays it"
        yield Finding("latency", "warning", text, "run routers and workers near the broker")
    else:
        yield Finding("latency", "ok", f"PING takes {server.ping_s * 1e3:.2f} ms (median)")
    if server.libraries:
        yield Finding("functions", "ok", ", ".join(server.libraries))
    elif server.libraries is not None:
        yield Finding("functions", "absent", "none yet: the first router or worker loads them")


def _durability(facts: Facts) -> Iterator[Finding]:
    if facts.server is None:
        return
    if facts.server.appendonly is None:
        yield Finding("durability", "warning", "the broker does not tell whether it has an append-only file")
    elif facts.server.appendonly != "yes":
        fix = "appendonly yes, appendfsync everysec (or always)"
        yield Finding("durability", "warning", "no append-only file: a restart of the broker loses jobs", fix)
    elif facts.server.appendfsync == "no":
        text = "appendfsync no: the system decides when jobs reach the disk"
        yield Finding("durability", "warning", text, "appendfsync everysec (or always)")
    elif facts.settings.get("LEPTON_DURABILITY") == "fsync" and facts.server.appendfsync != "always":
        policy = facts.server.appendfsync
        text = f"appendfsync {policy}, and LEPTON_DURABILITY is fsync: each acceptance waits for the disk"
        yield Finding("durability", "warning", text, "appendfsync always, which is quicker")
    else:
        yield Finding("durability", "ok", f"append-only file, appendfsync {facts.server.appendfsync}")


def _memory(facts: Facts) -> Iterator[Finding]:
    server = facts.server
    if server is None:
        return
    if server.maxmemory_policy is None:
        yield Finding("memory", "warning", "the broker does not tell its maxmemory-policy", "it must be noeviction")
        return
    used = f"{server.used_memory / 2**20:,.0f} MiB used"
    limit = f"of {server.maxmemory / 2**20:,.0f} MiB" if server.maxmemory else "and no limit (maxmemory 0)"
    if server.maxmemory_policy != "noeviction":
        text = f"maxmemory-policy {server.maxmemory_policy}: a full broker would throw jobs away ({used} {limit})"
        status: Literal["problem", "warning"] = "problem" if server.maxmemory else "warning"
        yield Finding("memory", status, text, "maxmemory-policy noeviction")
    elif server.maxmemory and server.used_memory > 0.9 * server.maxmemory:
        yield Finding("memory", "warning", f"{used} {limit}: soon no job is taken", "a larger maxmemory")
    else:
        yield Finding("memory", "ok", f"{used} {limit}, noeviction")


# -- the fleet --------------------------------------------------------------------------------------------------------


def _alive(facts: Facts) -> Iterator[Finding]:
    fleet = facts.fleet
    if fleet is None:
        return
    if fleet.routers == 0:
        idle = not fleet.workers and not fleet.waiting and not fleet.again
        behind = fleet.waiting + fleet.again
        text = "none is alive" if idle else f"none is alive, and jobs that wait for one: {behind}"
        yield Finding("routers", "absent" if idle else "problem", text, f"`lepton serve router`; {_UP}")
    elif fleet.routers is not None:
        yield Finding("routers", "ok", f"{fleet.routers} alive")
    if not fleet.workers:
        fix = f"celery -A tasks.worker worker -Q lepton.cpu -P threads; {_UP}"
        yield Finding("workers", "warning" if fleet.routers else "absent", "none is alive", fix)
    for each in fleet.workers:
        emulated = ", emulated" if each.emulated else ""
        text = (
            f"{each.worker} on {each.device}{emulated}: "
            f"{_counted(each.slots, 'slot')}, {_counted(len(each.kernels), 'kernel')}"
        )
        yield Finding("worker", "ok", text)
        for name, reason in each.refused.items():
            text = f"{each.worker} refuses {name}: {reason}"
            yield Finding("kernel", "warning", text, "mend it, and start the worker anew")
        for name, reason in each.quarantined.items():
            text = f"{each.worker} may not run {name}: {reason}"
            fix = f"once it is mended: lepton quarantine --clear {name} {each.device}"
            yield Finding("quarantine", "warning", text, fix)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _queues(facts: Facts) -> Iterator[Finding]:
    fleet = facts.fleet
    if fleet is None or fleet.routers is None:
        return
    parts = [f"{fleet.waiting} wait for a router"]
    parts += [f"{count} for {device}" for device, count in fleet.queued.items()]
    if fleet.again:
        parts.append(f"{fleet.again} to be placed again")
    terms = facts.accounts.terms if facts.accounts is not None else {}
    if with_routers := terms.get("claimed", 0) + terms.get("reclaimed", 0):
        parts.append(f"{with_routers} in the routers' windows")
    if in_bundles := terms.get("bundled", 0):
        parts.append(f"{in_bundles} more that share messages with those for devices")
    if fleet.scheduled:
        parts.append(f"{fleet.scheduled} wait for their time")
    yield Finding("queues", "ok", ", ".join(parts))
    orphans = {device for device, count in fleet.queued.items() if count} - {each.device for each in fleet.workers}
    if orphans and not fleet.routers:
        text = f"jobs wait for {', '.join(sorted(orphans))}, which nobody serves"
        yield Finding("queues", "problem", text, "start a worker there, or a router, which takes them back")
    if fleet.parked:
        text = ", ".join(f"{count} of {kernel}" for kernel, count in fleet.parked.items())
        fix = "start a worker that announces the kernel, or cancel them; `lepton why ID` says what each waits for"
        yield Finding("parked", "warning", f"jobs that no live device can run: {text}", fix)
    if fleet.dead:
        text = f"{_counted(fleet.dead, 'job')} that were given up"
        yield Finding("dead", "warning", text, "`lepton dead list`; `lepton dead replay` runs them once more")


def _conservation(facts: Facts) -> Iterator[Finding]:
    accounts = facts.accounts
    if accounts is None:
        return
    terms = ", ".join(f"{name} {count:,}" for name, count in accounts.terms.items())
    text = f"{accounts.equation()} ({terms})"
    if accounts.difference:
        fix = "keep the logs and the broker's data: something but Lepton changes its keys, or Lepton has a defect"
        yield Finding("conservation", "problem", text, fix)
    else:
        yield Finding("conservation", "ok", text)


def _ingest(facts: Facts) -> Iterator[Finding]:
    if facts.http_status == 200:
        yield Finding("ingest", "ok", f"{facts.http_url} is ready")
    elif facts.http_status is not None:
        text = f"{facts.http_url} answers /readyz with {facts.http_status}: {facts.http_error or 'not ready'}"
        fix = (
            "see the broker above"
            if facts.http_status == 503
            else "is that another service? name the ingest with --url"
        )
        yield Finding("ingest", "problem" if facts.http_named or facts.http_status == 503 else "warning", text, fix)
    else:
        text = f"nothing answers at {facts.http_url} ({facts.http_error})"
        yield Finding("ingest", "problem" if facts.http_named else "absent", text, _UP)


CHECKS: Final[tuple[Check, ...]] = (
    _python,
    _lepton,
    _packages,
    _settings,
    _embedded,
    _accelerators,
    _broker,
    _serving,
    _durability,
    _memory,
    _alive,
    _queues,
    _conservation,
    _ingest,
)


# -- versions ---------------------------------------------------------------------------------------------------------


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `9.1.2.post2` -> (9, 1, 2)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _fits(version: str, limits: str) -> bool:
    """Whether a version is within limits such as `>=5.7,<5.8`; what is neither >= nor < is not looked at."""
    number = _numbers(version)
    for limit in limits.split(","):
        bound = _numbers(limit.strip().lstrip("<>="))
        if (limit.strip().startswith(">=") and number < bound) or (
            re.match(r"<(?!=)", limit.strip()) and number >= bound
        ):
            return False
    return True
