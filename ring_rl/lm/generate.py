"""Text that a language model writes, from a key-value cache that the devices of a ring share."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from ring_rl.lm.generation.sampling import GREEDY, Sampling
from ring_rl.lm.generation.steps import GenerationSteps, compiled_steps
from ring_rl.lm.generation.table import Table, groups_of_like_length
from ring_rl.lm.model import LanguageModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Float32, Int32, PRNGKeyArray

__all__ = ["GREEDY", "Generation", "Generator", "Sampling", "generate"]

CHECK_EVERY = 8
"""Steps between two looks at what was drawn: each waits for the device, which else is told the next steps ahead."""


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
        model: Its weights are copied to every device that shares the cache.
        parallel: A mesh whose sequence axis shares the cache's slots, for contexts that one device cannot hold; None:
            one device.
        chunk_size: Tokens of a prompt that are read at once. Larger is faster until the device is busy; the
            activations of a chunk are what reading needs beside the cache.
    """

    def __init__(self, model: LanguageModel, *, parallel: SequenceParallel | None, chunk_size: int):
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
        self._config, self._parallel, self._chunk_size = model.config, parallel, chunk_size
        self._parameters = compiled_steps(self._config, GREEDY, parallel).prepare(nnx.split(model)[1])

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
        """As `generate`; `on_progress` is called with how many positions are done, and of how many."""
        prompts = [np.asarray(prompt) for prompt in prompts]
        check_prompts(
            prompts,
            vocabulary_size=self._config.vocabulary_size,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
        )
        if sampling.temperature > 0.0 and key is None:
            raise ValueError(f"sampling.temperature={sampling.temperature} draws at random and needs a key")
        key = jax.random.key(0) if key is None else key
        steps = compiled_steps(self._config, sampling, self._parallel)
        tables = {
            tuple(group): Table([prompts[row] for row in group], max_new_tokens=max_new_tokens, stop_ids=stop_ids)
            for group in groups_of_like_length([len(prompt) for prompt in prompts])
        }
        done, total = 0, sum(table.positions for table in tables.values())
        written = {}
        for group, table in tables.items():
            before = done

            def advanced(position: int, before: int = before) -> None:
                if on_progress is not None:
                    on_progress(before + position, total)

            self._fill(table, steps, key, np.array(group, np.uint32), advanced)
            done += table.positions
            advanced(table.positions)
            written |= dict(zip(group, table.rows(), strict=True))
        rows = [written[row] for row in range(len(prompts))]
        return Generation(*(tuple(row[field] for row in rows) for field in range(3)))

    def _fill(
        self,
        table: Table,
        steps: GenerationSteps,
        key: PRNGKeyArray,
        rows: np.ndarray,
        advanced: Callable[[int], None],
    ) -> None:
        """Reads the prompts of a table and writes after them."""
        cache = steps.begin(len(rows), steps.slots(table.positions))
        drawn, waiting = np.zeros(len(rows), np.int32), []
        for start, stop in table.pieces(chunk_size=self._chunk_size):
            drawn, log_probability, cache = steps.read(
                self._parameters, cache, table.read(start, stop), drawn, key, rows, table.counts(stop)
            )
            waiting.append((stop, drawn, log_probability))
            if len(waiting) == CHECK_EVERY or stop == table.positions:
                for each in jax.device_get(waiting):
                    table.write(*each)
                waiting = []
                advanced(stop)
                if table.complete():
                    return


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
    """What `model` writes after each of `prompts`, whatever their lengths.

    Greedily that is, token by token, the argmax of the model on everything before. A prompt's draws depend on `key`
    and its place among the prompts: not on what the others are, nor on the ring, nor on `chunk_size`.

    Cost: one forward pass over the longest prompt in chunks, then one step for each new token and for each token by
    which prompts that are read together differ in length. Memory: the cache, 2 · layers · K · D numbers a token, of
    which each device that shares it holds its part, and a copy of the weights on each of them.

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
            `max_length`, no key to draw with.
    """
    return Generator(model, parallel=parallel, chunk_size=chunk_size)(
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        stop_ids=stop_ids,
        max_length=max_length,
    )


def check_prompts(
    prompts: Sequence[np.ndarray], *, vocabulary_size: int, max_new_tokens: int, max_length: int | None
) -> None:
    """Raises ValueError for what `generate` cannot read."""
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
                f"prompt {index} has {len(prompt)} tokens, and {max_new_tokens} new ones make more than "
                f"{max_length}; shorten it, or lower max_new_tokens to {max(max_length - len(prompt), 0)}"
            )
