"""What every layer is told about the tokens it works on: made once, before the layers."""

from typing import NamedTuple

import jax.numpy as jnp

from ring_rl.kernels.halo import chunks_with_previous, lagged
from ring_rl.nn.parallel import LocalParallel
from ring_rl.nn.rotary import Rotation, rotation
from ring_rl.nn.rotary_scaling import rotary_frequencies
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.typing import Array, Bool, Int

# No document has it.
_NO_DOCUMENT = -(2**31)


class TokenContext(NamedTuple):
    """Positions and documents of a device's tokens.

    Attributes:
        positions: Global, in the document where rows are packed; b is 1 where all rows agree.
        segment_ids: Documents of packed rows, or None.
        rotation: What queries and keys turn by; None where nothing turns.
        together: Whether the token 1, 2, ... back is of the same document; None where that is certain, or not asked.
    """

    positions: Int[Array, "b T"]
    segment_ids: Int[Array, "B T"] | None
    rotation: Rotation | None
    together: Bool[Array, "B T n"] | None


def token_context(
    config: TransformerConfig,
    positions: Int[Array, "b T"],
    segment_ids: Int[Array, "B T"] | None = None,
    parallel: LocalParallel | None = None,
) -> TokenContext:
    """The context of a device's tokens, inside `jax.shard_map`; without `parallel` they are the whole sequence."""
    turning = None
    if config.rotary_dim and len(config.no_position_layers) < config.layers:
        frequencies = rotary_frequencies(
            rotary_dim=config.rotary_dim, base=config.rotary_base, scaling=config.rotary_scaling
        )
        turning = rotation(positions, frequencies)
    together, count = None, config.tokens_back
    if count and segment_ids is not None and parallel is not None:
        chunks = chunks_with_previous(
            segment_ids, count, layout=parallel.layout, axis_name=parallel.sequence_axes, fill=_NO_DOCUMENT
        )
        back = [lagged(chunks, lag, count=count) == segment_ids for lag in range(1, count + 1)]
        together = jnp.stack(back, axis=-1)
    return TokenContext(positions, segment_ids, turning, together)
