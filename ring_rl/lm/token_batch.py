"""Batches of token rows: what a language model reads, and what it should have said."""

import dataclasses
from typing import Any

import jax

from ring_rl.typing import Float32, Int32

# numpy's where a batch is made, jax's where it is read.
_AnyArray = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B rows of T tokens, in the layout of the ring; a row of a `RowSource` is one without B, in natural order.

        tokens        ASK  red  fox  IS   4    7    <pad>
        targets       red  fox  IS   4    7    -1   -1       the token that follows, shifted before any permutation
        weights       0    0    0    1    1    0    0        what each target counts in the loss
        answer_ids    -1   -1   -1   0    0    -1   -1
        positions     0    1    2    3    4    5    6        from 0 in every document
        segment_ids   0    0    0    0    0    0    -1

    Attributes:
        tokens: Ids in the vocabulary; any where there is padding.
        targets: The token that follows in the same document; -1 is none.
        weights: 0 where there is nothing to learn.
        positions: In the document.
        segment_ids: Which document of its row a token is of, so that none sees another; -1 is padding. None where every
            row is one document, padded at most on its right: causality then hides the padding, and attention is faster.
        answer_ids: Which answer of its row a target is part of, from 0 and below T; -1 is none. An answer is right if
            all its targets of positive weight are. None where nothing is asked: then no answers are counted.
    """

    tokens: Int32[_AnyArray, "B T"]
    targets: Int32[_AnyArray, "B T"]
    weights: Float32[_AnyArray, "B T"]
    positions: Int32[_AnyArray, "B T"]
    segment_ids: Int32[_AnyArray, "B T"] | None
    answer_ids: Int32[_AnyArray, "B T"] | None
