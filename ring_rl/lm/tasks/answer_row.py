"""A sample as a row of tokens: what a model learns from, or is asked in one pass."""

from __future__ import annotations

import numpy as np

from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["answer_row"]


def answer_row(
    sample: Sample, tokenizer: Tokenizer, *, begin_with_bos: bool, end_with_eos: bool, length: int | None = None
) -> TokenBatch:
    """Prompt, prefix and completion as tokens [T]; only the tokens of answers have weight.

    They are encoded as the one text that they are, for a tokenizer may join letters across the seams. A token counts
    as an answer's where it holds any of its characters.

    Args:
        sample: As drawn.
        tokenizer: The model's own.
        begin_with_bos: Put the tokenizer's beginning in front, where it has one.
        end_with_eos: Put its end behind, where it has one, with weight: so a model learns to stop.
        length: T, filled up on the right; None: as long as it is.

    Raises:
        ValueError: it is longer than `length` (an answer is never cut), or an answer has no token of its own.
    """
    text = sample.prompt + sample.answer_prefix
    ids, spans = tokenizer.encode_with_spans(text + sample.completion)
    answer_of_token = np.full(len(ids), -1, np.int32)
    for number, (begin, end) in enumerate(sample.answer_spans()):
        inside = (spans[:, 0] < len(text) + end) & (spans[:, 1] > len(text) + begin)
        inside &= answer_of_token < 0
        if not inside.any():
            raise ValueError(f"the answer {sample.answers[number]!r} has no token of its own with this tokenizer")
        answer_of_token[inside] = number
    first = [tokenizer.bos_id] if begin_with_bos and tokenizer.bos_id is not None else []
    last = [tokenizer.eos_id] if end_with_eos and tokenizer.eos_id is not None else []
    used = len(first) + len(ids) + len(last)
    length = used if length is None else length
    if used > length:
        raise ValueError(
            f"a sample of {sample.task} with length {sample.length} takes {used} tokens, the row has {length}; "
            "ask for a smaller one or for longer rows"
        )
    tokens = np.zeros(length, np.int32)
    tokens[:used] = np.concatenate([np.array(first, np.int32), ids, np.array(last, np.int32)])
    targets = np.full(length, -1, np.int32)
    targets[: used - 1] = tokens[1:used]
    answer_ids = np.full(length, -1, np.int32)
    # The target of a place is the token after it.
    shift = len(first) - 1
    places = np.flatnonzero(answer_of_token >= 0)
    if places[0] + shift < 0:
        raise ValueError(f"nothing stands before the answer of this sample of {sample.task}; it needs a prompt")
    answer_ids[places + shift] = answer_of_token[places]
    weights = (answer_ids >= 0).astype(np.float32)
    if last:
        weights[used - 2] = 1.0
    return TokenBatch(
        tokens=tokens,
        targets=targets,
        weights=weights,
        positions=np.arange(length, dtype=np.int32),
        segment_ids=None,
        answer_ids=answer_ids,
    )
