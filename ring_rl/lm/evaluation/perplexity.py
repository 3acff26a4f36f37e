"""How well a model predicts whole documents, by the two usual rules; everything is summed, and divided once at the end.

With windows of W tokens and a document t[0], t[1], ..., t[n-1]:

    truncated   one window over t[0] ... t[W-1]; W - 1 losses. What lies beyond is not read. Every token is predicted
                from all before it, so the first ones from little.
    sliding     windows begin at 0, s, 2s, ... (s the stride); the first gives its W losses, every other one the s (the
                last: fewer) that no window gave before. All n - 1 tokens are predicted once, those after the first
                window from at least W - s tokens. Costs W / s times as many tokens as the document has.

Both come as the losses of single tokens, -log p(t[i + 1] | tokens of the window up to t[i]), so that sums over
documents, means over positions and results of single documents are all made from one pass. A mean of the means of
devices or documents would weigh tokens unequally; `Perplexity` adds sums and counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from ring_rl.kernels.layout import from_layout, to_layout
from ring_rl.lm.model import LanguageModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Array, Float32, Int

__all__ = ["Perplexity", "losses_by_position", "sliding_losses", "token_losses", "truncated_losses"]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sums over tokens; `a + b` is that of both together.

    Attributes:
        loss_sum: Σ -log p, in nats.
        tokens: how many were predicted.
    """

    loss_sum: float
    tokens: int

    @classmethod
    def of(cls, losses: Float32[np.ndarray, " _"]) -> Perplexity:
        """Of single tokens' losses, summed in float64."""
        return cls(float(losses.sum(dtype=np.float64)), len(losses))

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(self.loss_sum + other.loss_sum, self.tokens + other.tokens)

    @property
    def mean_loss(self) -> float:
        """Nats a token; nan of none."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def value(self) -> float:
        """exp(mean loss)."""
        return math.exp(self.mean_loss)


def truncated_losses(
    model: LanguageModel,
    documents: Sequence[Int[np.ndarray, " _"]],
    *,
    length: int,
    parallel: SequenceParallel,
    chunks: int,
    batch_size: int,
) -> list[Float32[np.ndarray, " _"]]:
    """The first `length` tokens of every document, in one window each: `length` - 1 losses a document.

    Args:
        model: predicts; on the devices of the mesh, as `load_model` leaves it.
        documents: token ids, each with a begin token where the model was trained so.
        length: W.
        parallel: the mesh; a document is sharded over its ring.
        chunks: steps in which the head runs; divides the tokens of a device.
        batch_size: documents read together; one program serves them all.

    Raises:
        ValueError: a document is shorter, or the mesh cannot share the windows.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, one to read and one to predict, got {length}")
    for number, document in enumerate(documents):
        if len(document) < length:
            raise ValueError(
                f"document {number} has {len(document)} tokens, fewer than the length of {length}; leave it out or "
                "measure a shorter length"
            )
    windows = (_Window(document[: length - 1], document[1:length]) for document in documents)
    return list(_losses_of(model, windows, length=length, parallel=parallel, chunks=chunks, batch_size=batch_size))


def sliding_losses(
    model: LanguageModel,
    document: Int[np.ndarray, " n"],
    *,
    window: int,
    stride: int,
    parallel: SequenceParallel,
    chunks: int,
    batch_size: int,
) -> Float32[np.ndarray, " _"]:
    """All n - 1 losses of a document, read in windows of `window` tokens that move by `stride`.

    Args:
        model: predicts; on the devices of the mesh, as `load_model` leaves it.
        document: token ids, with a begin token where the model was trained so; the later windows begin without it.
        window: W.
        stride: s, at most W; with s = W windows do not overlap.
        parallel: the mesh; a window is sharded over its ring.
        chunks: steps in which the head runs; divides the tokens of a device.
        batch_size: windows read together; one program serves them all.

    Raises:
        ValueError: the document has nothing to predict, the stride does not fit, or the mesh cannot share the windows.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be in [1, window={window}], got {stride}; beyond it tokens would be left out")
    if len(document) < 2:
        raise ValueError(f"a document needs at least 2 tokens, one to read and one to predict, got {len(document)}")
    targets = len(document) - 1
    begins = range(0, max(targets - window, 0) + stride, stride)
    windows = (_Window(document[at : min(at + window, targets)], document[at + 1 : at + window + 1]) for at in begins)
    losses = _losses_of(model, windows, length=window, parallel=parallel, chunks=chunks, batch_size=batch_size)
    # Of every window but the first, what the one before has not given.
    return np.concatenate(
        [each if at == 0 else each[window - stride :] for at, each in zip(begins, losses, strict=True)]
    )


def losses_by_position(losses: Sequence[Float32[np.ndarray, " _"]], *, edges: Sequence[int]) -> list[Perplexity]:
    """For each range of positions [edges[i], edges[i+1]) what the losses there sum to, over all documents.

    Position i is that of loss i, which is predicted from i + 1 tokens with the truncated rule: how much a longer
    context helps.

    Raises:
        ValueError: the edges do not ascend.
    """
    if any(stop <= start for start, stop in itertools.pairwise(edges)):
        raise ValueError(f"edges must ascend, got {list(edges)}")
    return [
        sum((Perplexity.of(each[start:stop]) for each in losses), Perplexity(0.0, 0))
        for start, stop in itertools.pairwise(edges)
    ]


@dataclasses.dataclass(frozen=True)
class _Window:
    """What is read, and what should follow each token of it."""

    tokens: Int[np.ndarray, " w"]
    targets: Int[np.ndarray, " w"]


def _losses_of(
    model: LanguageModel,
    windows: Iterator[_Window],
    *,
    length: int,
    parallel: SequenceParallel,
    chunks: int,
    batch_size: int,
) -> Iterator[Float32[np.ndarray, " _"]]:
    """The losses of each window, as many as it has targets; windows are padded to `length` and to whole batches."""
    parallel.check(batch_size, length)
    graphdef, state = nnx.split(model)
    sharding = NamedSharding(parallel.mesh, parallel.token_spec)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length))

    def placed(array: np.ndarray) -> Array:
        in_layout = to_layout(array, axis=1, ring_size=parallel.ring_size, layout=parallel.layout)
        return jax.device_put(in_layout, sharding)

    pending: list[_Window] = []

    def read() -> list[Float32[np.ndarray, " _"]]:
        tokens, targets = np.zeros((batch_size, length), np.int32), np.full((batch_size, length), -1, np.int32)
        for row, window in enumerate(pending):
            tokens[row, : len(window.tokens)], targets[row, : len(window.targets)] = window.tokens, window.targets
        losses = token_losses(
            graphdef, state, placed(tokens), placed(positions), placed(targets), parallel=parallel, chunks=chunks
        )
        whole = np.asarray(multihost_utils.process_allgather(losses, tiled=True))
        natural = np.asarray(from_layout(whole, axis=1, ring_size=parallel.ring_size, layout=parallel.layout))
        # A copy: a view would keep the whole batch.
        return [natural[row, : len(window.targets)].copy() for row, window in enumerate(pending)]

    for window in windows:
        pending.append(window)
        if len(pending) == batch_size:
            yield from read()
            pending.clear()
    if pending:
        yield from read()


@partial(jax.jit, static_argnames=("graphdef", "parallel", "chunks"))
def token_losses(
    graphdef: Any,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    *,
    parallel: SequenceParallel,
    chunks: int,
) -> Float32[Array, "B T"]:
    """-log p(target) of every token, 0 where there is no target; all arrays in the layout of `parallel`.

    Args:
        graphdef: the model's, as `nnx.split` gives it.
        state: its parameters.
        tokens: rows of one document each, padded on the right.
        positions: 0 to T - 1 in every row.
        targets: -1 is none.
        parallel: the mesh.
        chunks: steps in which the head runs.
    """
    model: LanguageModel = nnx.merge(graphdef, state)
    # One document a row, padded on its right: causality alone hides the padding.
    hidden_BTM = model.hidden(tokens, positions, parallel)
    return model.token_losses(hidden_BTM, targets, parallel, chunks=chunks)
