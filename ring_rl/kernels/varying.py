"""Loop carries under `shard_map`: a value's type says which mesh axes it varies over."""

import jax

from ring_rl.typing import Array


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, all marked as varying over every mesh axis that any of them varies over.

    The carry of a loop must enter with the type it leaves with; a fresh zero varies over nothing, while what
    is added to it varies over the ring. Outside `shard_map`, or with its check off, this changes nothing.
    """
    axes = frozenset().union(*map(_varying_axes, arrays))
    return tuple(_mark(x, axes - _varying_axes(x)) for x in arrays)


def _varying_axes(x: Array) -> frozenset:
    aval = jax.typeof(x)
    if hasattr(aval, "vma"):
        return aval.vma
    # jax 0.10.2 keeps the same set one level deeper.
    return getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())


def _mark(x: Array, axes: frozenset) -> Array:
    return jax.lax.pcast(x, tuple(sorted(axes, key=str)), to="varying") if axes else x
