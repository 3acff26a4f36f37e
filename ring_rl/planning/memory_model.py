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
from typing import Literal

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kept:
    """Bytes that a compiler keeps while it works on one layer, of each element that a device holds of an array.

    Attributes:
        queries: In the backward of a ring, of the queries.
        keys: In the backward of a ring, of the keys; those on their way and the sums of their gradients included.
        keys_alone: Of the keys, where none travel.
        stream: Of the residual stream, all through a layer's backward.
        hidden: Of the feed-forward's hidden width in a chunk, by its kind, where it is computed again.
        hidden_saved: The same where it was saved.
        copied_weights: Of the layers' weights that the device holds: a copy in the dtype of the products.
        gathered_weights: Of the weights of one layer, gathered, and their gradients.
        head: Of the head, gathered, during the backward of layers.
        head_in_loss: The same during the loss.
        logits: Of the logits of a chunk of the loss.
        stream_in_loss: Of the residual stream during the loss.
    """

    queries: float
    keys: float
    keys_alone: float
    stream: float
    hidden: dict[str, float]
    hidden_saved: dict[str, float]
    copied_weights: float
    gathered_weights: float
    head: float
    head_in_loss: float
    logits: float
    stream_in_loss: float


# XLA's compiler for CPUs, with the XLA block. Attention's own arrays never make its peak: it is where a layer's
# feed-forward is computed again, chunk by chunk, between copies of the stream.
_CPU = _Kept(
    queries=0,
    keys=5,
    keys_alone=5,
    stream=68,
    hidden={"none": 0, "gelu": 21, "swiglu": 34},
    hidden_saved={"none": 0, "gelu": 7.6, "swiglu": 20},
    copied_weights=0,
    gathered_weights=8,
    head=4,
    head_in_loss=8,
    logits=12,
    stream_in_loss=18,
)
# libtpu's compiler in bfloat16, with the XLA block: keys and the sums of their gradients are on their way while a block
# is computed tile by tile.
_TPU_XLA = _Kept(
    queries=10,
    keys=20,
    keys_alone=10,
    stream=8,
    hidden={"none": 0, "gelu": 6, "swiglu": 10},
    hidden_saved={"none": 0, "gelu": 4, "swiglu": 8},
    copied_weights=2,
    gathered_weights=2.8,
    head=0,
    head_in_loss=6,
    logits=8,
    stream_in_loss=8,
)
# The same with our Pallas kernels, whose results for a whole hop are float32 arrays beside the sums they go into.
_TPU_PALLAS = dataclasses.replace(_TPU_XLA, queries=19.4, keys=44, keys_alone=20)


def step_memory(sizes: StepSizes, *, compiler: Compiler) -> StepMemory:
    """The peak of a step, by part.

    Args:
        sizes: The step on its mesh.
        compiler: "tpu", with the block for attention that the request names; or "cpu", with the XLA block, which stands
            in for GPUs.
    """
    kept, config, layers = _kept(sizes, compiler), sizes.transformer, sizes.transformer.layers
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
    copied = round(kept.copied_weights * layer_held)
    chunk = sizes.tokens // config.feed_forward_chunks * config.feed_forward_width // sizes.mesh.tp
    recomputed = config.saved_activations not in ("products", "all")
    hidden = (kept.hidden if recomputed else kept.hidden_saved)[config.feed_forward]
    logits = sizes.tokens // sizes.request.loss_chunks * (head_gathered // config.width)
    layer_backward = {
        "gradients": _FLOAT32 * (layer_held + head_held),
        "saved activations": saved,
        "gathered weights": copied + round(kept.gathered_weights * layer_gathered + kept.head * head_gathered),
        "residual stream": round(kept.stream * stream),
    }
    moments = {
        "attention's backward": layer_backward | {"attention": _attention_bytes(sizes, kept)},
        "the feed-forward's backward": layer_backward | {"feed-forward": round(hidden * chunk)},
        "the loss": {
            "saved activations": saved,
            "gathered weights": copied + round(kept.head_in_loss * head_gathered),
            "residual stream": round(kept.stream_in_loss * stream),
            "logits": round(kept.logits * logits),
        },
        "the embedding's gradient": {
            "gradients": _FLOAT32 * held,
            "gathered weights": _FLOAT32 * head_gathered,
            "residual stream": 2 * _activation_bytes(sizes, compiler) * stream,
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
                     they turn, the results, all of the feed-forward; dense attention also its weights

    m is the number of hidden products, 2 if the feed-forward is gated. The compiler for CPUs keeps bfloat16 as float32.
    """
    config, tp, e = sizes.transformer, sizes.mesh.tp, _activation_bytes(sizes, compiler)
    shape = sizes.attention_shape()
    queries, keys = shape.query_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    log_sum_exp = _FLOAT32 * shape.query_heads
    hidden = {"none": 0, "gelu": 1, "swiglu": 2}[config.feed_forward] * config.feed_forward_width // tp
    elementwise = {"none": 0, "gelu": 3, "swiglu": 5}[config.feed_forward] * config.feed_forward_width // tp
    a_token = {
        "none": config.width * e,
        "offload": 0,
        "attention": (config.width + queries) * e + log_sum_exp,
        "products": (2 * config.width + 2 * queries + 2 * keys + hidden) * e + log_sum_exp,
        "all": (10 * config.width + 3 * queries + 4 * keys + elementwise) * e + log_sum_exp,
    }[config.saved_activations]
    dense = 0
    if sizes.attention_strategy == "dense" and config.saved_activations in ("all", "products"):
        dense = _FLOAT32 * shape.query_heads * shape.batch * shape.tokens**2
    return config.layers * (sizes.tokens * a_token + dense)


def _kept(sizes: StepSizes, compiler: Compiler) -> _Kept:
    if compiler == "cpu":
        return _CPU
    return _TPU_XLA if sizes.request.attention_block == "xla" else _TPU_PALLAS


def _activation_bytes(sizes: StepSizes, compiler: Compiler) -> int:
    return _FLOAT32 if compiler == "cpu" else sizes.element_bytes


def _attention_bytes(sizes: StepSizes, kept: _Kept) -> int:
    """What the backward of one layer's attention works on."""
    shape = sizes.attention_shape()
    if sizes.attention_strategy == "dense":
        return 3 * _FLOAT32 * shape.query_heads * shape.batch * shape.tokens**2
    queries = sizes.tokens * shape.query_heads * shape.head_dim
    keys = sizes.tokens * max(shape.key_value_heads, sizes.exchange_size) * shape.head_dim
    travel = sizes.ring_size > 1 and sizes.attention_strategy in ("ring", "hybrid")
    # Float32 activations are twice as large, the sums in float32 are not.
    wider = 1.0 if sizes.element_bytes == 2 or kept is _CPU else 1.4
    return round(wider * (kept.queries * queries + (kept.keys if travel else kept.keys_alone) * keys))
