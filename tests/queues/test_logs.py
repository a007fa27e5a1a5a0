"""Each test logs in a process of its own: where logs go belongs to the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def stderr_of(program: str, **settings: str) -> str:
    head = (
        "import logging, threading, structlog\n"
        "from lepton_ai.settings import Settings\n"
        "from queues.logs import configure\n"
        f"configure(Settings(**{settings!r}), 'router')\n"
        "log = structlog.get_logger()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", head + program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == ""
    return ran.stderr


def entries(program: str, **settings: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr_of(program, log="json", **settings).splitlines()]


def test_an_event_is_one_line_of_json_with_its_fields_service_level_and_time() -> None:
    (found,) = entries("log.info('job_placed', job='j1', wait_s=0.5)")
    at = datetime.fromisoformat(found.pop("timestamp"))
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60
    assert found == {"event": "job_placed", "job": "j1", "wait_s": 0.5, "service": "router", "level": "info"}


def test_a_librarys_record_is_an_event_like_ours() -> None:
    (found,) = entries("logging.getLogger('celery').warning('it is %s', 'late')")
    assert (found["event"], found["level"], found["service"]) == ("it is late", "warning", "router")


def test_a_librarys_chatter_is_left_out() -> None:
    assert entries("logging.getLogger('celery').info('hello')", log_level="debug") == []


def test_what_is_below_the_level_is_left_out() -> None:
    program = "for name in ('debug', 'info', 'warning', 'error'): getattr(log, name)(name)"
    assert [each["event"] for each in entries(program, log_level="warning")] == ["warning", "error"]
    assert [each["event"] for each in entries(program, log_level="debug")] == ["debug", "info", "warning", "error"]


def test_other_threads_know_the_service_too() -> None:
    (found,) = entries("thread = threading.Thread(target=log.info, args=('hello',)); thread.start(); thread.join()")
    assert found["service"] == "router"


def test_an_id_that_was_bound_once_is_in_every_line() -> None:
    found = entries("structlog.contextvars.bind_contextvars(job='j1'); log.info('one'); log.info('two')")
    assert [each["job"] for each in found] == ["j1", "j1"]


FAILS = "\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    "


@pytest.mark.parametrize("logger", ["log", "logging.getLogger('celery')"])
def test_an_exception_stays_in_its_line(logger: str) -> None:
    (found,) = entries(f"{FAILS}{logger}.exception('it_failed')")
    assert found["event"] == "it_failed"
    assert "ZeroDivisionError: division by zero" in found["exception"]


@pytest.mark.parametrize("logger", ["log", "logging.getLogger('celery')"])
def test_a_person_sees_event_fields_and_traceback(logger: str) -> None:
    found = stderr_of(f"{FAILS}{logger}.exception('it_failed')")
    assert "it_failed" in found.splitlines()[0]
    assert "service=router" in found.splitlines()[0]
    assert found.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_what_goes_to_a_file_has_no_colours() -> None:
    assert "\x1b" not in stderr_of("log.error('it_failed', why='reason')")
