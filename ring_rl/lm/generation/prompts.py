"""Prompts of any lengths as chunks of one shape."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ring_rl.typing import Int32

FILLER = 0
"""The token that stands after the end of a shorter prompt; nothing ever reads it."""


class Chunk(NamedTuple):
    """A stretch of all prompts that is read at once.

    Attributes:
        tokens: Each row's tokens, then `FILLER`.
        counts: How many of them are the prompt's; 0 once a prompt is at its end.
    """

    tokens: Int32[np.ndarray, "B T"]
    counts: Int32[np.ndarray, " B"]


def prompt_chunks(prompts: Sequence[Int32[np.ndarray, " tokens"]], *, chunk_size: int) -> list[Chunk]:
    """The prompts, begun together, in chunks of `chunk_size` tokens; of a power of two if they are shorter.

    All chunks are of one shape, so that one program reads them.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    chunk_size = min(chunk_size, 1 << (longest - 1).bit_length())
    padded = np.full((len(prompts), -(-longest // chunk_size) * chunk_size), FILLER, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return [
        Chunk(padded[:, start : start + chunk_size], np.clip(lengths - start, 0, chunk_size))
        for start in range(0, padded.shape[1], chunk_size)
    ]


def check_prompts(
    prompts: Sequence[np.ndarray], *, vocabulary_size: int, max_new_tokens: int, max_length: int | None
) -> None:
    """Raises ValueError for what `ring_rl.lm.generate.generate` cannot read, or may not."""
    if not prompts:
        raise ValueError("no prompts; give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"prompt {index} must be token ids [tokens], got {prompt.dtype}{list(prompt.shape)}")
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty; begin it with a token, such as the tokenizer's bos_id")
        if prompt.min() < 0 or prompt.max() >= vocabulary_size:
            wrong = prompt[(prompt < 0) | (prompt >= vocabulary_size)][0]
            raise ValueError(
                f"prompt {index} holds token {wrong}, but the model's vocabulary has {vocabulary_size}; "
                "use the tokenizer that it was trained with"
            )
        if max_length is not None and len(prompt) + max_new_tokens > max_length:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, which with {max_new_tokens} new ones are more than "
                f"max_length={max_length}; shorten it, or lower max_new_tokens to {max_length - len(prompt)}"
                if len(prompt) < max_length
                else f"prompt {index} has {len(prompt)} tokens, which leave no room for new ones in "
                f"max_length={max_length}; shorten it"
            )
