"""A producer that can be killed: `python producer.py BROKER FIRST JOBS` submits numbered jobs with large arrays.

Says `acknowledged ID NUMBER` of each that was, and waits for the oldest while a few are open.
"""

from __future__ import annotations

import sys
from collections import deque

import numpy as np

from lepton_ai import Client, JobHandle

_OPEN = 8
_ELEMENTS = 256 * 1024


def main() -> None:
    url, first, jobs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    waiting: deque[JobHandle] = deque()
    with Client(url) as client:
        for number in range(first, first + jobs):
            data = np.full(_ELEMENTS, number, np.float32)
            waiting.append(client.submit("fault.large", {"n": number, "ms": 20, "data": data}))
            print("acknowledged", waiting[-1].id, number, flush=True)
            while len(waiting) > _OPEN:
                waiting.popleft().result(timeout=60)
        for job in waiting:
            job.result(timeout=60)
    print("done", flush=True)


if __name__ == "__main__":
    main()
