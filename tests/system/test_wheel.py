"""The wheel as a user has it: installed with everything into an empty venv, beside others' modules of our names."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL_S, DEMO_S = 600, 240
#: Top-level modules of other people, and of the producer in whose folder the commands are run.
NAMES = ("tasks", "queues", "pipeline")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(INSTALL_S + DEMO_S)]


def clean_environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("LEPTON_", "PYTHON"))}


def run(command: Sequence[str | Path], cwd: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(command), cwd=cwd, env=clean_environ(), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def build(folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    done = run(command, ROOT, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("lepton_ai-*.whl")
    return wheel


def foreign_wheel(folder: Path) -> Path:
    """Another distribution, which has packages called as our services are."""
    files = {f"{name}/__init__.py": f"OWNER = 'another distribution ({name})'\n" for name in NAMES}
    files |= {
        "another-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: another\nVersion: 1.0\n",
        "another-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(text.encode())}")
    files["another-1.0.dist-info/RECORD"] = "\n".join([*record, "another-1.0.dist-info/RECORD,,", ""])
    path = folder / "another-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def locked(folder: Path) -> Path:
    """The lock as constraints (without hashes: the wheel that is under test has none in it)."""
    found = re.findall(r"^[^\s#-][^\\\n]*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    path = folder / "constraints.txt"
    path.write_text("\n".join(line.strip() for line in found) + "\n")
    return path


class Installed:
    """A venv with the wheel and the foreign distribution in it, and a producer's own folder."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "a venv" / "bin" / "python"
        self.command = folder / "a venv" / "bin" / "lepton"
        self.home = folder / "a producer"
        self.home.mkdir()
        for name in NAMES:
            (self.home / f"{name}.py").write_text(f"OWNER = 'the producer ({name})'\n")

    def python_says(self, code: str, cwd: Path) -> str:
        done = run([self.python, "-c", code], cwd, 60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "a venv", with_pip=True)
    found = Installed(folder)
    pip = [found.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if run([*pip, "--dry-run", "--no-deps", "msgspec"], folder, 60).returncode:
        pytest.skip("no package index can be reached, so nothing can be installed into an empty venv")
    done = run([*pip, "--no-deps", "--no-index", foreign_wheel(folder)], folder, 60)
    assert done.returncode == 0, done.stderr
    wheel = build(folder)
    done = run([*pip, "--constraint", locked(folder), f"{wheel}[all]"], folder, INSTALL_S)
    assert done.returncode == 0, done.stderr
    return found


def test_what_was_installed_fits_together(installed: Installed) -> None:
    done = run([installed.python, "-m", "pip", "check"], installed.home, 60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_another_distributions_modules_are_untouched(installed: Installed, name: str, tmp_path: Path) -> None:
    said = installed.python_says(f"import lepton_ai, {name}; print({name}.OWNER)", tmp_path)
    assert said == f"another distribution ({name})"


@pytest.mark.parametrize("name", NAMES)
def test_a_producers_own_modules_are_untouched(installed: Installed, name: str) -> None:
    said = installed.python_says(f"import lepton_ai, {name}; print({name}.OWNER)", installed.home)
    assert said == f"the producer ({name})"


def test_the_demo_runs_in_the_producers_folder(installed: Installed) -> None:
    before = sorted(installed.home.iterdir())
    done = run([installed.command, "demo", "--jobs", "60", "--json"], installed.home, DEMO_S)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert (summary["submitted"], summary["succeeded"]) == (60, 60)
    assert sorted(installed.home.iterdir()) == before, "it leaves nothing behind"


def test_up_serves_in_the_producers_folder_and_drains(installed: Installed, tmp_path: Path) -> None:
    arguments = [
        "--data",
        str(tmp_path / "data"),
        "--http-port",
        str(free_port()),
        "--workers",
        "cpu:1",
        "--log",
        "json",
    ]
    process = subprocess.Popen(
        [installed.command, "up", *arguments],
        cwd=installed.home,
        env=clean_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        http = until_ready(process)
        job = ["submit", "linalg.matmul", "--arg", "a=[[1, 2]]", "--arg", "b=[[3], [4]]"]
        done = run([installed.command, *job, "--wait=60", "--json", "--url", http], installed.home, 90)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["result"] == {"c": [[11.0]]}
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout is not None
        process.stdout.close()


def until_ready(process: subprocess.Popen[str]) -> str:
    """The HTTP address, once everything is up."""
    http, lines = "", []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        told = json.loads(line)
        http = told.get("http", http)
        if told["event"] == "up_ready":
            return http
    raise AssertionError("".join(lines))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
