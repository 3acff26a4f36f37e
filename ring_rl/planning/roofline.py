"""How long a training step takes at best: operations over the rate of computing, bytes over the rate of the links.

What counts, of one device and one step:

    products      all matrix products, those that backward repeats included (`saved_activations`), by `products_share`
                  of the peak
    attention     kernels.cost.attention_flops, of the busiest device at each hop, by `attention_share` of the peak
    waiting       what the ring's hops take longer than the blocks that cover them (kernels.overlap)
    exchange      all-to-alls of Ulysses, and all_gather's keys and values: nothing covers them
    gathers       weights gathered over the weight axes, twice where layers are computed again, and their gradients
                  scattered in float32; nothing covers them unless `gathers_overlap` says that the longer of gathers
                  and products counts
    tensor        sums of activations over the tensor axis
    gradients     the sum of gradients over the axes that repeat the parameters, once a step

What is left out: elementwise work and the memory's bandwidth (norms, softmax, the optimizer), input, the latency of a
transfer, and the tiles that a masked block computes in vain. The two shares stand for the first; they are settings.
"""

from __future__ import annotations

import dataclasses

from ring_rl.kernels.cost import Cost, attention_flops, traffic
from ring_rl.kernels.hardware import Hardware
from ring_rl.kernels.mask import FULL
from ring_rl.kernels.overlap import Overlap, ring_overlap
from ring_rl.kernels.pairs import hop_pairs, visible_pairs
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.training.flops import model_flops_per_step

__all__ = ["Rates", "Roofline", "days_for", "layer_attention_flops", "product_flops", "roofline"]

_FLOAT32_BYTES = 4
_SECONDS_PER_DAY = 86400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What is reached of a data sheet's peaks.

    Attributes:
        products_share: Of the peak of matrix products, by products of weights and activations.
        attention_share: Of the same peak, by attention.
        link_share: Of the links' bandwidth.
        gathers_overlap: Whether weights are gathered while products run.
    """

    products_share: float
    attention_share: float
    link_share: float
    gathers_overlap: bool

    def __post_init__(self) -> None:
        for name in ("products_share", "attention_share", "link_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"rates.{name} must lie in (0, 1], got {getattr(self, name)}; 1 is the data sheet's")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """A step's time and what it is made of, in seconds of the busiest device, and its work.

    Attributes:
        products_seconds: As above, and so the next six.
        attention_seconds: As above.
        waiting_seconds: As above.
        exchange_seconds: As above.
        gather_seconds: As above; 0 where they hide behind products.
        tensor_seconds: As above.
        gradient_seconds: As above.
        product_flops: Of a device in a step, repeated ones included.
        attention_flops: Of the busiest device in a step, repeated ones included.
        model_flops: Of all devices in a step, nothing counted twice (`ring_rl.training.flops`).
        hop_bytes: What a device sends to its neighbour at a hop, forward and backward; None without a ring.
        overlap: Times of a hop and of the shortest block that covers one; None without a ring.
        tokens: Of a step.
        peak_flops_per_second: Of all devices, by the data sheet.
    """

    products_seconds: float
    attention_seconds: float
    waiting_seconds: float
    exchange_seconds: float
    gather_seconds: float
    tensor_seconds: float
    gradient_seconds: float
    product_flops: float
    attention_flops: float
    model_flops: float
    hop_bytes: Cost | None
    overlap: Overlap | None
    tokens: int
    peak_flops_per_second: float

    def parts(self) -> dict[str, float]:
        """Seconds by name; they add up to `seconds`."""
        return {
            "products": self.products_seconds,
            "attention": self.attention_seconds,
            "waiting for the ring": self.waiting_seconds,
            "exchange": self.exchange_seconds,
            "gathers": self.gather_seconds,
            "tensor parallel sums": self.tensor_seconds,
            "sum of gradients": self.gradient_seconds,
        }

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts().values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: model FLOPs over what the devices could have done in that time."""
        return self.model_flops / (self.seconds * self.peak_flops_per_second)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.seconds


def roofline(sizes: StepSizes, *, hardware: Hardware, rates: Rates) -> Roofline:
    """The step's time on devices that are all alike.

    Raises:
        ValueError: The hardware has no rates to plan with.
    """
    compute = hardware.flops_per_second
    links = hardware.bytes_per_second * rates.link_share
    neighbour = hardware.neighbour_bytes_per_second * rates.link_share
    config, repeats = sizes.transformer, sizes.microbatches * sizes.transformer.layers

    products = sizes.microbatches * product_flops(sizes)
    attention_seconds, waiting_seconds, attended, overlap = _attention(sizes, hardware, rates)
    exchanged = 0
    if sizes.attention_strategy in ("ulysses", "all_gather", "hybrid"):
        exchanged = _exchanged_bytes(sizes)
    gathers = sizes.microbatches * _gathered_bytes(sizes) / links
    products_seconds = products / (compute * rates.products_share)
    if rates.gathers_overlap:
        gathers = max(gathers - products_seconds, 0.0)
    repeated = sum(sizes.held(g) * (config.layers if g.layered else 1) for g in sizes.parameter_groups())
    repeating = sizes.devices // (sizes.weight_shards * sizes.mesh.tp)
    pairs = sizes.request.batch_size * visible_pairs(sizes.mask, sizes.request.context)
    multiplied = sum(g.elements * (config.layers if g.layered else 1) for g in sizes.parameter_groups() if g.multiplied)
    return Roofline(
        products_seconds=products_seconds,
        attention_seconds=repeats * attention_seconds,
        waiting_seconds=repeats * waiting_seconds,
        exchange_seconds=repeats * exchanged / links,
        gather_seconds=gathers,
        tensor_seconds=repeats * _tensor_bytes(sizes) / neighbour,
        gradient_seconds=_all_reduced(repeated * _FLOAT32_BYTES, repeating) / links,
        product_flops=products,
        attention_flops=repeats * attended,
        model_flops=model_flops_per_step(
            matmul_parameters=multiplied,
            tokens=sizes.step_tokens,
            layers=config.layers,
            query_heads=config.query_heads,
            head_dim=config.head_dim,
            visible_pairs=sizes.microbatches * pairs,
        ),
        hop_bytes=_hop_bytes(sizes),
        overlap=overlap,
        tokens=sizes.step_tokens,
        peak_flops_per_second=sizes.devices * compute,
    )


def days_for(tokens: float, plan: Roofline) -> float:
    """Days that training on so many tokens takes at the roofline's pace."""
    if not tokens > 0:
        raise ValueError(f"the token budget must be positive, got {tokens}")
    return tokens / plan.tokens_per_second / _SECONDS_PER_DAY


def product_flops(sizes: StepSizes) -> float:
    """Operations of all products of weights and activations on one device, of one microbatch.

        2 N (3 + r) P      N tokens, P weights of the device that multiply, r what backward computes again:

    of a layer's own projections all, of the feed-forward all but the last product, whose result backward does not
    read; with saved_activations "all" and "products" nothing of the former, and nothing of the latter unless it runs
    in chunks, which keep nothing. The head's gradients are made in forward, where its logits are.
    """
    config = sizes.transformer
    recomputed = config.saved_activations not in ("all", "products")
    heads, feed_forward, *_ = (sizes.gathered(group) for group in sizes.parameter_groups())
    head = next(g for g in sizes.parameter_groups() if g.multiplied and not g.layered)
    again = heads * recomputed
    if recomputed or config.feed_forward_chunks > 1:
        again += feed_forward * {"none": 0.0, "gelu": 1 / 2, "swiglu": 2 / 3}[config.feed_forward]
    layer = 3 * (heads + feed_forward) + again
    return 2 * sizes.tokens * (config.layers * layer + 3 * sizes.gathered(head))


def layer_attention_flops(sizes: StepSizes) -> Cost:
    """Operations of one layer's attention on all devices that share a sequence, all its rows and their heads.

    Backward includes what is computed again: forward once more, unless its results are kept. Scores formed all at once
    are formed for the hidden pairs, too, and differentiated without forming them again.
    """
    dense = sizes.attention_strategy == "dense"
    useful = attention_flops(sizes.attention_shape(), mask=FULL if dense else sizes.mask)
    forward, backward = useful.forward, useful.backward
    if dense:
        backward = 2 * forward
    if sizes.transformer.saved_activations == "none":
        backward += forward
    return Cost(forward, backward)


def _attention(sizes: StepSizes, hardware: Hardware, rates: Rates) -> tuple[float, float, float, Overlap | None]:
    """Of one layer and microbatch: (seconds of work, seconds of waiting, operations of the busiest device, overlap)."""
    rate = hardware.flops_per_second * rates.attention_share
    whole = layer_attention_flops(sizes)
    strategy, ring = sizes.attention_strategy, sizes.ring_size
    if strategy in ("blockwise", "dense"):
        return whole.total / rate, 0.0, whole.total, None
    if strategy == "ulysses" or ring == 1:
        return whole.total / sizes.mesh.sp / rate, 0.0, whole.total / sizes.mesh.sp, None
    layout, tokens = sizes.request.layout, sizes.request.context
    pairs_RR = hop_pairs(sizes.mask, layout=layout, tokens=tokens, ring_size=ring)
    in_lockstep = strategy != "all_gather"
    busiest = pairs_RR.max(axis=1).sum() if in_lockstep else pairs_RR.sum(axis=0).max()
    share = float(busiest) / float(pairs_RR.sum()) / sizes.exchange_size
    work = whole.total * share
    if not in_lockstep:
        return work / rate, 0.0, work, None
    shape = sizes.attention_shape()
    exchange = sizes.exchange_size
    shape = dataclasses.replace(
        shape,
        query_heads=shape.query_heads // exchange,
        key_value_heads=max(shape.key_value_heads, exchange) // exchange,
    )
    reached = dataclasses.replace(
        hardware, flops_per_second=rate, bytes_per_second=hardware.bytes_per_second * rates.link_share
    )
    overlap = ring_overlap(shape, mask=sizes.mask, layout=layout, ring_size=ring, hardware=reached)
    # Each hop waits by what its transfer takes longer than its block, whose work differs from hop to hop.
    pairs_R = pairs_RR[:-1].max(axis=1)
    products = shape.batch * shape.query_heads * shape.head_dim / rate
    forward_runs = 1 + (sizes.transformer.saved_activations == "none")
    waiting = 0.0
    for pairs in pairs_R:
        waiting += forward_runs * max(overlap.forward_hop_seconds - 4 * products * float(pairs), 0.0)
        waiting += max(overlap.backward_hop_seconds - 10 * products * float(pairs), 0.0)
    return work / rate, waiting, work, overlap


def _hop_bytes(sizes: StepSizes) -> Cost | None:
    """What a device sends at a hop: k, v; in backward also the sums of dk, dv, one hop behind."""
    if sizes.attention_strategy not in ("ring", "hybrid") or sizes.ring_size == 1:
        return None
    shape, exchange = sizes.attention_shape(), sizes.exchange_size
    heads = max(shape.key_value_heads, exchange) // exchange
    elements = 2 * shape.batch * (shape.tokens // sizes.ring_size) * heads * shape.head_dim
    return Cost(elements * shape.element_bytes, elements * (shape.element_bytes + _FLOAT32_BYTES))


def _exchanged_bytes(sizes: StepSizes) -> float:
    """What a device sends in one layer where nothing computes meanwhile."""
    strategy = sizes.attention_strategy
    arguments = {"mask": sizes.mask, "layout": sizes.request.layout}
    sent = traffic(sizes.attention_shape(), strategy=strategy, axis_size=sizes.attention_axis, **arguments)
    hop = _hop_bytes(sizes)
    if strategy == "hybrid" and hop is not None:
        hops = sizes.ring_size - 1
        sent = Cost(sent.forward - hops * hop.forward, sent.backward - hops * hop.backward)
    again = sent.forward if sizes.transformer.saved_activations == "none" else 0
    return sent.total + again


def _gathered_bytes(sizes: StepSizes) -> float:
    """What a device receives of weights, and sends of their gradients, in one microbatch."""
    shards, config = sizes.weight_shards, sizes.transformer
    if shards == 1:
        return 0.0
    total = 0.0
    for group in sizes.parameter_groups():
        if not group.over_width:
            continue
        whole = sizes.gathered(group) * (shards - 1) / shards
        gathers = 2 if group.layered and config.saved_activations != "all" else 1
        layers = config.layers if group.layered else 1
        total += layers * whole * (gathers * sizes.element_bytes + _FLOAT32_BYTES)
    return total


def _tensor_bytes(sizes: StepSizes) -> float:
    """What a device sends of one layer's sums over the tensor axis: two forward, two backward, and those repeated."""
    sums = 4 + (sizes.transformer.saved_activations != "all")
    activations = sizes.tokens * sizes.transformer.width * sizes.element_bytes
    return sums * _all_reduced(activations, sizes.mesh.tp)


def _all_reduced(size: float, devices: int) -> float:
    """Bytes that each of `devices` sends to sum an array of `size` bytes: scattered, then gathered."""
    return 2 * size * (devices - 1) / devices
