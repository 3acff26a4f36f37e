"""The contract of a local block: one device's attention of some queries to some keys.

A strategy (ring, ...) cuts global attention into rectangles that are either fully visible or causal, calls a
block for each, and merges. So a block knows nothing of devices, layouts or masks beyond `causal`.
"""

import logging
from typing import Literal, Protocol

from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.typing import Array, Float, Float32

_log = logging.getLogger(__name__)

LocalName = Literal["auto", "xla"]
LOCAL_NAMES: tuple[LocalName, ...] = ("auto", "xla")


class LocalBlock(Protocol):
    """Attention within one device. Implementations are frozen and hashable: they are compile-time constants."""

    def forward(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Float32[Array, "B T H D"], Float32[Array, "B H T"]]:
        """(out, log_sum_exp) over these keys alone; float32, natural base. `causal` needs T == S."""
        ...

    def backward(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        *,
        out: Float[Array, "B T H D"],
        log_sum_exp: Float32[Array, "B H T"],
        d_out: Float[Array, "B T H D"],
        delta: Float32[Array, "B H T"],
        causal: bool,
        scale: float,
    ) -> tuple[Float32[Array, "B T H D"], Float32[Array, "B S K D"], Float32[Array, "B S K D"]]:
        """(dq, dk, dv), float32: this rectangle's share of the gradients of GLOBAL attention.

        `out` and `log_sum_exp` are the global ones, over every key of the sequence, so that
        p = exp(scale q kᵀ - log_sum_exp) are the global softmax's weights. `delta` is
        Σ_d out d_out - d_log_sum_exp. Rows with log_sum_exp = +inf contribute nothing.
        """
        ...


def select_block(local: LocalName | LocalBlock, *, block_size: int) -> LocalBlock:
    """The block called `local`; "auto" takes the best one that serves here and logs which (today only XLA's)."""
    if not isinstance(local, str):
        return local
    if local not in LOCAL_NAMES:
        raise ValueError(f"unknown local block {local!r}; choose one of {', '.join(LOCAL_NAMES)}")
    if local == "auto":
        _log.info("local attention block: xla")
    return XlaBlock(block_size=block_size)
