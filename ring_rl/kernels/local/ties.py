"""How a strategy hides a transfer behind a block: by tying what is in flight to the block's raw results."""

from collections.abc import Callable

from ring_rl.typing import Array

# A block applies it to the results of its products before anything else is done with them. A scheduler puts a
# transfer's start as late as whatever comes before its end still seems to cover it. With a barrier behind the block,
# transposes and sums are cover enough, and the transfer starts after the products; tied here, they lie between.
Tie = Callable[[tuple[Array, ...]], tuple[Array, ...]]


def untied(results: tuple[Array, ...]) -> tuple[Array, ...]:
    """Nothing is in flight."""
    return results
