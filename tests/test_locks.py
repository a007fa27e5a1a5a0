"""The locks: every file hashed, no address in them, and in step with pyproject.toml and with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RUN = "requirements.lock"
DEV = "requirements-dev.lock"
BENCH = "requirements-bench.lock"

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[str | dict[str, str]]] = PROJECT["dependency-groups"]


def entries(lock: str) -> list[str]:
    """The requirements of a lock with their hashes, one a string."""
    return (ROOT / lock).read_text().replace("\\\n", " ").splitlines()


def pins(lock: str) -> dict[str, set[str]]:
    """The versions that a lock has of each name: two, where one does not run on every Python that we support."""
    found: dict[str, set[str]] = {}
    for entry in entries(lock):
        requirement = Requirement(entry.split("--hash", 1)[0])
        versions = [part.version for part in requirement.specifier]
        found.setdefault(canonicalize_name(requirement.name), set()).update(versions)
    return found


def wanted_by_run() -> list[Requirement]:
    lines = [*PROJECT["project"]["dependencies"], *GROUPS["build"]]
    for extra in Requirement(EXTRAS["all"][0]).extras:
        lines += EXTRAS[extra]
    return [Requirement(line) for line in lines]


def wanted_by_dev() -> list[Requirement]:
    lines = [line for line in GROUPS["dev"] if isinstance(line, str)] + EXTRAS["backfill"]
    return wanted_by_run() + [Requirement(line) for line in lines]


def wanted_by_bench() -> list[Requirement]:
    return wanted_by_dev() + [Requirement(line) for line in GROUPS["bench"] if isinstance(line, str)]


@pytest.mark.parametrize("lock", [RUN, DEV, BENCH])
def test_a_lock_names_no_address(lock: str) -> None:
    assert "://" not in (ROOT / lock).read_text()


@pytest.mark.parametrize("lock", [RUN, DEV, BENCH])
def test_every_requirement_is_pinned_and_hashed(lock: str) -> None:
    pattern = re.compile(r"[a-z0-9][a-z0-9-]*==[^ ;]+( ; [^\\]+?)?( +--hash=sha256:[0-9a-f]{64})+")
    assert entries(lock)
    assert [entry for entry in entries(lock) if not pattern.fullmatch(entry.strip())] == []


@pytest.mark.parametrize(
    ("lock", "wanted"), [(RUN, wanted_by_run()), (DEV, wanted_by_dev()), (BENCH, wanted_by_bench())]
)
def test_a_lock_has_what_the_project_names_in_a_version_that_it_allows(lock: str, wanted: list[Requirement]) -> None:
    locked = pins(lock)
    assert [str(one) for one in wanted if canonicalize_name(one.name) not in locked] == []
    for one in wanted:
        for version in locked[canonicalize_name(one.name)]:
            assert one.specifier.contains(version, prereleases=True), f"{one} is {version} in {lock}"


@pytest.mark.parametrize(("small", "large"), [(RUN, DEV), (DEV, BENCH)])
def test_a_lock_holds_the_one_before_it(small: str, large: str) -> None:
    held, holds = pins(small), pins(large)
    assert {name: holds.get(name) for name in held} == held


def test_the_run_lock_carries_no_tool_of_the_tests() -> None:
    tools = {"hypothesis", "import-linter", "mypy", "pyarrow", "pytest", "ruff", "schemathesis"}
    assert tools.isdisjoint(pins(RUN))


def test_only_the_bench_lock_carries_other_job_queues() -> None:
    assert {"dramatiq", "huey", "ray", "taskiq"}.isdisjoint(pins(DEV))
