"""What may attend to what."""

import dataclasses

import jax.numpy as jnp

from ring_rl.typing import Array, Bool, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees, as a function of global positions and of nothing else.

    Attributes:
        causal: A query at position p sees keys at positions <= p; otherwise it sees every key.
    """

    causal: bool


FULL = Mask(causal=False)
CAUSAL = Mask(causal=True)


def visible(mask: Mask, query_positions: Int[Array, " T"], key_positions: Int[Array, " S"]) -> Bool[Array, "T S"]:
    """The dense mask: entry (t, s) is true where query t sees key s. O(T S) memory; for references and tests."""
    if mask.causal:
        return query_positions[:, None] >= key_positions[None, :]
    return jnp.ones((query_positions.shape[0], key_positions.shape[0]), bool)
