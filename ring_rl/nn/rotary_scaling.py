"""The frequencies of rotary positions, and the published ways to slow them down for contexts beyond the trained one.

A model whose pairs of dimensions turn by position · f_d reads contexts it was not trained on when all or some of its
f_d are lowered. Everything here is float64 on the host, a few numbers a model.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

from ring_rl.typing import Float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions interpolated (arXiv:2306.15595): every frequency divided by `factor`.

    Attributes:
        name: Tells the kinds of scaling apart.
        factor: At least 1.
    """

    name: Literal["linear"]
    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's rule (arXiv:2407.21783): slow frequencies divided by `factor`, fast ones kept, a ramp between.

    A pair that makes `original_positions` · f / 2π turns over the original context is slow below
    `low_frequency_factor` turns and fast above `high_frequency_factor`.

    Attributes:
        name: Tells the kinds of scaling apart.
        factor: At least 1.
        low_frequency_factor: In turns.
        high_frequency_factor: In turns, above `low_frequency_factor`.
        original_positions: Tokens of the context before it was extended.
    """

    name: Literal["llama3"]
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original_positions(self.original_positions)
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                "rotary_scaling needs 0 < low_frequency_factor < high_frequency_factor, got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): a ramp over the dimensions from kept to divided frequencies, and sharper attention.

    The ramp begins at the pair that makes `beta_fast` turns over the original context and ends at the one that makes
    `beta_slow`, both rounded outwards to whole pairs. Queries and keys are both multiplied by `attention_factor`.

    Attributes:
        name: Tells the kinds of scaling apart.
        factor: At least 1.
        original_positions: Tokens of the context before it was extended.
        beta_fast: In turns; 32 in the paper.
        beta_slow: In turns; 1 in the paper.
        attention_factor: None is the paper's 0.1 ln(factor) + 1.
    """

    name: Literal["yarn"]
    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float | None

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original_positions(self.original_positions)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"rotary_scaling needs 0 < beta_slow < beta_fast, got {self.beta_slow} and {self.beta_fast}"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(
                f"rotary_scaling.attention_factor must be positive, got {self.attention_factor}; null derives it"
            )


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling


class Frequencies(NamedTuple):
    """What positions turn by.

    Attributes:
        per_position: f_d, radians a position, for each of the pairs of dimensions that turn.
        magnitude: What queries and keys are multiplied by besides.
    """

    per_position: Float64[np.ndarray, " d"]
    magnitude: float


def rotary_frequencies(*, rotary_dim: int, base: float, scaling: RotaryScaling | None) -> Frequencies:
    """base^(-2d / rotary_dim) for d < rotary_dim / 2, then scaled."""
    plain = float(base) ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    match scaling:
        case None:
            return Frequencies(plain, 1.0)
        case LinearScaling():
            return Frequencies(plain / scaling.factor, 1.0)
        case Llama3Scaling():
            turns = scaling.original_positions * plain / (2 * math.pi)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return Frequencies(kept * plain + (1 - kept) * plain / scaling.factor, 1.0)
        case YarnScaling():
            return _yarn(plain, scaling, rotary_dim=rotary_dim, base=base)


def _yarn(plain: np.ndarray, scaling: YarnScaling, *, rotary_dim: int, base: float) -> Frequencies:
    def pair_that_turns(count: float) -> float:
        return rotary_dim * math.log(scaling.original_positions / (count * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), rotary_dim - 1)
    # Published models were trained with this width of a ramp that begins where it ends.
    width = last - first if last != first else 0.001
    divided = np.clip((np.arange(rotary_dim // 2) - first) / width, 0.0, 1.0)
    magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(scaling.factor) + 1.0
    return Frequencies((1 - divided) * plain + divided * plain / scaling.factor, magnitude)


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f"rotary_scaling.factor must be at least 1, got {factor}; rotary_scaling=null scales nothing")


def _check_original_positions(positions: int) -> None:
    if positions < 1:
        raise ValueError(f"rotary_scaling.original_positions must be at least 1, got {positions}")
