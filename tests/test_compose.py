"""The container files, as far as they can be judged where no Docker engine is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"


def run_linter(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (it comes with requirements-dev.lock)")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)


def test_the_compose_file_fits_the_specification() -> None:
    run = run_linter("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert run.returncode == 0, run.stdout + run.stderr


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    run = run_linter("hadolint", "--no-color", ROOT / "Dockerfile")
    assert run.stdout + run.stderr == ""
    assert run.returncode == 0


def test_the_image_runs_as_nobody_in_particular_and_installs_from_the_lock() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "USER 10001" in lines
    assert "RUN pip install --require-hashes --requirement requirements.lock" in lines


def test_no_port_is_published_beyond_the_loopback_address() -> None:
    ports = [line for line in COMPOSE.read_text().splitlines() if "ports:" in line]
    assert ports
    assert [line for line in ports if '["127.0.0.1:' not in line] == []


def test_there_is_no_default_password() -> None:
    text = COMPOSE.read_text()
    assert "VALKEY_PASSWORD:?" in text
    assert "VALKEY_PASSWORD:-" not in text
