"""A fingerprint is of the values, and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ring_rl.training.fingerprint import fingerprint_of_arrays
from ring_rl.training.mesh import MeshConfig, make_mesh


def test_a_fingerprint_does_not_know_the_mesh_and_sees_one_bit():
    values = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    whole = fingerprint_of_arrays({"a": jnp.asarray(values), "b": jnp.ones(3)})
    assert len(whole) == 16
    mesh = make_mesh(MeshConfig(dp=1, fsdp=8, tp=1, sp=1))
    split = jax.device_put(values, NamedSharding(mesh, PartitionSpec("fsdp")))
    assert fingerprint_of_arrays({"a": split, "b": jnp.ones(3)}) == whole
    changed = values.copy()
    changed[5, 5] = np.nextafter(changed[5, 5], np.float32(9))
    assert fingerprint_of_arrays({"a": jnp.asarray(changed), "b": jnp.ones(3)}) != whole
    # The same numbers, dealt out otherwise.
    assert fingerprint_of_arrays({"a": jnp.ones(3), "b": jnp.asarray(values)}) != whole
