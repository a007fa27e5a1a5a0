"""Every bench in small, with the peers that the dev lock has: that it runs, checks results, and says what it is to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def report(name: str, *arguments: str) -> Any:
    """What a bench says in JSON."""
    run = subprocess.run(
        [sys.executable, "-m", "bench", name, "--quick", "--json", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def only(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--only", name)]


def test_throughput_compares_lepton_with_its_peers_and_the_floor() -> None:
    found = report("throughput", "--noop", *only("lepton", "lepton_flower", "celery_two_hop", "raw_redis"))
    assert {"ratio_two_hop", "ratio_best_peer", "share_of_floor", "share_with_flower"} <= found.keys()
    for name in ("lepton", "celery_two_hop", "raw_redis"):
        assert found[name]["jobs_per_s"] > 0
        assert {"client", "broker"} < found[name]["cpu_us_per_job_by_process"].keys()
    assert found["lepton"]["cpu_us_per_job_by_process"].keys() == {
        "client", "router", "worker", "broker", "telemetry", "ingest",
    }  # fmt: skip
    assert found["lepton"]["conservation_difference"] == 0
    assert found["lepton"]["placements_recorded"] == found["lepton"]["placements_looked_at"] > 0
    assert found["lepton_flower"]["celery_events_heard"] > 0


def test_kernels_that_compute_are_compared_too() -> None:
    found = report("throughput", *only("lepton", "raw_redis"))
    (figures,) = found["kernels"].values()
    assert figures["lepton"]["jobs_per_s"] > 0
    assert figures["share_of_floor"] > 0


def test_latency_is_that_of_one_job_in_flight() -> None:
    found = report("latency", *only("lepton", "celery", "raw_redis"))
    for name in ("lepton", "celery", "raw_redis"):
        assert 0 < found[name]["p50_ms"] <= found[name]["p99_ms"]
    assert found["ratio_floor"] > 0


def test_efficiency_is_the_share_of_the_cores_that_kernels_compute_on() -> None:
    found = report("efficiency", *only("lepton"))
    assert [row["kernel_ms"] for row in found["rows"]] == [1.0, 10.0]
    assert all(0 < row["kernel_cpu_share"] <= 1.2 for row in found["rows"])


def test_scale_tells_what_a_job_costs_at_each_depth() -> None:
    found = report("scale", "--depth", "500", "--depth", "2000", "--jobs", "500")
    assert [row["depth"] for row in found["rows"]] == [500, 2000]
    for row in found["rows"]:
        assert row["us_per_job"] > 0
        assert row["broker_bytes_per_job"] > 256
        assert row["router_rss_mb"] > 10


def test_http_counts_what_the_ingest_accepts_beside_an_echo() -> None:
    found = report("http")
    rows = {(row["form"], row["peer"]): row["jobs_per_s"] for row in found["rows"]}
    assert rows.keys() == {(form, peer) for form in ("single", "list", "ndjson") for peer in ("lepton", "echo")}
    assert min(rows.values()) > 0
    assert found["conservation_difference"] == 0


def test_payload_carries_large_arrays() -> None:
    found = report("payload", *only("lepton", "raw_redis"))
    rows = {(row["peer"], row["bytes"]): row for row in found["rows"]}
    for peer in ("lepton", "raw_redis", "memcpy"):
        for size in (2**20, 2**24):
            assert rows[peer, size]["mb_per_s"] > 0
            assert rows[peer, size]["p50_ms"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_process_behind() -> None:
    mark = f"TEST_MARK={uuid.uuid4()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "throughput", "--noop", *only("lepton", "celery_two_hop", "raw_redis")],
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
