"""What may attend to what: one description for every strategy, layout and local block.

A `Mask` is a rule over global positions, known when a program is compiled. Packing is data: segment ids, one a
token, are passed beside the mask and combine with any of them. A query at position p in segment a sees a key at
position s in segment b if all of these hold:

    causal              s // causal_block_size <= p // causal_block_size
    window W            p - s < W, and s - p < W where the mask is not causal
    segments            a = b and a >= 0

With causal_block_size = 1 the first line is plain causality; larger blocks see themselves in full, as prefixes and
frames do. Tokens with a negative segment id are padding: they see nothing and nobody sees them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ring_rl.typing import Array, Bool, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees, as a function of global positions and of nothing else.

    Attributes:
        causal: A query sees no key of a later block of positions; otherwise the order does not matter.
        causal_block_size: Length of the blocks that causality is about; 1 is token by token.
        window: How many positions back a query sees, itself included; None is all of them. Without `causal` it
            sees as many ahead.
    """

    causal: bool
    causal_block_size: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        if self.causal_block_size < 1:
            raise ValueError(f"causal_block_size must be at least 1 token, got {self.causal_block_size}")
        if self.causal_block_size > 1 and not self.causal:
            raise ValueError(f"causal_block_size={self.causal_block_size} means nothing without causal=True")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token (the query's own), got {self.window}")

    @property
    def needs_positions(self) -> bool:
        """Whether anything is hidden by position."""
        return self.causal or self.window is not None

    def reach(self) -> tuple[int | None, int | None]:
        """How many positions (back, ahead) of itself a query can see at most; None is without limit."""
        back = None if self.window is None else self.window - 1
        return back, self.causal_block_size - 1 if self.causal else back


FULL = Mask(causal=False)
CAUSAL = Mask(causal=True)


def visible(
    mask: Mask,
    query_positions: Int[Array | np.ndarray, "*b T"],
    key_positions: Int[Array | np.ndarray, "*b S"],
    query_segments: Int[Array | np.ndarray, "*b T"] | None = None,
    key_segments: Int[Array | np.ndarray, "*b S"] | None = None,
) -> Bool[Array, "*b T S"]:
    """The dense mask: entry (t, s) is true where query t sees key s. O(T S) memory.

    Raises:
        ValueError: Only one of the two segment ids is given.
    """
    if (query_segments is None) != (key_segments is None):
        raise ValueError("segment ids are needed for queries and keys alike, or for neither")
    p, s = query_positions[..., :, None], key_positions[..., None, :]
    shown = jnp.ones(jnp.broadcast_shapes(p.shape, s.shape), bool)
    if mask.causal:
        shown &= s // mask.causal_block_size <= p // mask.causal_block_size
    if mask.window is not None:
        shown &= p - s < mask.window
        if not mask.causal:
            shown &= s - p < mask.window
    if query_segments is not None and key_segments is not None:
        a, b = query_segments[..., :, None], key_segments[..., None, :]
        shown = shown & (a == b) & (a >= 0)
    return shown
