"""Jobs a second that the ingest accepts: single POSTs on many connections, lists, and NDJSON, beside a bare ASGI echo.

`./lepton bench http [--quick] [--rounds N] [--seconds S] [--json]`. The echo (bench/echo.py) stands on the same server,
reads the same requests, and answers 202 with what it was sent. The ingest's jobs are worked off at the same time, on
the same cores; then the turn waits until all have ended, and none is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec
from rich.table import Table

from bench import cpu, report
from bench.contest import KERNELS, median_and_range, rotated, say
from bench.load import NOOP
from lepton_ai import Client
from lepton_ai.settings import Settings
from pipeline.processes import Program, environment, start
from pipeline.supervisor import free_port, run_fleet

_HEADERS_END = b"\r\n\r\n"
_LIMIT_S = 120.0


class Form(NamedTuple):
    """One way of sending jobs."""

    name: str
    connections: int
    jobs: int
    """Of one request."""
    content_type: str


FORMS = (
    Form("single", 64, 1, "application/json"),
    Form("list", 4, 100, "application/json"),
    Form("ndjson", 4, 1000, "application/x-ndjson"),
)


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn (default: %(default)s)")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["LEPTON_KERNELS"] = KERNELS
    rounds, seconds = (1, 0.2) if options.quick else (options.rounds, options.seconds)
    with (
        tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder,
        run_fleet(Settings.read(), {"cpu": 1}, say) as fleet,
        _echo(Path(folder)) as (echo_url, echo_pid),
        Client(fleet.broker_url) as client,
    ):
        ours = {name.removesuffix("-cpu"): [process.pid] for name, process in fleet.processes.items()}
        ours |= {"broker": [int(client_broker(fleet.broker_url))]}
        peers = {"lepton": (fleet.http_url, ours), "echo": (echo_url, {"echo": [echo_pid]})}
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for form in FORMS:
            for number, name in rotated(list(peers), rounds):
                url, roles = peers[name]
                _turn(client, url, form, roles, min(0.3, seconds))
                turn = _turn(client, url, form, roles, seconds)
                say(f"{form.name}, round {number + 1}/{rounds}: {name} {turn['jobs_per_s']:,.0f} jobs/s")
                found.setdefault((name, form.name), []).append(turn)
        difference = client.accounts().difference
    rows = [_row(name, form, own) for (name, form), own in found.items()]
    for form in FORMS:
        one, other = (next(row for row in rows if row["peer"] == name and row["form"] == form.name) for name in peers)
        one["share_of_echo"] = round(one["jobs_per_s"] / other["jobs_per_s"], 3)
    if difference:
        raise ValueError(f"{difference} jobs are unaccounted for")
    return {"rows": rows, "conservation_difference": difference}


def client_broker(url: str) -> int:
    """The process of the broker."""
    import redis

    found: Any = redis.Redis.from_url(url).info("server")
    return int(found["process_id"])


@contextmanager
def _echo(folder: Path) -> Iterator[tuple[str, int]]:
    port = free_port()
    with (folder / "echo").open("wb") as log:
        process = start(Program("echo", ("-m", "bench.echo", str(port)), environment({})), log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while not _answers(url):
            if time.monotonic() > deadline or process.poll() is not None:
                raise TimeoutError(f"the echo did not start:\n{(folder / 'echo').read_text()}")
            time.sleep(0.05)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.post(url, content=b"{}").status_code == 202
    except httpx.HTTPError:
        return False


def _turn(client: Client, url: str, form: Form, roles: cpu.Roles, seconds: float) -> dict[str, Any]:
    roles = {"client": [os.getpid()], **roles}
    accepted, before = client.accounts().accepted, cpu.used_s(roles)
    jobs, took = asyncio.run(_load(url, form, seconds))
    began = time.perf_counter()
    while (now := client.accounts()).waiting or now.in_flight:
        if time.perf_counter() > began + _LIMIT_S:
            raise TimeoutError(f"{now.equation()}: not worked off within {_LIMIT_S:.0f} s")
        time.sleep(0.02)
    drained = took + time.perf_counter() - began
    after = cpu.used_s(roles)
    if "ingest" in roles and now.accepted - accepted != jobs:
        raise ValueError(f"{jobs} jobs were acknowledged and {now.accepted - accepted} accepted")
    return {
        "jobs_per_s": jobs / took,
        "ended_per_s": jobs / drained,
        "cpu_us_per_job_by_process": {role: (after[role] - before[role]) / jobs * 1e6 for role in roles},
    }


def _request(url: str, form: Form) -> bytes:
    row = {**NOOP.rows(1)[0]}
    row["data"] = {"dtype": "|u1", "shape": [len(row["data"])], "data": base64.b64encode(row["data"]).decode()}
    job = msgspec.json.encode({"kernel": NOOP.kernel, "arguments": row})
    body = job
    if form.name == "list":
        body = b"[" + b",".join([job] * form.jobs) + b"]"
    elif form.name == "ndjson":
        body = b"\n".join([job] * form.jobs)
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-type: {form.content_type}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _load(url: str, form: Form, seconds: float) -> tuple[int, float]:
    """How many jobs were acknowledged, and in how many seconds, by connections that each wait for their answer."""
    request = _request(url, form)
    began = time.perf_counter()
    until = began + seconds
    counts = await asyncio.gather(*(_connection(url, request, until) for _ in range(form.connections)))
    return sum(counts) * form.jobs, time.perf_counter() - began


async def _connection(url: str, request: bytes, until: float) -> int:
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port, limit=1 << 24)
    count = 0
    try:
        while time.perf_counter() < until:
            writer.write(request)
            await writer.drain()
            head = (await reader.readuntil(_HEADERS_END)).lower()
            if b" 202 " not in head[:16]:
                raise ValueError(f"{url} answered {head[:200]!r}")
            length = head.partition(b"content-length:")[2].partition(b"\r")[0]
            await reader.readexactly(int(length))
            count += 1
    finally:
        writer.close()
    return count


def _row(name: str, form: str, own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rates = median_and_range([each["jobs_per_s"] for each in own], 1)
    parts = {
        role: round(statistics.median(each["cpu_us_per_job_by_process"][role] for each in own), 1)
        for role in own[0]["cpu_us_per_job_by_process"]
    }
    return {
        "peer": name,
        "form": form,
        "jobs_per_s": rates["median"],
        "jobs_per_s_range": rates["range"],
        "ended_per_s": round(statistics.median(each["ended_per_s"] for each in own), 1) if name == "lepton" else None,
        "cpu_us_per_job": round(sum(parts.values()), 1),
        "cpu_us_per_job_by_process": parts,
    }


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    keys = ("form", "peer", "jobs_per_s", "jobs_per_s_range", "ended_per_s", "cpu_us_per_job", "share_of_echo")
    rows = [[row.get(key) for key in keys] for row in found["rows"]]
    yield report.table("accepted over HTTP", ("", *keys[1:]), rows)
