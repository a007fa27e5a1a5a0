"""Events: what happened, in the past tense. One entry of the stream `lepton:events` holds the Events of one step.

| type             | from    | jobs | data                                                                        |
|------------------|---------|------|-----------------------------------------------------------------------------|
| job.placed       | router  | yes  | seconds: predicted time of each job; devices: how many jobs went to each    |
| job.parked       | router  | yes  | (the reason is in each job's Placement)                                     |
| job.rejected     | router  | yes  | dead: how many more were no messages (the error is in each job's result)    |
| job.succeeded    | worker  | yes  | observation of the launch (see `Observation`)                               |
| job.failed       | worker  | yes  | code, message, field: the error (see `LeptonError.to_wire`)                 |
| job.cancelled    | worker  | yes  | code, message                                                               |
| device.online    | worker  |      | worker                                                                      |
| device.heartbeat | worker  |      | state: ResourceState                                                        |
| device.offline   | worker  |      | worker                                                                      |
| kernel.refused   | worker  |      | reason (`kernel` is the kernel, or the module that was refused)             |
| router.online    | router  |      |                                                                             |
| router.offline   | router  |      |                                                                             |

The time of an event is the id of its stream entry: the server's clock, never a client's.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Event", "Observation", "decode", "encode"]


class Observation(msgspec.Struct, frozen=True):
    """What one launch taught: the measured times of a batch of `jobs` jobs of one kernel, compilation not counted.

    `flops` and `bytes` are the Work of all its jobs, `transfer_bytes` the size of their array arguments. `transfer_s`
    is everything between message and device: decoding, upload, download and encoding.
    """

    kernel: str
    device: str
    jobs: int
    flops: float
    bytes: float
    transfer_s: float
    run_s: float
    transfer_bytes: float = 0.0


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened. `source` is the incarnation of the process that saw it."""

    type: str
    source: str
    kernel: str | None = None
    device: str | None = None
    jobs: tuple[str, ...] = ()
    observation: Observation | None = None
    data: dict[str, Any] = {}


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[Event, ...])

#: The one field of a stream entry.
FIELD = b"e"


def encode(*events: Event) -> bytes:
    """The Events of one step as one stream value."""
    return _ENCODER.encode(events)


def decode(data: bytes) -> tuple[Event, ...]:
    """The Events of a stream value."""
    return _DECODER.decode(data)
