"""Every bench in small: that it runs, checks results, and says what it is to. All are held on one fleet."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.contest import KERNELS, Arena, arena

ROOT = Path(__file__).parents[2]
#: What the dev lock has, and one that nobody has.
NAMES = ("lepton", "lepton_flower", "celery_two_hop", "raw_redis", "nobody")
pytestmark = pytest.mark.slow

Report = Callable[..., Any]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """A fleet and contenders, for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEPTON_KERNELS", KERNELS)
        patch.setenv("LEPTON_BODY_LIMIT_BYTES", str(2**26))
        with arena(NAMES, 2, tmp_path_factory.mktemp("arena")) as found:
            yield found


@pytest.fixture
def report(held: Arena, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """What a bench says in JSON when it is held there; its tables are drawn too."""

    def told(name: str, *arguments: str) -> Any:
        bench = importlib.import_module(f"bench.{name}")
        monkeypatch.setattr(bench, "arena", lambda *_, **__: nullcontext(held), raising=False)
        monkeypatch.setattr(bench, "run_fleet", lambda *_, **__: nullcontext(held.fleet), raising=False)
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--json", *arguments])
        assert bench.main() == 0
        found = json.loads(capsys.readouterr().out)
        with Path(os.devnull).open("w") as nowhere:
            for table in bench._tables(found):
                Console(file=nowhere).print(table)
        return found

    return told


def test_throughput_compares_lepton_with_its_peers_and_the_floor(report: Report) -> None:
    found = report("throughput", "--noop")
    assert {"ratio_two_hop", "ratio_best_peer", "share_of_floor", "share_with_flower"} <= found.keys()
    for name in ("lepton", "celery_two_hop", "raw_redis"):
        assert found[name]["jobs_per_s"] > 0
        assert {"client", "broker"} < found[name]["cpu_us_per_job_by_process"].keys()
        assert found[name]["settings"]
    assert found["lepton"]["cpu_us_per_job_by_process"].keys() == {
        "client", "router", "worker", "broker", "telemetry", "ingest",
    }  # fmt: skip
    assert found["lepton"]["conservation_difference"] == 0
    assert found["lepton"]["placements_recorded"] == found["lepton"]["placements_looked_at"] > 0
    assert found["lepton_flower"]["celery_events_heard"] > 0
    assert found["nobody"] == {"missing": "bench.peers.nobody is not installed"}


@pytest.fixture
def few(held: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Lepton and the floor are left."""
    monkeypatch.setattr(held, "contenders", {name: held.contenders[name] for name in ("lepton", "raw_redis")})


@pytest.mark.usefixtures("few")
def test_kernels_that_compute_are_compared_too(report: Report) -> None:
    (figures,) = report("throughput")["kernels"].values()
    assert figures["lepton"]["jobs_per_s"] > 0
    assert figures["share_of_floor"] > 0


def test_latency_is_that_of_one_job_in_flight(report: Report) -> None:
    found = report("latency")
    for name in ("lepton", "celery_two_hop", "raw_redis"):
        assert 0 < found[name]["p50_ms"] <= found[name]["p99_ms"]
    assert found["ratio_floor"] > 0
    assert found["nobody"]["missing"]


@pytest.mark.usefixtures("few")
def test_efficiency_is_the_share_of_the_cores_that_kernels_compute_on(report: Report) -> None:
    found = report("efficiency")
    shares = {row["peer"]: row["kernel_cpu_share"] for row in found["rows"] if "missing" not in row}
    assert shares.keys() == {"lepton", "raw_redis"}
    assert all(0 < share <= 1.2 for share in shares.values())
    assert {row["kernel_ms"] for row in found["rows"] if "missing" not in row} == {1.0}


def test_http_counts_what_the_ingest_accepts_beside_an_echo(report: Report) -> None:
    found = report("http")
    rows = {(row["form"], row["peer"]): row["jobs_per_s"] for row in found["rows"]}
    assert rows.keys() == {(form, peer) for form in ("single", "list", "ndjson") for peer in ("lepton", "echo")}
    assert min(rows.values()) > 0
    assert found["conservation_difference"] == 0


@pytest.mark.usefixtures("few")
def test_payload_carries_large_arrays(report: Report) -> None:
    found = report("payload")
    rows = {(row["peer"], row["bytes"]): row for row in found["rows"] if "missing" not in row}
    for peer in ("lepton", "raw_redis", "memcpy"):
        for size in (2**20, 2**24):
            assert rows[peer, size]["mb_per_s"] > 0
            assert rows[peer, size]["p50_ms"] > 0


def test_scale_tells_what_a_job_costs_at_each_depth() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench", "scale", "--quick", "--json"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert [row["depth"] for row in found["rows"]] == [1000, 5000]
    for row in found["rows"]:
        assert row["us_per_job"] > 0
        assert row["broker_bytes_per_job"] > 256
        assert row["router_rss_mb"] > 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_process_behind() -> None:
    mark = f"TEST_MARK={uuid.uuid4()}"
    contenders = [argument for name in ("celery_two_hop", "raw_redis") for argument in ("--only", name)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "throughput", "--noop", "--seconds", "0.3", *contenders],
        cwd=ROOT,
        env=os.environ | dict([mark.split("=")]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "round 1" in line:
                break
        assert len(marked(mark)) > 5
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        deadline = time.monotonic() + 10
        while left := marked(mark):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def marked(mark: str) -> list[str]:
    """The command lines of all processes with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or is not ours
            continue
    return found
