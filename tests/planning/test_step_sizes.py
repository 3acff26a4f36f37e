"""What a device holds and does, and meshes that cannot be."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ring_rl.planning.step_sizes import OPTIMIZER_MOMENTS, StepSizes
from ring_rl.training.mesh import MeshConfig
from small_steps import small_request

AXES = st.fixed_dictionaries({axis: st.sampled_from([1, 2, 4]) for axis in ("dp", "fsdp", "tp", "sp")})


@given(mesh=AXES, over_ring=st.booleans(), rows=st.integers(1, 3), microbatches=st.integers(1, 3))
def test_devices_share_everything_without_remainder(mesh, over_ring, rows, microbatches):
    assume(mesh["tp"] <= 2)
    assume(mesh["fsdp"] * (mesh["sp"] if over_ring else 1) <= 16)
    batch_size = rows * mesh["dp"] * mesh["fsdp"]
    request = small_request(mesh=mesh, weights_over_ring=over_ring, batch_size=batch_size)
    sizes = StepSizes(request, microbatches=microbatches)
    assert sizes.devices == mesh["dp"] * mesh["fsdp"] * mesh["tp"] * mesh["sp"]
    assert sizes.rows == rows
    # Groups of devices that share a sequence hold its tokens once; tensor parallelism repeats them.
    assert microbatches * sizes.tokens * sizes.devices // mesh["tp"] == sizes.step_tokens
    for group in sizes.parameter_groups():
        shards = (sizes.weight_shards if group.over_width else 1) * (mesh["tp"] if group.over_tensor else 1)
        assert sizes.held(group) * shards == group.elements


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"sp": -1}}, "a plan needs the size of every mesh axis"),
        ({"strategy": "auto"}, "strategy='auto' is chosen on the devices"),
        ({"strategy": "hybrid", "ulysses_size": 3, "mesh": {"sp": 4}}, "ulysses_size=3 does not divide sp=4"),
        ({"ulysses_size": 2, "mesh": {"sp": 4}}, "ulysses_size=2 means nothing to ring"),
        ({"strategy": "dense", "mesh": {"sp": 2}}, "needs each sequence whole on a device"),
        ({"mesh": {"dp": 2}, "batch_size": 3}, "use a multiple of 2"),
        ({"mesh": {"sp": 4}, "context": 100}, "sequence length 100 is not divisible"),
        ({"loss_chunks": 3}, "cannot be cut into 3 loss chunks"),
        ({"mesh": {"tp": 4}}, "query_heads=2 cannot be shared by tp=4"),
        ({"mesh": {"fsdp": 32}, "batch_size": 32}, "width=16 cannot be shared by the 32 devices of the weight axes"),
        ({"strategy": "ulysses", "mesh": {"sp": 4}}, "2 query heads cannot be shared by the 4 devices"),
    ],
)
def test_meshes_that_cannot_be_say_why_in_a_line(changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        StepSizes(small_request(**changes))
    assert "\n" not in str(refusal.value)


def test_microbatches_are_counted_from_one():
    with pytest.raises(ValueError, match="microbatches must be at least 1"):
        StepSizes(small_request(), microbatches=0)


def test_a_ring_of_groups_is_as_long_as_the_groups_are_many():
    sizes = StepSizes(small_request(mesh={"sp": 8}, strategy="hybrid", ulysses_size=2, context=128))
    assert (sizes.ring_size, sizes.exchange_size, sizes.attention_axis) == (4, 2, (4, 2))
    ulysses = StepSizes(small_request(mesh={"sp": 2}, strategy="ulysses"))
    assert (ulysses.exchange_size, ulysses.attention_strategy) == (2, "ulysses")
    alone = StepSizes(dataclasses.replace(ulysses.request, mesh=MeshConfig(dp=1, fsdp=1, tp=1, sp=1)))
    assert alone.attention_strategy == "blockwise"


def test_adam_keeps_two_moments():
    assert StepSizes(small_request()).moments == OPTIMIZER_MOMENTS["adamw"] == 2
