"""The one place where partial results of attention merge.

Attention over a set of keys is summarised by (out, log_sum_exp): the normalised output and the log of the
softmax's denominator. Over disjoint sets of keys A and B,

    m    = max(lse_A, lse_B)
    l    = e^(lse_A - m) + e^(lse_B - m)
    out  = (e^(lse_A - m) out_A + e^(lse_B - m) out_B) / l
    lse  = m + log l

A `Partial` keeps the numerator and l apart, so that any number of merges is followed by one division, and
rounding does not pile up with the number of blocks. All of it is float32.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ring_rl.typing import Array, Float32


class Partial(NamedTuple):
    """A softmax in progress; -inf maxima and zero sums stand for rows that have seen no key yet."""

    numerator: Float32[Array, "B H T D"]
    maximum: Float32[Array, "B H T"]
    denominator: Float32[Array, "B H T"]


def begin(out: Float32[Array, "B H T D"], log_sum_exp: Float32[Array, "B H T"]) -> Partial:
    """The Partial of one block's result."""
    seen_BHT = log_sum_exp > -jnp.inf
    # A block reports 0 for a row that sees nothing, but a discarded block may hold anything: select, not multiply.
    return Partial(
        numerator=jnp.where(seen_BHT[..., None], out, 0.0),
        maximum=log_sum_exp,
        denominator=seen_BHT.astype(jnp.float32),
    )


def merge(partial: Partial, out: Float32[Array, "B H T D"], log_sum_exp: Float32[Array, "B H T"]) -> Partial:
    """`partial` extended by a block over other keys. A block with log_sum_exp = -inf changes nothing."""
    maximum_BHT = jnp.maximum(partial.maximum, log_sum_exp)
    # -inf - -inf is NaN; a row that has seen nothing needs weights of zero, which any finite maximum gives.
    finite_BHT = jnp.where(maximum_BHT > -jnp.inf, maximum_BHT, 0.0)
    kept_BHT = jnp.exp(partial.maximum - finite_BHT)
    added_BHT = jnp.exp(log_sum_exp - finite_BHT)
    return Partial(
        numerator=kept_BHT[..., None] * partial.numerator + added_BHT[..., None] * out,
        maximum=maximum_BHT,
        denominator=kept_BHT * partial.denominator + added_BHT,
    )


def finish(partial: Partial) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
    """(out, log_sum_exp) of everything merged; rows that saw nothing give out = 0 and log_sum_exp = -inf."""
    seen_BHT = partial.denominator > 0
    divisor_BHT = jnp.where(seen_BHT, partial.denominator, 1.0)
    out_BTHD = partial.numerator / divisor_BHT[..., None]
    return out_BTHD, jnp.where(seen_BHT, partial.maximum + jnp.log(divisor_BHT), -jnp.inf)


def where_seen(condition: Array, log_sum_exp: Float32[Array, "B H T"]) -> Float32[Array, "B H T"]:
    """`log_sum_exp` where `condition` holds, else that of a block nobody sees, so that merging it is a no-op."""
    return jnp.where(condition, log_sum_exp, -jnp.inf)
