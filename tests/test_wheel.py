"""What the people who install `lepton-ai` get: one import name, the services as data, and no Celery unless asked."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_nothing_lands_at_the_top_of_site_packages_but_lepton_ai(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/", 1)[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lepton_ai"}
    assert len(top) == 2


@pytest.mark.parametrize("service", ["pipeline", "queues", "tasks"])
def test_every_file_of_a_service_travels_inside(wheel: zipfile.ZipFile, service: str) -> None:
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / service).rglob("*") if path.is_file()}
    packed = {name.removeprefix("lepton_ai/_services/") for name in wheel.namelist()}
    assert ours
    assert {name for name in ours if "__pycache__" not in name} <= packed


def test_the_types_are_announced(wheel: zipfile.ZipFile) -> None:
    assert "lepton_ai/py.typed" in wheel.namelist()


def test_no_bytecode_and_no_tests_are_packed(wheel: zipfile.ZipFile) -> None:
    # The example of a package has tests of its own, which show how one is tested.
    ours = [name for name in wheel.namelist() if "/examples/own_kernels/" not in name]
    assert [name for name in ours if "tests/" in name or "/test_" in name] == []
    assert [name for name in wheel.namelist() if "__pycache__" in name] == []


def test_the_command_and_the_licence_come_along(wheel: zipfile.ZipFile) -> None:
    (dist_info,) = {name.split("/", 1)[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "lepton = lepton_ai.cli:main" in wheel.read(f"{dist_info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{dist_info}/licenses/LICENSE").decode()


def test_a_producer_installs_no_celery_and_no_compiler(wheel: zipfile.ZipFile) -> None:
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    requires = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist") or []
    plain = [line for line in requires if "extra ==" not in line]
    assert plain
    assert [line for line in plain if line.startswith(("celery", "kombu", "litestar", "numba", "structlog"))] == []
