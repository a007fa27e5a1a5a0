"""What is compiled once is kept, for many processes at once, and never torn."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lepton_ai import services
from tasks import caches
from tasks.caches import Lock, choose, lock_of, private_folder

#: A package with two kernels, each of which takes Numba a while.
KERNELS = """
import os, time
import numpy as np
from lepton_ai.kernel import Kernel

def _sum(x, y):
    total = 0.0
    for i in range(x.size):
        total += x[i] * FACTOR
    y[0] = total

def make(name):
    found = Kernel(name, inputs={"x": "float64[n]"}, outputs={"y": "float64[1]"}, flops="n", bytes="8*n")
    found.reference(lambda x: {"y": np.array([x.sum() * FACTOR])})
    found.samples(lambda: [{"x": np.ones(4)}])

    @found.on("cpu")
    def build(device):
        from numba import njit, types
        array = types.Array(types.float64, 1, "C", readonly=True)
        run = njit((array, types.float64[::1]), cache=True)(_sum)
        print("LOADED" if sum(run.stats.cache_hits.values()) else "COMPILED", name, flush=True)
        if os.environ.get("TEST_HANGS"):
            print("HANGS", flush=True)
            time.sleep(600)

        def doubled(inputs, context):
            y = np.empty(1)
            run(inputs["x"], y)
            return {"y": y}
        return doubled
    return found

one, two = make("test.one"), make("test.two")
"""
WARM = """
from tasks.driver import open_device
from tasks.catalogue import load
from tasks.warmup import warm
driver = open_device("cpu", 1)
import cached_kernels
found = warm([cached_kernels.one, cached_kernels.two], driver, {})
assert not found.refused, found.refused
print(f"SERVES {' '.join(found.kernels)}", flush=True)
"""


class Package:
    """A package of somebody's, and processes that warm its kernels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write()

    def write(self, factor: str = "1.0") -> None:
        (self.folder / "cached_kernels.py").write_text(KERNELS.replace("FACTOR", factor))

    def start(self, **environ: str) -> subprocess.Popen[str]:
        own = {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", **environ}
        ours = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        return subprocess.Popen(
            [sys.executable, "-P", "-c", WARM],
            env=services.environ({**ours, **own}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def warm(self, count: int = 1, **environ: str) -> list[str]:
        """What so many processes say that start at once."""
        running = [self.start(**environ) for _ in range(count)]
        said = [process.communicate(timeout=120)[0] for process in running]
        for process, each in zip(running, said, strict=True):
            assert process.returncode == 0, each
            assert "SERVES test.one test.two" in each
        return said


def counted(said: list[str], word: str) -> int:
    return sum(len(re.findall(rf"^{word} ", each, re.MULTILINE)) for each in said)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    folder = tmp_path / "package"
    folder.mkdir()
    return Package(folder)


def test_processes_that_start_at_once_compile_each_function_once(package: Package) -> None:
    said = package.warm(4)
    # Both kernels are made of one function, so the second finds what the first has compiled, in every process.
    assert (counted(said, "COMPILED"), counted(said, "LOADED")) == (1, 7)
    assert counted(package.warm(), "COMPILED") == 0


def test_a_worker_that_is_killed_in_mid_compile_leaves_no_lock_and_nothing_torn(package: Package) -> None:
    package.write("3.0")
    assert counted(package.warm(), "COMPILED") == 1
    (before,) = [each.read_bytes() for each in package.folder.rglob("*.nbc")]
    package.write("20.0")
    process = package.start(TEST_HANGS="1")
    assert process.stdout is not None
    assert any("HANGS" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    # As if it had died between the two: the index leads to what was compiled before.
    (file,) = package.folder.rglob("*.nbc")
    file.write_bytes(before)
    assert counted(package.warm(2), "COMPILED") == 1
    assert not [*package.folder.rglob("*.tmp")]


def test_what_the_last_one_left_unfinished_is_forgotten(tmp_path: Path) -> None:
    source = tmp_path / "kernels.py"
    index, others = tmp_path / "kernels._sum-3.py311.nbi", tmp_path / "others._sum-3.py311.nbi"
    for each in (source, index, others):
        each.touch()
    dead = Lock(tmp_path / "a.lock", source)
    assert dead.take(wait=False)
    assert dead._descriptor is not None
    os.close(dead._descriptor)  # what is left of it when its process dies
    heir = Lock(tmp_path / "a.lock", source)
    assert heir.take(wait=False)
    assert (index.exists(), others.exists()) == (False, True)
    heir.give()
    index.touch()
    assert Lock(tmp_path / "a.lock", source).take(wait=False)
    assert index.exists()


def test_a_lock_is_one_processs_at_a_time(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "a.lock"), Lock(tmp_path / "a.lock")
    assert first.take(wait=False)
    assert not second.take(wait=False)
    assert Lock(tmp_path / "b.lock").take(wait=False)
    first.give()
    assert second.take(wait=True)


def test_whoever_compiles_for_ever_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_PATIENCE_S", 0.1)
    first, second = Lock(tmp_path / "a.lock"), Lock(tmp_path / "a.lock")
    assert first.take(wait=True)
    assert second.take(wait=True)
    second.give()
    assert not Lock(tmp_path / "a.lock").take(wait=False)


def test_where_no_lock_can_be_made_the_kernel_is_compiled_all_the_same(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "missing" / "a.lock")
    assert lock.take(wait=False)
    lock.give()


def test_a_package_that_cannot_be_written_has_its_code_kept_in_the_users_cache(
    package: Package, tmp_path: Path
) -> None:
    (package.folder / "__pycache__").touch()  # a file, so that nothing can be kept in it, whoever we are
    home = str(tmp_path / "cache")
    assert counted(package.warm(XDG_CACHE_HOME=home), "COMPILED") == 1
    assert counted(package.warm(XDG_CACHE_HOME=home), "COMPILED") == 0
    folder = tmp_path / "cache" / "lepton" / "numba"
    assert [*folder.rglob("cached_kernels._sum-*.nbi")]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_the_operator_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "own"))
    (tmp_path / "__pycache__").touch()
    assert choose([tmp_path / "kernels.py"]) == tmp_path / "own"
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "own")


def test_a_package_that_can_be_written_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert choose([tmp_path / "kernels.py"]) is None
    assert "NUMBA_CACHE_DIR" not in os.environ
    assert lock_of("test.one", "cpu", tmp_path / "kernels.py")._path.parent == tmp_path / "__pycache__"


def test_a_kernel_that_stands_in_no_file_has_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert lock_of("test.one", "cpu", None)._path == tmp_path / "lepton" / "locks" / "lepton-test.one.cpu.lock"


def test_a_folder_of_somebody_else_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = private_folder("pocl", "kcache")
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    assert private_folder("pocl", "kcache") == ours
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert private_folder("pocl", "kcache") not in {ours, tmp_path / "lepton-pocl-kcache-12345"}
