"""Meshes that are tried, ranked and refused."""

import dataclasses
import math

import pytest

from ring_rl.kernels.hardware import Hardware
from ring_rl.planning.memory_model import step_memory
from ring_rl.planning.rates import Cluster, Rates
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.planning.suggest import ANY_MESH, candidates, fewest_devices, suggest
from small_steps import small_request

CLUSTER = Cluster(
    device=Hardware(
        name="made up", flops_per_second=1e9, memory_bytes=1e9, bytes_per_second=1e9, links=2, source="for tests"
    )
)
RATES = Rates(products_share=0.5, attention_share=0.5, link_share=0.5, hop_latency_seconds=1e-6, gathers_overlap=False)
REQUEST = small_request(context=256)


def found(*, devices=4, batch_tokens=1024, memory_bytes=1e9, **changes):
    return suggest(
        REQUEST,
        devices=devices,
        batch_tokens=batch_tokens,
        cluster=CLUSTER,
        memory_bytes=memory_bytes,
        rates=RATES,
        policies=("attention", "none"),
        compiler="cpu",
        **changes,
    )


def test_every_mesh_uses_all_devices_and_reads_the_whole_batch():
    for each in found(devices=8).fitting:
        assert each.sizes.devices == 8
        assert each.sizes.step_tokens == 1024


def test_every_product_of_axes_is_tried():
    tried = {
        dataclasses.astuple(mesh) for mesh, _, _ in candidates(REQUEST, devices=4, sequences=4, policies=("none",))
    }
    # Two key-value heads: tp is 1 or 2.
    expected = {
        (dp, fsdp, tp, sp)
        for dp in (1, 2, 4)
        for fsdp in (1, 2, 4)
        for tp in (1, 2)
        for sp in (1, 2, 4)
        if dp * fsdp * tp * sp == 4
    }
    assert tried == expected


def test_microbatches_are_as_few_as_leave_a_tenth_of_the_memory():
    roomy = found(devices=2, batch_tokens=16 * 256).fitting
    assert all(each.sizes.microbatches == 1 for each in roomy)
    one_row = step_memory(StepSizes(dataclasses.replace(roomy[0].sizes.request, batch_size=2), 8), compiler="cpu").total
    for each in found(devices=2, batch_tokens=16 * 256, memory_bytes=1.5 * one_row).fitting:
        sizes, memory_bytes = each.sizes, 1.5 * one_row
        assert each.sizes.step_tokens == 16 * 256
        assert each.memory == step_memory(sizes, compiler="cpu")
        assert sizes.rows == 1 or each.memory.total <= 0.9 * memory_bytes
        if sizes.microbatches > 1:
            twice = dataclasses.replace(sizes.request, batch_size=2 * sizes.request.batch_size)
            larger = step_memory(StepSizes(twice, sizes.microbatches // 2), compiler="cpu").total
            assert larger > 0.9 * memory_bytes


def test_meshes_are_ranked_by_time():
    seconds = [each.time.seconds for each in found().fitting]
    assert seconds == sorted(seconds)
    assert len(seconds) > 10


def test_what_does_not_fit_is_refused_with_its_largest_part():
    # A single sequence, and so one microbatch whatever the memory.
    everything = found(batch_tokens=256)
    smallest = min(everything.fitting, key=lambda each: each.memory.total)
    tight = found(batch_tokens=256, memory_bytes=smallest.memory.total)
    assert {each.memory.total for each in tight.fitting} == {smallest.memory.total}
    assert all(each.memory.total > smallest.memory.total for each in tight.refused if each.memory is not None)
    assert "GiB, most of it for" in tight.refused[0].reason
    assert len(tight.fitting) + len(tight.refused) == len(everything.fitting) + len(everything.refused)


def test_impossible_meshes_say_why():
    # Three sequences cannot be shared by two groups of devices.
    reasons = {each.reason for each in found(batch_tokens=3 * 256).refused}
    assert any("a batch of 3 sequences cannot be shared by 2 groups" in reason for reason in reasons)
    # Two heads cannot be dealt out to four devices.
    assert any("2 query heads cannot be shared by the 4 devices" in each.reason for each in found().refused)


def test_constraints_are_kept():
    constraints = dataclasses.replace(ANY_MESH, sp=2, strategy="ulysses")
    fitting = found(constraints=constraints).fitting
    assert fitting
    assert all((each.sizes.mesh.sp, each.sizes.attention_strategy) == (2, "ulysses") for each in fitting)
    with pytest.raises(ValueError, match="no mesh of 4 devices has tp=3, strategy=ring: dp x fsdp x tp x sp must be 4"):
        found(constraints=dataclasses.replace(ANY_MESH, tp=3, strategy="ring"))


def test_contexts_are_padded_to_what_the_ring_divides():
    request = dataclasses.replace(REQUEST, context=250)
    found = suggest(
        request,
        devices=4,
        batch_tokens=250,
        cluster=CLUSTER,
        memory_bytes=1e9,
        rates=RATES,
        policies=("none",),
        compiler="cpu",
    )
    # Four devices ask for a multiple of 8, two for one of 4.
    assert {each.sizes.request.context for each in found.fitting} == {252, 256}


def test_contexts_are_padded_to_what_the_chunks_divide():
    transformer = dataclasses.replace(REQUEST.model.transformer, feed_forward_chunks=4)
    model = dataclasses.replace(REQUEST.model, transformer=transformer)
    request = dataclasses.replace(REQUEST, model=model, context=1000, loss_chunks=6)
    found = suggest(
        request,
        devices=64,
        batch_tokens=1000,
        cluster=CLUSTER,
        memory_bytes=1e9,
        rates=RATES,
        policies=("none",),
        compiler="cpu",
    )
    by_ring = {each.sizes.mesh.sp: each.sizes.request.context for each in found.fitting}
    # Twelve chunks on each of 32 devices.
    assert by_ring == {32: 1152}
    assert any("1,000 tokens would be padded to 1,536 for sp=64 and 12 chunks" in each.reason for each in found.refused)


def test_a_batch_must_hold_a_sequence():
    with pytest.raises(ValueError, match="holds no sequence"):
        found(batch_tokens=100)


def test_fewest_devices_fit_and_half_of_them_do_not():
    arguments = {"batch_tokens": 256, "policies": ("none",), "compiler": "cpu"}
    alone = fewest_devices(REQUEST, counts=[1], memory_bytes=math.inf, **arguments)
    assert alone is not None
    memory_bytes = step_memory(alone, compiler="cpu").total // 2
    sizes = fewest_devices(REQUEST, counts=[1, 2, 4, 8, 16], memory_bytes=memory_bytes, **arguments)
    assert sizes is not None
    assert sizes.devices > 1
    assert step_memory(sizes, compiler="cpu").total <= memory_bytes
    fewer = [1, 2, 4, 8, 16][: [1, 2, 4, 8, 16].index(sizes.devices)]
    assert fewest_devices(REQUEST, counts=fewer, memory_bytes=memory_bytes, **arguments) is None


def test_no_number_of_devices_holds_what_is_larger_than_all_of_them():
    # Parameters and moments alone take 12 bytes each.
    memory_bytes = 12 * small_parameters() / 16 - 1
    arguments = {"batch_tokens": 256, "policies": ("none",), "compiler": "cpu"}
    assert fewest_devices(REQUEST, counts=[1, 2, 4, 8, 16], memory_bytes=memory_bytes, **arguments) is None


def small_parameters():
    return StepSizes(REQUEST).parameters()
