"""When a stage of training has learned enough to be over before its last step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

__all__ = ["AdvanceWhen", "Milestone"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvanceWhen:
    """What a stage must reach.

    Attributes:
        metric: one of the step's own metrics, such as "answer_accuracy" or "loss".
        above: the least mean of it; for a metric that falls, such as "loss", give `below`.
        below: the largest mean of it; exactly one of the two is given.
        over_steps: steps that the mean is taken over. Blocks of so many steps do not overlap, so the decision falls
            at every `over_steps`-th step of the stage, whatever else is logged or saved there.
    """

    metric: str
    above: float | None
    below: float | None
    over_steps: int

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise ValueError(
                f"advance_when needs either above or below, got above={self.above} below={self.below}; "
                f"set the other one to null"
            )
        if self.over_steps < 1:
            raise ValueError(f"over_steps must be at least 1, got {self.over_steps}")

    def holds(self, mean: float) -> bool:
        """Whether a mean is good enough; NaN never is."""
        return mean >= self.above if self.above is not None else mean <= (self.below or 0.0)


class Milestone:
    """Watches the metrics of a stage, step by step.

    Args:
        config: what is to be reached; None is never reached.
        first_step: the step that the stage began after.
        minimum_steps: of the stage, however good it is.
        observed: what `observed` held when the stage was saved; a resumed stage then decides as one that was never
            interrupted.
    """

    def __init__(
        self, config: AdvanceWhen | None, *, first_step: int, minimum_steps: int, observed: Iterable[float] = ()
    ):
        self._config, self._first_step, self._minimum_steps = config, first_step, minimum_steps
        self._observed = [float(value) for value in observed]

    @property
    def observed(self) -> list[float]:
        """Values of the block of steps that is under way, or has just ended."""
        return list(self._observed)

    def due(self, step: int) -> bool:
        """Whether a block of steps ends after `step`, so that its metrics are needed now."""
        return self._config is not None and (step - self._first_step) % self._config.over_steps == 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics after `step`; every step of the stage, in order.

        Raises:
            ValueError: there is no such metric.
        """
        if self._config is None:
            return
        if self._config.metric not in metrics:
            raise ValueError(
                f"there is no metric {self._config.metric} for advance_when; choose one of {', '.join(sorted(metrics))}"
            )
        if (step - 1 - self._first_step) % self._config.over_steps == 0:
            self._observed = []
        self._observed.append(float(metrics[self._config.metric]))

    def reached(self, step: int) -> bool:
        """Whether the block that ended after `step` was good enough, and the stage long enough."""
        if self._config is None or not self.due(step) or step - self._first_step < self._minimum_steps:
            return False
        if len(self._observed) < self._config.over_steps:
            return False
        return self._config.holds(math.fsum(self._observed) / len(self._observed))
