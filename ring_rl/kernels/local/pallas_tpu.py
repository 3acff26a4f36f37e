"""The local block of a TPU: our own Pallas kernels, with public Pallas names only.

jax brings such kernels too (`splash_attention`), but they return partial results in the dtype of q, so that a bfloat16
ring would round at every hop; have no scale, no ALiBi and no masks by position, and refuse a mask with an empty row.
These keep float32 results of bfloat16 operands, put the scale where it costs nothing (on float32 scores) and serve
every mask and layout. The algorithm is FlashAttention-2's, arXiv:2307.08691: three kernels, for the output, for dq, and
for dk and dv, so that each sums along one axis of its grid and no gradient is added to twice.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ring_rl.kernels.local import pallas_tpu_kernels as kernels
from ring_rl.kernels.local.block import Demand, Relation, Scoring
from ring_rl.kernels.local.pallas_tpu_kernels import Operands, Reach, batch_row
from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.local.tiles import Tiling, bounds, visible_tiles
from ring_rl.kernels.tokens import Cotangents, Keys, Queries
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Float32, Int32

_DTYPES = ("float32", "bfloat16")
# Width of a vector register: the edge of a tile is a multiple of it.
_LANES = 128
_INT32 = np.iinfo(np.int32)

Side = Literal["queries", "keys"]
# The fields of `Operands` that are about keys; the others are about queries.
_OF_KEYS = frozenset({"k", "v", "key_positions", "key_segments", "alibi_key_positions"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuBlock:
    """Blockwise attention on a TPU; O(visible tiles) work, and memory for its arguments and results alone.

    Attributes:
        block_size: Largest edge of a tile, in tokens, a multiple of 128. Lengths need not be multiples of it.
        interpret: Run the kernels tile by tile on whatever platform there is, to test them; slow.
        cross_compile: The program is compiled here for a TPU that is not here.
    """

    block_size: int
    interpret: bool = False
    cross_compile: bool = False

    def __post_init__(self) -> None:
        if self.block_size < _LANES or self.block_size % _LANES:
            raise ValueError(f"a TPU block_size must be a multiple of {_LANES} tokens, got {self.block_size}")

    @property
    def looks_at_positions(self) -> bool:
        """It serves relations by position."""
        return True

    @property
    def prefers_positions(self) -> bool:
        """Not measured, so the rectangles without a mask are preferred."""
        return False

    @property
    def heads_at_once(self) -> None:
        """It takes all heads and rows of the batch at once."""
        return None

    def refusal(self, demand: Demand) -> str | None:
        """See `LocalBlock.refusal`."""
        here = jax.default_backend()
        if not (self.interpret or self.cross_compile or here == "tpu"):
            return f"it needs a TPU and this platform is {here!r}"
        if demand.dtype not in _DTYPES:
            return f"it computes in {' or '.join(_DTYPES)}, not in {demand.dtype}"
        if demand.scoring.dropout_rate > 0:
            return "it has no dropout"
        return None

    def forward(
        self, queries: Queries, keys: Keys, *, relation: Relation, scoring: Scoring, tie: Tie = untied
    ) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
        """See `LocalBlock.forward`."""
        work = _Work.of(self, queries, keys, relation)
        B, H, T, D = queries.q.shape
        rows = work.rows
        results = work.call(
            partial(kernels.forward_kernel, scoring=scoring, tiles_along=work.columns.count),
            name="ring_attention_forward",
            by_rows=True,
            results=[(B, H, work.padded_rows, D), (B, H, 1, work.padded_rows)],
            scratch=[(D, rows.size), (1, rows.size), (1, rows.size)],
            products=2,
        )
        out, lse = tie(tuple(results))
        return out[:, :, :T], lse[:, :, 0, :T]

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
        """See `LocalBlock.backward`."""
        work = _Work.of(self, queries, keys, relation, cotangents)
        (B, H, T, D), (K, S) = queries.q.shape, keys.k.shape[1:3]
        (dq,) = work.call(
            partial(kernels.d_queries_kernel, scoring=scoring, tiles_along=work.columns.count),
            name="ring_attention_d_queries",
            by_rows=True,
            results=[(B, H, work.padded_rows, D)],
            scratch=[],
            products=3,
        )
        dk, dv = work.call(
            partial(kernels.d_keys_kernel, scoring=scoring, tiles_along=work.rows.count),
            name="ring_attention_d_keys",
            by_rows=False,
            results=[(B, K, work.padded_columns, D)] * 2,
            scratch=[],
            products=4,
        )
        dq, dk, dv = tie((dq, dk, dv))
        return dq[:, :, :T], dk[:, :, :S], dv[:, :, :S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """One rectangle, cut into tiles, and the operands of its kernels."""

    block: PallasTpuBlock
    rows: Tiling
    columns: Tiling
    visible: tuple[Array | np.ndarray, Array | np.ndarray]
    slopes: Array | None
    operands: Operands

    @staticmethod
    def of(
        block: PallasTpuBlock, queries: Queries, keys: Keys, relation: Relation, cotangents: Cotangents | None = None
    ) -> "_Work":
        rows, columns = (_tiling(x.shape[2], block.block_size) for x in (queries.q, keys.k))
        low, high, key_positions = _intervals(queries, keys, relation, hidden_padding=columns.padding > 0)
        if low is not None and high is not None and key_positions is not None:
            low, high = _row(low, rows), _row(high, rows)
            # Padding stands where no interval reaches.
            key_positions = _row(key_positions, columns, fill=_INT32.max)
        alibi = queries.slopes is not None
        d_out = log_sum_exp = delta = None
        if cotangents is not None:
            d_out = _tokens(cotangents.d_out.astype(queries.q.dtype), rows)
            log_sum_exp = _pad(cotangents.log_sum_exp[:, :, None], 3, rows.padding, np.inf)
            delta = _pad(cotangents.delta[:, :, None], 3, rows.padding)
        operands = Operands(
            q=_tokens(queries.q, rows),
            k=_tokens(keys.k, columns),
            v=_tokens(keys.v, columns),
            low=low,
            high=high,
            key_positions=key_positions,
            # Padding sees nothing and nobody sees it, other padding included.
            query_segments=_documents(queries.segment_ids, rows, nobody=-1),
            key_segments=_documents(keys.segment_ids, columns, nobody=-2),
            alibi_query_positions=_row(queries.positions, rows) if alibi else None,
            alibi_key_positions=_row(keys.positions, columns) if alibi else None,
            d_out=d_out,
            log_sum_exp=log_sum_exp,
            delta=delta,
        )
        return _Work(
            block=block,
            rows=rows,
            columns=columns,
            visible=visible_tiles(queries, keys, relation=relation, rows=rows, columns=columns),
            slopes=queries.slopes,
            operands=operands,
        )

    @property
    def padded_rows(self) -> int:
        return self.rows.count * self.rows.size

    @property
    def padded_columns(self) -> int:
        return self.columns.count * self.columns.size

    def call(
        self,
        kernel,
        *,
        name: str,
        by_rows: bool,
        results: list[tuple[int, ...]],
        scratch: list[tuple[int, int]],
        products: int,
    ) -> list[Array]:
        """Runs a kernel over tiles of queries (`by_rows`) or of keys, each against the reachable tiles of the others.

        Args:
            kernel: One of `pallas_tpu_kernels`.
            name: What a profile calls it.
            by_rows: Whether results belong to queries; else to keys.
            results: Their shapes, [B, heads, tokens, D] or [B, heads, 1, tokens].
            scratch: Shapes of float32 arrays that outlast the steps along a row of tiles.
            products: How many products of matrices a tile of scores costs.
        """
        x = self.operands
        (B, H, _, D), K = x.q.shape, x.k.shape[1]
        reachable, is_open = self.visible if by_rows else (v.swapaxes(-1, -2) for v in self.visible)
        limits = [jnp.atleast_2d(jnp.asarray(limit)) for limit in bounds(reachable, is_open)]
        # None is a leaf here: a kernel is told what its attention does not use.
        scalars, x = _vary_alike(Reach(*limits)._replace(slopes=self.slopes), x)
        scalars = [array for array in scalars if array is not None]
        own, other = (self.rows, self.columns) if by_rows else (self.columns, self.rows)
        blocks = _Blocks(by_rows=by_rows, group=H // K, along=other.count, sizes=(self.rows.size, self.columns.size))
        shapes = [_like(x.q, shape) for shape in results]

        def body(*refs):
            inputs = len(scalars) + len(x)
            kernel(_reach(refs[: len(scalars)]), Operands(*refs[len(scalars) : inputs]), *refs[inputs:])

        tiles = B * self.rows.count * self.columns.count
        if isinstance(reachable, np.ndarray):
            tiles = B * int(np.sum(reachable))
        area = tiles * H * self.rows.size * self.columns.size
        moved = [array for array in (*x, *shapes) if array is not None]
        return pl.pallas_call(
            body,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(B, H if by_rows else K, own.count, (1 if by_rows else H // K) * other.count),
                in_specs=[
                    blocks.spec(array, "keys" if field in _OF_KEYS else "queries")
                    for field, array in zip(x._fields, x, strict=True)
                ],
                out_specs=[blocks.spec(shape, "queries" if by_rows else "keys") for shape in shapes],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            ),
            # Without it a scheduler does not know that a kernel lasts long enough to hide a transfer.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * area * D,
                transcendentals=area,
                bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
            ),
            name=name,
            interpret=self.block.interpret,
        )(*scalars, *x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Which part of an array a step of the grid works on."""

    by_rows: bool
    group: int
    along: int
    sizes: tuple[int, int]

    def spec(self, array: Array | jax.ShapeDtypeStruct | None, side: Side) -> pl.BlockSpec | None:
        """Of [B, heads, tokens, D], or of rows: [B, heads, 1, tokens] or [b, 1, tokens]."""
        if array is None:
            return None
        size, shape = self.sizes[side == "keys"], array.shape
        if len(shape) == 3:
            index = lambda b, head, tile: (0 if shape[0] == 1 else b, 0, tile)  # noqa: E731
            block = (None, 1, size)
        elif shape[2] == 1:
            index, block = lambda b, head, tile: (b, head, 0, tile), (None, None, 1, size)
        else:
            index, block = lambda b, head, tile: (b, head, tile, 0), (None, None, size, shape[3])
        return pl.BlockSpec(block, lambda *step_and_scalars: index(*self.place(*step_and_scalars)[side]))

    def place(self, b, head, own, step, *scalars) -> dict[Side, tuple]:
        """(batch, head, tile) of the queries and of the keys of a step."""
        reach = _reach(scalars)
        first, stop = batch_row(reach.first, b, own), batch_row(reach.stop, b, own)
        # What cannot be reached is not fetched: asked for the tile that is there already, a copy is skipped.
        along = jnp.minimum(jnp.maximum(step % self.along, first), jnp.maximum(stop - 1, 0))
        if self.by_rows:
            return {"queries": (b, head, own), "keys": (b, head // self.group, along)}
        return {"queries": (b, head * self.group + step // self.along, along), "keys": (b, head, own)}


def _reach(scalars) -> Reach:
    return Reach(*scalars, *([None] * (len(Reach._fields) - len(scalars))))


def _vary_alike(*stretches):
    """The named tuples, all their arrays varying over the mesh axes that any of them varies over."""
    arrays = iter(vary_alike(*(x for stretch in stretches for x in stretch if x is not None)))
    return tuple(type(s)(*(None if x is None else next(arrays) for x in s)) for s in stretches)


def _like(operand: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A float32 result that varies over the mesh axes that `operand` varies over."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.ravel()[0].astype(jnp.float32), shape), operand)


def _tiling(length: int, largest: int) -> Tiling:
    """The fewest tiles of at most `largest` tokens, as even as whole vector registers go."""
    count = -(-length // largest)
    size = -(-length // (count * _LANES)) * _LANES
    return Tiling(count, size, count * size - length)


def _intervals(
    queries: Queries, keys: Keys, relation: Relation, *, hidden_padding: bool
) -> tuple[Int32[Array, "b T"] | None, Int32[Array, "b T"] | None, Int32[Array, "b S"] | None]:
    """(low, high, s): a query sees the keys with low <= s < high, which says all that a mask can; None for all."""
    mask = relation.mask
    if not mask.needs_positions and not hidden_padding:
        return None, None, None
    if relation.by_position:
        p, s = queries.positions, keys.positions
    else:
        p = _tied_iota(queries.q) + (relation.offset or 0)
        s = _tied_iota(keys.k)
    low, high = jnp.full_like(p, _INT32.min), jnp.full_like(p, _INT32.max)
    if mask.window is not None:
        low, high = p - mask.window + 1, p + mask.window
    if mask.causal:
        high = (p // mask.causal_block_size + 1) * mask.causal_block_size
    return low, high, s


def _tied_iota(x: Array) -> Int32[Array, "1 T"]:
    """0, 1, ... for the tokens of x, made to depend on x: a scan over layers would keep a constant for each layer."""
    iota = lax.iota(jnp.int32, x.shape[2])[None]
    return lax.optimization_barrier((iota, x.ravel()[0]))[0]


def _documents(segment_ids: Array | None, tiling: Tiling, *, nobody: int) -> Array | None:
    if segment_ids is None:
        return None
    return _row(jnp.where(segment_ids < 0, nobody, segment_ids), tiling, fill=nobody)


def _tokens(x_BHTD: Array, tiling: Tiling) -> Array:
    """[B, heads, padded tokens, D]."""
    return _pad(x_BHTD, 2, tiling.padding)


def _row(x_bT: Array, tiling: Tiling, *, fill: int = 0) -> Array:
    """[b, 1, padded tokens]."""
    return _pad(x_bT[:, None], 2, tiling.padding, fill)


def _pad(x: Array, axis: int, padding: int, value: float = 0) -> Array:
    if padding == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padding)
    return jnp.pad(x, widths, constant_values=value)
