"""How the implementations in JAX are compiled and run: over a mesh where there are devices, else virtually."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_worker import Case, Inputs, Prepared, Results, segment_ids
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_rl.training.provenance import device_description, versions

# q, k, v, segment ids -> out
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def hello(*packages: str) -> dict[str, Any]:
    """Who answers: the platform, the devices and the versions of jax and `packages`."""
    return {
        "platform": jax.default_backend(),
        "device": device_description(),
        "device_kind": jax.devices()[0].device_kind,
        "versions": versions("jax", "jaxlib", *packages),
    }


def calls_in_flight() -> int:
    """One at a time on a CPU, where a started call already competes for the cores."""
    return 1 if jax.default_backend() == "cpu" else 8


def prepare(
    case: Case,
    inputs: Inputs,
    attend: Attend,
    *,
    axes: Mapping[str, int],
    order: np.ndarray | None,
    check_vma: bool,
) -> Prepared:
    """Compiles attention and its gradients.

    Args:
        case: What is compiled.
        inputs: In natural order.
        attend: One device's part, called where `axes` are bound.
        axes: Names and sizes of the axes that tokens are sharded over, outermost first; empty for one device.
        order: Permutation that puts tokens into the layout of the case; None leaves them.
        check_vma: Whether `shard_map` checks what varies over the axes.
    """
    bound, sharding = _bind(attend, axes, check_vma=check_vma)
    permute = (lambda x: x) if order is None else (lambda x: x[:, order])
    restore = (lambda x: x) if order is None else (lambda x: x[:, np.argsort(order)])
    q, k, v, d_out = (jax.device_put(permute(x), sharding) for x in inputs)
    ids = segment_ids(case)
    ids = None if ids is None else jax.device_put(permute(ids), sharding)

    def out_and_gradients(q, k, v, ids, d_out):
        out, pull_back = jax.vjp(lambda q, k, v: bound(q, k, v, ids), q, k, v)
        return out, *pull_back(d_out)

    forward = jax.jit(bound).lower(q, k, v, ids).compile()
    both = jax.jit(out_and_gradients).lower(q, k, v, ids, d_out).compile()
    memory = both.memory_analysis()
    return Prepared(
        forward=lambda: forward(q, k, v, ids),
        forward_backward=lambda: both(q, k, v, ids, d_out),
        wait=jax.block_until_ready,
        results=lambda: Results(*(restore(np.asarray(x)) for x in both(q, k, v, ids, d_out))),
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
        local=case.local,
    )


def gemm(size: int, dtype: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """A product of two square matrices, whose speed is the most that attention can hope for."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    return lambda: product(a, b), jax.block_until_ready


def _bind(attend: Attend, axes: Mapping[str, int], *, check_vma: bool) -> tuple[Attend, Any]:
    """`attend` of whole arrays, and the sharding that these want."""
    count = math.prod(axes.values())
    if not axes:
        return attend, None
    if count <= len(jax.devices()):
        mesh = Mesh(np.asarray(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))
        spec = PartitionSpec(None, tuple(axes))
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
        return mapped, NamedSharding(mesh, spec)
    return _virtual(attend, axes), None


def _virtual(attend: Attend, axes: Mapping[str, int]) -> Attend:
    """Every device of the mesh on this one device: one `vmap` an axis."""
    mapped = attend
    for name in reversed(tuple(axes)):
        mapped = jax.vmap(mapped, in_axes=1, out_axes=1, axis_name=name)

    def split(x: jax.Array) -> jax.Array:
        batch, tokens, *rest = x.shape
        return x.reshape(batch, *axes.values(), tokens // math.prod(axes.values()), *rest)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        return mapped(*jax.tree.map(split, (q, k, v, ids))).reshape(q.shape)

    return whole
