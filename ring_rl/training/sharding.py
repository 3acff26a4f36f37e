"""Where the training state lives: from the names of a parameter's dimensions to the axes of the mesh.

A parameter names its dimensions (`ring_rl.nn.logical_axes`), and one table says which mesh axis shards which name:

    width                        weight_axes    gathered before use, its gradients scattered back
    heads, hidden, vocabulary    tp             never gathered: each device computes its part
    None                         never sharded

A vocabulary that tp does not divide is left whole: its size is the tokenizer's to choose. Any other dimension that
its axis does not divide is refused.

`weight_axes` is fsdp, or fsdp and sp: then the devices that share a sequence share the weights, too, as in Ring
Attention (arXiv:2310.01889), for as many more bytes to gather.

What of the optimizer's state mirrors a parameter (its moments) lives where the parameter does; the rest (counts,
Adafactor's row and column sums) is replicated. Over all other mesh axes everything is replicated.

A parameter that names nothing is sharded over the weight axes along its largest divisible dimension if it has at least
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

__all__ = ["FSDP_ONLY", "LOGICAL_NAMES", "UNNAMED_SHARDED_FROM", "optimizer_shardings", "parameter_shardings"]

LOGICAL_NAMES = ("width", "heads", "hidden", "vocabulary")
UNNAMED_SHARDED_FROM = 2**16
FSDP_ONLY = ("fsdp",)
_TENSOR_AXES = ("tp",)


def parameter_shardings(mesh: Mesh, parameters: nnx.State, *, weight_axes: tuple[str, ...] = FSDP_ONLY) -> nnx.State:
    """The sharding of each parameter, in a state of the same structure; arrays or abstract values serve.

    Args:
        mesh: where they live.
        parameters: with the names of their dimensions.
        weight_axes: the mesh axes that share the width, together.

    Raises:
        ValueError: a named dimension is not divisible by its mesh axis or its name is unknown, or fsdp or tp is
            larger than 1 and shards no parameter at all, so that its devices would only repeat one another.
    """
    variables = nnx.to_flat_state(parameters)
    specs = {path: _spec(mesh, ".".join(map(str, path)), variable, weight_axes) for path, variable in variables}
    used = {axis for spec in specs.values() for axes in spec for axis in _as_tuple(axes)}
    for axis in ("fsdp", "tp"):
        if mesh.shape.get(axis, 1) > 1 and axis not in used:
            names = ", ".join(name for name in LOGICAL_NAMES if axis in _axes_of(name, weight_axes))
            instead = "dp" if axis == "fsdp" else "another axis"
            raise ValueError(
                f"mesh axis {axis}={mesh.shape[axis]} shards none of the model's {len(specs)} parameters, because "
                f"none is large enough or names a dimension of {names}; set {axis}=1 and give {instead} its devices"
            )
    flat = [(path, variable.replace(NamedSharding(mesh, specs[path]))) for path, variable in variables]
    return nnx.from_flat_state(flat)


def optimizer_shardings(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    optimizer_state: PyTree[Any],
    parameters: nnx.State,
    *,
    weight_axes: tuple[str, ...] = FSDP_ONLY,
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
        parameter_shardings(mesh, parameters, weight_axes=weight_axes),
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


# What one dimension is sharded over: no mesh axis, one, or several.
_Axes = str | tuple[str, ...] | None


def _spec(mesh: Mesh, name: str, parameter: nnx.Variable, weight_axes: tuple[str, ...]) -> PartitionSpec:
    shape = parameter.get_value().shape
    names = logical_axes(parameter)
    named = any(names)
    axes = _named_axes(mesh, name, shape, names, weight_axes) if named else _largest_axis(mesh, shape, weight_axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _named_axes(
    mesh: Mesh, name: str, shape: tuple[int, ...], names: tuple[str | None, ...], weight_axes: tuple[str, ...]
) -> list[_Axes]:
    if len(names) != len(shape):
        raise ValueError(f"parameter {name} of shape {shape} names {len(names)} dimensions {names}; name each, or None")
    axes: list[_Axes] = []
    taken: set[str] = set()
    for dimension, (length, logical) in enumerate(zip(shape, names, strict=True)):
        if logical is not None and logical not in LOGICAL_NAMES:
            raise ValueError(
                f"parameter {name} names its dimension {dimension} {logical!r}; use one of "
                f"{', '.join(LOGICAL_NAMES)}, or None"
            )
        wanted = () if logical is None else _present(mesh, _axes_of(logical, weight_axes))
        # A mesh axis can shard one dimension only: of two with names of the same axis, the first.
        if not wanted or taken & set(wanted):
            axes.append(None)
            continue
        size = math.prod(mesh.shape[axis] for axis in wanted)
        if length % size and logical == "vocabulary":
            axes.append(None)
            continue
        if length % size:
            sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in wanted)
            remedy = f"choose {wanted[0]} among the divisors of {length}"
            if len(wanted) > 1:
                remedy = "choose sizes whose product divides it, leave the ring out of weight_axes"
            raise ValueError(
                f"parameter {name} of shape {shape} cannot be sharded over the mesh axis {sizes}: "
                f"its dimension {dimension} ({logical}) has length {length}; {remedy}, or change the model"
            )
        taken |= set(wanted)
        axes.append(_as_entry(wanted))
    return axes


def _largest_axis(mesh: Mesh, shape: tuple[int, ...], weight_axes: tuple[str, ...]) -> list[_Axes]:
    axes: list[_Axes] = [None] * len(shape)
    wanted = _present(mesh, weight_axes)
    size = math.prod(mesh.shape[axis] for axis in wanted)
    divisible = [dimension for dimension, length in enumerate(shape) if length % size == 0]
    if wanted and divisible and math.prod(shape) >= UNNAMED_SHARDED_FROM:
        axes[max(divisible, key=lambda dimension: shape[dimension])] = _as_entry(wanted)
    return axes


def _axes_of(logical: str, weight_axes: tuple[str, ...]) -> tuple[str, ...]:
    return weight_axes if logical == "width" else _TENSOR_AXES


def _present(mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def _as_entry(axes: tuple[str, ...]) -> _Axes:
    return axes[0] if len(axes) == 1 else axes


def _as_tuple(axes: _Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
