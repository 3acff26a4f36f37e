"""Text that a language model writes, from a key-value cache that the devices of a ring share."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from ring_rl.lm.generation.cache import batch_devices, cache_size, check_cache_fits
from ring_rl.lm.generation.prompts import check_prompts, prompt_chunks
from ring_rl.lm.generation.sampling import GREEDY, Sampling
from ring_rl.lm.generation.steps import Drawn, compiled_prepare, compiled_steps
from ring_rl.lm.model import LanguageModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Float32, Int32, PRNGKeyArray

__all__ = ["GREEDY", "Generation", "Generator", "Sampling", "generate"]

CHECK_EVERY = 8
"""New tokens between two looks at them: each look waits for the device, which else is told its next steps ahead."""


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What was written after each prompt.

    Attributes:
        tokens: Of each prompt, the new tokens, without the one that stopped it.
        log_probabilities: Of each new token, under the model itself (`ring_rl.lm.generation.sampling.draw`).
        stopped: Whether a stop token ended it, and not `max_new_tokens`.
    """

    tokens: tuple[Int32[np.ndarray, " new"], ...]
    log_probabilities: tuple[Float32[np.ndarray, " new"], ...]
    stopped: tuple[bool, ...]


class Generator:
    """A model made ready for writing once, for any number of prompts; `generate` says what it promises.

    Args:
        model: Its weights are copied to every device.
        parallel: A mesh whose sequence axis shares the cache's slots, for contexts that one device cannot hold, and
            whose batch axes share the prompts; None: one device.
        chunk_size: Tokens of a prompt that are read at once. Larger is faster until the device is busy; the
            activations of a chunk are what reading needs beside the cache.

    Raises:
        ValueError: `chunk_size` is less than 1.
    """

    def __init__(self, model: LanguageModel, *, parallel: SequenceParallel | None, chunk_size: int):
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
        self._config, self._parallel, self._chunk_size = model.config, parallel, chunk_size
        self._parameters = compiled_prepare(self._config, parallel)(nnx.split(model)[1])

    def __call__(
        self,
        prompts: Sequence[Int32[np.ndarray, " tokens"]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        key: PRNGKeyArray | None = None,
        stop_ids: Sequence[int] = (),
        max_length: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """As `generate`; `on_progress` is called with how many tokens of the longest row are done, and of how many."""
        prompts = [np.asarray(prompt) for prompt in prompts]
        check_prompts(
            prompts,
            vocabulary_size=self._config.vocabulary_size,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
        )
        if sampling.temperature > 0.0 and key is None:
            raise ValueError(f"sampling.temperature={sampling.temperature} draws at random and needs a key")
        report = on_progress or (lambda done, total: None)
        # Copies of the last prompt fill up what devices that share the rows divide.
        asked, prompts = len(prompts), prompts + prompts[-1:] * (-len(prompts) % batch_devices(self._parallel))
        chunks, longest = prompt_chunks(prompts, chunk_size=self._chunk_size), max(map(len, prompts))
        size, total = chunks[0].tokens.shape[1], longest + max_new_tokens
        key = jax.random.key(0) if key is None else key
        # The last token that is written need not be read; what stands after the end of a prompt is.
        devices = 1 if self._parallel is None else self._parallel.sequence_devices
        slots, slot_block = cache_size(max(len(chunks) * size, total - 1), devices=devices)
        steps = compiled_steps(self._config, sampling, self._parallel, slot_block=slot_block)
        check_cache_fits(self._config, rows=len(prompts), slots=slots, parallel=self._parallel)
        rows, (cache, drawn) = np.arange(len(prompts), dtype=np.uint32), steps.begin(len(prompts), slots)
        for index, chunk in enumerate(chunks, start=1):
            drawn, cache = steps.read(self._parameters, cache, chunk, drawn, rows, key)
            jax.block_until_ready(drawn)
            report(min(index * size, longest), total)
        columns, waiting = [], [drawn]
        for number in range(1, max_new_tokens):
            if len(waiting) == CHECK_EVERY:
                columns, waiting = columns + jax.device_get(waiting), []
                report(longest + number, total)
                if np.isin([column.tokens[:asked] for column in columns], stop_ids).any(axis=0).all():
                    break
            drawn, cache = steps.write(self._parameters, cache, drawn, rows, key, np.uint32(number))
            waiting.append(drawn)
        report(total, total)
        return _generation(columns + jax.device_get(waiting), asked, stop_ids)


def generate(
    model: LanguageModel,
    prompts: Sequence[Int32[np.ndarray, " tokens"]],
    *,
    parallel: SequenceParallel | None,
    max_new_tokens: int,
    sampling: Sampling,
    key: PRNGKeyArray | None,
    chunk_size: int,
    stop_ids: Sequence[int] = (),
    max_length: int | None = None,
) -> Generation:
    """What `model` writes after each of `prompts`, of any lengths, all of them at once.

    Greedily that is, token by token, the argmax of the model on everything before. A prompt's draws depend on `key`
    and its place among the prompts: not on what the others are, nor on the mesh, nor on `chunk_size`.

    Cost: a forward pass over the longest prompt for every row, then a step a new token; prompts of like length, and
    whole chunks, waste least. Memory: the cache, 2 · layers · K · D numbers a token and row, of which each device that
    shares it holds its part, and a copy of the weights on each of them.

    Args:
        model: As trained or loaded.
        prompts: Token ids [tokens] of each; at least one token.
        parallel: As in `Generator`.
        max_new_tokens: Most tokens that are written after a prompt.
        sampling: `GREEDY`, or how to draw.
        key: Of the draws; greedily None will do.
        chunk_size: As in `Generator`.
        stop_ids: Tokens that end a text.
        max_length: Most tokens of a prompt together with what is written after it; None: as many as memory holds.

    Raises:
        ValueError: Before anything is computed: an empty prompt, a token outside the vocabulary, more tokens than
            `max_length` or than the devices' memory has room for, no key to draw with.
    """
    return Generator(model, parallel=parallel, chunk_size=chunk_size)(
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        stop_ids=stop_ids,
        max_length=max_length,
    )


def _generation(columns: Sequence[Drawn], asked: int, stop_ids: Sequence[int]) -> Generation:
    """Every row that was asked for, up to its first stop token."""
    tokens_BT = np.stack([column.tokens[:asked] for column in columns], axis=1)
    log_probabilities_BT = np.stack([column.log_probabilities[:asked] for column in columns], axis=1)
    rows = []
    for tokens, log_probabilities in zip(tokens_BT, log_probabilities_BT, strict=True):
        stops = np.flatnonzero(np.isin(tokens, stop_ids))
        length = stops[0] if len(stops) else len(tokens)
        rows.append((tokens[:length], log_probabilities[:length], len(stops) > 0))
    return Generation(*zip(*rows, strict=True))
