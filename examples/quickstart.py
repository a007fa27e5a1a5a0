"""One job: submit it, take its result, ask where it ran and why.

Run, with LEPTON_REDIS_URL set to the broker of a running Lepton: `python examples/quickstart.py`.
"""

import numpy as np

from lepton_ai import Client

random = np.random.default_rng(0)
a, b = random.standard_normal((512, 256), np.float32), random.standard_normal((256, 128), np.float32)

with Client() as lepton:
    job = lepton.submit("linalg.matmul", {"a": a, "b": b}, priority=7)
    c = job.result(timeout=30)["c"]
    print(f"{job.id} {job.state}: c is {c.dtype}{list(c.shape)}, {np.abs(c - a @ b).max():.1e} from NumPy's")

    placement = job.why()
    if placement is not None:
        print(f"ran on {placement.device} because {placement.reason}")
        for each in placement.candidates:
            told = each.excluded if each.estimate is None else f"{each.estimate.finish_s * 1e3:.2f} ms predicted"
            print(f"  {each.device}: {told}")
