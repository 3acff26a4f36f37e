"""Weights that are sharded over the mesh: how they lie, and how a layer gets to use them.

Inside `jax.shard_map` a layer's weights arrive as this device's shard. The part of the sharding that tensor
parallelism works with stays; over the other, the width, they are gathered right before use (fully sharded data
parallelism: arXiv:1910.02054, stage 3) and their gradients are summed and scattered right after.
"""

import math
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

    A width that the weight axes do not divide, or a vocabulary that the tensor axis does not, is not sharded.
    """
    tensor_axes = () if parallel.tensor_axis is None else (parallel.tensor_axis,)
    axes_of = {"width": parallel.weight_axes, "heads": tensor_axes, "hidden": tensor_axes, "vocabulary": tensor_axes}

    def entry(name: str | None, length: int) -> str | tuple[str, ...] | None:
        axes = () if name is None else axes_of[name]
        if not axes or length % math.prod(parallel.mesh.shape[axis] for axis in axes):
            return None
        return axes[0] if len(axes) == 1 else axes

    def spec(parameter: nnx.Variable) -> PartitionSpec:
        lengths = parameter.get_value().shape
        return PartitionSpec(*map(entry, logical_axes(parameter), lengths))

    return jax.tree.map(spec, parameters, is_leaf=_is_variable)


def without_first_dimension(specs: Any) -> Any:
    """The specs of one layer, from those of a stack of layers."""
    return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs)


def gathered(parameters: nnx.State, specs: Any, parallel: LocalParallel, *, dtype: jnp.dtype) -> nnx.State:
    """The parameters with their width whole, ready for tokens that no other device has.

    Float32 weights travel in `dtype`, in which they will be used, and are float32 again. Their gradients are summed
    over all devices in float32, over `weight_axes` by a reduce-scatter, over the others on the shard that is left.
    """

    def gather(parameter: nnx.Variable, spec: PartitionSpec) -> nnx.Variable:
        shard = parameter.get_value()
        # Before the gather, so that the sum that this is in backward comes after the scatter and adds shards only;
        # and before any loop, so that no loop sums in each of its steps.
        sharded = {axis for entry in spec for axis in _as_tuple(entry)}
        others = tuple(axis for axis in parallel.token_axes if axis not in sharded)
        shard = lax.pcast(shard, others, to="varying") if others else shard
        for dimension, entry in enumerate(spec):
            if entry is not None and _as_tuple(entry) == parallel.weight_axes:
                shard = _gather(parallel.weight_axes, dimension, dtype, shard)
        return parameter.replace(shard)

    return jax.tree.map(gather, parameters, specs, is_leaf=_is_variable)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(axes: tuple[str, ...], dimension: int, dtype: jnp.dtype, shard: Float[Array, "..."]) -> Float[Array, "..."]:
    whole = lax.all_gather(shard.astype(dtype), axes, axis=dimension, tiled=True)
    return whole.astype(shard.dtype)


def _gather_forward(axes: tuple[str, ...], dimension: int, dtype: jnp.dtype, shard: Array) -> tuple[Array, None]:
    return _gather(axes, dimension, dtype, shard), None


def _gather_backward(axes: tuple[str, ...], dimension: int, dtype: jnp.dtype, _: None, gradient: Array) -> tuple[Array]:
    # In the dtype of the parameter, not in that of the transfer: sums over many devices need it.
    del dtype
    return (lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def _as_tuple(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
