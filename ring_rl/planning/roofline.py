"""How long a training step takes at best: operations over the rate of computing, bytes over the rate of the links.

What counts, of one device and one step:

    products      all matrix products, those that backward repeats included (`saved_activations`), by `products_share`
                  of the peak
    attention     kernels.cost.attention_flops, of the busiest device in each phase of a ring, by `attention_share`
    waiting       what a ring's transfers take longer than the blocks that cover them (`ring_phases`)
    exchange      all-to-alls of Ulysses, and all_gather's keys and values: nothing covers them
    gathers       weights gathered over the weight axes, twice where layers are computed again, and their gradients
                  scattered in float32; nothing covers them unless `gathers_overlap` says that the longer of gathers
                  and products counts
    tensor        sums of activations over the tensor axis, over one link of a torus
    gradients     sums of gradients over the axes that repeat the parameters, in every microbatch: a layer's backward
                  ends with them (`nn.weights`)

What is left out: elementwise work and the memory's bandwidth (norms, softmax, the optimizer), input, what
`saved_activations=offload` moves to the host, the latency of collectives, and the tiles that a masked block computes
in vain. The two shares stand for the first; they are settings.
"""

from __future__ import annotations

import dataclasses

from ring_rl.kernels.cost import Cost, attention_flops, traffic
from ring_rl.kernels.mask import FULL
from ring_rl.kernels.pairs import hop_pairs, visible_pairs
from ring_rl.planning.rates import Cluster, Group, Rates
from ring_rl.planning.ring_phases import RingPhases, busiest_pairs, busiest_phases, layer_rings, ring_bytes
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.training.flops import model_flops_per_step

__all__ = ["Roofline", "days_for", "layer_attention_flops", "product_flops", "roofline"]

_FLOAT32_BYTES = 4
_SECONDS_PER_DAY = 86400.0


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
        hop_bytes: What a device sends to its neighbour at a hop of one ring, forward and backward; None without one.
        forward: Phases of one ring on the busiest device; None without a ring.
        backward: The same of backward.
        rings: Rings that a layer runs one after another, a group of heads each; 0 without a ring.
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
    forward: RingPhases | None
    backward: RingPhases | None
    rings: int
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
    def hides(self) -> bool | None:
        """Whether no device of a ring ever waits for a transfer; None without a ring."""
        return None if self.forward is None else self.waiting_seconds == 0

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: model FLOPs over what the devices could have done in that time."""
        return self.model_flops / (self.seconds * self.peak_flops_per_second)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.seconds


def roofline(sizes: StepSizes, *, cluster: Cluster, rates: Rates) -> Roofline:
    """The step's time on devices that are all alike."""
    config, mesh, repeats = sizes.transformer, sizes.mesh, sizes.microbatches * sizes.transformer.layers
    compute = cluster.device.flops_per_second
    products = sizes.microbatches * product_flops(sizes)
    products_seconds = products / (compute * rates.products_share)
    attended = repeats * _busiest_share(sizes) * layer_attention_flops(sizes).total
    forward, backward, rings, waiting = None, None, 0, 0.0
    if sizes.keys_travel:
        rings = layer_rings(sizes)[1]
        forward, backward = (
            busiest_phases(sizes, cluster=cluster, rates=rates, backward=backward) for backward in (False, True)
        )
        runs_forward = 1 + _attends_again(sizes)
        waiting = repeats * rings * (runs_forward * forward.waiting_seconds + backward.waiting_seconds)

    exchanging = Group(stride=1, size=mesh.sp if sizes.attention_strategy == "all_gather" else sizes.exchange_size)
    exchanged = repeats * _exchanged_bytes(sizes)
    if sizes.attention_strategy == "all_gather":
        exchange_rate = cluster.gather_bytes_per_second(exchanging)
    else:
        exchange_rate = cluster.exchange_bytes_per_second(exchanging)
    over_ring = sizes.request.weights_over_ring
    gathering = Group(stride=1 if over_ring else mesh.tp * mesh.sp, size=sizes.weight_shards)
    if over_ring and mesh.tp > 1:
        # fsdp and sp, with tp between them: as far apart as their outermost members are.
        gathering = Group(stride=mesh.tp, size=sizes.weight_shards)
    gathers = sizes.microbatches * _gathered_bytes(sizes) / cluster.gather_bytes_per_second(gathering)
    gathers /= rates.link_share
    if rates.gathers_overlap:
        gathers = max(gathers - products_seconds, 0.0)
    held = sum(sizes.held(g) * (config.layers if g.layered else 1) for g in sizes.parameter_groups())
    repeating = _repeating(sizes)
    summed = sizes.microbatches * _all_reduced(held * _FLOAT32_BYTES, repeating.size)
    tensor = sizes.microbatches * _tensor_bytes(sizes) / cluster.neighbour_bytes_per_second(Group(mesh.sp, mesh.tp))
    pairs = sizes.request.batch_size * visible_pairs(sizes.mask, sizes.request.context)
    multiplied = sum(g.elements * (config.layers if g.layered else 1) for g in sizes.parameter_groups() if g.multiplied)
    return Roofline(
        products_seconds=products_seconds,
        attention_seconds=attended / (compute * rates.attention_share),
        waiting_seconds=waiting,
        exchange_seconds=exchanged / (exchange_rate * rates.link_share),
        gather_seconds=gathers,
        tensor_seconds=tensor / rates.link_share,
        gradient_seconds=summed / (cluster.gather_bytes_per_second(repeating) * rates.link_share),
        product_flops=products,
        attention_flops=attended,
        model_flops=model_flops_per_step(
            matmul_parameters=multiplied,
            tokens=sizes.step_tokens,
            layers=config.layers,
            query_heads=config.query_heads,
            head_dim=config.head_dim,
            visible_pairs=sizes.microbatches * pairs,
        ),
        hop_bytes=ring_bytes(sizes) if sizes.keys_travel else None,
        forward=forward,
        backward=backward,
        rings=rings,
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

    with saved_activations "all" and "products" nothing; else of attention's projections all and of the feed-forward all
    but its last product: what ends a layer backward does not read, so that without a feed-forward attention's last
    projection is it. A feed-forward in chunks is computed again with "all", too; "products" keeps the products of its
    chunks. The head's gradients are made in forward, where its logits are.
    """
    config = sizes.transformer
    heads, feed_forward, *_ = (sizes.gathered(group) for group in sizes.parameter_groups())
    head = next(g for g in sizes.parameter_groups() if g.multiplied and not g.layered)
    saved, again = config.saved_activations, 0.0
    if saved not in ("all", "products"):
        out = heads * config.query_heads / (2 * (config.query_heads + config.key_value_heads))
        again += heads - (out if config.feed_forward == "none" else 0)
    if sizes.recomputes_feed_forward:
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
    if _attends_again(sizes):
        backward += forward
    return Cost(forward, backward)


def _attends_again(sizes: StepSizes) -> bool:
    """Whether backward runs attention's forward once more."""
    return sizes.transformer.saved_activations == "none"


def _busiest_share(sizes: StepSizes) -> float:
    """What the busiest device computes of a sequence's attention; phases of a ring end for all devices together."""
    if sizes.mesh.sp == 1 or sizes.ring_size == 1 or sizes.attention_strategy == "ulysses":
        return 1 / sizes.mesh.sp
    if sizes.keys_travel:
        pairs = sum(busiest_pairs(sizes))
    else:
        ring = {"layout": sizes.request.layout, "ring_size": sizes.ring_size}
        pairs = int(hop_pairs(sizes.mask, tokens=sizes.request.context, **ring).sum(axis=0).max())
    return pairs / visible_pairs(sizes.mask, sizes.request.context) / sizes.exchange_size


def _exchanged_bytes(sizes: StepSizes) -> float:
    """What a device sends in one layer where nothing computes meanwhile."""
    shape, layout = sizes.attention_shape(), sizes.request.layout
    if sizes.attention_strategy == "all_gather":
        sent = traffic(shape, strategy="all_gather", mask=sizes.mask, layout=layout, axis_size=sizes.mesh.sp)
    elif sizes.exchange_size > 1:
        # In a hybrid each group of its ring's devices deals out the heads of its share of the tokens.
        shape = dataclasses.replace(shape, tokens=shape.tokens // sizes.mesh.sp * sizes.exchange_size)
        size = sizes.exchange_size
        sent = traffic(shape, strategy="ulysses", mask=sizes.mask, layout="contiguous", axis_size=size)
    else:
        return 0.0
    return sent.total + (sent.forward if _attends_again(sizes) else 0)


def _repeating(sizes: StepSizes) -> Group:
    """The devices that hold the same weights."""
    mesh, over_ring = sizes.mesh, sizes.request.weights_over_ring
    if over_ring:
        return Group(stride=mesh.fsdp * mesh.tp * mesh.sp, size=mesh.dp)
    if mesh.dp == 1:
        return Group(stride=1, size=mesh.sp)
    # dp and sp, with fsdp and tp between them.
    return Group(stride=mesh.fsdp * mesh.tp, size=mesh.dp * mesh.sp)


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
    """What a device sends of sums over the tensor axis in one microbatch, as the program asks for them.

    Of a layer: forward the results of attention and of the feed-forward; backward the gradients of what goes into each
    of their first projections, one by one, and attention's result again where the layer is. Of the vocabulary, where it
    is shared: the embedded tokens and the gradient of what the head reads. A compiler may add up some before it sums.
    """
    config = sizes.transformer
    inwards = {"none": 0, "gelu": 1, "swiglu": 2}[config.feed_forward]
    again = config.saved_activations != "all" and config.feed_forward != "none"
    sums = config.layers * (1 + (config.feed_forward != "none") + again + 3 + inwards)
    if sizes.request.model.vocabulary_size % sizes.mesh.tp == 0:
        sums += 2
    return sums * _all_reduced(sizes.tokens * config.width * sizes.element_bytes, sizes.mesh.tp)


def _all_reduced(size: float, devices: int) -> float:
    """Bytes that each of `devices` sends to sum an array of `size` bytes: scattered, then gathered."""
    return 2 * size * (devices - 1) / devices
