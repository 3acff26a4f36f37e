"""Whether a ring's transfers hide behind its work, on given hardware.

While a device computes one block it sends on the keys and values of the next, so a hop costs the longer of the two.
In backward float32 sums of dk and dv travel as well; the device's own block is cut in two, of which one part covers
the first arrival of keys and the other the last hop of sums, together as much as a hop in between.
"""

import dataclasses
from collections.abc import Sequence

from ring_rl.kernels.cost import AttentionShape
from ring_rl.kernels.hardware import Hardware
from ring_rl.kernels.layout import Layout
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.pairs import hop_pairs

_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Seconds of one hop's transfer, and of the shortest block that has to cover one, per direction."""

    forward_hop_seconds: float
    forward_block_seconds: float
    backward_hop_seconds: float
    backward_block_seconds: float

    @property
    def hides(self) -> bool:
        """Whether no device ever waits for a transfer, forward and backward."""
        return (
            self.forward_hop_seconds <= self.forward_block_seconds
            and self.backward_hop_seconds <= self.backward_block_seconds
        )


def ring_overlap(
    shape: AttentionShape,
    *,
    mask: Mask,
    layout: Layout,
    ring_size: int,
    hardware: Hardware,
    document_lengths: Sequence[int] | None = None,
) -> Overlap:
    """Times of a hop and of its block when a ring goes the full circle.

        forward    hop 2 B c K D e / bandwidth           block  4 B H D pairs / FLOP/s
        backward   hop 2 B c K D (e + 4) / bandwidth     block 10 B H D pairs / FLOP/s

    Devices are in lockstep, so `pairs` are those of the busiest device at a hop; of the blocks that cover a transfer
    (all but the last) the one with the fewest pairs counts. Data sheets give peaks of both rates; for a sharper answer
    pass measured ones as `hardware`. `document_lengths` as in `visible_pairs`.

    Raises:
        ValueError: The ring has no hop, or does not divide the sequence.
    """
    if ring_size < 2:
        raise ValueError(f"a ring of {ring_size} has no hop to hide; ring_size must be at least 2")
    pairs_RR = hop_pairs(
        mask, layout=layout, tokens=shape.tokens, ring_size=ring_size, document_lengths=document_lengths
    )
    fewest = int(pairs_RR[:-1].max(axis=1).min())
    elements = 2 * shape.batch * (shape.tokens // ring_size) * shape.key_value_heads * shape.head_dim
    product_seconds = shape.batch * shape.query_heads * shape.head_dim * fewest / hardware.flops_per_second
    bandwidth = hardware.neighbour_bytes_per_second
    return Overlap(
        forward_hop_seconds=elements * shape.element_bytes / bandwidth,
        forward_block_seconds=4 * product_seconds,
        backward_hop_seconds=elements * (shape.element_bytes + _FLOAT32_BYTES) / bandwidth,
        backward_block_seconds=10 * product_seconds,
    )


def minimal_share(
    hardware: Hardware,
    *,
    query_heads: int,
    key_value_heads: int,
    element_bytes: int,
    visible_fraction: float,
    backward: bool,
) -> float:
    """Tokens a device from which on a hop's transfer hides: `ring_overlap` solved for c.

        forward    c >= F / B  x  K / H  x  e / 2        / visible fraction
        backward   c >= F / B  x  K / H  x  (e + 4) / 5  / visible fraction

    F is FLOP/s and B the bandwidth to one neighbour. With K = H, e = 2, everything visible and all links counted as
    one the first line is the paper's c >= F / B (arXiv:2310.01889, section 3). Sharing keys among the queries of a
    group makes a ring cheaper in proportion; a causal zigzag or striped hop works on half of what it moves, which
    doubles c; in bfloat16 the float32 sums of backward ask for 1.2 times what forward does.

    Args:
        hardware: Peak or measured rates.
        query_heads: H.
        key_value_heads: K.
        element_bytes: e.
        visible_fraction: Share of a hop's c x c pairs that is computed: 1 without a mask, 1/2 for causal zigzag.
        backward: Which of the two lines.
    """
    if not 0 < visible_fraction <= 1:
        raise ValueError(f"visible_fraction must be in (0, 1], got {visible_fraction}")
    intensity = hardware.flops_per_second / hardware.neighbour_bytes_per_second
    per_pair = (element_bytes + _FLOAT32_BYTES) / 5 if backward else element_bytes / 2
    return intensity * key_value_heads / query_heads * per_pair / visible_fraction
