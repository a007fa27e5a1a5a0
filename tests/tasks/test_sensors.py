from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from structlog.testing import capture_logs

from tasks.sensors import Sensor, SlowSensor


class Broken(Exception): ...


def read_until(sensor: SlowSensor[Any], condition: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 5
    while not condition(found := sensor.read()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def test_a_sensor_that_raises_is_told_of_once_and_left_out_until_it_works_again() -> None:
    answers = iter([1, Broken("no"), Broken("no"), 2, Broken("again")])

    def reading() -> int:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    sensor = Sensor("test", reading)
    with capture_logs() as logs:
        assert [sensor.read() for _ in range(5)] == [1, None, None, 2, None]
    assert [each["reason"] for each in logs] == ["Broken: no", "Broken: again"]


def test_a_slow_sensor_is_never_waited_for() -> None:
    going = threading.Event()
    sensor = SlowSensor("test", lambda: going.wait(10) and 7, 60.0)
    started = time.monotonic()
    assert [sensor.read() for _ in range(100)] == [None] * 100
    assert time.monotonic() - started < 1
    going.set()
    assert read_until(sensor, lambda found: found is not None) == 7


def test_a_slow_sensor_that_hangs_is_told_of_once_left_out_and_read_again_once_it_answers() -> None:
    going = threading.Event()
    answers = iter([1, None, 2])

    def reading() -> int | None:
        found = next(answers, 3)
        if found is None:
            going.wait(10)
        return found

    sensor = SlowSensor("test", reading, 0.05)
    assert read_until(sensor, lambda found: found is not None) == 1
    with capture_logs() as logs:
        read_until(sensor, lambda found: found is None)
        for _ in range(3):
            assert sensor.read() is None
        going.set()
        assert read_until(sensor, lambda found: found is not None) in (2, 3)
    assert [each["event"] for each in logs] == ["sensor_hangs"]


def test_a_slow_sensor_that_raises_is_left_out_and_asked_again() -> None:
    answers = iter([Broken("no"), Broken("no"), 5])

    def reading() -> int:
        found = next(answers, 5)
        if isinstance(found, Exception):
            raise found
        return found

    sensor = SlowSensor("test", reading, 60.0)
    assert read_until(sensor, lambda found: found is not None) == 5
