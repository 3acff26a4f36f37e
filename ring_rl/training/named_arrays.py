"""A pytree's arrays as plain nested dicts by name, the form in which they are stored.

A checkpoint made of plain dicts outlives changes in the classes (flax's, optax's) that held the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ring_rl.typing import PyTree

__all__ = ["abstract_arrays", "described_arrays", "named_arrays", "with_arrays", "with_integer_keys"]


def named_arrays(tree: PyTree[Any]) -> dict[str, Any]:
    """The arrays of `tree` as nested dicts, keyed by the names, fields and indices that lead to them.

    An `nnx.Variable` counts as its array. Parts without arrays (optax's empty states) leave no trace.
    """
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
        *parents, name = _keys(path)
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = leaf.get_value() if _is_variable(leaf) else leaf
    return nested


def with_arrays(tree: PyTree[Any], nested: Mapping[str, Any]) -> PyTree[Any]:
    """The inverse of `named_arrays`: `tree` with its arrays taken from `nested`."""
    arrays = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
        node: Any = nested
        for key in _keys(path):
            node = node[key]
        arrays.append(node)
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


def abstract_arrays(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shape, type and sharding of each array; arrays that were donated still have them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def described_arrays(tree: PyTree[Any]) -> PyTree[str]:
    """Each array as text, "float32[4, 8]", for messages and comparison."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)


def with_integer_keys(tree: Any) -> Any:
    """Nested dicts whose names made of digits are ints again: flax keys a list of modules by index."""
    if not isinstance(tree, Mapping):
        return tree
    return {int(key) if key.isdigit() else key: with_integer_keys(value) for key, value in tree.items()}


def _keys(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((entry,), simple=True) for entry in path]


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
