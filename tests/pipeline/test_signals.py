from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.signals import Signals


@pytest.fixture(autouse=True)
def not_ignored() -> Iterator[None]:
    """Under nohup SIGHUP is ignored from the start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_kept_and_cuts_a_wait_short(number: signal.Signals) -> None:
    with Signals() as signals:
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        start = time.monotonic()
        signals.wait(30)
        assert time.monotonic() - start < 10
        assert signals.received == [number]
        with pytest.raises(KeyboardInterrupt):
            signals.check()


def test_a_signal_that_came_before_the_wait_counts() -> None:
    with Signals() as signals:
        signals.check()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        signals.wait(30)
        assert signals.received == [signal.SIGTERM, signal.SIGINT]


def test_the_end_of_a_child_cuts_a_wait_short() -> None:
    with Signals() as signals:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.1)"])
        start = time.monotonic()
        while child.poll() is None:
            signals.wait(30)
        assert time.monotonic() - start < 10


def test_nothing_happens_until_the_wait_is_over() -> None:
    with Signals() as signals:
        start = time.monotonic()
        signals.wait(0.1)
        assert time.monotonic() - start >= 0.09


def test_what_the_shell_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.wait(0.05)
            assert signals.received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_everything_is_as_it_was() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    with Signals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
