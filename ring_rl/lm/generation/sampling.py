"""Which token comes next, given the logits of all of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ring_rl.typing import Array, Float32, Int, Int32, PRNGKeyArray, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; the rules apply in the order in which they stand here.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most likely token, whatever the other two say.
        top_k: Only the k most likely tokens stay; None: all.
        top_p: Of what is left, only the most likely tokens stay, as few as together have this much of its
            probability (arXiv:1904.09751); None: all.
    """

    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"sampling.temperature must be finite and at least 0 (greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling.top_k must be at least 1 token, got {self.top_k}; null is all of them")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p must be above 0 and at most 1, got {self.top_p}; null is 1")


GREEDY = Sampling(temperature=0.0, top_k=None, top_p=None)


def row_keys(key: PRNGKeyArray, rows: Int[Array, " B"], number: Int[Array, ""] | int) -> Shaped[PRNGKeyArray, " B"]:
    """A key for the new token `number` of each row, which depends on nothing else than `key` and these two."""
    fold = lambda row: jax.random.fold_in(jax.random.fold_in(key, row), number)  # noqa: E731
    return jax.vmap(fold)(rows)


def draw(
    logits: Float32[Array, "B V"], sampling: Sampling, keys: Shaped[PRNGKeyArray, " B"]
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """A token for each row, and the logarithm of its probability under the model itself.

    That is log softmax(logits), whatever the temperature and the cuts: what the model thinks of the text, which can
    be compared between samplings. Each row draws from its own key alone.
    """
    if sampling.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1)
    else:
        token = _sampled(logits / sampling.temperature, sampling, keys)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def _sampled(tempered_BV: Array, sampling: Sampling, keys: Shaped[PRNGKeyArray, " B"]) -> Int[Array, " B"]:
    categorical = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:
        return categorical(keys, tempered_BV)
    # Sorted, both cuts are prefixes, of exactly so many tokens even where several are equally likely.
    order_BV = jnp.argsort(tempered_BV, axis=-1, descending=True)
    sorted_BV = jnp.take_along_axis(tempered_BV, order_BV, axis=-1)
    if sampling.top_k is not None:
        sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < sampling.top_k, sorted_BV, -jnp.inf)
    if sampling.top_p is not None:
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # Nothing stands before the most likely token: it always stays.
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        sorted_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
    rank_B = categorical(keys, sorted_BV)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]
