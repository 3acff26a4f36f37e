"""What a device holds while a training step runs, part by part, by formula: nothing is compiled.

What must be held is known exactly: parameters and moments, gradients, what the policy of saved activations keeps of a
layer. What a compiler keeps besides, while it works on one layer, is its own choice: the numbers below were read
from compiled programs (their buffers at the peak, and how their peaks grow with tokens, width and vocabulary) and hold
for our kernels with the versions named in this room's README. A step has four moments that may need most:

    a layer's backward         state, gradients, everything saved, copies of the residual stream, and what attention or
                               the feed-forward work on, whichever is more
    the loss                   state, everything saved, the head gathered, its gradient, and the logits of a chunk
    the embedding's gradient   state, gradients, and the gradient of the whole embedding before it is scattered

The largest is the peak. `experiments/check_memory_model.py` compares with compiled steps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

from ring_rl.planning.step_sizes import StepSizes

__all__ = ["Compiler", "StepMemory", "saved_bytes", "step_memory"]

Compiler = Literal["tpu", "cpu"]

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one device at the moment that needs most.

    Attributes:
        parts: By name; they add up to `total`.
        moment: When that is.
    """

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())


class _Arrays(NamedTuple):
    """How many arrays of some shape are held: in the dtype of the activations, and in float32."""

    narrow: float
    float32: float = 0

    def bytes(self, elements: float, *, narrow_bytes: int) -> float:
        """Of arrays of so many elements."""
        return elements * (narrow_bytes * self.narrow + _FLOAT32 * self.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ForAttention:
    """Arrays of the size of a device's queries, and of its keys, in the backward of one layer's attention.

    Attributes:
        ring: Where keys travel: queries and what is found for them; keys and values, which are here, on their way, and
            cut for a hop; and the float32 sums of their gradients, which travel, arrive, are found, or are the
            device's own.
        ring_of_two: The same where there is one hop: nothing arrives while something else is sent on.
        alone: Where none travel: operands, and float32 results.
        around_groups: Of the whole layer, where attention works on some heads at a time: operands and results. The
            arrays above are then held for these heads only.
        scores: Arrays of all scores, where attention is dense.
    """

    ring: tuple[_Arrays, _Arrays]
    ring_of_two: tuple[_Arrays, _Arrays]
    alone: tuple[_Arrays, _Arrays]
    around_groups: tuple[_Arrays, _Arrays]
    scores: _Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a compiler keeps while it works on one layer, or on the loss.

    Attributes:
        attention: In the backward of attention.
        recomputed: Arrays of queries and of keys that wait while the feed-forward's backward runs.
        stream: Arrays of the residual stream, all through a layer's backward.
        hidden: Arrays of the feed-forward's hidden width in a chunk, by its kind, where it is computed again.
        hidden_saved: The same where it was saved.
        copied_weights: Bytes of each of all layers' weights that the device holds, for copies in the dtype of products.
        gathered_weights: Bytes of each of the weights of one layer: gathered, and their gradients.
        head: Bytes of each weight of the head, gathered, during the backward of layers.
        head_in_loss: The same during the loss.
        logits: Float32 arrays of the logits of a chunk of the loss.
        stream_in_loss: Arrays of the residual stream during the loss.
        lanes: What heads' dimension is rounded up to a multiple of in the arrays that attention works on. Where arrays
            only wait, the compiler puts tokens last, and nothing is padded.
    """

    attention: _ForAttention
    recomputed: _Arrays
    stream: _Arrays
    hidden: dict[str, float]
    hidden_saved: dict[str, float]
    copied_weights: int
    gathered_weights: float
    head: float
    head_in_loss: float
    logits: float
    stream_in_loss: float
    lanes: int


# XLA's compiler for CPUs, with the XLA block. Attention's own arrays never make its peak: it is where a layer's
# feed-forward is computed again, chunk by chunk, between copies of the stream.
_NO_QUERIES_SOME_KEYS = (_Arrays(0), _Arrays(1.25))
_CPU = _Kept(
    attention=_ForAttention(
        ring=_NO_QUERIES_SOME_KEYS,
        ring_of_two=_NO_QUERIES_SOME_KEYS,
        alone=_NO_QUERIES_SOME_KEYS,
        around_groups=(_Arrays(0), _Arrays(0)),
        scores=_Arrays(4),
    ),
    recomputed=_Arrays(0),
    stream=_Arrays(17),
    hidden={"none": 0, "gelu": 5.25, "swiglu": 8.5},
    hidden_saved={"none": 0, "gelu": 1.9, "swiglu": 5},
    copied_weights=0,
    gathered_weights=8,
    head=4,
    head_in_loss=8,
    logits=3,
    stream_in_loss=4.5,
    lanes=1,
)
# libtpu's compiler with our Pallas kernels. A hop's kernels return float32 arrays, which are there beside the sums that
# they go into: of queries two hops' results, their halves put in place, and the sum; of keys the four kinds above. Of
# scores v4 keeps a bfloat16 array besides, and v5e, v5p and v6e do not: the figure lies between, nearer to theirs.
_TPU_PALLAS = _Kept(
    attention=_ForAttention(
        ring=(_Arrays(3.5, 4), _Arrays(5, 8)),
        ring_of_two=(_Arrays(0.5, 1.5), _Arrays(0.5, 6.5)),
        alone=(_Arrays(3, 1), _Arrays(2, 2)),
        around_groups=(_Arrays(4), _Arrays(4)),
        scores=_Arrays(0.3, 2),
    ),
    recomputed=_Arrays(2),
    stream=_Arrays(2),
    hidden={"none": 0, "gelu": 3, "swiglu": 5},
    hidden_saved={"none": 0, "gelu": 2, "swiglu": 4},
    copied_weights=2,
    gathered_weights=4,
    head=0,
    head_in_loss=6,
    logits=2,
    stream_in_loss=4,
    lanes=128,
)
# The same with the XLA block, which keeps operands in the two layouts that its products want. A ring of two and no ring
# were not compiled.
_TPU_XLA = dataclasses.replace(
    _TPU_PALLAS,
    attention=dataclasses.replace(
        _TPU_PALLAS.attention,
        ring=(_Arrays(7, 2), _Arrays(10, 8)),
        ring_of_two=(_Arrays(7, 2), _Arrays(10, 8)),
    ),
    lanes=1,
)


def step_memory(sizes: StepSizes, *, compiler: Compiler) -> StepMemory:
    """The peak of a step, by part.

    Args:
        sizes: The step on its mesh.
        compiler: "tpu", with the block for attention that the request names; or "cpu", with the XLA block, which stands
            in for GPUs.
    """
    kept, config, layers = _kept(sizes, compiler), sizes.transformer, sizes.transformer.layers
    narrow_bytes = _activation_bytes(sizes, compiler)
    groups = sizes.parameter_groups()
    held = sizes.held_parameters()
    layer_groups = [group for group in groups if group.layered]
    layer_held = sum(layers * sizes.held(group) for group in layer_groups)
    layer_gathered = sum(sizes.gathered(group) for group in layer_groups)
    head = next(group for group in groups if group.multiplied and not group.layered)
    head_held, head_gathered = sizes.held(head), sizes.gathered(head)
    always = {
        "parameters": _FLOAT32 * held,
        "optimizer moments": _FLOAT32 * sizes.moments * held,
        "batch": 4 * _FLOAT32 * sizes.tokens,
        "sums of microbatches": _FLOAT32 * held if sizes.microbatches > 1 else 0,
    }
    saved = saved_bytes(sizes, compiler=compiler)
    stream = sizes.tokens * config.width
    copied = kept.copied_weights * layer_held
    chunk = sizes.tokens // config.feed_forward_chunks * config.feed_forward_width // sizes.mesh.tp
    hidden = (kept.hidden if sizes.recomputes_feed_forward else kept.hidden_saved)[config.feed_forward]
    logits = sizes.tokens // sizes.request.loss_chunks * (head_gathered // config.width)
    queries, keys = _elements(sizes)
    layer_backward = {
        "gradients": _FLOAT32 * (layer_held + head_held),
        "saved activations": saved,
        "gathered weights": copied + round(kept.gathered_weights * layer_gathered + kept.head * head_gathered),
        "residual stream": round(kept.stream.bytes(stream, narrow_bytes=narrow_bytes)),
    }
    moments = {
        "attention's backward": layer_backward
        | {"attention": _attention_bytes(sizes, kept, narrow_bytes=narrow_bytes)},
        "the feed-forward's backward": layer_backward
        | {
            "attention": round(kept.recomputed.bytes(queries + keys, narrow_bytes=narrow_bytes)),
            "feed-forward": round(hidden * narrow_bytes * chunk),
        },
        "the loss": {
            "saved activations": saved,
            "gathered weights": copied + round(kept.head_in_loss * head_gathered),
            "residual stream": round(kept.stream_in_loss * narrow_bytes * stream),
            "logits": round(kept.logits * _FLOAT32 * logits),
        },
        "the embedding's gradient": {
            "gradients": _FLOAT32 * held,
            "gathered weights": _FLOAT32 * head_gathered,
            "residual stream": 2 * narrow_bytes * stream,
        },
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return StepMemory(always | moments[moment], moment)


def saved_bytes(sizes: StepSizes, *, compiler: Compiler) -> int:
    """What all layers keep from forward to backward, on one device; of each token and layer in elements:

        none         M
        offload      nothing: the host has it
        attention    M + H D, and H float32
        products     2 M + 2 H D + 2 K D + m F, and H float32
        all          what backward reads: the residual stream and its norms, queries, keys and values before and after
                     they turn, the results, all of the feed-forward unless it runs in chunks, which compute theirs
                     again; dense attention also its weights. In bfloat16 on TPUs the insides of the norms are float32,
                     and weights of all layers are kept gathered

    m is the number of hidden products, 2 if the feed-forward is gated. The compiler for CPUs keeps bfloat16 as float32.
    """
    config, tp, e = sizes.transformer, sizes.mesh.tp, _activation_bytes(sizes, compiler)
    shape = sizes.attention_shape()
    queries, keys = shape.query_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    log_sum_exp = _FLOAT32 * shape.query_heads
    hidden = {"none": 0, "gelu": 1, "swiglu": 2}[config.feed_forward] * config.feed_forward_width // tp
    whole = {"none": 0, "gelu": 3, "swiglu": 5}[config.feed_forward] * config.feed_forward_width // tp
    # The feed-forward's norm is computed again with it.
    elementwise, streams = (0, 4) if sizes.recomputes_feed_forward else (whole, 10)
    a_token = {
        "none": config.width * e,
        "offload": 0,
        "attention": (config.width + queries) * e + log_sum_exp,
        "products": (2 * config.width + 2 * queries + 2 * keys + hidden) * e + log_sum_exp,
        "all": (streams * config.width + 3 * queries + 4 * keys + elementwise) * e + log_sum_exp,
    }[config.saved_activations]
    a_layer = 0
    if sizes.attention_strategy == "dense" and config.saved_activations in ("all", "products"):
        a_layer += _FLOAT32 * shape.query_heads * shape.batch * shape.tokens**2
    if e < _FLOAT32 and config.saved_activations == "all":
        elementwise += 0 if sizes.recomputes_feed_forward else config.feed_forward_width // tp
        a_token = ((3 * config.width + 2 * queries + 2 * keys + elementwise) * e) + 6 * config.width * _FLOAT32
        a_token += log_sum_exp
        a_layer += e * sum(sizes.gathered(each) for each in sizes.parameter_groups() if each.layered)
    return config.layers * (sizes.tokens * a_token + a_layer)


def _kept(sizes: StepSizes, compiler: Compiler) -> _Kept:
    if compiler == "cpu":
        return _CPU
    return _TPU_XLA if sizes.request.attention_block == "xla" else _TPU_PALLAS


def _activation_bytes(sizes: StepSizes, compiler: Compiler) -> int:
    return _FLOAT32 if compiler == "cpu" else sizes.element_bytes


def _elements(sizes: StepSizes) -> tuple[int, int]:
    """Of a device's queries and of its keys."""
    shape = sizes.attention_shape()
    key_heads = max(shape.key_value_heads, sizes.exchange_size)
    return sizes.tokens * shape.query_heads * shape.head_dim, sizes.tokens * key_heads * shape.head_dim


def _attention_bytes(sizes: StepSizes, kept: _Kept, *, narrow_bytes: int) -> int:
    """What the backward of one layer's attention works on."""
    shape, arrays = sizes.attention_shape(), kept.attention
    if sizes.attention_strategy == "dense":
        scores = shape.query_heads * shape.batch * shape.tokens**2
        return round(arrays.scores.bytes(scores, narrow_bytes=narrow_bytes))
    queries, keys = _elements(sizes)

    def both(each: tuple[_Arrays, _Arrays]) -> float:
        of_queries, of_keys = each
        return of_queries.bytes(queries, narrow_bytes=narrow_bytes) + of_keys.bytes(keys, narrow_bytes=narrow_bytes)

    if sizes.keys_travel:
        worked_on = both(arrays.ring if sizes.ring_size > 2 else arrays.ring_of_two)
    else:
        worked_on = both(arrays.alone)
    worked_on *= math.ceil(shape.head_dim / kept.lanes) * kept.lanes / shape.head_dim
    share = _share_at_once(sizes)
    return round(worked_on if share == 1 else both(arrays.around_groups) + share * worked_on)


def _share_at_once(sizes: StepSizes) -> float:
    """Which part of its keys' heads, over all rows, a device works on at a time."""
    if sizes.request.heads_at_once is None:
        return 1
    return sizes.key_heads_together / sizes.key_heads / sizes.rows
