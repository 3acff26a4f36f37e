from __future__ import annotations

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.cost import AttentionShape, transformer_flops
from ring_rl.kernels.mask import CAUSAL, Mask
from ring_rl.kernels.pairs import visible_pairs
from ring_rl.training.flops import matmul_parameters, model_flops_per_step


def test_by_hand():
    """2 sequences of 3 tokens see 6 pairs each; 1 head of 2 dimensions, 5 layers, 7 parameters."""
    flops = model_flops_per_step(
        matmul_parameters=7, tokens=6, layers=5, query_heads=1, head_dim=2, visible_pairs=2 * 6
    )
    assert flops == 6 * 7 * 6 + 12 * 5 * 2 * 12


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 64),
    layers=st.integers(1, 4),
    key_value_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 16),
    width=st.integers(1, 64),
    window=st.one_of(st.none(), st.integers(1, 64)),
)
def test_it_is_the_cost_of_a_transformer_less_the_scores_that_backward_forms_again(
    batch, tokens, layers, key_value_heads, group, head_dim, width, window
):
    query_heads, mask = key_value_heads * group, Mask(causal=True, window=window)
    shape = AttentionShape(
        batch=batch,
        tokens=tokens,
        query_heads=query_heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        element_bytes=2,
    )
    cost = transformer_flops(
        shape,
        mask=mask,
        layers=layers,
        model_width=width,
        feed_forward_width=4 * width,
        feed_forward_products=2,
        vocabulary=0,
    )
    pairs = batch * visible_pairs(mask, tokens)
    flops = model_flops_per_step(
        matmul_parameters=layers * (2 * width * head_dim * (query_heads + key_value_heads) + 8 * width**2),
        tokens=batch * tokens,
        layers=layers,
        query_heads=query_heads,
        head_dim=head_dim,
        visible_pairs=pairs,
    )
    assert cost.total - flops == 2 * layers * query_heads * head_dim * pairs


def test_causal_attention_counts_once():
    full, causal = (
        model_flops_per_step(
            matmul_parameters=0,
            tokens=1024,
            layers=1,
            query_heads=1,
            head_dim=1,
            visible_pairs=visible_pairs(mask, 1024),
        )
        for mask in (Mask(causal=False), CAUSAL)
    )
    assert causal / full == pytest.approx(0.5, rel=1e-3)


def test_only_kernels_multiply():
    class Module(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(100, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.out = nnx.Linear(4, 8, rngs=rngs)

            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make_layers(rngs: nnx.Rngs) -> nnx.Linear:
                return nnx.Linear(4, 4, rngs=rngs)

            self.layers = make_layers(rngs)

    parameters = nnx.state(nnx.eval_shape(lambda: Module(nnx.Rngs(0))), nnx.Param)
    assert matmul_parameters(parameters) == 4 * 8 + 3 * 4 * 4


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="tokens must not be negative, got -1"):
        model_flops_per_step(matmul_parameters=1, tokens=-1, layers=1, query_heads=1, head_dim=1, visible_pairs=1)
