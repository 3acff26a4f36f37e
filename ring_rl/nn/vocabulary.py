"""Tokens in and tokens out: an embedding, and a head whose loss never holds the logits of all tokens.

The vocabulary is sharded over the tensor axis, where that divides it, and the width over the weight axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ring_rl.kernels.cross_entropy import CrossEntropySums, blockwise_cross_entropy_and_hits
from ring_rl.kernels.token_scores import TokenScores, blockwise_token_scores
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import LocalParallel, SequenceParallel
from ring_rl.nn.weights import gathered, weight_specs
from ring_rl.typing import Array, Bool, Float, Float32, Int, Shaped

# The standard deviation that GPT-2 and LLaMA start from.
INITIAL_SCALE = 0.02


class Vocabulary(nnx.Module):
    """The first and the last layer of a language model, which may share their weights (arXiv:1608.05859)."""

    def __init__(
        self,
        *,
        size: int,
        width: int,
        tied: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        embedding_scale: float = INITIAL_SCALE,
    ):
        """Random weights.

        Args:
            size: V, tokens in the vocabulary.
            width: M, of the model.
            tied: Whether the head is the transpose of the embedding.
            dtype: Of activations and matrix products; weights are float32.
            rngs: Random streams.
            embedding_scale: Standard deviation that the embedding starts with.
        """
        if size < 1 or width < 1:
            raise ValueError(f"a vocabulary needs at least one token and a width of 1, got size={size} width={width}")
        self.size, self.tied, self.dtype = size, tied, dtype
        normal = nnx.initializers.normal
        table = normal(embedding_scale)(rngs.params(), (size, width))
        self.embedding = nnx.Param(table, **named("vocabulary", "width"))
        if not tied:
            head = normal(INITIAL_SCALE)(rngs.params(), (width, size))
            self.head = nnx.Param(head, **named("width", "vocabulary"))

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

    def look_up(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b M"]:
        """`embed` where the whole embedding is here, as it is in decoding."""
        held = (tokens >= 0) & (tokens < self.size)
        rows = jnp.take(self.embedding[...], jnp.where(held, tokens, 0), axis=0).astype(self.dtype)
        return jnp.where(held[..., None], rows, 0)

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
        return self.cross_entropy_and_hits(
            hidden, targets, parallel, chunks=chunks, weights=weights, soft_cap=soft_cap, z_loss=z_loss
        )[0]

    def cross_entropy_and_hits(
        self,
        hidden: Float[Array, "B T M"],
        targets: Int[Array, "B T"],
        parallel: SequenceParallel,
        *,
        chunks: int,
        weights: Shaped[Array, "B T"] | None = None,
        soft_cap: float | None = None,
        z_loss: float = 0.0,
    ) -> tuple[CrossEntropySums, Bool[Array, "B T"]]:
        """`cross_entropy`, and whether each target that counts is the most likely token."""

        def summed(hidden: Array, head: Array, tokens: tuple[Array, Array | None]) -> tuple[CrossEntropySums, Array]:
            return blockwise_cross_entropy_and_hits(
                hidden,
                head,
                tokens[0],
                chunks=chunks,
                weights=tokens[1],
                soft_cap=soft_cap,
                z_loss=z_loss,
                axis_name=self._token_axes(parallel) or None,
            )

        specs = PartitionSpec(), parallel.token_spec
        return self._with_head(summed, hidden, (targets, weights), parallel, out_specs=specs)

    def token_scores(
        self,
        hidden: Float[Array, "B T M"],
        targets: Int[Array, "B T"] | None,
        parallel: SequenceParallel,
        *,
        chunks: int,
    ) -> TokenScores:
        """What the head says of every token, one by one; arguments and errors as `cross_entropy`, no gradients."""

        def scored(hidden: Array, head: Array, tokens: tuple[Array | None]) -> TokenScores:
            return blockwise_token_scores(hidden, head, tokens[0], chunks=chunks)

        return self._with_head(scored, hidden, (targets,), parallel, out_specs=parallel.token_spec)

    def _with_head(
        self,
        function: Callable[..., Any],
        hidden: Array,
        tokens: tuple[Array | None, ...],
        parallel: SequenceParallel,
        *,
        out_specs: Any,
    ) -> Any:
        """function(hidden, head, tokens) on each device's tokens; the compiler shares products over the tensor axis."""
        parallel.check(*hidden.shape[:2])
        mesh, axes = parallel.mesh, self._token_axes(parallel)
        tensor_axis = parallel.local().tensor_axis if self.size % parallel.tensor_devices == 0 else None
        # Gathered over the weight axes here, and its gradient put back; left to the compiler, as only the tensor axis
        # is in its hands inside.
        head = lax.with_sharding_constraint(
            self._head().astype(self.dtype), NamedSharding(mesh, PartitionSpec(None, tensor_axis))
        )
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(parallel.token_spec, PartitionSpec(), parallel.token_spec),
            out_specs=out_specs,
            axis_names=set(axes) or set(mesh.axis_names),
        )(hidden.astype(self.dtype), head, tokens)

    def _token_axes(self, parallel: SequenceParallel) -> tuple[str, ...]:
        """The mesh axes that tokens differ over."""
        present = parallel.mesh.shape
        return tuple(axis for axis in (*parallel.batch_axes, parallel.sequence_axis) if axis in present)

    def _head(self) -> Float[Array, "M V"]:
        return self.embedding[...].T if self.tied else self.head[...]


def _rows(table: Array, tokens: Array, dtype: jnp.dtype, local: LocalParallel, *, sharded: bool) -> Array:
    """The rows of `tokens`; `table` is this device's part of the vocabulary if it is sharded."""
    first = lax.axis_index(local.tensor_axis) * table.shape[0] if sharded and local.tensor_axis else 0
    index = tokens - first
    held = (index >= 0) & (index < table.shape[0])
    rows = jnp.where(held[..., None], jnp.take(table, jnp.where(held, index, 0), axis=0).astype(dtype), 0)
    return local.sum_over_tensor_axis(rows) if sharded else rows
