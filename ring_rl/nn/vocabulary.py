"""Tokens in and tokens out: an embedding, and a head whose loss never holds the logits of all tokens.

The vocabulary is sharded over the tensor axis, where that divides it, and the width over the weight axes.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ring_rl.kernels.cross_entropy import CrossEntropySums, blockwise_cross_entropy
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import LocalParallel, SequenceParallel
from ring_rl.nn.weights import gathered, weight_specs
from ring_rl.typing import Array, Float, Float32, Int, Shaped

# The standard deviation that GPT-2 and LLaMA start from.
INITIAL_SCALE = 0.02


class Vocabulary(nnx.Module):
    """The first and the last layer of a language model, which may share their weights (arXiv:1608.05859)."""

    def __init__(self, *, size: int, width: int, tied: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Random weights.

        Args:
            size: V, tokens in the vocabulary.
            width: M, of the model.
            tied: Whether the head is the transpose of the embedding.
            dtype: Of activations and matrix products; weights are float32.
            rngs: Random streams.
        """
        if size < 1 or width < 1:
            raise ValueError(f"a vocabulary needs at least one token and a width of 1, got size={size} width={width}")
        self.size, self.tied, self.dtype = size, tied, dtype
        initial = nnx.initializers.normal(INITIAL_SCALE)
        self.embedding = nnx.Param(initial(rngs.params(), (size, width)), **named("vocabulary", "width"))
        if not tied:
            self.head = nnx.Param(initial(rngs.params(), (width, size)), **named("width", "vocabulary"))

    def embed(self, tokens: Int[Array, "B T"], parallel: SequenceParallel) -> Float[Array, "B T M"]:
        """Rows of the embedding. A token outside [0, V) gets zeros.

        Each device looks up what its share of the vocabulary holds: one sum over the tensor axis of B T M elements.
        """
        local = parallel.local()
        _, state, _ = nnx.split(self, lambda path, _: path == ("embedding",), ...)
        specs = weight_specs(state, local)

        def look_up(state: nnx.State, tokens: Array) -> Array:
            (table,) = jax.tree.leaves(gathered(state, specs, local, dtype=self.dtype))
            return _rows(table, tokens, self.dtype, local, sharded=table.shape[0] < self.size)

        tokens_spec = local.token_spec
        return jax.shard_map(look_up, mesh=local.mesh, in_specs=(specs, tokens_spec), out_specs=tokens_spec)(
            state, tokens
        )

    def logits(self, hidden: Float[Array, "*b M"]) -> Float32[Array, "*b V"]:
        """hidden head, in float32: for the few tokens of a decoding step."""
        head = self._head().astype(self.dtype)
        return jnp.matmul(hidden.astype(self.dtype), head, preferred_element_type=jnp.float32)

    def cross_entropy(
        self,
        hidden: Float[Array, "B T M"],
        targets: Int[Array, "B T"],
        parallel: SequenceParallel,
        *,
        chunks: int,
        weights: Shaped[Array, "B T"] | None = None,
        soft_cap: float | None = None,
        z_loss: float = 0.0,
    ) -> CrossEntropySums:
        """Loss of hidden head against targets, summed over all tokens of all devices, and what to divide it by.

        Each device sees the logits of T / chunks of its own tokens at a time, and of its share of the vocabulary.

        Args:
            hidden: The transformer's result, in the layout of `parallel`.
            targets: The token that follows each; outside [0, V) is ignored.
            parallel: The mesh.
            chunks: Number of steps; divides the tokens of a device.
            weights: What each token counts; None is 1 for all.
            soft_cap: Bound of a logit's magnitude, or None.
            z_loss: Weight of log_sum_exp².

        Raises:
            ValueError: The mesh cannot share the tokens, or `chunks` does not divide those of a device.
        """
        parallel.check(*targets.shape)
        local, mesh = parallel.local(), parallel.mesh
        tensor_axis = local.tensor_axis if self.size % parallel.tensor_devices == 0 else None
        # Gathered over the weight axes here, and its gradient put back; left to the compiler, as only the tensor axis
        # is in its hands inside.
        head = lax.with_sharding_constraint(
            self._head().astype(self.dtype), NamedSharding(mesh, PartitionSpec(None, tensor_axis))
        )
        token_axes = (*local.batch_axes, *(axis for axis in (parallel.sequence_axis,) if axis in mesh.shape))

        def summed(hidden: Array, head: Array, targets: Array, weights: Array | None) -> CrossEntropySums:
            return blockwise_cross_entropy(
                hidden.astype(self.dtype),
                head,
                targets,
                chunks=chunks,
                weights=weights,
                soft_cap=soft_cap,
                z_loss=z_loss,
                axis_name=token_axes or None,
            )

        tokens = parallel.token_spec
        return jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(tokens, PartitionSpec(), tokens, tokens),
            out_specs=PartitionSpec(),
            axis_names=set(token_axes) or set(mesh.axis_names),
        )(hidden, head, targets, weights)

    def _head(self) -> Float[Array, "M V"]:
        return self.embedding[...].T if self.tied else self.head[...]


def _rows(table: Array, tokens: Array, dtype: jnp.dtype, local: LocalParallel, *, sharded: bool) -> Array:
    """The rows of `tokens`; `table` is this device's part of the vocabulary if it is sharded."""
    first = lax.axis_index(local.tensor_axis) * table.shape[0] if sharded and local.tensor_axis else 0
    index = tokens - first
    held = (index >= 0) & (index < table.shape[0])
    rows = jnp.where(held[..., None], jnp.take(table, jnp.where(held, index, 0), axis=0).astype(dtype), 0)
    return local.sum_over_tensor_axis(rows) if sharded else rows
