"""Whether a ring's transfers hide behind its work, on given hardware.

While a device computes one block it sends on the keys and values of the next, so a phase costs the longer of the two.
In backward float32 sums of dk and dv travel as well, one hop behind, and the device's own block is cut in two:

    forward, R phases          block 0 (own)  1  ...  R-1
                               send  k,v      k,v ... nothing
    backward, R + 1 phases     block half of own   1    2         ...  R-1    half of own
                               send  k,v           k,v  k,v,sums  ...  sums   sums
"""

import dataclasses
import math
from collections.abc import Sequence

from ring_rl.kernels.cost import AttentionShape
from ring_rl.kernels.hardware import Hardware
from ring_rl.kernels.layout import Layout
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.pairs import hop_pairs

_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Seconds of a transfer and of the block that has to cover it, in each direction's tightest phase."""

    forward_transfer_seconds: float
    forward_block_seconds: float
    backward_transfer_seconds: float
    backward_block_seconds: float

    @property
    def hides(self) -> bool:
        """Whether no device ever waits for a transfer, forward and backward."""
        return (
            self.forward_transfer_seconds <= self.forward_block_seconds
            and self.backward_transfer_seconds <= self.backward_block_seconds
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
    """Times of the transfer that is covered worst, and of its block, when a ring goes the full circle.

        forward    transfer 2 B c K D e / bandwidth                        block  4 B H D pairs / FLOP/s
        backward   transfer 2 B c K D (e, e + 4 or 4) / bandwidth          block 10 B H D pairs / FLOP/s

    Devices are in lockstep, so `pairs` are those of the busiest device in a phase, and half of its own in backward's
    first and last. Worst is where a transfer is longest for its block. Data sheets give peaks of both rates; for a
    sharper answer pass measured ones as `hardware`. `document_lengths` as in `visible_pairs`.

    Raises:
        ValueError: The ring has no hop, or does not divide the sequence.
    """
    if ring_size < 2:
        raise ValueError(f"a ring of {ring_size} has no hop to hide; ring_size must be at least 2")
    pairs_RR = hop_pairs(
        mask, layout=layout, tokens=shape.tokens, ring_size=ring_size, document_lengths=document_lengths
    )
    pairs = [int(busiest) for busiest in pairs_RR.max(axis=1)]
    hops, half_own = ring_size - 1, pairs[0] / 2
    seconds_a_byte = 2 * shape.batch * (shape.tokens // ring_size) * shape.key_value_heads * shape.head_dim
    seconds_a_byte /= hardware.neighbour_bytes_per_second
    seconds_a_pair = shape.batch * shape.query_heads * shape.head_dim / hardware.flops_per_second

    keys, sums = [shape.element_bytes] * hops, [_FLOAT32_BYTES] * hops
    in_backward = [k + s for k, s in zip([*keys, 0, 0], [0, 0, *sums], strict=True)]
    forward = _tightest([*keys, 0], pairs, seconds_a_byte, 4 * seconds_a_pair)
    backward = _tightest(in_backward, [half_own, *pairs[1:], half_own], seconds_a_byte, 10 * seconds_a_pair)
    return Overlap(
        forward_transfer_seconds=forward[0],
        forward_block_seconds=forward[1],
        backward_transfer_seconds=backward[0],
        backward_block_seconds=backward[1],
    )


def _tightest(
    element_bytes: Sequence[int], pairs: Sequence[float], seconds_a_byte: float, seconds_a_pair: float
) -> tuple[float, float]:
    """(transfer, block), in seconds, of the phase whose transfer is longest for its block."""

    def exposure(phase: tuple[float, float]) -> float:
        transfer, block = phase
        if block == 0:
            return math.inf if transfer > 0 else 0.0
        return transfer / block

    phases = [(e * seconds_a_byte, p * seconds_a_pair) for e, p in zip(element_bytes, pairs, strict=True)]
    return max(phases, key=exposure)


def minimal_share(
    hardware: Hardware,
    *,
    query_heads: int,
    key_value_heads: int,
    element_bytes: int,
    visible_fraction: float,
    backward: bool,
) -> float:
    """Tokens a device from which on all transfers hide: `ring_overlap` solved for c.

        forward    c >= F / B  x  K / H  x  e / 2            / visible fraction
        backward   c >= F / B  x  K / H  x  2 max(e, 4) / 5  / visible fraction

    F is FLOP/s and B the bandwidth to one neighbour. With K = H, e = 2, everything visible and all links counted as
    one the first line is the paper's c >= F / B (arXiv:2310.01889, section 3). Sharing keys among the queries of a
    group makes a ring cheaper in proportion; a causal zigzag or striped hop works on half of what it moves, which
    doubles c. In backward the halves of the device's own block decide: one covers keys of e bytes, the other the
    float32 sums on their way home; in bfloat16 that asks for 1.6 times what forward does.

    Args:
        hardware: Peak or measured rates.
        query_heads: H.
        key_value_heads: K.
        element_bytes: e.
        visible_fraction: Share of every block's c x c pairs that is computed: 1 without a mask, 1/2 for causal zigzag.
        backward: Which of the two lines.
    """
    if not 0 < visible_fraction <= 1:
        raise ValueError(f"visible_fraction must be in (0, 1], got {visible_fraction}")
    intensity = hardware.flops_per_second / hardware.neighbour_bytes_per_second
    per_pair = 2 * max(element_bytes, _FLOAT32_BYTES) / 5 if backward else element_bytes / 2
    return intensity * key_value_heads / query_heads * per_pair / visible_fraction
