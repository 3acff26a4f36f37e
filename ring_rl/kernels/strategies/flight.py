"""Transfers under way, and the work that hides them."""

from jax import lax

from ring_rl.typing import Array


class InFlight:
    """What has been sent and is not needed before a certain block is done.

    A scheduler that hides transfers starts each as late as it thinks is enough, and takes all work before the arrival
    for cover: the merging and reshaping after a block, too, which hides nothing. So what is in flight is tied to the
    bare results of the block's products, before anything is made of them; then the products lie between start and
    arrival. Exists while a program is traced, and only there.

    Attributes:
        arrays: What arrives; from after the block that `tie` was given to.
    """

    def __init__(self, arrays):
        self.arrays = arrays

    def tie(self, results: tuple[Array, ...]) -> tuple[Array, ...]:
        """`results`, and nothing in flight is read before they are there; for `LocalBlock`'s argument `tie`."""
        self.arrays, results = lax.optimization_barrier((self.arrays, results))
        return results
