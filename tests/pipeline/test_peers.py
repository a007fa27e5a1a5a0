from __future__ import annotations

from typing import Any

import pytest

from lepton_ai.event import Event
from pipeline.cluster import Cluster
from pipeline.peers import Peers


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def peers(cluster: Cluster) -> Peers:
    return Peers("router-us", cluster)


def placed(*jobs: str, source: str = "router-other", **data: Any) -> Event:
    data.setdefault("seconds", [1.5] * len(jobs))
    return Event("job.placed", source, device="cpu", jobs=jobs, data=data)


def test_what_another_router_has_placed_is_work_of_its_device(peers: Peers, cluster: Cluster) -> None:
    peers.heard(placed("a", "b"))
    assert (cluster.outstanding_s("cpu"), cluster.outstanding_jobs("cpu")) == (3.0, 2)
    cluster.finished("a", "cpu")
    assert (cluster.outstanding_s("cpu"), cluster.outstanding_jobs("cpu")) == (1.5, 1)


def test_what_we_have_placed_is_known_already(peers: Peers, cluster: Cluster) -> None:
    peers.heard(placed("a", source="router-us"))
    assert cluster.outstanding_jobs("cpu") == 0
    assert not peers


def test_a_job_of_ours_that_another_router_places_anew_is_where_it_went_last(peers: Peers, cluster: Cluster) -> None:
    cluster.dispatched("a", "gpu", 9.0)
    peers.heard(placed("a"))
    assert (cluster.outstanding_s("gpu"), cluster.outstanding_s("cpu")) == (0.0, 1.5)


@pytest.mark.parametrize("kind", ["job.parked", "job.scheduled"])
def test_a_job_that_another_router_puts_aside_is_no_devices_any_more(peers: Peers, cluster: Cluster, kind: str) -> None:
    cluster.dispatched("a", "cpu", 1.0)
    peers.heard(Event(kind, "router-other", jobs=("a",)))
    assert cluster.outstanding_jobs("cpu") == 0


def test_the_messages_of_anothers_bundles_are_not_taken_for_more_of_others(peers: Peers, cluster: Cluster) -> None:
    peers.heard(placed(*"abcdefgh", messages=2))
    cluster.reconcile("cpu", 2)
    assert cluster.outstanding_jobs("cpu") == 8


@pytest.mark.parametrize("messages", [2**62, -1, float("nan"), "many", None])
def test_nobody_is_taken_to_have_given_a_device_more_messages_than_jobs(
    peers: Peers, cluster: Cluster, messages: Any
) -> None:
    peers.heard(placed("a", "b", messages=messages))
    cluster.reconcile("cpu", 3)
    assert cluster.outstanding_jobs("cpu") == 3


def test_there_are_others_from_the_first_word_until_they_leave_or_their_lease_lapses(peers: Peers) -> None:
    assert not peers
    peers.heard(Event("router.online", "router-other"))
    assert peers
    peers.heard(Event("router.offline", "router-other"))
    assert not peers
    peers.heard(placed("a"))
    assert peers
    peers.alive(["router-us"])
    assert not peers
    peers.alive(["router-us", "router-other"])
    assert peers


@pytest.mark.parametrize("seconds", [None, "1", ["x"], [-1.0], [float("nan")], {"a": 1}, [1e400]])
def test_an_event_with_anything_in_it_does_no_harm(peers: Peers, cluster: Cluster, seconds: Any) -> None:
    peers.heard(placed("a", seconds=seconds, messages="many"))
    assert cluster.outstanding_s("cpu") == 0.0
