"""`traffic` against the programs themselves: every collective of a traced attention, forward and backward, counted."""

import functools
from collections.abc import Iterator, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import pytest
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from ring_rl.kernels.attention import attention
from ring_rl.kernels.cost import AttentionShape, Cost, traffic
from ring_rl.kernels.mask import CAUSAL, FULL, Mask

BATCH, TOKENS, QUERY_HEADS, HEAD_DIM = 2, 64, 8, 4


def equations(jaxpr, times: int = 1) -> Iterator[tuple[JaxprEqn, int]]:
    """Every equation of a program with the number of times that it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inner_times)


def received(jaxpr, sizes: Mapping[str, int]) -> int:
    """Bytes of q, k, v, out and their gradients that the busiest device receives from others.

    Arrays without a head dimension (the log-sum-exp, which Ulysses exchanges too) are left out, as in `traffic`.
    """
    by_all, by_device = 0, dict.fromkeys(range(max(sizes.values())), 0)
    for equation, times in equations(jaxpr):
        name, parameters = equation.primitive.name, equation.params
        avals = [cast(ShapedArray, v.aval) for v in equation.invars if hasattr(v.aval, "shape")]
        operand = times * sum(x.size * x.dtype.itemsize for x in avals if x.ndim >= 4)
        if name == "ppermute":
            for giver, taker in parameters["perm"]:
                by_device[taker] += operand * (giver != taker)
        elif name in ("all_to_all", "reduce_scatter", "all_gather"):
            axis = parameters["axis_name"]
            size = sizes[axis if isinstance(axis, str) else axis[0]]
            by_all += operand * (size - 1) if name == "all_gather" else operand * (size - 1) // size
    return by_all + max(by_device.values())


def measured(strategy, axis_size, *, key_value_heads, mask, layout) -> Cost:
    ring_size, ulysses_size = axis_size if isinstance(axis_size, tuple) else (axis_size, None)
    sizes = {"ring": ring_size} | ({} if ulysses_size is None else {"ulysses": ulysses_size})
    axis_name = tuple(sizes) if isinstance(axis_size, tuple) else "ring"
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))

    def attend(q, k, v):
        # The block is of no interest here; the smaller its tiles, the longer the tracing.
        options = {"axis_name": axis_name, "layout": layout, "local": "xla", "block_size": TOKENS}
        return attention(q, k, v, mask=mask, strategy=strategy, **options).out

    tokens = PartitionSpec(None, axis_name)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=tokens, out_specs=tokens)
    q = jnp.zeros((BATCH, TOKENS, QUERY_HEADS, HEAD_DIM), jnp.bfloat16)
    k = jnp.zeros((BATCH, TOKENS, key_value_heads, HEAD_DIM), jnp.bfloat16)

    def backward_too(q, k, v):
        out, gradient = jax.vjp(sharded, q, k, v)
        return gradient(out)

    forward, both = (received(jax.make_jaxpr(f)(q, k, k).jaxpr, sizes) for f in (sharded, backward_too))
    return Cost(forward, both - forward)


@functools.cache
def shape(key_value_heads: int) -> AttentionShape:
    return AttentionShape(
        batch=BATCH,
        tokens=TOKENS,
        query_heads=QUERY_HEADS,
        key_value_heads=key_value_heads,
        head_dim=HEAD_DIM,
        element_bytes=2,
    )


@pytest.mark.parametrize(
    ("strategy", "axis_size", "key_value_heads", "mask", "layout"),
    [
        ("ring", 2, 8, CAUSAL, "zigzag"),
        ("ring", 8, 2, CAUSAL, "zigzag"),
        ("ring", 8, 2, FULL, "contiguous"),
        ("ring", 4, 1, Mask(causal=True, window=16), "striped"),
        ("ring", 8, 2, Mask(causal=True, window=12), "contiguous"),
        ("ring", 8, 2, Mask(causal=True, window=12), "zigzag"),
        ("ring", 8, 2, Mask(causal=True, window=25), "zigzag"),
        ("ring", 4, 2, Mask(causal=False, window=7), "zigzag"),
        ("ring", 4, 2, Mask(causal=True, causal_block_size=4, window=9), "contiguous"),
        ("all_gather", 8, 2, CAUSAL, "zigzag"),
        ("all_gather", 4, 8, Mask(causal=True, window=16), "contiguous"),
        ("ulysses", 4, 8, CAUSAL, "zigzag"),
        ("ulysses", 8, 2, CAUSAL, "contiguous"),
        ("hybrid", (4, 2), 8, CAUSAL, "zigzag"),
        ("hybrid", (2, 4), 2, CAUSAL, "zigzag"),
        ("hybrid", (4, 2), 2, Mask(causal=True, window=8), "contiguous"),
    ],
)
def test_as_many_bytes_as_the_program_moves(strategy, axis_size, key_value_heads, mask, layout):
    counted = measured(strategy, axis_size, key_value_heads=key_value_heads, mask=mask, layout=layout)
    stated = traffic(shape(key_value_heads), strategy=strategy, mask=mask, layout=layout, axis_size=axis_size)
    assert counted == stated
