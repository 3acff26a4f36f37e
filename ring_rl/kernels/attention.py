"""The one call: exact attention over a sequence that may be sharded, by any strategy."""

import dataclasses
import math
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.checks import check_options, check_shapes, checked_side
from ring_rl.kernels.choose import choose_strategy
from ring_rl.kernels.cost import STRATEGIES, Strategy
from ring_rl.kernels.dropout import Dropout
from ring_rl.kernels.hardware import hardware_for
from ring_rl.kernels.layout import Layout, check_length, layout_order, natural_order
from ring_rl.kernels.local.block import Demand, LocalBlock, LocalName, Scoring
from ring_rl.kernels.local.select import select_block
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.reference import reference_attention
from ring_rl.kernels.strategies import ring, window
from ring_rl.kernels.strategies.plan import Plan, Side
from ring_rl.kernels.strategies.sharded import Exchange, attend
from ring_rl.kernels.strategies.ulysses import attend_by_heads, check_heads
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Float, Float32, Int


class AttentionOutput(NamedTuple):
    """What attention returns; both are differentiable.

    Attributes:
        out: In the dtype of the queries.
        log_sum_exp: log Σ exp(logit) over the visible keys, natural base; -inf for a row that sees nothing.
    """

    out: Float[Array, "B T H D"]
    log_sum_exp: Float32[Array, "B H T"]


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    mask: Mask,
    axis_name: str | tuple[str, ...] | None = None,
    layout: Layout = "contiguous",
    strategy: Strategy | str = "auto",
    positions: Int[Array, "b T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, " H"] | None = None,
    dropout: Dropout | None = None,
    log_sum_exp_gradient: bool = True,
    local: LocalName | LocalBlock = "auto",
    block_size: int | None = None,
    heads_at_once: int | None = None,
) -> AttentionOutput:
    """softmax(scale q kᵀ + mask) v over a sequence that is sharded over mesh axis `axis_name`.

    Call it where the axis is bound: inside `jax.shard_map`, or inside `jax.vmap(axis_name=...)`, which puts a virtual
    ring of any size on one device. Every argument with a token axis holds this device's T tokens, in `layout` order.

        strategy     axis_name            what moves                     needs
        ring         one axis             keys and values, hop by hop
        all_gather   one axis             keys and values, all at once
        ulysses      one axis             heads against tokens           devices divide H (`ulysses.check_heads`)
        hybrid       (ring, ulysses)      both; tokens sharded P((ring, ulysses)), layout that of the ring axis
        blockwise    None                 nothing
        dense        None                 nothing; O(T²) memory, differentiated by jax: the specification
        auto         any of them          what `choose_strategy` says for one axis

    Where a sliding window needs only neighbours, "ring" asks only those.

    Args:
        q: Queries. H must be a multiple of K (grouped-query attention); keys are never repeated.
        k: Keys.
        v: Values.
        mask: What may attend to what.
        axis_name: The mesh axis, or the two, that the sequence is sharded over; None if it is all here.
        layout: Which tokens a device holds. "zigzag" balances causal work.
        strategy: How shards meet.
        positions: Global positions, ascending on each device, where no layout gives them.
        segment_ids: Documents of packed rows; a token sees only its own. Negative ids are padding.
        scale: Multiplies q kᵀ; 1/√D by default.
        soft_cap: c in c tanh(logit / c), applied after `scale`.
        alibi_slopes: Subtracts slope_h |query position - key position| from logits; constant, not differentiated.
        dropout: Sets weights to zero by a rule over global positions: the same for every ring size and strategy.
        log_sum_exp_gradient: Whether a gradient may reach `log_sum_exp`; False stops it there, which spares some
            blocks (cuDNN's) half of backward.
        local: The block that computes one device's share, by name or an object of your own. "auto" is the first of the
            platform's that can serve: "pallas_tpu" on TPUs, "cudnn" on NVIDIA GPUs, "native_cpu" (C++, compiled when
            first asked for) on CPUs that have a compiler; else "xla", which serves everything everywhere.
        block_size: Largest edge of a tile of scores, for blocks that leave it open: "xla" and "pallas_tpu". None leaves
            it to them.
        heads_at_once: Key-value heads, with the queries that read them, of one batch row that are worked on at a time,
            at most; None leaves it to the block. Every group of heads goes round a ring of its own: the same bytes in
            more and smaller transfers, and only a group's share of what a ring holds besides its arguments and
            results. "dense" takes all at once.

    Differentiated once, in reverse; strategy="dense" serves forward mode and higher orders.

    Raises:
        NameError: The axis is not bound here: call it inside `jax.shard_map` or `jax.vmap(axis_name=...)`.
        ValueError: The shapes do not fit together, the layout or the devices do not divide them, the strategy does
            not fit the axis, or the local block cannot serve; the error says what would.

    Per device O(T · visible keys) work and O(T) memory. Sums are float32 throughout. arXiv:2310.01889.
    """
    check_shapes(q, k, v)
    check_options(
        mask=mask, layout=layout, block_size=block_size, heads_at_once=heads_at_once, scale=scale, soft_cap=soft_cap
    )
    # Replicated where the others vary (keys of few heads under tensor parallelism), their gradients are summed there.
    q, k, v = vary_alike(q, k, v)
    side = checked_side(q, positions=positions, segment_ids=segment_ids, alibi_slopes=alibi_slopes, dropout=dropout)
    settings = _Settings(
        mask=mask,
        layout=layout,
        scoring=Scoring(
            scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
            soft_cap=soft_cap,
            dropout_rate=0.0 if dropout is None else dropout.rate,
        ),
        local=local,
        block_size=block_size,
        heads_at_once=heads_at_once,
        log_sum_exp_gradient=log_sum_exp_gradient,
    )
    axes = _axes(axis_name)
    strategy = _resolve(strategy, q, k, mask=mask, axes=axes, layout=layout, placed=positions is not None)
    result: tuple[Array, Array]
    match strategy:
        case "dense":
            result = settings.dense(q, k, v, side)
        case "ulysses":
            result = settings.ulysses(axes[0], q, k, v, side)
        case "hybrid":
            result = settings.hybrid(axes[0], axes[1], q, k, v, side)
        case "all_gather":
            result = settings.over_shards(axes[0], "all_gather", q, k, v, side)
        case _:
            result = settings.over_shards(axes[0] if axes else None, "ring", q, k, v, side)
    return AttentionOutput(*result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """What is the same for every strategy."""

    mask: Mask
    layout: Layout
    scoring: Scoring
    local: LocalName | LocalBlock
    block_size: int | None
    heads_at_once: int | None
    log_sum_exp_gradient: bool

    def over_shards(self, axis_name: str | None, exchange: Exchange, q, k, v, side: Side) -> tuple[Array, Array]:
        """Attention over one axis, or none; keys come to the queries."""
        size, length = 1 if axis_name is None else lax.axis_size(axis_name), q.shape[1]
        placed = side.positions is not None
        if not placed:
            check_length(length * size, ring_size=size, layout=self.layout)
        # Before the block is known a plan is made with one that knows no positions: those are the fewest demands.
        plan = Plan(
            axis_name=axis_name,
            size=size,
            layout=self.layout,
            placed=placed,
            mask=self.mask,
            scoring=self.scoring,
            looks_at_positions=False,
            prefers_positions=False,
            local=XlaBlock(block_size=1),
            heads_at_once=None,
        )
        if exchange == "ring" and window.serves(plan, length):
            exchange = "window"
        if size == 1:
            exchange = "ring"
        demand = Demand(
            dtype=q.dtype.name,
            head_dim=q.shape[-1],
            query_heads=q.shape[2],
            key_value_heads=k.shape[2],
            length=length,
            devices=size,
            relations=window.relations(plan, length) if exchange == "window" else ring.relations(plan, length),
            segments=side.segment_ids is not None,
            alibi=side.alibi_slopes is not None,
            scoring=self.scoring,
            log_sum_exp_gradient=self.log_sum_exp_gradient,
        )
        local = select_block(self.local, demand, block_size=self.block_size)
        plan = dataclasses.replace(
            plan,
            local=local,
            looks_at_positions=local.looks_at_positions,
            prefers_positions=local.prefers_positions,
            heads_at_once=self.heads_at_once or local.heads_at_once,
        )
        out, log_sum_exp = cast(tuple[Array, Array], attend(plan, exchange, q, k, v, side))
        return out, self._log_sum_exp(log_sum_exp)

    def ulysses(self, axis_name: str, q, k, v, side: Side) -> tuple[Array, Array]:
        """Attention over one axis; every device gets all tokens, in natural order, and a share of the heads."""
        devices = lax.axis_size(axis_name)
        check_heads(query_heads=q.shape[2], key_value_heads=k.shape[2], devices=devices)
        if side.positions is None:
            check_length(q.shape[1] * devices, ring_size=devices, layout=self.layout)
            gathered = partial(natural_order, ring_size=devices, layout=self.layout)
            scattered = partial(layout_order, ring_size=devices, layout=self.layout)
        else:
            gathered = scattered = _unchanged
        inner = partial(dataclasses.replace(self, layout="contiguous").over_shards, None, "ring")
        return attend_by_heads(q, k, v, side, axis_name=axis_name, gathered=gathered, scattered=scattered, attend=inner)

    def hybrid(self, ring_axis: str, ulysses_axis: str, q, k, v, side: Side) -> tuple[Array, Array]:
        """Attention over two axes: tokens and heads change places on the inner one, a ring runs over the outer."""
        devices = lax.axis_size(ulysses_axis)
        check_heads(query_heads=q.shape[2], key_value_heads=k.shape[2], devices=devices)
        inner = partial(self.over_shards, ring_axis, "ring")
        return attend_by_heads(
            q, k, v, side, axis_name=ulysses_axis, gathered=_unchanged, scattered=_unchanged, attend=inner
        )

    def dense(self, q, k, v, side: Side) -> tuple[Array, Array]:
        """The reference, with float32 sums."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        out, log_sum_exp = reference_attention(
            q.astype(wide),
            k.astype(wide),
            v.astype(wide),
            mask=self.mask,
            scale=self.scoring.scale,
            query_positions=side.positions,
            key_positions=side.positions,
            query_segments=side.segment_ids,
            key_segments=side.segment_ids,
            soft_cap=self.scoring.soft_cap,
            alibi_slopes=side.alibi_slopes,
            dropout=side.dropout,
        )
        return out.astype(q.dtype), self._log_sum_exp(log_sum_exp)

    def _log_sum_exp(self, log_sum_exp: Array) -> Array:
        return log_sum_exp if self.log_sum_exp_gradient else lax.stop_gradient(log_sum_exp)


def _axes(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes, as a tuple; one axis may be given bare.

    Raises:
        ValueError: Something else than names, or one twice.
    """
    axes = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(axes, tuple) or not all(isinstance(name, str) for name in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"axis_name must be None, a name, or a tuple of different names; got {axis_name!r}")
    return axes


def _resolve(
    strategy: str, q: Array, k: Array, *, mask: Mask, axes: tuple[str, ...], layout: Layout, placed: bool
) -> Strategy:
    """The strategy that runs; checks that it fits the axes.

    Raises:
        ValueError: Unknown, or of another number of axes.
    """
    needed: dict[str, int] = {"blockwise": 0, "dense": 0, "ring": 1, "all_gather": 1, "ulysses": 1, "hybrid": 2}
    if strategy != "auto" and strategy not in needed:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of auto, {', '.join(STRATEGIES)}")
    if len(axes) > 2 or (strategy != "auto" and len(axes) != needed[strategy]):
        fitting = ", ".join(name for name, count in needed.items() if count == len(axes)) or "none"
        wanted = "at most 2 mesh axes" if strategy == "auto" else f"{needed[strategy]} mesh axes"
        raise ValueError(f"strategy {strategy!r} runs over {wanted}, got {axes!r}; strategies for those: {fitting}")
    if strategy != "auto":
        return cast(Strategy, strategy)
    if len(axes) != 1:
        return "hybrid" if axes else "blockwise"
    size = lax.axis_size(axes[0])
    if placed:
        # Where positions are given, nothing is known of neighbours: a window is served like any mask.
        mask = dataclasses.replace(mask, window=None)
    chosen = choose_strategy(
        mask=mask,
        layout=layout,
        tokens=q.shape[1] * size,
        ring_size=size,
        query_heads=q.shape[2],
        key_value_heads=k.shape[2],
        head_dim=q.shape[-1],
        element_bytes=q.dtype.itemsize,
        hardware=hardware_for(jax.devices()[0].device_kind),
    )
    # One device on the axis: a ring of one.
    return "ring" if chosen == "blockwise" else chosen


def _unchanged(x: Array, *, axis: int) -> Array:
    del axis
    return x
