"""The contract of a local block: one device's attention of some queries to some keys.

A strategy (ring, ...) cuts global attention into rectangles of queries and keys, calls a block for each, and merges.
A rectangle is described by a `Relation`, which is known when the program is compiled, and by the positions and
segment ids that travel with its tokens.
"""

import dataclasses
from typing import Literal, Protocol

from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.tokens import Cotangents, Keys, Queries
from ring_rl.typing import Array, Float32

LocalName = Literal["auto", "xla", "native_cpu", "cudnn", "pallas_tpu"]
LOCAL_NAMES: tuple[LocalName, ...] = ("auto", "xla", "native_cpu", "cudnn", "pallas_tpu")


@dataclasses.dataclass(frozen=True)
class Relation:
    """Which keys of a rectangle its queries see, segments aside.

    Attributes:
        mask: The rule; FULL where the strategy knows that position hides nothing here.
        offset: Position of query t minus position of key s is t - s + offset for every t and s, known now; None
            where positions are known only when the program runs. Irrelevant for FULL. Where causality goes by blocks,
            an offset also says that key 0 begins one.
    """

    mask: Mask
    offset: int | None = None

    @property
    def by_position(self) -> bool:
        """Whether the block must look at the positions of its tokens to know what is visible."""
        return self.mask.needs_positions and self.offset is None


EVERYTHING = Relation(FULL)
DIAGONAL = Relation(CAUSAL, offset=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a query and a key that see one another make a weight.

        logit  = scale q·k
        logit  = soft_cap tanh(logit / soft_cap)                   if there is a cap
        logit  = logit - slope_h |query position - key position|   with ALiBi
        weight = softmax over all visible keys
        weight = weight kept / (1 - dropout_rate)                  with dropout

    Attributes:
        scale: Multiplies q·k.
        soft_cap: Bound of a logit's magnitude, or None.
        dropout_rate: Share of weights set to zero.
    """

    scale: float
    soft_cap: float | None = None
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap must be positive, got {self.soft_cap}; None is no cap")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """All that one attention will ask of a block, so that a block can refuse before any work.

    Attributes:
        dtype: Name of the dtype of q, k and v: "float32", "bfloat16", ...
        head_dim: Width of a head.
        query_heads: Number of query heads in a call.
        key_value_heads: Number of key-value heads in a call.
        length: Tokens of the shard that rectangles are cut from.
        devices: How many devices share the sequence.
        relations: Every relation that a rectangle of it may have.
        segments: Whether tokens carry segment ids.
        alibi: Whether logits carry ALiBi's bias.
        scoring: How logits become weights.
        log_sum_exp_gradient: Whether a gradient may reach log_sum_exp.
    """

    dtype: str
    head_dim: int
    query_heads: int
    key_value_heads: int
    length: int
    devices: int
    relations: tuple[Relation, ...]
    segments: bool
    alibi: bool
    scoring: Scoring
    log_sum_exp_gradient: bool


class LocalBlock(Protocol):
    """Attention within one device. Implementations are frozen and hashable: they are compile-time constants."""

    @property
    def looks_at_positions(self) -> bool:
        """Whether it serves relations by position, and skips the tiles that nobody sees."""
        ...

    @property
    def prefers_positions(self) -> bool:
        """Whether skipping tiles by position costs it less than the copies that a fully visible rectangle takes."""
        ...

    @property
    def heads_at_once(self) -> int | None:
        """How many key-value heads of one batch row a strategy should pass at a time; None is all of everything."""
        ...

    def refusal(self, demand: Demand) -> str | None:
        """Why this block cannot serve the demand, on this machine, in one phrase; None if it can."""
        ...

    def forward(
        self, queries: Queries, keys: Keys, *, relation: Relation, scoring: Scoring, tie: Tie = untied
    ) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
        """(out, log_sum_exp) over these keys alone: float32, natural base, out already divided by the sum.

        A row that sees none of these keys gives out = 0 and log_sum_exp = -inf. With dropout, out holds the kept
        weights, rescaled, and log_sum_exp all of them.
        """
        ...

    def backward(
        self,
        queries: Queries,
        keys: Keys,
        cotangents: Cotangents,
        *,
        relation: Relation,
        scoring: Scoring,
        tie: Tie = untied,
    ) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B K S D"], Float32[Array, "B K S D"]]:
        """(dq, dk, dv), float32: this rectangle's share of the gradients of GLOBAL attention.

        `cotangents` are global, so that exp(logit - log_sum_exp) are the global softmax's weights. Rows with
        log_sum_exp = +inf contribute nothing.
        """
        ...
