"""How many compilations a table still takes, and how long: from earlier ones, or else from an expectation."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping, Sequence

from ring_rl.planning.compiled_step import CompiledMemory
from ring_rl.planning.limits import Cell, CellResult, LimitsConfig, Plan
from ring_rl.planning.probe_cache import ProbeCache

__all__ = ["Forecast", "duration"]

# Of a cell that nothing is known of, (compiled to the end, refused): TPU compilers refuse what does not fit, those for
# CPU devices compile everything. In the paper's table cells took (1 to 3, 1 to 2) and (2 to 4, 0).
_PROBES_OF_A_SLICE, _PROBES_OF_A_NODE = (2, 2), (3, 0)
# Seconds of a refusal over those of a compilation to the end, until refusals have been timed.
_REFUSAL_SHARE = 0.05


class Forecast:
    """Counts what is left while a table is made; safe for threads.

    A TPU compiler refuses within seconds and compiles what fits for minutes, so these are counted and timed apart. A
    probe is expected to take the mean of its sort on the same machine, else on machines of the same kind (slices of
    TPUs, or CPU devices that stand for GPUs), else what was expected. A cell that is not done takes at least one more.

    Args:
        plans: The cells.
        cache: What is known.
        expected_seconds: Of a compilation for TPUs, to its end, where none was timed.
        expected_gpu_seconds: Of one for CPU devices that stand for GPUs.
    """

    def __init__(
        self, plans: Sequence[Plan], cache: ProbeCache, *, expected_seconds: float, expected_gpu_seconds: float
    ):
        self.plans = list(plans)
        self.done = 0
        # By whether machines are estimated.
        self._expected_seconds, self._lock = {False: expected_seconds, True: expected_gpu_seconds}, threading.Lock()
        # By machine, and whether the compiler refused.
        self._seconds: dict[tuple[str, bool], list[float]] = {}
        self._left: dict[Cell, tuple[int, int]] = {}
        self._plan_of = {plan.cell: plan for plan in plans}
        self.known = 0
        for plan in plans:
            known = plan.known(cache)
            self.known += len(known)
            for memory in known.values():
                self._timed(plan, memory)
            if plan.next(known) is not None:
                self._left[plan.cell] = _expected_probes(plan, known)

    @property
    def remaining(self) -> int:
        """Compilations still expected."""
        return sum(sum(left) for left in self._left.values())

    @property
    def total(self) -> int:
        """Those done since the start, and those expected."""
        return self.done + self.remaining

    @property
    def cells_left(self) -> int:
        """Cells that are not done."""
        return len(self._left)

    def seconds(self) -> float:
        """Of all that remain, one after another."""
        with self._lock:
            return sum(
                compiled * self._mean(self._plan_of[cell], refused=False)
                + refused * self._mean(self._plan_of[cell], refused=True)
                for cell, (compiled, refused) in self._left.items()
            )

    def compiled(self, plan: Plan, memory: CompiledMemory) -> None:
        """Takes note of a new answer."""
        with self._lock:
            self.done += 1
            self._timed(plan, memory)
            compiled, refused = self._left.get(plan.cell, (1, 0))
            left = (compiled, max(refused - 1, 0)) if _refused(memory) else (max(compiled - 1, 0), refused)
            self._left[plan.cell] = left if sum(left) else (1, 0)

    def finished(self, result: CellResult) -> None:
        """Takes note that nothing more is asked about a cell."""
        with self._lock:
            self._left.pop(result.plan.cell, None)

    def left(self, processes: int) -> str:
        """In words, for so many compilers at once."""
        return f"about {duration(self.seconds() / processes)} left"

    def describe(self, config: LimitsConfig) -> str:
        """What is left before anything is begun, in a line."""
        if not self._left:
            return f"all {len(self.plans)} cells are known from {config.probes}; nothing is compiled"
        source = "timed ones" if self._seconds else config.expectation
        plural = "es" if config.processes > 1 else ""
        return (
            f"{self.cells_left} of {len(self.plans)} cells are left, about {self.remaining} compilations in "
            f"{config.processes} process{plural}: about {duration(self.seconds() / config.processes)}, by {source}; "
            f"{self.known} known from {config.probes}"
        )

    def _timed(self, plan: Plan, memory: CompiledMemory) -> None:
        seconds = memory.lower_seconds + memory.compile_seconds
        self._seconds.setdefault((plan.cell.row.machine, _refused(memory)), []).append(seconds)

    def _mean(self, plan: Plan, *, refused: bool) -> float:
        """Seconds of a probe."""
        own = self._seconds.get((plan.cell.row.machine, refused))
        if own:
            return statistics.mean(own)
        estimated = plan.machine.estimated
        kin = {each.cell.row.machine for each in self.plans if each.machine.estimated == estimated}
        alike = [each for machine in kin for each in self._seconds.get((machine, refused), [])]
        if alike:
            return statistics.mean(alike)
        return self._expected_seconds[estimated] * (_REFUSAL_SHARE if refused else 1.0)


def _refused(memory: CompiledMemory) -> bool:
    return memory.peak_bytes is None


def _expected_probes(plan: Plan, known: Mapping[int, CompiledMemory]) -> tuple[int, int]:
    """(compiled to the end, refused) that a cell still takes: at least one, at most as many as there are lengths."""
    compiled, refused = _PROBES_OF_A_NODE if plan.machine.estimated else _PROBES_OF_A_SLICE
    refusals = sum(_refused(memory) for memory in known.values())
    lengths = len(plan.lengths) - len(known)
    compiled = min(max(compiled - (len(known) - refusals), 0), lengths)
    refused = min(max(refused - refusals, 0), lengths - compiled)
    return (compiled, refused) if compiled + refused else (1, 0)


def duration(seconds: float) -> str:
    """ "2 h 05 min", "12 min" or "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
