"""The longest context that fits, in few probes: each of them is a compilation of minutes.

Memory is close to affine in the tokens of a device (with dense attention, in their square), so two probes foretell the
rest; but the answer is only one once it was seen to fit, and the next longer context not to. A compiler refuses what
does not fit within seconds, and says what it wanted: so the search comes from above, where it can.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Limit", "Probe", "known_limit", "longest_that_fits", "next_length", "token_grid"]

# Of a curve that is what it should be a handful of probes is enough; of any other, halving ends the search.
_FORETOLD_PROBES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What is known of one length.

    Attributes:
        fits: Whether a device holds it.
        needed_bytes: What it takes; None where nobody knows.
    """

    fits: bool
    needed_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """Where fitting ends.

    Attributes:
        longest: The longest length that fits; None where the shortest does not.
        shortest_failing: The next one, which does not; None where all of them fit.
    """

    longest: int | None
    shortest_failing: int | None


def token_grid(*, quantum: int, largest: int, significant_bits: int) -> list[int]:
    """Multiples of `quantum` up to `largest`, ascending, in steps that grow with them.

    A multiple is b x 2^k with b below 2^significant_bits, so that steps are 1 / 2^significant_bits to
    2 / 2^significant_bits of a length and every length is a multiple of many powers of two.

    Raises:
        ValueError: A number is below 1, or `largest` below `quantum`.
    """
    if min(quantum, significant_bits) < 1:
        raise ValueError(f"quantum and significant_bits must be at least 1, got {quantum} and {significant_bits}")
    if largest < quantum:
        raise ValueError(f"the largest length, {largest}, must be at least the quantum, {quantum}")
    lengths, multiple = [], 1
    while multiple * quantum <= largest:
        lengths.append(multiple * quantum)
        multiple += 1 << max(0, multiple.bit_length() - significant_bits)
    return lengths


def longest_that_fits(
    lengths: Sequence[int],
    probe: Callable[[int], Probe],
    *,
    start: int,
    memory_bytes: int,
    fixed_bytes: int,
    degree: int,
) -> Limit:
    """Probes until the longest of `lengths` that fits is known, and the next longer one not to fit.

    See `next_length`.
    """
    known: dict[int, Probe] = {}
    while (
        length := next_length(
            lengths, known, start=start, memory_bytes=memory_bytes, fixed_bytes=fixed_bytes, degree=degree
        )
    ) is not None:
        known[length] = probe(length)
    return known_limit(lengths, known)


def next_length(
    lengths: Sequence[int],
    known: Mapping[int, Probe],
    *,
    start: int,
    memory_bytes: int,
    fixed_bytes: int,
    degree: int,
) -> int | None:
    """Which length to probe now; None once the limit is known. A function of what is known, so a search can go on.

    Args:
        lengths: Ascending.
        known: Probes so far; of lengths that are not among `lengths` nothing is learnt.
        start: Where to begin; the nearest length from below is taken.
        memory_bytes: Of a device.
        fixed_bytes: What every length needs, at least: parameters and their moments.
        degree: Bytes are about a + b tokens^degree.

    Raises:
        ValueError: There are no lengths, or they don't ascend.
    """
    if not lengths or any(a >= b for a, b in itertools.pairwise(lengths)):
        raise ValueError("lengths to search must ascend, and there must be one")
    low, high = _bracket(lengths, known)
    if high - low <= 1:
        return None
    tried = [lengths.index(length) for length in known if length in lengths]
    if not tried:
        index = bisect.bisect_right(lengths, start) - 1
    elif len(tried) >= _FORETOLD_PROBES:
        # Without an upper end, further and further up.
        index = (low + high) // 2 if high < len(lengths) else 2 * low + 1
    else:
        foretold = _foretold(lengths, known, memory_bytes=memory_bytes, fixed_bytes=fixed_bytes, degree=degree)
        # The first that is foretold not to fit; once it was seen not to, the one below it.
        index = (low + high) // 2 if foretold is None else bisect.bisect_right(lengths, foretold)
    return lengths[min(max(index, low + 1), high - 1)]


def known_limit(lengths: Sequence[int], known: Mapping[int, Probe]) -> Limit:
    """The limit as far as it is known: final where `next_length` is None."""
    low, high = _bracket(lengths, known)
    return Limit(
        longest=lengths[low] if low >= 0 else None,
        shortest_failing=lengths[high] if high < len(lengths) else None,
    )


def _bracket(lengths: Sequence[int], known: Mapping[int, Probe]) -> tuple[int, int]:
    """Indices of the longest that fits, or -1, and of the shortest that does not, or their number."""
    failing = [i for i, length in enumerate(lengths) if length in known and not known[length].fits]
    high = min(failing, default=len(lengths))
    fitting = [i for i, length in enumerate(lengths[:high]) if length in known and known[length].fits]
    return max(fitting, default=-1), high


def _foretold(
    lengths: Sequence[int], known: Mapping[int, Probe], *, memory_bytes: int, fixed_bytes: int, degree: int
) -> float | None:
    """The length at which the memory is full, by a line in tokens^degree; None where no line can be drawn."""
    sized = {length: each.needed_bytes for length, each in known.items() if length in lengths and each.needed_bytes}
    fitting = sorted(length for length in sized if known[length].fits)
    failing = sorted(length for length in sized if not known[length].fits)
    # What a compiler says of a program that it refused is less to be trusted.
    chosen = fitting[-2:] if len(fitting) > 1 else [*fitting[-1:], *failing[: 2 - len(fitting)]]
    if not chosen:
        return None
    if len(chosen) == 1:
        (x, y), (x0, y0) = (chosen[0] ** degree, sized[chosen[0]]), (0, fixed_bytes)
    else:
        (x0, y0), (x, y) = ((length**degree, sized[length]) for length in chosen)
    if y <= y0:
        return None
    crossing = x0 + (memory_bytes - y0) * (x - x0) / (y - y0)
    return max(crossing, 0.0) ** (1 / degree)
