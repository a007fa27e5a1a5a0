from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from lepton_ai.errors import InvalidSettings
from lepton_ai.settings import Settings
from pipeline import setup as module
from pipeline.fleet_file import read_fleet
from pipeline.machine import CPU, Found, cores
from pipeline.setup import set_up

EXAMPLE = Path(__file__).parents[2] / "examples" / "fleet.toml"
NO_GPU = Found("gpu", available=False, what="no NVIDIA driver", fix="install one")


def written(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


def test_the_example_leaves_out_what_the_machine_has_not() -> None:
    plans = read_fleet(EXAMPLE).planned([CPU, NO_GPU, Found("fpga", available=True, emulated=True)])
    assert [(each.name, each.device, each.slots) for each in plans] == [("cpu", "cpu", 1), ("fpga", "fpga", 1)]
    assert plans[0].environ == {"LEPTON_MEMORY_LIMIT": "0.9"}


def test_the_example_gives_a_card_its_limits_and_kernels() -> None:
    plans = read_fleet(EXAMPLE).planned([CPU, Found("gpu", available=True)])
    settings = Settings.read(plans[1].environ | {})
    assert (settings.memory_limit, settings.temperature_limit, settings.power_limit) == (0.9, 0.95, 0.98)
    assert settings.allows("linalg.matmul")
    assert not settings.allows("vision.ndvi")
    assert plans[1].environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_workers_of_one_device_have_names_of_their_own(tmp_path: Path) -> None:
    each = ('device = "cpu"\ncount = 2', 'device = "cpu.big"', 'device = "cpu"\nslots = 3')
    text = "".join(f"[[worker]]\n{worker}\n" for worker in each)
    plans = read_fleet(written(tmp_path, text)).planned([CPU])
    assert [each.name for each in plans] == ["cpu", "cpu-2", "cpu.big", "cpu-3"]
    assert [each.slots for each in plans] == [cores(), cores(), 1, 3]


def test_a_worker_overrides_what_is_said_for_all(tmp_path: Path) -> None:
    text = (
        '[limits]\nmemory = 0.5\nnetwork = 0.4\n[environment]\nA = "1"\n'
        '[[worker]]\ndevice = "cpu"\nlimits = { memory = 0.9 }\nenvironment = { A = "2" }\n'
    )
    (plan,) = read_fleet(written(tmp_path, text)).planned([CPU])
    assert plan.environ == {"LEPTON_MEMORY_LIMIT": "0.9", "LEPTON_NETWORK_LIMIT": "0.4", "A": "2"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("worker = 1", "no fleet file"),
        ("[[worker]\n", "no TOML"),
        ("", "worker"),
        ("worker = []", "names no"),
        ('[[worker]]\ndevice = "abacus"', "worker 1: .*abacus"),
        ('[[worker]]\ndevice = "cpu"\n[[worker]]\ndevice = "cpu"\nslots = 0', "worker 2: slots is 1 to"),
        ('[[worker]]\ndevice = "cpu"\ncount = 0', "count is 1 to"),
        ('[[worker]]\ndevice = "cpu"\nslot = 2', "unknown field `slot`"),
        ('[[worker]]\ndevice = "cpu"\nslots = "two"', "slots"),
        ('[[worker]]\ndevice = "cpu"\nlimits = { memory = -1 }', "LEPTON_MEMORY_LIMIT"),
        ('[[worker]]\ndevice = "cpu"\nlimits = { heat = 1 }', "unknown field `heat`"),
        ('[[worker]]\ndevice = "cpu"\nenvironment = { LEPTON_MEMRY_LIMIT = "1" }', "did you mean LEPTON_MEMORY_LIMIT"),
        ('[[worker]]\ndevice = "cpu"\nenvironment = { LEPTON_REDIS_URL = "redis://x" }', "not for a fleet file"),
        ('[[worker]]\ndevice = "cpu"\nenvironment = { "A=B" = "1" }', "worker 1: a variable's name .* not 'A=B'"),
        ('[[worker]]\ndevice = "cpu"\nenvironment = { "1A" = "1" }', "not '1A'"),
        ('[[worker]]\ndevice = "cpu"\nenvironment = { "" = "1" }', "not ''"),
        ('[environment]\n"A\\n" = "1"\n[[worker]]\ndevice = "cpu"', "a variable's name"),
        ("worker = " + "[" * 9000, "no TOML"),
        (
            '[[worker]]\ndevice = "cpu.x"\ncount = 2\n[[worker]]\ndevice = "cpu.x-2"',
            r"worker 1 \(cpu.x\) and worker 2 \(cpu.x-2\) come out with one name, cpu.x-2",
        ),
        (
            '[[worker]]\ndevice = "cpu.x-2"\n[[worker]]\ndevice = "cpu.x"\ncount = 2',
            r"worker 1 \(cpu.x-2\) and worker 2 \(cpu.x\) come out with one name, cpu.x-2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidSettings, match=says) as refused:
        read_fleet(written(tmp_path, text))
    assert str(tmp_path) in refused.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="cannot be read"):
        read_fleet(tmp_path / "none.toml")


def test_a_device_that_must_be_there_is_refused_with_the_fix(tmp_path: Path) -> None:
    fleet = read_fleet(written(tmp_path, '[[worker]]\ndevice = "gpu"'))
    with pytest.raises(InvalidSettings, match=r"no NVIDIA driver; install one; or say optional = true"):
        fleet.planned([CPU, NO_GPU])


def test_a_machine_with_none_of_the_devices_is_refused(tmp_path: Path) -> None:
    fleet = read_fleet(written(tmp_path, '[[worker]]\ndevice = "gpu"\noptional = true'))
    with pytest.raises(InvalidSettings, match=r"none of its devices is on this machine \(gpu\)"):
        fleet.planned([CPU, NO_GPU])


def test_up_starts_a_worker_for_each_with_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("LEPTON_REDIS_URL", raising=False)
    monkeypatch.setattr(module, "look_for_devices", lambda: pytest.fail("the machine was asked for its devices"))
    file = written(tmp_path, '[[worker]]\ndevice = "cpu"\ncount = 2\nkernels = ["linalg.*"]')
    with ExitStack() as held:
        programs = {each.name: each for each in set_up(["--http-port", "0", "--fleet", str(file)], held).programs()}
    assert list(programs)[3:] == ["worker-cpu", "worker-cpu-2"]
    assert "cpu-2@%h" in programs["worker-cpu-2"].arguments
    assert programs["worker-cpu-2"].environ["LEPTON_KERNELS_ALLOWED"] == "linalg.*"
    assert "LEPTON_KERNELS_ALLOWED" not in programs["router"].environ


def test_a_fleet_file_and_workers_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="leave one out"), ExitStack() as held:
        set_up(["--workers", "cpu:1", "--fleet", str(tmp_path / "fleet.toml")], held)
