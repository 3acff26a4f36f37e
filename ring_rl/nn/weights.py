"""Weights that are sharded over the mesh: how they lie, and how a layer gets to use them.

Inside `jax.shard_map` a layer's weights arrive as this device's shard. The part of the sharding that tensor
parallelism works with stays; over the other, the width, they are gathered right before use (fully sharded data
parallelism: arXiv:1910.02054, stage 3) and their gradients are summed and scattered right after.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from ring_rl.nn.logical_axes import logical_axes
from ring_rl.nn.parallel import LocalParallel
from ring_rl.typing import Array, Float

_is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731


def weight_specs(parameters: nnx.State, parallel: LocalParallel) -> Any:
    """The mesh axes of every parameter's dimensions, in a tree like `parameters`.

    A width that the weight axis does not divide, or a vocabulary that the tensor axis does not, is not sharded.
    """
    axis_of = {
        "width": parallel.weight_axis,
        "heads": parallel.tensor_axis,
        "hidden": parallel.tensor_axis,
        "vocabulary": parallel.tensor_axis,
    }

    def spec(parameter: nnx.Variable) -> PartitionSpec:
        axes = [None if name is None else axis_of[name] for name in logical_axes(parameter)]
        lengths = parameter.get_value().shape
        divides = [
            axis is not None and length % parallel.mesh.shape[axis] == 0
            for axis, length in zip(axes, lengths, strict=True)
        ]
        return PartitionSpec(*(axis if divided else None for axis, divided in zip(axes, divides, strict=True)))

    return jax.tree.map(spec, parameters, is_leaf=_is_variable)


def without_first_dimension(specs: Any) -> Any:
    """The specs of one layer, from those of a stack of layers."""
    return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs)


def gathered(parameters: nnx.State, specs: Any, parallel: LocalParallel, *, dtype: jnp.dtype) -> nnx.State:
    """The parameters with their width whole, ready for tokens that no other device has.

    Float32 weights travel in `dtype`, in which they will be used, and are float32 again. Their gradients are summed
    over all devices in float32, over `weight_axis` by a reduce-scatter, over the others on the shard that is left.
    """

    def gather(parameter: nnx.Variable, spec: PartitionSpec) -> nnx.Variable:
        shard = parameter.get_value()
        # Before the gather, so that the sum that this is in backward comes after the scatter and adds shards only;
        # and before any loop, so that no loop sums in each of its steps.
        others = tuple(axis for axis in parallel.token_axes if axis not in spec)
        shard = lax.pcast(shard, others, to="varying") if others else shard
        if parallel.weight_axis in spec and parallel.weight_axis is not None:
            shard = _gather(parallel.weight_axis, spec.index(parallel.weight_axis), dtype, shard)
        return parameter.replace(shard)

    return jax.tree.map(gather, parameters, specs, is_leaf=_is_variable)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(axis_name: str, dimension: int, dtype: jnp.dtype, shard: Float[Array, "..."]) -> Float[Array, "..."]:
    whole = lax.all_gather(shard.astype(dtype), axis_name, axis=dimension, tiled=True)
    return whole.astype(shard.dtype)


def _gather_forward(axis_name: str, dimension: int, dtype: jnp.dtype, shard: Array) -> tuple[Array, None]:
    return _gather(axis_name, dimension, dtype, shard), None


def _gather_backward(axis_name: str, dimension: int, dtype: jnp.dtype, _: None, gradient: Array) -> tuple[Array]:
    # In the dtype of the parameter, not in that of the transfer: sums over many devices need it.
    del dtype
    return (lax.psum_scatter(gradient, axis_name, scatter_dimension=dimension, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)
