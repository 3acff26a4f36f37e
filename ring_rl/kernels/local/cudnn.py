"""The local block of an NVIDIA GPU: cuDNN's fused attention, through jax's private primitives.

cuDNN returns out, dq, dk and dv in the dtype of q, so every rectangle's share is rounded once before shares are summed
in float32; log_sum_exp is float32. It computes Σ_d out d_out by itself and knows no gradient of log_sum_exp, which
takes a second call: see `CudnnBlock.log_sum_exp_gradient`.

Rows that see nothing do not occur in the relations served (a diagonal and windows along it show a query itself), but
backward is asked to ignore rows with log_sum_exp = +inf, whose weights exp(s - inf) are 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ring_rl.kernels.local.block import Demand, Relation, Scoring
from ring_rl.kernels.local.private_jax import CudnnAttention, UnsupportedJaxError, cudnn_attention
from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.tokens import Cotangents, Keys, Queries
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Float32

_DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudnnBlock:
    """Fused attention on NVIDIA GPUs from Ampere on: full, causal, or causal with a window along the diagonal.

    Attributes:
        log_sum_exp_gradient: Whether a gradient may reach log_sum_exp. It costs a second call in backward. Without
            it, `Cotangents.delta` must be Σ out d_out: nothing but the output is differentiated.
    """

    log_sum_exp_gradient: bool

    @property
    def looks_at_positions(self) -> bool:
        """Its masks are known when it is compiled."""
        return False

    @property
    def prefers_positions(self) -> bool:
        """It cannot look at them."""
        return False

    @property
    def heads_at_once(self) -> None:
        """It takes all heads and rows of the batch at once."""
        return None

    def refusal(self, demand: Demand) -> str | None:
        """See `LocalBlock.refusal`."""
        return _refusal_by_demand(demand) or _refusal_by_machine(demand)

    def forward(
        self, queries: Queries, keys: Keys, *, relation: Relation, scoring: Scoring, tie: Tie = untied
    ) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
        """See `LocalBlock.forward`; out is float32 that was rounded to the dtype of q once."""
        cudnn = cudnn_attention()
        q, k, v = vary_alike(queries.q, keys.k, keys.v)
        out, log_sum_exp = tie(
            tuple(cudnn.forward(q, k, v, *_unused(q), **_settings(cudnn, relation, scoring), is_training=True))
        )
        return out.astype(jnp.float32), log_sum_exp

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
        """See `LocalBlock.backward`; each gradient is float32 that was rounded to the dtype of q once."""
        cudnn = cudnn_attention()
        out, d_out = (x.astype(queries.q.dtype) for x in (cotangents.out, cotangents.d_out))
        q, k, v, log_sum_exp, out, d_out = vary_alike(queries.q, keys.k, keys.v, cotangents.log_sum_exp, out, d_out)
        settings = _settings(cudnn, relation, scoring)

        def gradients(v: Array, out: Array, d_out: Array) -> tuple[Array, ...]:
            return tuple(cudnn.backward(q, k, v, *_unused(q), log_sum_exp, out, d_out, **settings))

        results = gradients(v, out, d_out)
        if self.log_sum_exp_gradient:
            # Gradients are linear in (d_out, d_log_sum_exp). Values of 1 in one component and a d_out of
            # d_log_sum_exp there, with an out of 0, make cuDNN's d_weights - delta just d_log_sum_exp.
            results += gradients(*_as_values(v, out, _d_log_sum_exp(cotangents)))[:2]
        dq, dk, dv, *more = (x.astype(jnp.float32) for x in tie(results))
        return (dq + more[0], dk + more[1], dv) if more else (dq, dk, dv)


def _refusal_by_demand(demand: Demand) -> str | None:
    if demand.dtype not in _DTYPES:
        return f"cuDNN attention computes in {' or '.join(_DTYPES)}, not in {demand.dtype}"
    if demand.head_dim % 8:
        return f"cuDNN attention needs a head_dim that 8 divides, not {demand.head_dim}"
    asked = {
        "segment ids": demand.segments,
        "ALiBi": demand.alibi,
        "a soft cap": demand.scoring.soft_cap is not None,
        "dropout by global position": demand.scoring.dropout_rate > 0,
    }
    for name, is_asked in asked.items():
        if is_asked:
            return f"cuDNN attention has no {name.removeprefix('a ')}"
    for relation in demand.relations:
        mask = relation.mask
        if not mask.needs_positions:
            continue
        if relation.offset != 0 or not mask.causal or mask.causal_block_size > 1:
            return f"cuDNN attention masks along the diagonal alone, and a rectangle has {mask} at {relation.offset}"
    return None


def _refusal_by_machine(demand: Demand) -> str | None:
    here = jax.default_backend()
    if here != "gpu":
        return f"cuDNN needs an NVIDIA GPU and this platform is {here!r}"
    try:
        cudnn = cudnn_attention()
        cudnn.cudnn_version()
    except (UnsupportedJaxError, RuntimeError) as error:
        return str(error)
    if not cudnn.capability_at_least("8.0"):
        return "cuDNN attention needs an NVIDIA GPU of the Ampere generation or later"
    largest = 256 if cudnn.capability_at_least("9.0") else 128
    if demand.head_dim > largest:
        return f"cuDNN attention on this GPU has a head_dim of at most {largest}, not {demand.head_dim}"
    return None


def _settings(cudnn: CudnnAttention, relation: Relation, scoring: Scoring) -> dict[str, Any]:
    """The keyword arguments that forward and backward share."""
    mask = relation.mask
    return {
        "scale": scoring.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.causal if mask.causal else cudnn.no_mask,
        "layout": cudnn.heads_before_tokens,
        "sliding_window_length": mask.window,
    }


def _unused(q: Array) -> tuple[Array, ...]:
    """Bias, lengths, offsets and page tables, which an empty array stands for."""
    return (jnp.zeros(0, q.dtype),) * 7


def _d_log_sum_exp(cotangents: Cotangents) -> Float32[Array, "B H T"]:
    own = jnp.einsum("bhtd,bhtd->bht", cotangents.out.astype(jnp.float32), cotangents.d_out.astype(jnp.float32))
    return own - cotangents.delta


def _as_values(v: Array, out: Array, d_log_sum_exp: Float32[Array, "B H T"]) -> tuple[Array, Array, Array]:
    """(v, out, d_out) whose gradients in q and k are those of log_sum_exp, which two components hold to 16 bits."""
    coarse = d_log_sum_exp.astype(v.dtype)
    rest = (d_log_sum_exp - coarse.astype(jnp.float32)).astype(v.dtype)
    d_out = jnp.zeros_like(out).at[..., 0].set(coarse).at[..., 1].set(rest)
    return jnp.zeros_like(v).at[..., :2].set(1), jnp.zeros_like(out), d_out
