"""Every scenario, with the sizes in which it is played."""

from __future__ import annotations

from tests.faults import (
    scenarios_blobs,
    scenarios_broker,
    scenarios_clock,
    scenarios_doors,
    scenarios_kernels,
    scenarios_links,
    scenarios_services,
    scenarios_workers,
)
from tests.faults.scenario import Scenario, Size

__all__ = ["SCENARIOS", "TESTED"]

#: Shorter than the default, where many deaths are waited for one after another.
_BRISK: dict[str, object] = {"lease_s": 2.0, "heartbeat_s": 0.5}

SCENARIOS = (
    Scenario(
        "worker_kill_storm",
        scenarios_workers.storm,
        full=Size(jobs=12_000, rounds=40),
        quick=Size(jobs=3_000, rounds=10),
        tested=Size(jobs=800, rounds=4, settings=_BRISK),
    ),
    Scenario(
        "worker_relay",
        scenarios_workers.relay,
        full=Size(jobs=6_000, rounds=6),
        quick=Size(jobs=1_200, rounds=2, settings=_BRISK),
    ),
    Scenario(
        "worker_sync_points",
        scenarios_workers.sync_points,
        full=Size(jobs=6, rounds=len(scenarios_workers.POINTS)),
        quick=Size(jobs=6, rounds=8, settings=_BRISK),
        tested=Size(jobs=6, rounds=4, settings=_BRISK),
    ),
    Scenario(
        "worker_frozen",
        scenarios_workers.freeze,
        full=Size(jobs=200, rounds=6, seconds=2),
        quick=Size(jobs=100, rounds=1, seconds=1),
        tested=Size(jobs=50, rounds=1, seconds=0.2, settings=_BRISK),
    ),
    Scenario(
        "rolling_sigterm",
        scenarios_workers.rolling_end,
        full=Size(jobs=6_000, rounds=24),
        quick=Size(jobs=1_500, rounds=6),
    ),
    Scenario(
        "clock_skew",
        scenarios_clock.clock_skew,
        full=Size(jobs=4_000, rounds=8),
        quick=Size(jobs=800, rounds=2),
    ),
    Scenario(
        "router_sync_points",
        scenarios_services.router_kill,
        full=Size(jobs=40, rounds=len(scenarios_services.ROUTER_POINTS)),
        quick=Size(jobs=40, rounds=5, settings=_BRISK),
        tested=Size(jobs=40, rounds=2, settings=_BRISK),
    ),
    Scenario(
        "router_frozen",
        scenarios_services.router_freeze,
        full=Size(jobs=100, rounds=6, seconds=2),
        quick=Size(jobs=100, rounds=2, seconds=0.5),
    ),
    Scenario(
        "two_routers",
        scenarios_services.two_routers,
        full=Size(jobs=8_000, rounds=10),
        quick=Size(jobs=2_000, rounds=3),
    ),
    Scenario(
        "bundle_storm",
        scenarios_services.bundle_storm,
        full=Size(jobs=60_000, rounds=40),
        quick=Size(jobs=10_000, rounds=10, settings=_BRISK),
        tested=Size(jobs=4_000, rounds=6, settings=_BRISK),
    ),
    Scenario(
        "ingest_kill",
        scenarios_services.ingest_kill,
        full=Size(jobs=10, rounds=16),
        quick=Size(jobs=10, rounds=len(scenarios_services.INGEST_POINTS)),
    ),
    Scenario(
        "broker_kill",
        scenarios_broker.broker_kill,
        full=Size(jobs=6_000, rounds=12, seconds=0.5),
        quick=Size(jobs=1_500, rounds=3, seconds=0.2),
        tested=Size(jobs=500, rounds=1),
    ),
    Scenario(
        "broker_kill_waitaof",
        scenarios_broker.broker_kill_waitaof,
        full=Size(jobs=4_000, rounds=12, seconds=0.5),
        quick=Size(jobs=600, rounds=2, seconds=0.2),
    ),
    Scenario(
        "broker_out_of_memory",
        scenarios_broker.out_of_memory,
        full=Size(rounds=5, seconds=8),
        quick=Size(rounds=2, seconds=3),
    ),
    Scenario("disk_full", scenarios_broker.disk_full, full=Size(seconds=8), quick=Size(seconds=2)),
    Scenario(
        "connections_cut",
        scenarios_links.cut,
        full=Size(jobs=6_000, rounds=60, seconds=1.5),
        quick=Size(jobs=1_500, rounds=15, seconds=1),
    ),
    Scenario(
        "half_open",
        scenarios_links.half_open,
        full=Size(jobs=4_000, rounds=6),
        quick=Size(jobs=1_000, rounds=2),
    ),
    Scenario("slow_link", scenarios_links.slow, full=Size(jobs=2_000), quick=Size(jobs=200)),
    Scenario(
        "blackout",
        scenarios_links.blackout,
        full=Size(jobs=1_000, rounds=2, seconds=30),
        quick=Size(jobs=300, rounds=1, seconds=8),
    ),
    Scenario(
        "poison",
        scenarios_kernels.poison,
        full=Size(jobs=500, rounds=6),
        quick=Size(jobs=200, rounds=2, settings=_BRISK),
        tested=Size(jobs=100, rounds=1, settings=_BRISK),
    ),
    Scenario(
        "device_lost",
        scenarios_kernels.device_lost,
        full=Size(jobs=1_000, rounds=6),
        quick=Size(jobs=300, rounds=2, settings=_BRISK),
        tested=Size(jobs=120, rounds=1, settings=_BRISK),
    ),
    Scenario(
        "device_memory",
        scenarios_kernels.out_of_device_memory,
        full=Size(jobs=2_000, rounds=8),
        quick=Size(jobs=400, rounds=2),
        tested=Size(jobs=120, rounds=1, settings=_BRISK),
    ),
    Scenario(
        "hang",
        scenarios_kernels.hang,
        full=Size(jobs=400, rounds=4),
        quick=Size(jobs=100, rounds=1, settings=_BRISK),
    ),
    Scenario(
        "duplicate_submits",
        scenarios_doors.duplicates,
        full=Size(jobs=50, rounds=20),
        quick=Size(jobs=50, rounds=4),
    ),
    Scenario(
        "eta_storm",
        scenarios_doors.eta_storm,
        full=Size(jobs=10_000, rounds=50, seconds=8),
        quick=Size(jobs=2_000, rounds=20, seconds=4),
    ),
    Scenario(
        "overflow",
        scenarios_doors.overflow,
        full=Size(jobs=40_000),
        quick=Size(jobs=8_000),
    ),
    Scenario(
        "large_arrays",
        scenarios_blobs.storm,
        full=Size(jobs=200, rounds=18),
        quick=Size(jobs=60, rounds=6, settings=_BRISK),
        tested=Size(jobs=30, rounds=3, settings=_BRISK),
    ),
    Scenario(
        "carried_state",
        scenarios_workers.carried_state,
        full=Size(jobs=4_000, rounds=24),
        quick=Size(jobs=800, rounds=6, settings=_BRISK),
        tested=Size(jobs=300, rounds=3, settings=_BRISK),
    ),
    Scenario("malformed", scenarios_doors.malformed, full=Size(jobs=2_000, rounds=5), quick=Size(jobs=300, rounds=1)),
)
TESTED = tuple(scenario for scenario in SCENARIOS if scenario.tested is not None)
