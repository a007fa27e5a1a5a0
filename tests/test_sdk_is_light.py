import json
import subprocess
import sys

HEAVY = ("celery", "kombu", "numba", "scipy", "structlog", "msgpack", "redis", "httpx", "litestar", "cyclopts", "rich")


def _modules_after(statement: str) -> set[str]:
    program = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout))


def test_importing_the_sdk_loads_none_of_the_services_libraries() -> None:
    assert _modules_after("import lepton_ai").isdisjoint(HEAVY)


def test_everything_the_sdk_promises_is_there() -> None:
    import lepton_ai

    assert all(hasattr(lepton_ai, name) for name in lepton_ai.__all__)


def test_the_producers_side_of_every_module_loads_no_celery() -> None:
    loaded = _modules_after("import lepton_ai.direct, lepton_ai.remote, lepton_ai.wire, lepton_ai.placement.costs")
    assert loaded.isdisjoint({"celery", "kombu", "numba", "scipy", "structlog"})
