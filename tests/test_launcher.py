"""`./lepton` finds a Python, fills .venv once, hands over. Here with a stand-in for Python, so nothing is fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-bench.lock")

# Plays python, venv, pip and pytest. What it is asked to install goes to $INSTALLED; only the lock is real.
STAND_IN = f"""#!/bin/sh
case "$*" in
    *fcntl*) exec "{sys.executable}" "$@" ;;
    *realpath*) echo "$0" ;;
    *sys.version_info*) echo "${{VERSION-3.12.1}}" ;;
    *ensurepip*) exit "${{NO_ENSUREPIP-0}}" ;;
    *python_version*) echo 3.12.1 ;;
    *"-m venv"*)
        for folder; do :; done
        rm -rf "$folder"
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python"
        printf '%s\\n' '#!/bin/sh' 'echo "at=$PWD"' 'for one; do echo "argument=$one"; done' >"$folder/bin/lepton"
        chmod +x "$folder/bin/lepton"
        echo venv >>"$INSTALLED"
        ;;
    *"-m pip"*)
        sleep "${{SLOW-0}}"
        if [ -n "${{PIP_BREAKS-}}" ]; then echo "no matching distribution"; exit 1; fi
        for last; do :; done
        echo "${{last##*/}}" >>"$INSTALLED"
        ;;
    *"-m pytest"* | *"-m bench"*) echo "at=$PWD python=$*" ;;
esac
"""


class Checkout:
    """A copy of the launcher, with locks of no meaning, in a folder whose name has a space."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.root.mkdir()
        self.launcher = self.root / "lepton"
        shutil.copy(ROOT / "lepton", self.launcher)
        for name in (*LOCKS, "pyproject.toml"):
            (self.root / name).write_text(f"# {name}\n")
        self.log = folder / "installed"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for program in ("cat", "chmod", "cksum", "cp", "dirname", "mkdir", "readlink", "rm", "sh", "sleep"):
            found = shutil.which(program)
            assert found, program
            (self.bin / program).symlink_to(found)

    def add_python(self, name: str = "python3") -> Path:
        path = self.bin / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
        return path

    def start(
        self, *arguments: str, launcher: Path | None = None, cwd: Path | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [launcher or self.launcher, *arguments],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "INSTALLED": str(self.log), **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *arguments: str, launcher: Path | None = None, cwd: Path | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, launcher=launcher, cwd=cwd, **environ)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def installed(self) -> list[str]:
        """What was installed since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_an_old_python_is_refused_by_name(checkout: Checkout) -> None:
    checkout.add_python()
    run = checkout.run("demo", VERSION="3.9.2")
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer" in run.stderr
    assert "python3 is 3.9.2" in run.stderr
    assert not (checkout.root / ".venv").exists()


def test_no_python_at_all_is_said(checkout: Checkout) -> None:
    run = checkout.run("demo")
    assert run.returncode == 1
    assert "found: none" in run.stderr


def test_a_python_named_in_the_environment_is_the_only_one_tried(checkout: Checkout) -> None:
    checkout.add_python()
    run = checkout.run("demo", PYTHON="python9")
    assert run.returncode == 1
    assert "PYTHON=python9 is no Python" in run.stderr


def test_a_python_without_ensurepip_names_the_package_that_brings_it(checkout: Checkout) -> None:
    checkout.add_python()
    run = checkout.run("demo", NO_ENSUREPIP="1")
    assert run.returncode == 1
    assert "apt install python3-venv" in run.stderr


def test_a_program_that_is_no_python_is_passed_over(checkout: Checkout) -> None:
    broken = checkout.bin / "python3.14"
    broken.write_text("#!/bin/sh\necho 'python3.14: command not found' >&2\nexit 127\n")
    broken.chmod(0o755)
    checkout.add_python()
    assert checkout.run("demo").returncode == 0


def test_help_needs_no_python(checkout: Checkout) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        run = checkout.run(*arguments)
        assert run.returncode == 0
        assert "usage: ./lepton" in run.stdout


def test_the_usage_has_every_command_of_the_launcher(checkout: Checkout) -> None:
    usage = checkout.run().stdout
    assert all(
        f"\n  {command}" in usage for command in ("demo ", "serve SERVICE ", "test ", "check ", "bench NAME ", "help ")
    )


@pytest.mark.parametrize("command", [[], ["serve"]])
def test_help_is_the_help_of_the_program(checkout: Checkout, command: list[str]) -> None:
    checkout.add_python()
    run = checkout.run("help", *command)
    assert run.stdout.splitlines()[1:] == [f"argument={argument}" for argument in (*command, "--help")]


STEPS = ("ruff", "mypy", "lint-imports", "check-jsonschema", "hadolint")


@pytest.mark.parametrize(
    ("broken", "told"),
    [((), None), (("mypy",), "mypy"), (("ruff", "lint-imports"), "ruff check, ruff format --check, lint-imports")],
    ids=["none", "one", "several"],
)
def test_a_check_runs_every_step_and_names_those_that_failed(
    checkout: Checkout, broken: tuple[str, ...], told: str | None
) -> None:
    checkout.add_python()
    checkout.run("test")
    for step in STEPS:
        program = checkout.root / ".venv" / "bin" / step
        program.write_text(f"#!/bin/sh\nexit {int(step in broken)}\n")
        program.chmod(0o755)
    run = checkout.run("check")
    assert run.returncode == bool(broken)
    lines = run.stderr.splitlines()
    assert [line for line in lines if "failed" in line] == ([f"lepton: failed: {told}"] if told else [])
    assert lines[5].startswith("lepton: hadolint")


def test_the_first_start_installs_the_lock_and_the_second_nothing(checkout: Checkout) -> None:
    checkout.add_python()
    first = checkout.run("demo")
    assert first.stderr.count("\n") == 1
    assert checkout.installed() == ["venv", "requirements.lock", "a checkout"]
    assert checkout.run("demo").stderr == ""
    assert checkout.installed() == []


def test_arguments_and_the_current_folder_reach_the_program(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_python()
    run = checkout.run("submit", "two words", "--why", "", cwd=tmp_path)
    assert run.stdout.splitlines() == [
        f"at={tmp_path}",
        "argument=submit",
        "argument=two words",
        "argument=--why",
        "argument=",
    ]


def test_a_symbolic_link_to_a_symbolic_link_will_do(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_python()
    (tmp_path / "some where").mkdir()
    near = tmp_path / "some where" / "near"
    near.symlink_to("../a checkout/lepton")
    far = tmp_path / "far"
    far.symlink_to(near)
    assert checkout.run("demo", launcher=far, cwd=Path("/")).stdout.splitlines() == ["at=/", "argument=demo"]
    assert (checkout.root / ".venv").is_dir()


def test_tests_run_in_the_checkout_with_the_other_lock(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_python()
    run = checkout.run("test", "-k", "a or b", cwd=tmp_path)
    assert run.stdout.strip() == f"at={checkout.root} python=-m pytest -k a or b"
    assert checkout.installed() == ["venv", "requirements-dev.lock", "a checkout"]
    checkout.run("demo")
    assert checkout.installed() == []


def test_benches_run_in_the_checkout_with_the_other_lock(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_python()
    run = checkout.run("bench", "faults", "--only", "poison", cwd=tmp_path)
    assert run.stdout.strip() == f"at={checkout.root} python=-m bench faults --only poison"
    assert checkout.installed() == ["venv", "requirements-dev.lock", "a checkout"]


def test_benches_that_compare_bring_the_peers_too(checkout: Checkout) -> None:
    checkout.add_python()
    run = checkout.run("bench", "throughput", "--json")
    assert run.stdout.strip() == f"at={checkout.root} python=-m bench throughput --json"
    assert checkout.installed() == ["venv", "requirements-bench.lock", "a checkout"]
    checkout.run("test")
    checkout.run("demo")
    assert checkout.installed() == []


def test_a_list_of_the_benches_needs_no_peers(checkout: Checkout) -> None:
    checkout.add_python()
    for arguments in ([], ["--help"]):
        checkout.run("bench", *arguments)
    assert checkout.installed() == ["venv", "requirements-dev.lock", "a checkout"]


def test_the_second_set_is_added_to_the_first(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.run("demo")
    checkout.installed()
    checkout.run("test")
    assert checkout.installed() == ["requirements-dev.lock", "a checkout"]


@pytest.mark.parametrize("name", [*LOCKS, "pyproject.toml"])
def test_a_changed_lock_is_installed_again(checkout: Checkout, name: str) -> None:
    checkout.add_python()
    checkout.run("demo")
    checkout.installed()
    (checkout.root / name).write_text("changed\n")
    checkout.run("demo")
    assert checkout.installed() == ["requirements.lock", "a checkout"]


def test_a_failed_install_shows_why_and_the_next_start_begins_anew(checkout: Checkout) -> None:
    checkout.add_python()
    run = checkout.run("demo", PIP_BREAKS="1")
    assert run.returncode == 1
    assert "no matching distribution" in run.stderr
    assert run.stdout == ""
    checkout.installed()
    assert checkout.run("demo").returncode == 0
    assert checkout.installed() == ["venv", "requirements.lock", "a checkout"]


def test_a_killed_install_does_not_look_complete(checkout: Checkout) -> None:
    checkout.add_python()
    process = checkout.start("demo", SLOW="0.3")
    while not (checkout.root / ".venv" / "bin" / "lepton").exists():
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=30)
    checkout.installed()
    assert checkout.run("demo").returncode == 0
    assert checkout.installed()[-3:] == ["venv", "requirements.lock", "a checkout"]


def test_a_checkout_that_was_moved_is_set_up_anew(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.run("demo")
    checkout.installed()
    checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
    checkout.launcher = checkout.root / "lepton"
    assert checkout.run("demo").returncode == 0
    assert checkout.installed() == ["venv", "requirements.lock", "elsewhere"]


def test_two_starts_at_once_set_up_once(checkout: Checkout) -> None:
    checkout.add_python()
    both = [checkout.start("demo", SLOW="0.3") for _ in range(2)]
    outputs = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert checkout.installed() == ["venv", "requirements.lock", "a checkout"]
    assert sum("waiting for it" in err for _, err in outputs) == 1


def test_a_python_set_in_the_environment_is_used(checkout: Checkout, tmp_path: Path) -> None:
    mine = checkout.add_python("my-python").rename(tmp_path / "my python")
    assert checkout.run("demo", PYTHON=str(mine)).returncode == 0
    assert os.access(checkout.root / ".venv" / "bin" / "python", os.X_OK)
