"""What a stretch of tokens brings to attention: as queries, as keys, and as queries in backward.

Everything here is an array with the batch first, so that stretches of tokens are cut, joined and sent alike; heads
come before tokens, so that a head's tokens are one stretch of memory. Fields that an attention does not use are None.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from ring_rl.typing import Array, Float, Float32, Int32, UInt32


class Queries(NamedTuple):
    """The side that looks.

    Attributes:
        q: Queries.
        positions: Global positions; b is 1 where all rows of the batch agree, else B.
        segment_ids: Documents of a packed batch.
        slopes: ALiBi's factor of each head; b as for positions.
        row_bits: Random bits of each query row, from which dropout of its weights is derived (`dropout.py`).
    """

    q: Float[Array, "B H T D"]
    positions: Int32[Array, "b T"]
    segment_ids: Int32[Array, "B T"] | None = None
    slopes: Float32[Array, "b H"] | None = None
    row_bits: UInt32[Array, "B H T"] | None = None

    def between(self, start: int, stop: int) -> "Queries":
        """The queries `start` to `stop`."""
        cut = slice(start, stop)
        return Queries(
            self.q[:, :, cut],
            self.positions[:, cut],
            None if self.segment_ids is None else self.segment_ids[:, cut],
            self.slopes,
            None if self.row_bits is None else self.row_bits[:, :, cut],
        )


class Keys(NamedTuple):
    """The side that is looked at; positions and segments as in `Queries`."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    positions: Int32[Array, "b S"]
    segment_ids: Int32[Array, "B S"] | None = None

    def between(self, start: int, stop: int) -> "Keys":
        """The keys `start` to `stop`."""
        cut = slice(start, stop)
        segment_ids = None if self.segment_ids is None else self.segment_ids[:, cut]
        return Keys(self.k[:, :, cut], self.v[:, :, cut], self.positions[:, cut], segment_ids)


class Cotangents(NamedTuple):
    """What backward needs of the queries' side besides; all of it global, over every key of the sequence.

    Attributes:
        out: Attention's output.
        log_sum_exp: Natural base; +inf where a row saw nothing, so that its weights are exp(s - inf) = 0.
        d_out: Gradient of the loss in `out`.
        delta: Σ_d out d_out - d_log_sum_exp.
    """

    out: Float[Array, "B H T D"]
    log_sum_exp: Float32[Array, "B H T"]
    d_out: Float[Array, "B H T D"]
    delta: Float32[Array, "B H T"]

    def between(self, start: int, stop: int) -> "Cotangents":
        """Those of the queries `start` to `stop`."""
        cut = slice(start, stop)
        return Cotangents(*(x[:, :, cut] for x in self))


Stretch = TypeVar("Stretch", Queries, Keys, Cotangents)


def stack_batches(first: Stretch, second: Stretch) -> Stretch:
    """Two stretches of equal length as one of twice the batch."""
    batch = first[0].shape[0]

    def both(a: Array, b: Array) -> Array:
        # A row that stood for the whole batch (positions, slopes) no longer does.
        whole = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:]))  # noqa: E731
        return jnp.concatenate([whole(a), whole(b)])

    return jax.tree.map(both, first, second)


def select(condition: Array, first: Stretch, second: Stretch) -> Stretch:
    """`first` where the scalar `condition` holds, else `second`; both are computed, nothing branches."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)
