"""What `stream.window` promises over several jobs: conformance tests look at one job at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lepton_ai import wire
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from tasks.devices.cpu import open_device
from tasks.kernels.stream_window import window
from tests.tasks.workshop import Worker

RUN = window.build("cpu", open_device("cpu", slots=1))


def job(times: Any, keys: Any, values: Any, state: Any = None, watermark: Any = None, **numbers: float) -> Any:
    """The outputs; a first job leaves the state out."""
    given = {"times": np.array(times, float), "keys": np.array(keys, np.int64), "values": np.array(values, float)}
    whole = {"width": 10.0, **numbers, **given}
    whole |= {name: value for name, value in (("state", state), ("watermark", watermark)) if value is not None}
    context: Any = None
    return RUN(window.signature.bind(whole)[0], context)


@pytest.mark.parametrize("names", [np.arange(7), np.array([0, 5, -(2**53), 2**53, 10**15, -3, 10**12])])
def test_jobs_that_pass_on_their_state_close_what_one_job_would(names: NDArray[np.int64]) -> None:
    random = np.random.default_rng(1)
    times = np.arange(3_000) / 10 + random.uniform(-4, 4, 3_000)
    keys, values = random.choice(names, 3_000), random.normal(0, 1, 3_000)
    closed: list[NDArray[np.float64]] = []
    done: dict[str, Any] = {"state": None, "watermark": None}
    for part in np.array_split(np.arange(3_000), 50):
        carried = {name: done[name] for name in ("state", "watermark")}
        done = job(times[part], keys[part], values[part], lateness=8.0, **carried)
        assert done["late"][0] == 0
        closed.append(done["closed"])
    closed.append(job([], [], [], done["state"], np.array([np.inf]))["closed"])
    together = job(times, keys, values)
    expected = np.concatenate([together["closed"], together["state"]])
    found = np.concatenate(closed)
    np.testing.assert_allclose(found[np.lexsort((found[:, 0], found[:, 1]))], expected, rtol=1e-12, atol=1e-12)
    assert [rows[0, 1] for rows in closed if len(rows)] == sorted(rows[0, 1] for rows in closed if len(rows))


def test_an_event_out_of_order_counts_until_its_window_is_closed() -> None:
    first = job([3, 14], [1, 1], [5, 1], lateness=5.0)
    assert first["watermark"] == [9.0]
    assert len(first["closed"]) == 0
    second = job([7, 15], [1, 1], [2, 1], first["state"], first["watermark"], lateness=5.0)
    np.testing.assert_array_equal(second["closed"], [[1, 0, 2, 7, 2, 5]])
    assert second["late"] == [0]
    third = job([9.99], [1], [100], second["state"], second["watermark"], lateness=5.0)
    assert third["late"] == [1]
    np.testing.assert_array_equal(third["state"], [[1, 10, 2, 2, 1, 1]])


def test_the_watermark_never_falls() -> None:
    done = job([50.0], [1], [1], lateness=5.0)
    assert job([45.0], [1], [1], done["state"], done["watermark"], lateness=5.0)["watermark"] == [45.0]
    assert job([], [], [], done["state"], done["watermark"])["watermark"] == [45.0]


def test_an_end_is_the_next_windows_start_however_width_rounds() -> None:
    times = np.arange(1_000) * 0.1
    done = job(times, np.zeros(1_000), np.ones(1_000), width=0.1)
    rows = np.concatenate([done["closed"], done["state"]])
    assert rows[:, 2].sum() == 1_000
    np.testing.assert_array_equal(rows[:, 1], np.unique(np.floor(times / 0.1)) * 0.1)
    # What the watermark is in is open, and all before it is closed.
    assert done["state"][0, 1] == math.floor(times[-1] / 0.1) * 0.1
    assert len(done["state"]) == 1
    again = job([], [], [], done["state"], done["watermark"], width=0.1)
    np.testing.assert_array_equal(again["state"], done["state"])


def test_jobs_of_a_state_key_go_on_where_the_last_one_ended(worker: Worker) -> None:
    worker.shop.repertoire.kernels[window.name], worker.shop.repertoire.runs[window.name] = window, RUN

    def sent(*times: float) -> Any:
        events = {"times": list(times), "keys": [1] * len(times), "values": [2.0] * len(times), "width": 10.0}
        job = new_id()
        worker.push(wire.envelope(job, window.name, events, Options(state_key="meter")))
        return worker.meta(job).result

    assert sent(1, 2) == {"closed": [], "late": [0]}
    assert sent(3, 12) == {"closed": [[1, 0, 3, 6, 2, 2]], "late": [0]}
    assert sent(4, 25) == {"closed": [[1, 10, 1, 2, 2, 2]], "late": [1]}
