"""Work and time of a step, against counts made another way."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ring_rl.kernels.cost import traffic
from ring_rl.kernels.hardware import Hardware
from ring_rl.lm.loss import make_language_loss
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.planning.rates import Cluster, Rates
from ring_rl.planning.roofline import days_for, layer_attention_flops, product_flops, roofline
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.training.flops import matmul_parameters
from ring_rl.training.mesh import make_mesh
from small_steps import small_request

HARDWARE = Hardware(
    name="made up", flops_per_second=1e9, memory_bytes=1e9, bytes_per_second=1e9, links=2, source="for tests"
)
CLUSTER = Cluster(device=HARDWARE)
PEAK = Rates(products_share=1.0, attention_share=1.0, link_share=1.0, hop_latency_seconds=0.0, gathers_overlap=False)


def sizes(*, microbatches=1, **changes):
    return StepSizes(small_request(**changes), microbatches=microbatches)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embedding": True},
        {"transformer": {"feed_forward": "gelu", "key_value_heads": 1}},
        {"transformer": {"feed_forward": "none", "layers": 3}},
    ],
)
def test_parameters_are_those_of_the_model(changes):
    step = sizes(**changes)
    model = nnx.eval_shape(lambda: LanguageModel(step.request.model, rngs=nnx.Rngs(0)))
    parameters = nnx.state(model, nnx.Param)
    assert step.parameters() == sum(leaf.size for leaf in jax.tree.leaves(parameters))
    multiplied = sum(
        g.elements * (step.transformer.layers if g.layered else 1) for g in step.parameter_groups() if g.multiplied
    )
    tied = step.transformer.width * 32 if step.request.model.tied_embedding else 0
    assert multiplied == matmul_parameters(parameters) + tied


def test_what_devices_hold_adds_up_to_the_model():
    step = sizes(mesh={"fsdp": 2, "tp": 2, "sp": 2}, weights_over_ring=True, batch_size=2)
    held = step.held_parameters() * 8
    # Norms are not shared over tp.
    assert held == step.parameters() + step.transformer.width * (2 * step.transformer.layers + 1)


@pytest.mark.parametrize(
    ("saved", "chunks", "times"),
    [
        ("all", 1, (3, 3)),
        ("all", 4, (3, 3 + 2 / 3)),
        ("none", 1, (4, 3 + 2 / 3)),
        ("attention", 4, (4, 3 + 2 / 3)),
        ("products", 4, (3, 3)),
    ],
)
def test_products_count_what_backward_does_again(saved, chunks, times):
    step = sizes(transformer={"saved_activations": saved, "feed_forward_chunks": chunks})
    projections, feed_forward = 4 * 16 * 16, 3 * 16 * 16
    layers = 2 * (times[0] * projections + times[1] * feed_forward)
    assert product_flops(step) == pytest.approx(2 * 64 * (layers + 3 * 16 * 32))


def gradient_program(step):
    """What a step differentiates, traced for its mesh: (equation, how often it runs) of a device."""
    request = step.request
    parallel = SequenceParallel(
        mesh=make_mesh(request.mesh, devices=jax.devices()[: step.devices]),
        layout=request.layout,
        strategy=request.strategy,
        ulysses_size=request.ulysses_size,
        weight_axes=("fsdp", "sp") if request.weights_over_ring else ("fsdp",),
    )
    model = nnx.eval_shape(lambda: LanguageModel(request.model, rngs=nnx.Rngs(0)))
    definition, parameters = nnx.split(model)
    loss = make_language_loss(parallel, chunks=request.loss_chunks, z_loss=0.0)
    tokens = jax.ShapeDtypeStruct((request.batch_size, request.context), jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    batch = TokenBatch(
        tokens=tokens, targets=tokens, weights=weights, positions=tokens, segment_ids=None, answer_ids=None
    )
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    total = lambda parameters, *given: loss(nnx.merge(definition, parameters), *given).total  # noqa: E731
    return list(equations(jax.make_jaxpr(jax.grad(total))(parameters, batch, key).jaxpr))


def equations(jaxpr, times=1):
    for equation in jaxpr.eqns:
        yield equation, times
        inside = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from equations(part, inside)


def flops_of_products(program):
    """Of matrices alone: attention's products have a batch dimension."""
    total = 0
    for equation, times in program:
        if equation.primitive.name == "dot_general" and not equation.params["dimension_numbers"][1][0]:
            ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
            summed = math.prod(left[axis] for axis in contracted)
            total += 2 * times * summed * math.prod(equation.outvars[0].aval.shape)
    return total


def bytes_into(program, primitive, *axes):
    """Of the arrays that go into a device's collectives over just these mesh axes; single numbers are left out."""
    total = 0
    for equation, times in program:
        named = equation.params.get("axes") or equation.params.get("axis_name") or ()
        if equation.primitive.name == primitive and set(named if isinstance(named, tuple) else (named,)) == set(axes):
            arrays = [operand.aval for operand in equation.invars]
            total += times * sum(array.size * array.dtype.itemsize for array in arrays if array.ndim)
    return total


@pytest.mark.parametrize("saved", ["none", "attention", "products", "all"])
@pytest.mark.parametrize(("feed_forward", "chunks"), [("swiglu", 1), ("swiglu", 4), ("gelu", 4), ("none", 1)])
def test_products_are_those_of_the_program(saved, feed_forward, chunks):
    shape = {"saved_activations": saved, "feed_forward": feed_forward, "feed_forward_chunks": chunks}
    step = sizes(transformer={"feed_forward_width": 48, "key_value_heads": 1, **shape}, loss_chunks=2)
    assert flops_of_products(gradient_program(step)) == pytest.approx(product_flops(step))


def test_transfers_are_those_of_the_program():
    """A ring whose devices share weights with others, and repeat them; the head's are the compiler's affair."""
    step = sizes(
        mesh={"fsdp": 2, "tp": 2, "sp": 2},
        batch_size=2,
        transformer={"saved_activations": "attention", "compute_dtype": "bfloat16"},
    )
    program = gradient_program(step)
    one_link = Cluster(device=dataclasses.replace(HARDWARE, links=1))
    plan = roofline(step, cluster=one_link, rates=PEAK)
    # Of two devices each sends a hop of the ring; half of what it sums, twice; and half of what it scatters.
    assert plan.hop_bytes is not None
    assert bytes_into(program, "ppermute", "sp") == 2 * plan.hop_bytes.total
    head = 16 * 32 // 4
    received = bytes_into(program, "all_gather", "fsdp") + bytes_into(program, "reduce_scatter", "fsdp") / 2
    assert plan.gather_seconds * 1e9 == pytest.approx(received + head * (2 + 4))
    assert plan.gradient_seconds * 1e9 == pytest.approx(bytes_into(program, "psum_invariant", "dp", "sp") + 4 * head)
    activations = 32 * 16 * 2
    summed = bytes_into(program, "psum_invariant", "tp") + activations
    assert plan.tensor_seconds * 1e9 == pytest.approx(summed)


def test_a_hybrids_transfers_are_those_of_the_program():
    step = sizes(
        mesh={"dp": 2, "sp": 4},
        batch_size=2,
        weights_over_ring=True,
        strategy="hybrid",
        ulysses_size=2,
        transformer={"compute_dtype": "bfloat16"},
    )
    program = gradient_program(step)
    plan = roofline(step, cluster=Cluster(device=dataclasses.replace(HARDWARE, links=1)), rates=PEAK)
    assert plan.hop_bytes is not None
    # Two layers, one hop; forward twice, as nothing is saved.
    hops = 2 * (plan.hop_bytes.total + plan.hop_bytes.forward)
    assert bytes_into(program, "ppermute", "sp_ring") == hops
    assert plan.exchange_seconds * 1e9 == pytest.approx(bytes_into(program, "all_to_all", "sp_ulysses") / 2)
    over = ("sp_ring", "sp_ulysses")
    received = 3 * bytes_into(program, "all_gather", *over) + 3 / 4 * bytes_into(program, "reduce_scatter", *over)
    # Three quarters of the head come from others, and of its gradient go to them.
    assert plan.gather_seconds * 1e9 == pytest.approx(received + 3 / 4 * 16 * 32 * (2 + 4))


def test_attention_runs_again_where_nothing_of_it_is_kept():
    kept = layer_attention_flops(sizes(transformer={"saved_activations": "attention"}))
    again = layer_attention_flops(sizes(transformer={"saved_activations": "none"}))
    assert kept.forward == 4 * 16 * 64 * 65 // 2
    assert kept.backward == 10 * 16 * 64 * 65 // 2
    assert again.backward == kept.backward + kept.forward


def test_dense_attention_forms_hidden_scores_too():
    dense = layer_attention_flops(sizes(strategy="dense", transformer={"saved_activations": "all"}))
    assert (dense.forward, dense.backward) == (4 * 16 * 64 * 64, 8 * 16 * 64 * 64)


def test_work_is_shared_evenly_by_a_zigzag_ring_and_not_by_a_contiguous_one():
    alone = roofline(sizes(), cluster=CLUSTER, rates=PEAK)
    zigzag = roofline(sizes(mesh={"sp": 4}), cluster=CLUSTER, rates=PEAK)
    contiguous = roofline(sizes(mesh={"sp": 4}, layout="contiguous"), cluster=CLUSTER, rates=PEAK)
    assert 4 * zigzag.attention_flops == pytest.approx(alone.attention_flops, rel=0.05)
    assert contiguous.attention_flops > 1.5 * zigzag.attention_flops
    assert 4 * zigzag.product_flops == pytest.approx(alone.product_flops)


def test_a_ring_waits_where_its_hops_do_not_hide():
    slow = Cluster(device=dataclasses.replace(HARDWARE, bytes_per_second=1e6))
    step = sizes(mesh={"sp": 4}, transformer={"saved_activations": "attention"})
    waiting, hidden = (roofline(step, cluster=c, rates=PEAK) for c in (slow, CLUSTER))
    assert hidden.hides
    assert hidden.waiting_seconds == 0
    assert waiting.hides is False
    # The slowest link is one of two. Three hops of 2048 bytes forward, and of 4096 backward, in each of two layers;
    # of their time blocks of up to 128 pairs of 16 dimensions are no waiting.
    seconds = 2 * 3 * (2048 + 4096) / 0.5e6
    blocks = 2 * (4 * (136 + 2 * 128) + 10 * (136 + 3 * 128)) * 16 / 1e9
    assert waiting.waiting_seconds == pytest.approx(seconds - blocks)


def test_backward_that_attends_again_waits_again():
    slow = Cluster(device=dataclasses.replace(HARDWARE, bytes_per_second=1e6))
    kept, again = (
        roofline(sizes(mesh={"sp": 4}, transformer={"saved_activations": policy}), cluster=slow, rates=PEAK)
        for policy in ("attention", "none")
    )
    assert kept.forward is not None
    assert again.waiting_seconds - kept.waiting_seconds == pytest.approx(2 * kept.forward.waiting_seconds)


def test_some_heads_at_once_cost_latency_and_nothing_else():
    late = dataclasses.replace(PEAK, hop_latency_seconds=0.01)
    whole, by_head = (roofline(sizes(mesh={"sp": 4}, heads_at_once=n), cluster=CLUSTER, rates=late) for n in (None, 1))
    free = roofline(sizes(mesh={"sp": 4}, heads_at_once=1), cluster=CLUSTER, rates=PEAK)
    assert (whole.rings, by_head.rings) == (1, 2)
    assert free.hides
    assert whole.hop_bytes is not None
    assert by_head.hop_bytes is not None
    assert 2 * by_head.hop_bytes.total == whole.hop_bytes.total
    assert by_head.attention_seconds == pytest.approx(whole.attention_seconds)
    # Two layers; nothing is kept, so forward runs twice, three hops each; backward sends in five phases. Blocks of
    # microseconds cover next to nothing of it.
    assert whole.waiting_seconds == pytest.approx(2 * (2 * 3 + 5) * 0.01, rel=0.02)
    assert by_head.waiting_seconds == pytest.approx(2 * whole.waiting_seconds, rel=0.02)


def test_a_window_neither_waits_for_a_circle_nor_computes_one():
    window = {"attention_window": 5, "saved_activations": "attention"}
    plan = roofline(sizes(mesh={"sp": 4}, layout="contiguous", transformer=window), cluster=CLUSTER, rates=PEAK)
    assert plan.hides
    # Two layers of 70 own pairs and 10 with the neighbour's keys.
    assert plan.attention_flops == pytest.approx(2 * 14 * 16 * 80)
    hybrid = sizes(
        mesh={"sp": 8}, layout="contiguous", strategy="hybrid", ulysses_size=2, context=128, transformer=window
    )
    assert roofline(hybrid, cluster=CLUSTER, rates=PEAK).exchange_seconds > 0


def test_a_ring_that_leaves_its_node_waits_for_the_port():
    port = dataclasses.replace(HARDWARE, bytes_per_second=1e6, links=1)
    step = sizes(mesh={"sp": 4}, transformer={"saved_activations": "attention"})
    inside = roofline(step, cluster=Cluster(device=HARDWARE, node_devices=4, between_nodes=port), rates=PEAK)
    outside = roofline(step, cluster=Cluster(device=HARDWARE, node_devices=2, between_nodes=port), rates=PEAK)
    assert inside.hides
    assert outside.waiting_seconds == roofline(step, cluster=Cluster(device=port), rates=PEAK).waiting_seconds > 0
    # Tensor parallelism spans the rings: its groups are every fourth device.
    tensor = sizes(mesh={"tp": 2, "sp": 4})
    near, far = (
        roofline(tensor, cluster=Cluster(device=HARDWARE, node_devices=n, between_nodes=port), rates=PEAK)
        for n in (8, 4)
    )
    assert near.tensor_seconds < far.tensor_seconds


@pytest.mark.parametrize(("strategy", "ulysses_size"), [("ring", 1), ("hybrid", 2)])
def test_bytes_of_all_hops_are_those_of_the_traffic(strategy, ulysses_size):
    step = sizes(mesh={"sp": 8 if strategy == "hybrid" else 4}, strategy=strategy, ulysses_size=ulysses_size)
    one_link = Cluster(device=dataclasses.replace(HARDWARE, links=1))
    plan = roofline(step, cluster=one_link, rates=PEAK)
    sent = traffic(
        step.attention_shape(), strategy=strategy, mask=step.mask, layout="zigzag", axis_size=step.attention_axis
    )
    assert plan.hop_bytes is not None
    # The sums of the last hop go home, one hop more; those of the first are not there yet: as many as hops.
    ring = 3 * plan.hop_bytes.total
    exchanged = plan.exchange_seconds * HARDWARE.bytes_per_second
    if strategy == "ring":
        assert (ring, exchanged) == (sent.total, 0)
    else:
        # In every layer; forward once more, as nothing of attention is kept.
        share = 16 * 4 * 2 * (2 + 2) * 8 // 2 // 2
        assert sent.total - ring == 2 * share
        assert exchanged == pytest.approx(2 * 3 * share)


def test_ulysses_exchanges_and_computes_alone():
    plan = roofline(sizes(mesh={"sp": 2}, strategy="ulysses"), cluster=CLUSTER, rates=PEAK)
    assert plan.hides is None
    assert plan.hop_bytes is None
    assert plan.exchange_seconds > 0
    assert plan.attention_flops == pytest.approx(roofline(sizes(), cluster=CLUSTER, rates=PEAK).attention_flops / 2)


def test_gathered_weights_cost_their_bytes_or_hide():
    step = sizes(mesh={"fsdp": 2}, batch_size=2, transformer={"layers": 1})
    plan = roofline(step, cluster=CLUSTER, rates=PEAK)
    layer, ends = 4 * 256 + 3 * 256 + 2 * 16, 2 * 32 * 16 + 16
    # Half of all weights come from the other device: a layer's twice, the ends' once; and gradients go once, float32.
    assert plan.gather_seconds * 1e9 == pytest.approx(4 * (3 * layer + 2 * ends) / 2)
    hidden = roofline(step, cluster=CLUSTER, rates=dataclasses.replace(PEAK, gathers_overlap=True))
    assert hidden.gather_seconds == max(plan.gather_seconds - plan.products_seconds, 0)


def test_gradients_are_summed_over_those_who_repeat_the_weights_in_every_microbatch():
    one = roofline(sizes(mesh={"dp": 2}, batch_size=2), cluster=CLUSTER, rates=PEAK)
    three = roofline(sizes(mesh={"dp": 2}, batch_size=2, microbatches=3), cluster=CLUSTER, rates=PEAK)
    assert one.gradient_seconds * 1e9 == pytest.approx(4 * sizes().parameters())
    assert three.gradient_seconds == pytest.approx(3 * one.gradient_seconds)
    assert three.products_seconds == pytest.approx(3 * one.products_seconds)
    assert three.model_flops == 3 * one.model_flops


def test_shares_of_the_peak_lengthen_a_step_and_days_follow():
    plan = roofline(sizes(), cluster=CLUSTER, rates=PEAK)
    half = roofline(sizes(), cluster=CLUSTER, rates=dataclasses.replace(PEAK, products_share=0.5, attention_share=0.5))
    assert half.seconds == pytest.approx(2 * plan.seconds)
    assert half.utilisation == pytest.approx(plan.utilisation / 2)
    assert days_for(64 * 86400 / plan.seconds, plan) == pytest.approx(1)
    assert sum(plan.parts().values()) == plan.seconds
