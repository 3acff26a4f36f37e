from __future__ import annotations

import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from ring_rl.nn.logical_axes import named
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.optimizer import weight_decay_mask
from ring_rl.training.sharding import UNNAMED_SHARDED_FROM, parameter_shardings
from ring_rl.training.state import abstract_state, create_state


def mesh_of(dp=1, fsdp=1, tp=1, sp=1):
    return make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=sp))


class FeedForward(nnx.Module):
    """Named dimensions, in the two orders that a transformer has them in, and a stack of layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.inwards = nnx.Linear(
            8, 16, kernel_metadata=named("width", "hidden"), bias_metadata=named("hidden"), rngs=rngs
        )
        self.outwards = nnx.Linear(16, 8, kernel_metadata=named("hidden", "width"), use_bias=False, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def make_layers(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(8, 16, kernel_metadata=named("width", "heads"), use_bias=False, rngs=rngs)

        self.layers = make_layers(rngs)


def specs(tree) -> dict[str, PartitionSpec]:
    """Of arrays, abstract values or shardings, by their path without the words of NNX and of the state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.spec
        if hasattr(leaf, "spec")
        else leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


P = PartitionSpec


@pytest.mark.parametrize(
    ("sizes", "inwards", "bias", "outwards", "layers"),
    [
        ((2, 2, 2, 1), P("fsdp", "tp"), P("tp"), P("tp", "fsdp"), P(None, "fsdp", "tp")),
        ((1, 8, 1, 1), P("fsdp"), P(), P(None, "fsdp"), P(None, "fsdp")),
        ((1, 1, 4, 2), P(None, "tp"), P("tp"), P("tp"), P(None, None, "tp")),
        ((4, 1, 1, 2), P(), P(), P(), P()),
    ],
)
def test_names_decide_where_a_parameter_lies(sizes, inwards, bias, outwards, layers):
    parameters = nnx.state(nnx.eval_shape(lambda: FeedForward(nnx.Rngs(0))), nnx.Param)
    assert specs(parameter_shardings(mesh_of(*sizes), parameters)) == {
        "inwards.bias.value": bias,
        "inwards.kernel.value": inwards,
        "layers.kernel.value": layers,
        "outwards.kernel.value": outwards,
    }


def test_devices_of_one_sequence_may_share_the_weights():
    parameters = nnx.state(nnx.eval_shape(lambda: FeedForward(nnx.Rngs(0))), nnx.Param)
    shardings = parameter_shardings(mesh_of(fsdp=2, tp=2, sp=2), parameters, weight_axes=("fsdp", "sp"))
    assert specs(shardings) == {
        "inwards.bias.value": P("tp"),
        "inwards.kernel.value": P(("fsdp", "sp"), "tp"),
        "layers.kernel.value": P(None, ("fsdp", "sp"), "tp"),
        "outwards.kernel.value": P("tp", ("fsdp", "sp")),
    }
    with pytest.raises(ValueError, match=r"sp=3.*length 8"):
        parameter_shardings(mesh_of(dp=1, fsdp=1, tp=1, sp=3), parameters, weight_axes=("fsdp", "sp"))


def test_a_vocabulary_of_any_size_will_do():
    """As `ring_rl.nn.vocabulary` has it."""

    class Module(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.table = one_parameter((8, 6), "width", "vocabulary")(rngs).table
            self.hidden = one_parameter((8, 8), "width", "hidden")(rngs).table

    parameters = nnx.state(nnx.eval_shape(lambda: Module(nnx.Rngs(0))), nnx.Param)
    assert specs(parameter_shardings(mesh_of(fsdp=2, tp=2), parameters))["table.value"] == P("fsdp", "tp")
    assert specs(parameter_shardings(mesh_of(fsdp=2, tp=4), parameters))["table.value"] == P("fsdp")


OPTIMIZERS = {
    "adamw": optax.adamw(1e-3, weight_decay=0.1, mask=weight_decay_mask),
    "clipped momentum": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3, momentum=0.9)),
    "masked": optax.masked(optax.adam(1e-3), weight_decay_mask),
    "two groups": optax.partition({True: optax.adam(1e-3), False: optax.sgd(1e-3)}, weight_decay_mask),
    "every second step": optax.MultiSteps(optax.adam(1e-3), 2),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_moments_lie_where_their_parameter_does(optimizer):
    mesh = mesh_of(fsdp=2, tp=2, sp=2)
    _, state = abstract_state(FeedForward, optimizer, mesh=mesh)
    parameters = {
        name: (leaf.shape, leaf.sharding)
        for name, leaf in zip(specs(state.parameters), jax.tree.leaves(state.parameters), strict=True)
    }
    mirrored = 0
    for name, leaf in zip(specs(state.optimizer_state), jax.tree.leaves(state.optimizer_state), strict=True):
        shape, sharding = next((value for path, value in parameters.items() if name.endswith(path)), ((), None))
        if leaf.shape == shape and sharding is not None:
            assert leaf.sharding == sharding, name
            mirrored += 1
        else:
            assert leaf.sharding.is_fully_replicated, name
    assert mirrored > 0


def test_no_device_holds_more_than_its_shard():
    mesh = mesh_of(fsdp=4, tp=2)
    _, state = create_state(FeedForward, optax.adam(1e-3), seed=0, mesh=mesh)
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves((state.parameters, state.optimizer_state)):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.size
    # Five kernels of 8 x 16 over 8 devices, a bias of 16 over tp; Adam holds both twice more, and a count.
    assert set(held.values()) == {3 * (5 * 128 // 8 + 16 // 2) + 1}


def test_large_parameters_without_names_are_sharded_along_their_largest_dimension():
    class Unnamed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.large = nnx.Linear(128, UNNAMED_SHARDED_FROM // 128, rngs=rngs)
            self.small = nnx.Linear(8, 8, rngs=rngs)
            self.odd = nnx.Linear(127, 1001, use_bias=False, rngs=rngs)

    parameters = nnx.state(nnx.eval_shape(lambda: Unnamed(nnx.Rngs(0))), nnx.Param)
    assert specs(parameter_shardings(mesh_of(fsdp=8), parameters)) == {
        "large.bias.value": P(),
        "large.kernel.value": P(None, "fsdp"),
        "odd.kernel.value": P(),
        "small.bias.value": P(),
        "small.kernel.value": P(),
    }


def one_parameter(shape, *names):
    class Module(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.table = nnx.Param(np.zeros(shape, np.float32), **(named(*names) if names else {}))

    return Module


def test_a_mesh_axis_shards_the_first_of_two_dimensions_that_ask_for_it():
    _, state = abstract_state(one_parameter((8, 8), "heads", "hidden"), optax.sgd(1.0), mesh=mesh_of(tp=8))
    assert specs(state.parameters) == {"table.value": P("tp")}


@pytest.mark.parametrize(
    ("module", "sizes", "message"),
    [
        (
            one_parameter((6, 8), "width", "heads"),
            {"fsdp": 4},
            "parameter table of shape (6, 8) cannot be sharded over the mesh axis fsdp=4: its dimension 0 (width) "
            "has length 6; choose fsdp among the divisors of 6",
        ),
        (
            one_parameter((8, 6), "width", "hidden"),
            {"tp": 4},
            "cannot be sharded over the mesh axis tp=4: its dimension 1 (hidden) has length 6",
        ),
        (
            one_parameter((8, 8)),
            {"fsdp": 8},
            "mesh axis fsdp=8 shards none of the model's 1 parameters, because none is large enough or names a "
            "dimension of width; set fsdp=1 and give dp its devices",
        ),
        (one_parameter((8, 8), "width", None), {"tp": 2}, "mesh axis tp=2 shards none of the model's 1 parameters"),
        (
            one_parameter((8, 8), "width", "depth"),
            {"fsdp": 2},
            "parameter table names its dimension 1 'depth'; use one of width, heads, hidden, vocabulary, or None",
        ),
        (
            one_parameter((8,), "width", "heads"),
            {"fsdp": 2},
            "parameter table of shape (8,) names 2 dimensions ('width', 'heads'); name each, or None",
        ),
    ],
)
def test_what_a_mesh_cannot_shard_is_refused_by_name(module, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_state(module, optax.sgd(1.0), seed=0, mesh=mesh_of(**sizes))
