"""Each example does what its README says, run as a user would: as a program of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from lepton_ai import services
from pipeline.supervisor import Fleet
from queues.app import celery_addresses

EXAMPLES = services.root() / "examples"


def run(fleet: Fleet, program: Path, *arguments: str) -> str:
    broker, backend = celery_addresses(fleet.broker_url)
    own = {"LEPTON_REDIS_URL": fleet.broker_url, "BROKER_URL": broker, "RESULT_BACKEND": backend}
    ran = subprocess.run(
        [sys.executable, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | own,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_quickstart_prints_where_its_job_ran_and_why(fleet: Fleet) -> None:
    output = run(fleet, EXAMPLES / "quickstart.py")
    assert "succeeded" in output
    assert "ran on cpu." in output


def test_the_scheduler_s_example_places_and_explains_without_a_broker() -> None:
    program = EXAMPLES / "scheduler.py"
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=True)
    assert "'TaskA': {'resource': 'GPU', 'status': 'processing'}" in ran.stdout
    assert "TaskC: FPGA ends it first" in ran.stdout


def test_the_plain_celery_producer_gets_all_its_results(fleet: Fleet) -> None:
    summary = json.loads(run(fleet, EXAMPLES / "producer" / "tasks.py", "--count", "40").splitlines()[-1])
    assert (summary["submitted"], summary["succeeded"], summary["failed"]) == (40, 40, 0)


def test_the_producer_imports_nothing_of_ours(fleet: Fleet) -> None:
    program = "import sys, tasks; print([name for name in sys.modules if 'lepton' in name], tasks.__file__)"
    folder = EXAMPLES / "producer"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True)
    assert ran.stdout.startswith("[]")
    assert str(folder) in ran.stdout


def test_the_backfill_writes_a_row_of_parquet_for_each_row_it_priced(fleet: Fleet, tmp_path: Path) -> None:
    output = tmp_path / "options.parquet"
    said = run(fleet, EXAMPLES / "backfill" / "backfill.py", "--output", str(output))
    table = pq.read_table(output)
    assert said.startswith(f"{table.num_rows} rows")
    assert table.num_rows > 400
    assert all(call > 0 for row in table["call"].to_pylist() for call in row)


def test_the_workload_is_the_same_for_the_same_seed() -> None:
    printed = [
        subprocess.run([sys.executable, str(EXAMPLES / "workload.py")], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert printed[0].stdout == printed[1].stdout
    assert "medical.median_filter" in printed[0].stdout
