"""Prompts side by side, what has been written after them, and what is to be read next."""

from collections.abc import Iterator, Sequence

import numpy as np

from ring_rl.typing import Float32, Int32

DRAWN = -1
"""Stands where a row reads the token that it drew last."""
FEW_TOKENS = 16
"""Tokens of the pieces in which what no whole chunk is left of is read."""
MOST_WAITING = 64
"""Positions by which the prompts of a group differ at most: each costs a step of one token."""


class Table:
    """Rows that share positions: until the longest prompt is read, shorter rows write already.

    Args:
        prompts: Token ids of each row, one or more.
        max_new_tokens: Most tokens that are written after a prompt.
        stop_ids: Tokens that end a row.
    """

    def __init__(self, prompts: Sequence[np.ndarray], *, max_new_tokens: int, stop_ids: Sequence[int]):
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        # The last token that is written need not be read.
        self.positions = longest + max_new_tokens - 1
        self._max_new_tokens, self._stop_ids = max_new_tokens, np.array(sorted(stop_ids), np.int32)
        self._prompts = np.full((len(prompts), self.positions), DRAWN, np.int32)
        for row, prompt in enumerate(prompts):
            self._prompts[row, : len(prompt)] = prompt
        self._tokens = np.zeros((len(prompts), max_new_tokens), np.int32)
        self._log_probabilities = np.zeros((len(prompts), max_new_tokens), np.float32)
        self._written = np.zeros(len(prompts), int)
        self._stopped = np.zeros(len(prompts), bool)

    def pieces(self, *, chunk_size: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the positions that are read at once: chunks, pieces of a few tokens, single ones."""
        start = 0
        for size in sorted({chunk_size, min(FEW_TOKENS, chunk_size)}, reverse=True):
            while start + size <= self.shortest:
                yield start, start + size
                start += size
        for position in range(start, self.positions):
            yield position, position + 1

    def read(self, start: int, stop: int) -> Int32[np.ndarray, "B T"]:
        """The tokens at these positions, `DRAWN` where a row's own follow."""
        return self._prompts[:, start:stop]

    def counts(self, stop: int) -> Int32[np.ndarray, " B"]:
        """Which new token each row draws after reading up to `stop`; negative within its prompt."""
        return (stop - self.lengths).astype(np.int32)

    def write(self, stop: int, tokens: Int32[np.ndarray, " B"], log_probabilities: Float32[np.ndarray, " B"]) -> None:
        """Takes what was drawn after reading up to `stop`; in order of `stop`."""
        counts = self.counts(stop)
        wanted = (counts >= 0) & (counts < self._max_new_tokens) & ~self._stopped
        self._stopped |= wanted & np.isin(tokens, self._stop_ids)
        rows = np.flatnonzero(wanted & ~self._stopped)
        self._tokens[rows, counts[rows]] = tokens[rows]
        self._log_probabilities[rows, counts[rows]] = log_probabilities[rows]
        self._written[rows] += 1

    def complete(self) -> bool:
        """Whether every row has stopped or has all its tokens."""
        return bool(np.all(self._stopped | (self._written == self._max_new_tokens)))

    def rows(self) -> Iterator[tuple[Int32[np.ndarray, " new"], Float32[np.ndarray, " new"], bool]]:
        """(new tokens, their log-probabilities, whether a stop token ended them) of each row."""
        for row, written in enumerate(self._written):
            yield self._tokens[row, :written], self._log_probabilities[row, :written], bool(self._stopped[row])


def groups_of_like_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of prompts that are read together, which differ by `MOST_WAITING` tokens at most; each group sorted."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if group and lengths[index] - lengths[group[0]] > MOST_WAITING:
            yield sorted(group)
            group = []
        group.append(index)
    if group:
        yield sorted(group)
