"""Where the training state lives: from the names of a parameter's dimensions to the axes of the mesh.

A parameter names its dimensions (`ring_rl.nn.logical_axes`), and one table says which mesh axis shards which name:

    width                        fsdp    gathered before use, its gradients scattered back
    heads, hidden, vocabulary    tp      never gathered: each device computes its part
    None                         never sharded

What of the optimizer's state mirrors a parameter (its moments) lives where the parameter does; the rest (counts,
Adafactor's row and column sums) is replicated. Over "dp" and "sp" everything is replicated.

A parameter that names nothing is sharded over fsdp along its largest divisible dimension if it has at least
`UNNAMED_SHARDED_FROM` elements, and replicated if it is smaller, where a gather would cost more than it saves.
"""

from __future__ import annotations

import math
from typing import Any

import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_rl.nn.logical_axes import logical_axes
from ring_rl.training.mesh import replicated
from ring_rl.typing import PyTree

__all__ = ["MESH_AXIS_OF", "UNNAMED_SHARDED_FROM", "optimizer_shardings", "parameter_shardings"]

MESH_AXIS_OF = {"width": "fsdp", "heads": "tp", "hidden": "tp", "vocabulary": "tp"}
UNNAMED_SHARDED_FROM = 2**16


def parameter_shardings(mesh: Mesh, parameters: nnx.State) -> nnx.State:
    """The sharding of each parameter, in a state of the same structure; arrays or abstract values serve.

    Raises:
        ValueError: a named dimension is not divisible by its mesh axis or its name is unknown, or fsdp or tp is
            larger than 1 and shards no parameter at all, so that its devices would only repeat one another.
    """
    variables = nnx.to_flat_state(parameters)
    specs = {path: _spec(mesh, ".".join(map(str, path)), variable) for path, variable in variables}
    used = {axis for spec in specs.values() for axis in spec}
    for axis in ("fsdp", "tp"):
        if mesh.shape.get(axis, 1) > 1 and axis not in used:
            names = ", ".join(name for name, mesh_axis in MESH_AXIS_OF.items() if mesh_axis == axis)
            instead = "dp" if axis == "fsdp" else "another axis"
            raise ValueError(
                f"mesh axis {axis}={mesh.shape[axis]} shards none of the model's {len(specs)} parameters, because "
                f"none is large enough or names a dimension of {names}; set {axis}=1 and give {instead} its devices"
            )
    flat = [(path, variable.replace(NamedSharding(mesh, specs[path]))) for path, variable in variables]
    return nnx.from_flat_state(flat)


def optimizer_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, optimizer_state: PyTree[Any], parameters: nnx.State
) -> PyTree[NamedSharding]:
    """The sharding of each array of optax's state: that of the parameter it mirrors, or replicated."""

    def mirrored(value: Any, parameter: Any, sharding: NamedSharding) -> Any:
        # A masked part holds no array; a factored moment has the place of the parameter, but another shape.
        if isinstance(value, optax.MaskedNode):
            return value
        return sharding if value.shape == parameter.shape else replicated(mesh)

    return optax.tree.map_params(
        optimizer,
        mirrored,
        optimizer_state,
        parameters,
        parameter_shardings(mesh, parameters),
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def _spec(mesh: Mesh, name: str, parameter: nnx.Variable) -> PartitionSpec:
    shape = parameter.get_value().shape
    names = logical_axes(parameter)
    axes = _named_axes(mesh, name, shape, names) if any(names) else _largest_axis(mesh, shape)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _named_axes(mesh: Mesh, name: str, shape: tuple[int, ...], names: tuple[str | None, ...]) -> list[str | None]:
    if len(names) != len(shape):
        raise ValueError(f"parameter {name} of shape {shape} names {len(names)} dimensions {names}; name each, or None")
    axes: list[str | None] = []
    for dimension, (length, logical) in enumerate(zip(shape, names, strict=True)):
        if logical is not None and logical not in MESH_AXIS_OF:
            raise ValueError(
                f"parameter {name} names its dimension {dimension} {logical!r}; use one of "
                f"{', '.join(MESH_AXIS_OF)}, or None"
            )
        axis = MESH_AXIS_OF[logical] if logical is not None else None
        size = mesh.shape.get(axis, 1)
        # A mesh axis can shard one dimension only: of two with names of the same axis, the first.
        if size == 1 or axis in axes:
            axes.append(None)
            continue
        if length % size:
            raise ValueError(
                f"parameter {name} of shape {shape} cannot be sharded over the mesh axis {axis}={size}: "
                f"its dimension {dimension} ({logical}) has length {length}; choose {axis} among the divisors of "
                f"{length}, or change the model"
            )
        axes.append(axis)
    return axes


def _largest_axis(mesh: Mesh, shape: tuple[int, ...]) -> list[str | None]:
    axes: list[str | None] = [None] * len(shape)
    size = mesh.shape.get("fsdp", 1)
    divisible = [dimension for dimension, length in enumerate(shape) if length % size == 0]
    if size > 1 and divisible and math.prod(shape) >= UNNAMED_SHARDED_FROM:
        axes[max(divisible, key=lambda dimension: shape[dimension])] = "fsdp"
    return axes
