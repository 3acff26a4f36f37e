import dataclasses

import pytest

from ring_rl.kernels.cost_paper import dataset_flops_ratio
from ring_rl.planning.paper_tables import GrowthConfig, GrowthRow, causal_flops, growth_rows
from small_models import small_transformer

GROWTH = GrowthRow(model="small", hardware="made up", blockwise_tokens=256, ring_tokens=2048)


def growth(transformer, *, vocabulary=0):
    return growth_rows(GrowthConfig(vocabulary=vocabulary, rows=(GROWTH,), models={"small": transformer}))[0]


def test_attention_and_the_rest_are_all_there_is():
    """By hand, a token: three times 2 (4 M² + 3 M F + M V) for products, and 14 M pairs / T for attention, a layer."""
    model = small_transformer(layers=1, width=16, query_heads=2, key_value_heads=2, head_dim=8, feed_forward_width=16)
    whole, attention = causal_flops(model, 256, 32)
    pairs = 256 * 257 // 2
    assert attention == 14 * 16 * pairs
    assert whole - attention == 3 * 2 * 256 * (4 * 16**2 + 3 * 16 * 16 + 16 * 32)


def test_shares_and_ratio_agree_with_one_another():
    row = growth(small_transformer(), vocabulary=32)
    assert 0 < row.blockwise_attention < row.ring_attention < 1
    # What is not attention is the same of every token.
    assert row.causal_ratio == pytest.approx((1 - row.blockwise_attention) / (1 - row.ring_attention))
    assert row.ratio == dataset_flops_ratio(model_width=16, tokens=2048, reference_tokens=256)


def test_a_larger_model_pays_less_for_context():
    small, wide = small_transformer(), small_transformer(width=64, query_heads=8, key_value_heads=8)
    wide = dataclasses.replace(wide, feed_forward_width=64)
    assert growth(wide).ratio < growth(small).ratio
    assert growth(wide).causal_ratio < growth(small).causal_ratio


def test_a_row_names_a_model_that_is_there():
    with pytest.raises(ValueError, match=r"growth\.rows names 'small'; choose of large"):
        GrowthConfig(vocabulary=0, rows=(GROWTH,), models={"large": small_transformer()})
