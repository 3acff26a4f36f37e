"""The functions against the figures that arXiv:2310.01889 prints, at the digits that it prints."""

import pytest

from ring_rl.kernels.cost_paper import dataset_flops_ratio, layer_activations, minimal_block, minimal_sequence
from ring_rl.kernels.hardware import HARDWARE
from ring_rl.kernels.overlap import minimal_share

B, S, H, N, C = 3, 4096, 512, 8, 128


def activations(architecture):
    return layer_activations(architecture, batch=B, tokens=S, model_width=H, heads=N, block_size=C)


@pytest.mark.parametrize(
    ("architecture", "attention", "feed_forward", "total"),
    [
        ("memory_efficient_attention", 2 * B * S * H + 4 * B * C * H, 8 * B * S * H, 8 * B * S * H),
        ("blockwise_transformer", 2 * B * S * H, 2 * B * S * H, 2 * B * S * H),
        ("ring", 6 * B * C * H, 2 * B * C * H, 6 * B * C * H),
    ],
)
def test_table_1(architecture, attention, feed_forward, total):
    found = activations(architecture)
    assert (found.attention, found.feed_forward, found.total) == (attention, feed_forward, total)


def test_table_1_prints_another_total_for_the_vanilla_transformer():
    found = activations("vanilla")
    assert (found.attention, found.feed_forward) == (2 * B * N * S**2, 8 * B * S * H)
    assert found.total == 2 * B * N * S**2
    printed = 2 * B * H * S**2
    assert printed == found.total * H // N


def test_table_1_refuses_what_it_does_not_list():
    with pytest.raises(ValueError, match="unknown architecture 'mamba'; choose one of vanilla, "):
        activations("mamba")


@pytest.mark.parametrize(
    ("name", "block", "sequence"),
    [
        ("A100 NVLink", 1.0, 6.2),
        ("TPU v3", 1.1, 6.6),
        ("TPU v4", 1.0, 6.2),
        ("TPU v5e", 1.1, 6.3),
    ],
)
def test_table_2(name, block, sequence):
    assert round(minimal_block(HARDWARE[name]) / 1e3, 1) == block
    assert round(minimal_sequence(HARDWARE[name]) / 1e3, 1) == sequence


def test_table_2_is_slightly_off_for_infiniband():
    """Printed: 24.5 and 149.5."""
    assert minimal_block(HARDWARE["A100 InfiniBand"]) == pytest.approx(24.96e3)
    assert minimal_sequence(HARDWARE["A100 InfiniBand"]) == pytest.approx(149.76e3)
    assert minimal_block(HARDWARE["A100 InfiniBand"]) == pytest.approx(24.5e3, rel=0.02)
    assert minimal_sequence(HARDWARE["A100 InfiniBand"]) == pytest.approx(149.5e3, rel=0.002)


@pytest.mark.parametrize("name", [name for name, hardware in HARDWARE.items() if hardware.links == 1])
def test_the_papers_block_is_a_case_of_ours(name):
    ours = minimal_share(
        HARDWARE[name], query_heads=32, key_value_heads=32, element_bytes=2, visible_fraction=1, backward=False
    )
    assert ours == pytest.approx(minimal_block(HARDWARE[name]))


# Columns 8K, 16K, ..., 256K, 1M, "10M" and "100M" as multiples of 4096 tokens.
MULTIPLES = (2, 4, 8, 16, 32, 64, 256, 3072, 32768)
FIGURE_5 = {
    36864: (1.0, 1.1, 1.1, 1.3, 1.6, 2.1, 5.6, 56.8, 596.8),
    12288: (1.1, 1.2, 1.4, 1.8, 2.6, 4.3, 14.4, 162.6, 1725.6),
    8192: (1.1, 1.2, 1.5, 2.2, 3.4, 5.8, 20.6, 237.2, 2521.5),
    7168: (1.1, 1.3, 1.6, 2.3, 3.7, 6.5, 23.2, 268.0, 2850.3),
    5120: (1.1, 1.4, 1.8, 2.8, 4.6, 8.4, 31.0, 362.3, 3855.9),
    4096: (1.1, 1.4, 2.0, 3.1, 5.4, 10.0, 37.4, 439.7, 4682.0),
}


@pytest.mark.parametrize("width", FIGURE_5)
def test_figure_5(width):
    found = [dataset_flops_ratio(model_width=width, tokens=4096 * m, reference_tokens=4096) for m in MULTIPLES]
    assert [round(ratio, 1) for ratio in found] == list(FIGURE_5[width])


def test_figure_5_does_not_hold_for_the_width_in_its_text():
    """It says 5140 for the model of 13B; LLaMA's is 5120."""
    assert round(dataset_flops_ratio(model_width=5140, tokens=2**20, reference_tokens=4096), 1) != 31.0
