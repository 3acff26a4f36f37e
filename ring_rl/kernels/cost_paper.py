"""The tables of Ring Attention with Blockwise Transformers, arXiv:2310.01889, as functions.

They keep the paper's assumptions: bfloat16, as many key-value heads as query heads, no mask, every link counted as one.
`cost.py` and `overlap.py` are without these. Where the paper's own figures disagree with its formulas, the function
says so and follows the formula.
"""

import dataclasses
from typing import Literal

from ring_rl.kernels.hardware import Hardware

Architecture = Literal["vanilla", "memory_efficient_attention", "blockwise_transformer", "ring"]
ARCHITECTURES: tuple[Architecture, ...] = ("vanilla", "memory_efficient_attention", "blockwise_transformer", "ring")


@dataclasses.dataclass(frozen=True)
class LayerActivations:
    """Largest activations of one layer in bytes."""

    attention: int
    feed_forward: int

    @property
    def total(self) -> int:
        """The larger of the two, which do not live at once."""
        return max(self.attention, self.feed_forward)


def layer_activations(
    architecture: Architecture, *, batch: int, tokens: int, model_width: int, heads: int, block_size: int
) -> LayerActivations:
    """Table 1: bytes of the largest activations of a layer on one device, in bfloat16.

                                       attention         feed-forward
        vanilla                        2 b n s²          8 b s h
        memory_efficient_attention     2 b s h + 4 b c h 8 b s h
        blockwise_transformer          2 b s h           2 b s h
        ring                           6 b c h           2 b c h

    The printed total of the first row is 2 b h s², with the width h where its attention has the number of heads n: no
    sum or maximum of its row. The total here is the larger part, which agrees with every other row (with the second
    because c <= s).

    Args:
        architecture: A row of the table.
        batch: b.
        tokens: s, of the device.
        model_width: h.
        heads: n.
        block_size: c; of the last row it is what one device holds.

    Raises:
        ValueError: Unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; choose one of {', '.join(ARCHITECTURES)}")
    sequence, block = batch * tokens * model_width, batch * block_size * model_width
    if architecture == "vanilla":
        return LayerActivations(2 * batch * heads * tokens**2, 8 * sequence)
    if architecture == "memory_efficient_attention":
        return LayerActivations(2 * sequence + 4 * block, 8 * sequence)
    if architecture == "blockwise_transformer":
        return LayerActivations(2 * sequence, 2 * sequence)
    return LayerActivations(6 * block, 2 * block)


def minimal_block(hardware: Hardware) -> float:
    """Table 2: tokens of a block that hides its transfer, c = F / B, from 4 d c² / F >= 4 c d / B.

    B counts all links together, as the paper does, also on a torus, where a ring's neighbour is reached by one of
    them: `overlap.minimal_share` has that. For A100s on InfiniBand the formula gives 24.96 thousand; 24.5 is printed.
    """
    return hardware.flops_per_second / hardware.bytes_per_second


def minimal_sequence(hardware: Hardware) -> float:
    """Table 2: tokens of a device's sequence, s = 6 c: room for the six blocks that a device holds.

    For A100s on InfiniBand the formula gives 149.76 thousand; 149.5 is printed, which is not six times the printed
    block either.
    """
    return 6 * minimal_block(hardware)


def dataset_flops_ratio(*, model_width: int, tokens: int, reference_tokens: int) -> float:
    """Appendix D: operations to train on one data set in sequences of s₂ tokens, over those in sequences of s₁.

        (6 h + s₂) / (6 h + s₁)

    Figure 5 prints it for s₁ = 4096. Its columns "10M" and "100M" are 12 x 2²⁰ and 2²⁷ tokens (3072 and 32768 times
    4096), and its row 13B holds for LLaMA's width of 5120; the text says 5140.

    Args:
        model_width: h.
        tokens: s₂.
        reference_tokens: s₁.
    """
    return (6 * model_width + tokens) / (6 * model_width + reference_tokens)
