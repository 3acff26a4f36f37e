"""Ulysses, alone and as the inner half of the hybrid: exact, and heads that devices cannot share are refused."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ring_rl.kernels import CAUSAL, Mask, attention
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.strategies.ulysses import check_heads


# Every example is a compilation of its own: few of them, and none spent on finding a smaller one.
@settings(max_examples=3, phases=[Phase.generate])
@given(data=st.data())
def test_equals_dense_float64(data, cases):
    data.draw(cases("ulysses")).check()


@settings(max_examples=3, phases=[Phase.generate])
@given(data=st.data())
def test_hybrid_equals_dense_float64(data, cases):
    data.draw(cases("hybrid")).check()


@pytest.mark.parametrize("heads", [(8, 2), (8, 1)])
def test_fewer_key_value_heads_than_devices(case, heads):
    """Each travels to the devices whose query heads read it; options of a head go with the head."""
    options = {"soft_cap": 5.0, "alibi": True, "dropout_rate": 0.2}
    case(strategy="ulysses", axes=(4,), heads=heads, layout="striped", packed=True, **options).check()


def test_hybrid_exchanges_windows_with_neighbours(case, equations):
    """The outer half is the same ring as without Ulysses, windows included."""
    window = Mask(causal=True, window=5)
    hybrid = case(strategy="hybrid", axes=(4, 2), layout="zigzag", mask=window, heads=(2, 2), dropout_rate=0.2)
    sent = [e.params["perm"] for e, _ in equations(hybrid.jaxpr(backward=False)) if e.primitive.name == "ppermute"]
    assert sent
    assert {(taker - giver) % 4 for pairs in sent for giver, taker in pairs} <= {0, 1, 3}
    hybrid.check()


def test_on_one_device(case):
    """Both axes virtual."""
    options = {"layout": "zigzag", "virtual": True, "packed": True, "batch": 1, "local": XlaBlock(block_size=7)}
    case(strategy="ulysses", axes=(4,), heads=(4, 1), **options).check()
    case(strategy="hybrid", axes=(2, 2), heads=(2, 2), **options).check()


def test_nothing_but_all_to_all_of_tokens(case, equations):
    """q, k, v there; out, log_sum_exp back; in backward as many the other way. Only segment ids are gathered."""

    def collectives(*, backward):
        jaxpr = case(strategy="ulysses", axes=(4,), heads=(4, 4), packed=True, mask=CAUSAL).jaxpr(backward=backward)
        names = [equation.primitive.name for equation, times in equations(jaxpr) for _ in range(times)]
        return {name: names.count(name) for name in ("all_to_all", "all_gather", "ppermute")}

    assert collectives(backward=False) == {"all_to_all": 5, "all_gather": 1, "ppermute": 0}
    assert collectives(backward=True) == {"all_to_all": 10, "all_gather": 1, "ppermute": 0}


@pytest.mark.parametrize(
    ("query_heads", "key_value_heads", "rule"),
    [
        (6, 6, "6 query heads cannot be shared by the 4 devices .* must be a multiple"),
        (24, 6, "6 key-value heads cannot be shared by the 4 devices .* must be a multiple or a divisor"),
        (12, 3, "3 key-value heads cannot be shared by the 4 devices"),
    ],
)
def test_heads_that_cannot_be_shared(query_heads, key_value_heads, rule):
    """The error names the rule and the remedy, and comes before any work, from the call as from the check."""
    with pytest.raises(ValueError, match=f'{rule}.* use strategy="ring" over one axis, or a smaller axis'):
        check_heads(query_heads=query_heads, key_value_heads=key_value_heads, devices=4)
    q, k = (jnp.zeros((4, 1, 2, heads, 4)) for heads in (query_heads, key_value_heads))
    attend = lambda q, k, v: attention(q, k, v, mask=CAUSAL, axis_name="sp", strategy="ulysses")  # noqa: E731
    with pytest.raises(ValueError, match=rule):
        jax.vmap(attend, axis_name="sp")(q, k, k)


@pytest.mark.parametrize(("query_heads", "key_value_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (4, 1)])
def test_heads_that_can_be_shared(query_heads, key_value_heads):
    check_heads(query_heads=query_heads, key_value_heads=key_value_heads, devices=4)
