"""How many compilations a table still takes, and how long: from earlier ones, or else from an expectation."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence

from ring_rl.planning.compiled_step import CompiledMemory
from ring_rl.planning.limits import EXPECTED_PROBES, Cell, CellResult, LimitsConfig, Plan
from ring_rl.planning.probe_cache import ProbeCache

__all__ = ["Forecast", "duration"]


class Forecast:
    """Counts what is left while a table is made; safe for threads.

    A cell is expected to take `EXPECTED_PROBES` probes, and at least one more while it is not done. A probe is expected
    to take what the median one on the same machine took, else the median one of this file of probes, else
    `expected_seconds`.

    Args:
        plans: The cells.
        cache: What is known.
        expected_seconds: Of a compilation, where none was timed.
    """

    def __init__(self, plans: Sequence[Plan], cache: ProbeCache, *, expected_seconds: float):
        self.plans = list(plans)
        self.done = 0
        self._expected_seconds, self._lock = expected_seconds, threading.Lock()
        self._seconds: dict[str, list[float]] = {}
        self._left: dict[Cell, int] = {}
        self.known = 0
        for plan in plans:
            known = plan.known(cache)
            self.known += len(known)
            for memory in known.values():
                self._timed(plan, memory)
            if plan.next(known) is not None:
                self._left[plan.cell] = max(min(EXPECTED_PROBES, len(plan.lengths)) - len(known), 1)
        self._machine_of = {plan.cell: plan.cell.row.machine for plan in plans}

    @property
    def remaining(self) -> int:
        """Compilations still expected."""
        return sum(self._left.values())

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
            every = [each for of_machine in self._seconds.values() for each in of_machine]
            otherwise = statistics.median(every) if every else self._expected_seconds
            return sum(
                count * statistics.median(self._seconds.get(self._machine_of[cell], [otherwise]))
                for cell, count in self._left.items()
            )

    def compiled(self, plan: Plan, memory: CompiledMemory) -> None:
        """Takes note of a new answer."""
        with self._lock:
            self.done += 1
            self._timed(plan, memory)
            self._left[plan.cell] = max(self._left.get(plan.cell, 1) - 1, 1)

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
        self._seconds.setdefault(plan.cell.row.machine, []).append(seconds)


def duration(seconds: float) -> str:
    """ "2 h 05 min", "12 min" or "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
