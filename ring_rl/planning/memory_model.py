"""What a device holds while a training step runs, part by part, by formula: nothing is compiled.

What must be held is known exactly: parameters and moments, gradients, what the policy of saved activations keeps of a
layer. What a compiler keeps besides, while it works on one layer, is its own choice: the numbers in `_KEPT` were read
from compiled programs (their buffers at the peak, and their peaks as tokens, heads, width and vocabulary change) and
hold for our kernels with the versions named in this room's README. A step has three moments that may need most:

    layer backward     state, gradients, everything saved, and the arrays that one layer's backward works on
    loss               state, everything saved, the head gathered, its gradient, and the logits of a chunk
    embedding          state, gradients, and the gradient of the whole embedding before it is scattered

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
    """Bytes an element that a compiler keeps while it works on one layer.

    Attributes:
        ring_queries: Of each element of the queries, in the backward of a ring.
        ring_keys: Of each element of the keys, in the backward of a ring.
        alone_queries: Of the queries, where no keys travel.
        alone_keys: Of the keys, where no keys travel.
        stream: Of each element of the residual stream, all the while.
        hidden: Of each hidden activation of a chunk of the feed-forward, in backward.
        logits: Of each logit of a chunk of the loss.
        copied_weights: Of each weight that the device holds, all layers: a copy in the dtype of the products.
        gathered_weights: Of each weight of one layer, gathered.
        head: Of each weight of the head, gathered, while the loss runs.
    """

    ring_queries: float
    ring_keys: float
    alone_queries: float
    alone_keys: float
    stream: float
    hidden: float
    logits: float
    copied_weights: float
    gathered_weights: float
    head: float


_KEPT: dict[Compiler, _Kept] = {
    "tpu": _Kept(
        ring_queries=20,
        ring_keys=40,
        alone_queries=16,
        alone_keys=16,
        stream=8,
        hidden=12,
        logits=8,
        copied_weights=2,
        gathered_weights=6,
        head=6,
    ),
    "cpu": _Kept(
        ring_queries=20,
        ring_keys=40,
        alone_queries=16,
        alone_keys=16,
        stream=8,
        hidden=12,
        logits=8,
        copied_weights=2,
        gathered_weights=6,
        head=6,
    ),
}


def step_memory(sizes: StepSizes, *, compiler: Compiler) -> StepMemory:
    """The peak of a step, by part.

    Args:
        sizes: The step on its mesh.
        compiler: "tpu", with our Pallas block for attention; or "cpu", with the XLA block, as an estimate for GPUs.
    """
    kept, config, layers = _KEPT[compiler], sizes.transformer, sizes.transformer.layers
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
    saved = saved_bytes(sizes)
    stream = sizes.tokens * config.width
    copied = round(kept.copied_weights * layer_held)
    chunk = sizes.tokens // config.feed_forward_chunks
    hidden = 0 if config.feed_forward == "none" else chunk * config.feed_forward_width // sizes.mesh.tp
    logits = sizes.tokens // sizes.request.loss_chunks * (head_gathered // config.width)
    moments = {
        "layer backward": {
            "gradients": _FLOAT32 * (layer_held + head_held),
            "saved activations": saved,
            "gathered weights": copied + round(kept.gathered_weights * layer_gathered),
            "attention": _attention_bytes(sizes, kept) + round(kept.stream * stream),
            "feed-forward": round(kept.hidden * hidden),
        },
        "loss": {
            "saved activations": saved,
            "gathered weights": copied,
            "loss": round(kept.head * head_gathered + kept.logits * logits + 3 * sizes.element_bytes * stream),
        },
        "embedding": {
            "gradients": _FLOAT32 * held,
            "embedding": _FLOAT32 * head_gathered + 2 * sizes.element_bytes * stream,
        },
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return StepMemory(always | moments[moment], moment)


def saved_bytes(sizes: StepSizes) -> int:
    """What all layers keep from forward to backward, on one device; of each token and layer in elements:

    none         M
    offload      nothing: the host has it
    attention    M + H D, and H float32
    products     2 M + 2 H D + 2 K D + m F, and H float32; without m F where the feed-forward runs in chunks
    all          what backward reads: the residual stream and its norms, queries, keys and values before and after
                 they turn, the results, all of the feed-forward; dense attention also its weights
    """
    config, tp, e = sizes.transformer, sizes.mesh.tp, sizes.element_bytes
    shape = sizes.attention_shape()
    queries, keys = shape.query_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    log_sum_exp = _FLOAT32 * shape.query_heads
    matrices = {"none": 0, "gelu": 1, "swiglu": 2}[config.feed_forward]
    hidden = matrices * config.feed_forward_width // tp if config.feed_forward_chunks == 1 else 0
    a_token = {
        "none": config.width * e,
        "offload": 0,
        "attention": (config.width + queries) * e + log_sum_exp,
        "products": (2 * config.width + 2 * queries + 2 * keys + hidden) * e + log_sum_exp,
        "all": (6 * config.width + 3 * queries + 4 * keys + 2 * hidden) * e + log_sum_exp,
    }[config.saved_activations]
    dense = 0
    if sizes.attention_strategy == "dense" and config.saved_activations in ("all", "products"):
        dense = _FLOAT32 * shape.query_heads * shape.batch * shape.tokens**2
    return config.layers * (sizes.tokens * a_token + dense)


def _attention_bytes(sizes: StepSizes, kept: _Kept) -> int:
    """What the backward of one layer's attention works on."""
    shape = sizes.attention_shape()
    if sizes.attention_strategy == "dense":
        return 3 * _FLOAT32 * shape.query_heads * shape.batch * shape.tokens**2
    queries = sizes.tokens * shape.query_heads * shape.head_dim
    keys = sizes.tokens * max(shape.key_value_heads, sizes.exchange_size) * shape.head_dim
    if sizes.ring_size == 1 or sizes.attention_strategy == "ulysses":
        return round(kept.alone_queries * queries + kept.alone_keys * keys)
    return round(kept.ring_queries * queries + kept.ring_keys * keys)
