from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lepton_ai.errors import BrokerUnavailable, InvalidSettings
from pipeline import setup as module
from pipeline.machine import Found, Unit
from pipeline.setup import FLOWER, Setup, set_up

FREE = ("--workers", "cpu:1", "--http-port", "0")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's real folders and settings."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("LEPTON_REDIS_URL", raising=False)
    monkeypatch.setattr(module, "look_for_devices", lambda: pytest.fail("the machine was asked for its devices"))


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def names(setup: Setup) -> list[str]:
    return [each.name for each in setup.programs()]


def test_it_is_the_services_and_a_worker_for_each_device(held: ExitStack) -> None:
    setup = set_up([*FREE[2:], "--workers", "cpu.big:2,cpu.little:1"], held)
    assert names(setup) == ["router", "telemetry", "ingest", "worker-cpu.big", "worker-cpu.little"]
    assert setup.guardian() is not None


def test_without_workers_they_are_what_the_machine_has(held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Found("cpu", available=True), Found("fpga", available=True, emulated=True), Found("gpu", available=False))
    monkeypatch.setattr(module, "look_for_devices", lambda: found)
    assert [each.device for each in set_up(FREE[2:], held).workers] == ["cpu", "fpga"]


def test_each_card_has_a_worker_of_its_own(held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    units = tuple(Unit("gpu.t4", {"CUDA_VISIBLE_DEVICES": uuid}) for uuid in ("A", "B"))
    found = (Found("cpu", available=True), Found("gpu", available=True, units=units))
    monkeypatch.setattr(module, "look_for_devices", lambda: found)
    setup = set_up(FREE[2:], held)
    assert names(setup)[3:] == ["worker-cpu", "worker-gpu.t4", "worker-gpu.t4-2"]
    assert setup.programs()[-1].environ["CUDA_VISIBLE_DEVICES"] == "B"


def test_a_device_that_is_not_there_is_refused(held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Found("cpu", available=True), Found("fpga", available=False, what="no loader", fix="install it"))
    monkeypatch.setattr(module, "look_for_devices", lambda: found)
    with pytest.raises(InvalidSettings, match="no fpga on this machine: no loader; install it"):
        set_up(["--workers", "cpu:1,fpga:1", "--http-port", "0"], held)


def test_a_policy_that_there_is_not_is_refused(held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_POLICY", "nope")
    with pytest.raises(InvalidSettings, match="no policy 'nope'"):
        set_up(FREE, held)


def test_the_children_get_its_broker_port_and_way_of_logging(held: ExitStack) -> None:
    setup = set_up([*FREE, "--log", "json"], held)
    environ = setup.programs()[0].environ
    assert environ["LEPTON_REDIS_URL"] == setup.broker_url
    assert setup.http_url == f"http://127.0.0.1:{environ['LEPTON_HTTP_PORT']}"
    assert environ["LEPTON_LOG"] == setup.settings.log == "json"


# -- data -------------------------------------------------------------------------------------------------------------


def test_data_are_kept_where_the_users_state_belongs(held: ExitStack, tmp_path: Path) -> None:
    setup = set_up(FREE, held)
    assert setup.data == tmp_path / "state" / "lepton"
    assert str(tmp_path) in setup.broker_url or "lepton-" in setup.broker_url


def test_the_same_data_have_the_same_broker(tmp_path: Path) -> None:
    urls = set()
    for _ in range(2):
        with ExitStack() as held:
            urls.add(set_up([*FREE, "--data", str(tmp_path / "data")], held).broker_url)
    assert len(urls) == 1


def test_a_second_one_on_the_same_data_is_refused_with_the_pid_of_the_first(held: ExitStack, tmp_path: Path) -> None:
    arguments = [*FREE, "--data", str(tmp_path / "data")]
    set_up(arguments, held)
    with pytest.raises(InvalidSettings, match=f"another lepton up .pid {os.getpid()}. is using"):
        set_up(arguments, held)


def test_a_second_one_is_told_of_the_first_rather_than_of_its_port(held: ExitStack, tmp_path: Path, taken: int) -> None:
    set_up([*FREE, "--data", str(tmp_path)], held)
    with pytest.raises(InvalidSettings, match="another lepton up"):
        set_up(["--workers", "cpu:1", "--http-port", str(taken), "--data", str(tmp_path)], held)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_disk_that_is_full_is_told_like_one_that_is_not_there(held: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "up.lock").symlink_to("/dev/full")
    with pytest.raises(InvalidSettings, match="cannot hold the data"):
        set_up([*FREE, "--data", str(tmp_path)], held)


def test_a_place_that_can_hold_no_data_is_refused(held: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidSettings, match="file/data cannot hold the data"):
        set_up([*FREE, "--data", str(tmp_path / "file" / "data")], held)


# -- a broker of one's own --------------------------------------------------------------------------------------------


def test_with_a_broker_of_ones_own_nothing_is_stored(held: ExitStack, broker_url: str, tmp_path: Path) -> None:
    setup = set_up([*FREE, "--broker", broker_url], held)
    assert setup.broker_url == broker_url
    assert setup.data is None
    assert setup.guardian() is None
    assert not (tmp_path / "state").exists()


def test_the_environment_may_name_it(held: ExitStack, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_REDIS_URL", broker_url)
    assert set_up(FREE, held).guardian() is None


def test_data_of_a_broker_of_ones_own_are_its_own_affair(held: ExitStack, broker_url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="--data"):
        set_up([*FREE, "--broker", broker_url, "--data", str(tmp_path)], held)


def test_a_broker_that_is_not_there_is_told_at_once(held: ExitStack) -> None:
    with pytest.raises(BrokerUnavailable, match="no broker at /nowhere"):
        set_up([*FREE, "--broker", "unix:///nowhere"], held)


def test_a_broker_that_has_no_such_address_is_refused(held: ExitStack) -> None:
    with pytest.raises(InvalidSettings, match="REDIS_URL must begin with"):
        set_up([*FREE, "--broker", "amqp://localhost"], held)


# -- ports ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_http_port_that_is_taken_is_refused_with_the_option_that_changes_it(held: ExitStack, taken: int) -> None:
    with pytest.raises(InvalidSettings, match=f"port {taken} of 127.0.0.1 cannot be had .*--http-port"):
        set_up(["--workers", "cpu:1", "--http-port", str(taken)], held)


def test_a_port_of_flower_that_is_taken_is_refused(held: ExitStack, taken: int) -> None:
    with pytest.raises(InvalidSettings, match=f"port {taken} .*--flower-port"):
        set_up([*FREE, "--flower", "--flower-port", str(taken)], held)


@pytest.mark.parametrize(("option", "port"), [("--http-port", "70000"), ("--flower-port", "70000")])
def test_a_port_that_is_none_is_refused(held: ExitStack, option: str, port: str) -> None:
    with pytest.raises(InvalidSettings, match=port):
        set_up([*FREE, "--flower", option, port], held)


def test_flower_runs_on_loopback_beside_the_rest(held: ExitStack) -> None:
    setup = set_up([*FREE, "--flower", "--flower-port", "0"], held)
    flower = next(each for each in setup.programs() if each.name == FLOWER)
    assert f"http://127.0.0.1:{flower.arguments[-2].removeprefix('--port=')}" == setup.flower_url
    assert "--address=127.0.0.1" in flower.arguments


def test_flower_that_is_not_installed_is_named_with_what_installs_it(
    held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InvalidSettings, match=r"pip install 'lepton-ai\[flower\]'"):
        set_up([*FREE, "--flower"], held)
