"""A LLaMA-style language model: an embedding, a transformer, and a head."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from ring_rl.nn.kv_cache import KVCache
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer import Transformer, TransformerConfig
from ring_rl.nn.vocabulary import Vocabulary
from ring_rl.typing import Array, Float, Float32, Int, Int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What a language model is built from.

    Attributes:
        name: Tells the kinds of models apart in a checkpoint.
        vocabulary_size: V.
        tied_embedding: Whether the head is the transpose of the embedding.
        embedding_scale: Standard deviation that the embedding starts with.
        trained_positions: Tokens of the longest context that the weights were trained for; 0 for none yet.
        transformer: What is between embedding and head.
    """

    name: Literal["language"]
    vocabulary_size: int
    tied_embedding: bool
    embedding_scale: float
    trained_positions: int
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        if self.vocabulary_size < 1:
            raise ValueError(f"vocabulary_size must be at least 1 token, got {self.vocabulary_size}")
        if not self.embedding_scale > 0:
            raise ValueError(f"embedding_scale must be positive, got {self.embedding_scale}; 0.02 is usual")
        if self.trained_positions < 0:
            raise ValueError(f"trained_positions must not be negative, got {self.trained_positions}")


class LanguageModel(nnx.Module):
    """Predicts every token of a sequence from those before it.

    Whole sequences go through `hidden`, sharded over a mesh, and one of the three readings of it, which see the
    vocabulary a few tokens at a time; token by token through `begin` and `decode`. Both give the same numbers.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vocabulary = Vocabulary(
            size=config.vocabulary_size,
            width=config.transformer.width,
            tied=config.tied_embedding,
            embedding_scale=config.embedding_scale,
            dtype=jnp.dtype(config.transformer.compute_dtype),
            rngs=rngs,
        )
        self.transformer = Transformer(config.transformer, rngs=rngs)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        parallel: SequenceParallel,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T M"]:
        """What the head reads the next token from; everything comes and goes in the layout of `parallel`.

        Args:
            tokens: Ids; outside [0, V) is a vector of zeros.
            positions: In each document.
            parallel: The mesh.
            segment_ids: Documents of packed rows, -1 for padding; None is one document a row.

        Raises:
            ValueError: The mesh cannot share the model or the tokens; see `Transformer`.
        """
        embedded = self.vocabulary.embed(tokens, parallel)
        return self.transformer(embedded, positions, parallel, segment_ids=segment_ids)

    def logits(self, hidden: Float[Array, "*b M"]) -> Float32[Array, "*b V"]:
        """Of the next token, unnormalised: for few tokens, as they are V numbers each."""
        return self.vocabulary.logits(hidden)

    def predictions(
        self, hidden: Float[Array, "B T M"], parallel: SequenceParallel, *, chunks: int
    ) -> tuple[Int32[Array, "B T"], Float32[Array, "B T"]]:
        """The most likely next tokens, the first of equals, and their log-probabilities.

        T / chunks of a device's tokens at a time; no gradients.
        """
        scores = self.vocabulary.token_scores(hidden, None, parallel, chunks=chunks)
        return scores.best, scores.best_log_probability

    def token_losses(
        self, hidden: Float[Array, "B T M"], targets: Int[Array, "B T"], parallel: SequenceParallel, *, chunks: int
    ) -> Float32[Array, "B T"]:
        """-log p(target) of every token, 0 where the target is outside [0, V); the mean's exponential is perplexity.

        T / chunks of a device's tokens at a time; no gradients.
        """
        return -self.vocabulary.token_scores(hidden, targets, parallel, chunks=chunks).target_log_probability

    def begin(self, *, batch: int, capacity: int) -> KVCache:
        """A cache that has read nothing, for `batch` sequences of at most `capacity` tokens."""
        return self.transformer.empty_cache(batch=batch, capacity=capacity)

    def decode(
        self, tokens: Int[Array, "B T"], cache: KVCache, *, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float32[Array, "B V"], KVCache]:
        """Logits of what follows the last new token of each row, and the cache with the new tokens.

        Args:
            tokens: New ones, after everything in the cache.
            cache: As `begin` or `decode` gave it, with room for them; under `jax.shard_map` each device's slots.
            counts: How many of each row's tokens are real, if not all; see `Transformer.decode`. The logits of a row
                without any mean nothing.

        Raises:
            ValueError: `counts` with a cache of one length for all rows.
        """
        hidden_BTM, cache = self.decode_hidden(tokens, cache, counts=counts)
        if counts is None:
            return self.logits(hidden_BTM[:, -1]), cache
        last_B11 = jnp.maximum(counts - 1, 0)[:, None, None]
        return self.logits(jnp.take_along_axis(hidden_BTM, last_B11, axis=1)[:, 0]), cache

    def decode_hidden(
        self, tokens: Int[Array, "B T"], cache: KVCache, *, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T M"], KVCache]:
        """`decode` before the head, of all new tokens."""
        return self.transformer.decode(self.vocabulary.look_up(tokens), cache, counts=counts)
