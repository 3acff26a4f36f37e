"""Packed batches shared so that every device has the same causal work, whatever documents are in them.

Causal attention within documents costs a token as many keys as its document holds up to it. `zigzag` balances one
document as long as the sequence: of many short ones a device may get late tokens only. Here every document is dealt
in zigzag by itself. R = 2, documents a of 5 tokens and b of 9, and two of padding:

    tokens     a a a a a b b b b b b b b b - -
    device     0 0 1 1 0 1 0 0 1 1 1 1 0 0 0 1
               . |_____| . |_____________| . .     zigzag of a body; dots are heads, dealt out one by one

A body is what 2R divides of a document. A head is what is left, fewer than 2R tokens that see 1, 2, ... keys: so
little that devices differ by fewer than R visible (query, key) pairs in all. Where 2R divides every document there
are no heads, and devices have equal work at every hop of a ring as well. This is for causal masks without a window.

Each row of a batch then has an order of its own, so attention must be given positions; the layout implies none.
Where that is a burden, `striped` comes near with positions that it implies: it deals out the tokens of every document
one by one, so that devices differ by at most R keys a query.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from ring_rl.kernels.layout import check_length
from ring_rl.typing import Int


def balanced_permutation(segment_ids: Int[np.ndarray, "B T"], *, ring_size: int) -> Int[np.ndarray, "B T"]:
    """Indices p such that device i holds tokens p[b, i T/R : (i + 1) T/R] of row b, ascending, hence in document order.

    Of any array x of the batch, `np.take_along_axis(x, p, axis=1)` is what the devices hold, and p itself holds the
    tokens' positions in the sequence; `np.argsort(p, axis=1)` undoes it. Made on the host, in O(B T log T).

    Args:
        segment_ids: The document of each token; each document in one piece. Negative ids are padding: no work.
        ring_size: Number of devices.

    Raises:
        ValueError: The ring does not divide T, or a document is in pieces.
    """
    if segment_ids.ndim != 2:
        raise ValueError(f"segment ids are of shape [batch, tokens], got {segment_ids.shape}; add the missing axis")
    check_length(segment_ids.shape[1], ring_size=ring_size, layout="contiguous")
    # Within a device ascending positions keep a document's tokens together, and its own block plainly causal.
    return np.stack([np.argsort(_devices(row, ring_size), kind="stable") for row in segment_ids])


def _devices(segment_ids: Int[np.ndarray, " T"], ring_size: int) -> Int[np.ndarray, " T"]:
    """The device of each token."""
    devices = np.empty(len(segment_ids), np.int64)
    zigzag = np.concatenate([np.arange(ring_size), np.arange(ring_size)[::-1]])
    heads, work = [], []
    for start, stop, is_padding in _documents(segment_ids):
        chunk = (stop - start) // len(zigzag)
        body = stop - chunk * len(zigzag)
        devices[body:stop] = np.repeat(zigzag, chunk)
        heads.extend(range(start, body))
        work.extend([0] * (body - start) if is_padding else range(1, body - start + 1))
    # Bodies give every device the same load, so heads start from none. Heaviest first, a round of one for each device,
    # the heavier the token the less loaded its device: loads never differ by more than the works of a round do, and
    # those by less than R, as with a head of work w there is one of w - 1.
    heads_by_work = np.asarray(heads, np.int64)[np.argsort(-np.asarray(work, np.int64), kind="stable")]
    work_in_order = -np.sort(-np.asarray(work, np.int64))
    load = np.zeros(ring_size, np.int64)
    for first in range(0, len(heads_by_work), ring_size):
        least_loaded = np.argsort(load, kind="stable")
        devices[heads_by_work[first : first + ring_size]] = least_loaded
        load[least_loaded] += work_in_order[first : first + ring_size]
    return devices


def _documents(segment_ids: Int[np.ndarray, " T"]) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether it is padding) of every run of one id."""
    bounds = [0, *(np.flatnonzero(np.diff(segment_ids)) + 1).tolist(), len(segment_ids)]
    seen = set()
    for start, stop in itertools.pairwise(bounds):
        document = int(segment_ids[start])
        if document in seen:
            raise ValueError(f"document {document} is in pieces, token {start} begins another; pack it in one piece")
        if document >= 0:
            seen.add(document)
        yield start, stop, document < 0
