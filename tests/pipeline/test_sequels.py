"""What is to follow a job that a router ends: nothing that Celery makes of it may keep the router from ending it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from lepton_ai import results, wire
from lepton_ai.errors import BrokerUnavailable, JobCancelled
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps
from pipeline.sequels import Sequels


def message(embed: dict[str, Any]) -> bytes:
    """A message in JSON, which holds numbers that msgpack has not."""
    found = json.loads(wire.envelope(new_id(), "t.kernel", {}, Options()))
    found["body"] = base64.b64encode(json.dumps([[], {}, embed]).encode()).decode()
    found["content-type"], found["content-encoding"] = "application/json", "utf-8"
    return json.dumps(found).encode()


@pytest.fixture
def sequels(broker_url: str) -> Sequels:
    return Sequels(Settings(redis_url=broker_url), lambda: ["t.kernel"])


ENDED = results.failure("a", JobCancelled("cancelled"))


@pytest.mark.parametrize("embed", [{"chord": {"task": "x", "n": 2**70}}, {"chain": [{"n": 2**70}]}, {"chord": 7}, {}])
def test_what_cannot_be_told_is_nothing(sequels: Sequels, embed: dict[str, Any]) -> None:
    assert sequels.after(message(embed), ENDED) == FollowUps()


def test_what_can_be_told_is_a_part(sequels: Sequels) -> None:
    assert sequels.after(message({"chord": {"task": "x"}}), ENDED).chord_part is not None


@pytest.mark.parametrize(("error", "is_raised"), [(BrokerUnavailable("away"), True), (ZeroDivisionError(), False)])
def test_only_a_broker_that_is_away_is_raised(
    sequels: Sequels, monkeypatch: pytest.MonkeyPatch, error: Exception, is_raised: bool
) -> None:
    def refuse(*_: Any) -> FollowUps:
        raise error

    monkeypatch.setattr(sequels._made(), "after_failure", refuse)
    if is_raised:
        with pytest.raises(BrokerUnavailable):
            sequels.after(message({"chord": {"task": "x"}}), ENDED)
    else:
        assert sequels.after(message({"chord": {"task": "x"}}), ENDED) == FollowUps()
