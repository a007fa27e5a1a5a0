"""The Scheduler: tasks and resources described by hand, placed by the policies that the router uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

from lepton_ai.errors import InvalidArguments
from lepton_ai.placement import gantt, policies
from lepton_ai.placement.demand import Demand
from lepton_ai.placement.fields import meant
from lepton_ai.placement.schedule import Explanation, Schedule
from lepton_ai.placement.supply import Supply

if TYPE_CHECKING:
    import altair as alt

__all__ = ["Scheduler"]


class Scheduler:
    """Which task runs on which resource. Nothing is run: it is the plan alone, and needs no broker.

    A resource or task that comes or goes makes the strategy out of date; whatever asks for it next works it out again.
    What is asked while there are tasks and no resource is refused with InvalidArguments.
    """

    def __init__(self, policy: str = "auto", **options: Any) -> None:
        """`policy` is a file of `lepton_ai/placement/policies`, `options` what it takes (`seed=1` of `genetic`)."""
        self._policy = policies.load(policy, **options)
        self._supplies: dict[str, Supply] = {}
        self._demands: dict[str, Demand] = {}
        self._schedule: Schedule | None = None

    def add_resource(self, name: str, resource: Mapping[str, Any]) -> None:
        """`{'used': 0.4, 'total': 1.0}`, in any unit.

        Optionally `kind` (else it is read from the name), `speed`, `slots`, `memory_bytes`, `bandwidth`, `rate`.
        InvalidArguments names the field that is missing, unknown or wrong, or the name that is taken.
        """
        _new("resource", name, self._supplies)
        self._supplies[name] = Supply.read(name, resource)
        self._schedule = None

    def add_task(self, name: str, task: Mapping[str, Any]) -> None:
        """`{'type': 'high', 'priority': 1}`: the type is high, medium or low, and priority 1 goes first.

        Optionally `seconds` (then the type may be left out), `size`, `size_bytes`, `memory_bytes`, `deadline_s`,
        `device`. InvalidArguments as for a resource.
        """
        _new("task", name, self._demands)
        self._demands[name] = Demand.read(name, task)
        self._schedule = None

    def remove_resource(self, name: str) -> None:
        """Take a resource away, to end with it or to add it again in another state."""
        del self._supplies[_known("resource", name, self._supplies)]
        self._schedule = None

    def remove_task(self, name: str) -> None:
        """Take a task away."""
        del self._demands[_known("task", name, self._demands)]
        self._schedule = None

    def calculate_strategy(self) -> None:
        """Place all tasks."""
        if self._demands and not self._supplies:
            raise InvalidArguments("there are tasks and no resource to run them: add_resource() first", "resource")
        self._schedule = Schedule(tuple(self._supplies.values()), tuple(self._demands.values()), self._policy)

    def get_strategy(self) -> dict[str, dict[str, str | None]]:
        """Resource and status of each task: `processing`, or None and `waiting` where no resource can run it."""
        found = {task: self._calculated.resource(task) for task in self._demands}
        return {
            task: {"resource": resource, "status": "waiting" if resource is None else "processing"}
            for task, resource in found.items()
        }

    @overload
    def explain(self, task: str) -> Explanation: ...
    @overload
    def explain(self, task: None = None) -> dict[str, Explanation]: ...
    def explain(self, task: str | None = None) -> Explanation | dict[str, Explanation]:
        """Why a task goes where it does and what it would have cost elsewhere; without a name, so for every task."""
        if task is not None:
            return self._calculated.explain(_known("task", task, self._demands))
        return {each: self._calculated.explain(each) for each in self._demands}

    def utilization(self) -> dict[str, float]:
        """The share of the makespan in which each resource works on these tasks, 0 to 1."""
        return self._calculated.utilization()

    @property
    def makespan_s(self) -> float:
        """Seconds until the last placed task has ended."""
        return self._calculated.makespan_s

    @property
    def cost(self) -> float:
        """What the placed tasks cost, in the unit of the resources' `rate`s; 0 where none has one."""
        return self._calculated.cost

    @property
    def lower_bound_s(self) -> float:
        """Seconds below which no strategy's makespan can be."""
        return self._calculated.lower_bound_s

    def plot(self) -> alt.Chart:
        """A Gantt chart; MissingPackage without `lepton-ai[plot]`."""
        return gantt.chart(self._calculated)

    def _repr_html_(self) -> str:
        # A notebook shows whatever a cell ends with, also before there is anything to place.
        if self._demands and not self._supplies:
            return "<p>Tasks, and no resource to run them yet.</p>"
        return gantt.table(self._calculated)

    @property
    def _calculated(self) -> Schedule:
        if self._schedule is None:
            self.calculate_strategy()
        assert self._schedule is not None
        return self._schedule


def _new(what: str, name: Any, known: dict[str, Any]) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidArguments(f"the name of a {what} must be a text with something in it, not {name!r}", "name")
    if name in known:
        raise InvalidArguments(
            f"there is a {what} {name!r} already: choose another name, or remove_{what}({name!r}) first", "name"
        )


def _known(what: str, name: Any, known: dict[str, Any]) -> str:
    if not isinstance(name, str) or name not in known:
        raise InvalidArguments(f"no {what} {name!r}; {meant(str(name), known)}", "name")
    return name
