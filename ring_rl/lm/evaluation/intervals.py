"""How far a share of right answers can be trusted."""

from __future__ import annotations

import dataclasses
import math

from scipy import stats

from ring_rl.training.statistics import CONFIDENCE

__all__ = ["Proportion", "wilson"]


@dataclasses.dataclass(frozen=True)
class Proportion:
    """A share of `count` trials and its 95% Wilson interval; `f"{share:.2f}"` formats all alike: `0.90 [0.79, 0.96]`.

    Attributes:
        value: successes / count.
        low: Lower end of the interval.
        high: Upper end.
        count: Trials n.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return format(self, ".2f")

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def wilson(successes: float, count: int) -> Proportion:
    """The 95% interval of Wilson (1927), which stays inside [0, 1] and is honest where all or none succeed.

    With p = successes / n and z = 1.96 its ends are (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        successes: Right answers. Scores between 0 and 1 may be added up: their variance is at most that of right and
            wrong ones with the same mean, so the interval is then too wide rather than too narrow.
        count: Trials n.

    Raises:
        ValueError: No trial, or more successes than trials.
    """
    if count < 1:
        raise ValueError(f"a share needs at least one trial, got {count}")
    if not 0 <= successes <= count:
        raise ValueError(f"successes must lie between 0 and the {count} trials, got {successes}")
    share, z = successes / count, float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    center = share + z**2 / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # Rounding may carry an end past the share that it lies at.
    return Proportion(
        share, min(max(0.0, (center - reach) / scale), share), max(min(1.0, (center + reach) / scale), share), count
    )
