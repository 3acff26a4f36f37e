"""What the benchmark of decoding compares: shapes of caches, blocks, what they have to do, and what is right."""

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.kernels.decode import DEFAULT_TILE_SIZE, decode_attention
from ring_rl.nn.attention import FEW_TOKENS

Block = Literal["xla_whole", "xla_tiles", "native_cpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """A cache and the heads that read it."""

    batch: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    slots: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"{self.query_heads} query heads cannot share {self.key_value_heads} key-value heads; use a multiple"
            )

    def filled_slots(self, share: float) -> int:
        """Slots that are filled, those of the new tokens included."""
        return round(share * self.slots)

    def __str__(self) -> str:
        return f"{self.batch} x {self.query_heads}/{self.key_value_heads} x {self.head_dim}, {self.slots:,} slots"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One block on one case; `error` is max |out - exact| / max |exact|, and seconds are one a round."""

    shape: str
    new_tokens: int
    filled: float
    block: Block
    error: float
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def case(self) -> tuple[str, int, float]:
        """What the blocks that are compared have in common."""
        return self.shape, self.new_tokens, self.filled

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)


def blocks_for(new_tokens: int, platform: str) -> tuple[Block, ...]:
    """What is compared: XLA as models call it for so many tokens and in tiles, and on a CPU the C++ block."""
    whole: tuple[Block, ...] = ("xla_whole",) if new_tokens <= FEW_TOKENS else ()
    native: tuple[Block, ...] = ("native_cpu",) if platform == "cpu" else ()
    return (*whole, "xla_tiles", *native)


def compile_block(block: Block, q: jax.Array, k: jax.Array, v: jax.Array) -> Callable[..., jax.Array]:
    """`decode_attention` by one block, compiled: called with q, k, v and `length`.

    Raises:
        ValueError: The block cannot serve; the message says why.
    """
    decode = partial(
        decode_attention,
        local="native_cpu" if block == "native_cpu" else "xla",
        tile_size=k.shape[2] if block == "xla_whole" else DEFAULT_TILE_SIZE,
    )
    return jax.jit(decode).lower(q, k, v, length=jnp.int32(0)).compile()


def cache_bytes(shape: ShapeConfig, filled_slots: int, itemsize: int) -> int:
    """Of the keys and values that are there: 2 B K n D e."""
    return 2 * shape.batch * shape.key_value_heads * filled_slots * shape.head_dim * itemsize


def useful_flops(shape: ShapeConfig, filled_slots: int, new_tokens: int) -> int:
    """4 B H D for every pair of a new token and a token that it sees; the new ones are the last of those filled."""
    pairs = new_tokens * filled_slots - new_tokens * (new_tokens - 1) // 2
    return 4 * shape.batch * shape.query_heads * shape.head_dim * pairs


def exact_rows(
    q_BTHD: np.ndarray, k_BKSD: np.ndarray, v_BKSD: np.ndarray, *, length: int, tokens: np.ndarray
) -> np.ndarray:
    """softmax(q kᵀ / √D) v in float64 for these of the new tokens, whose first is at position `length`: [B, t, H, D].

    One head of the cache is widened at a time.
    """
    B, T, H, D = q_BTHD.shape
    K, n = k_BKSD.shape[1], length + T
    out_BtHD = np.empty((B, len(tokens), H, D))
    hidden_tn = np.arange(n) > length + tokens[:, None]
    for b, head in np.ndindex(B, K):
        k_nD, v_nD = (x[b, head, :n].astype(np.float64) for x in (k_BKSD, v_BKSD))
        group = slice(head * (H // K), (head + 1) * (H // K))
        logits_tGn = q_BTHD[b, tokens, group].astype(np.float64) @ k_nD.T / np.sqrt(D)
        logits_tGn = np.where(hidden_tn[:, None], -np.inf, logits_tGn)
        weights_tGn = np.exp(logits_tGn - logits_tGn.max(axis=-1, keepdims=True))
        out_BtHD[b, :, group] = weights_tGn @ v_nD / weights_tGn.sum(axis=-1, keepdims=True)
    return out_BtHD


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """max |found - exact| / max |exact|; nan where something found is."""
    return float(np.max(np.abs(found.astype(np.float64) - exact)) / np.max(np.abs(exact)))
