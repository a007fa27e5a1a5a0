"""Which task on which resource: described by hand, placed by the router's policies, and explained.

Run: `python examples/scheduler.py [policy]`. It needs no running Lepton.
"""

import sys

from lepton_ai import Scheduler

scheduler = Scheduler(*sys.argv[1:2])
scheduler.add_resource("CPU", {"used": 0.4, "total": 1.0})
scheduler.add_resource("GPU", {"used": 0.6, "total": 1.0})
scheduler.add_resource("FPGA", {"used": 0.2, "total": 1.0})
scheduler.add_task("TaskA", {"type": "high", "priority": 1})
scheduler.add_task("TaskB", {"type": "medium", "priority": 2})
scheduler.add_task("TaskC", {"type": "low", "priority": 3})
scheduler.calculate_strategy()
print(scheduler.get_strategy())

for task, why in scheduler.explain().items():
    print(f"{task}: {why.reason}")
print(f"all done after {scheduler.makespan_s:.2f} s; no strategy needs less than {scheduler.lower_bound_s:.2f} s")
