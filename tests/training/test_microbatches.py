from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given
from hypothesis import strategies as st

from ring_rl.nn.logical_axes import named
from ring_rl.training.mesh import MeshConfig, make_mesh, shard_batch
from ring_rl.training.microbatches import split_microbatches, sum_over_microbatches
from ring_rl.training.state import create_state
from ring_rl.training.step import Loss, compile_step, make_train_step


def mesh_of(dp=1, fsdp=1, sp=1):
    return make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=1, sp=sp))


def test_every_row_is_in_one_microbatch_and_on_the_device_that_had_it():
    mesh = mesh_of(dp=2, fsdp=2, sp=2)
    rows = np.arange(16)[:, None] + np.zeros((16, 4), int)
    placed = shard_batch(mesh, {"rows": rows, "scale": np.float32(3)})
    split = jax.jit(lambda batch: split_microbatches(mesh, batch, 2)).lower(placed).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute", split.as_text() or "")
    parts = split(placed)
    assert parts["rows"][:, :, 0].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert parts["scale"].tolist() == [3, 3]
    before = {shard.device: set(np.unique(shard.data)) for shard in placed["rows"].addressable_shards}
    after = {shard.device: set(np.unique(shard.data)) for shard in parts["rows"].addressable_shards}
    assert before == after


def test_sums_are_float32_and_keys_differ():
    mesh = mesh_of(dp=1)

    def function(batch, key):
        return {"low": batch.sum().astype(jnp.bfloat16), "count": jnp.int32(1), "noise": jax.random.uniform(key)}

    key = jax.random.key(3)
    sums = sum_over_microbatches(function, jnp.ones(512), key, mesh=mesh, steps=256)
    assert sums["low"].dtype == jnp.float32
    # Summed in bfloat16, the total would stop growing at 256.
    assert (sums["low"], sums["count"]) == (512, 256)
    noise = [jax.random.uniform(jax.random.fold_in(key, index)) for index in range(256)]
    np.testing.assert_allclose(sums["noise"], np.sum(noise), rtol=1e-5)
    alone = sum_over_microbatches(function, jnp.ones(512), key, mesh=mesh, steps=1)
    assert alone["noise"] == jax.random.uniform(key)
    assert alone["low"].dtype == jnp.float32


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 16, kernel_metadata=named(None, "width"), rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, inputs_BTF: jax.Array) -> jax.Array:
        return self.out(nnx.tanh(self.hidden(inputs_BTF)))[..., 0]


def squared_error(model: Mlp, batch: dict, key: jax.Array) -> Loss:
    del key
    error_BT = (model(batch["inputs"]) - batch["targets"]) ** 2 * batch["weights"]
    large = (error_BT > 0.5).astype(jnp.float32) * batch["weights"]
    return Loss(error_BT.sum(), batch["weights"].sum(), {"large": (large.sum(), batch["weights"].sum())})


@functools.cache
def compiled(sizes: tuple[int, int, int], accumulation_steps: int):
    """A step, compiled once, and the state that it starts from, on the host."""
    mesh, optimizer = mesh_of(*sizes), optax.sgd(0.1)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    step = make_train_step(squared_error, graphdef, optimizer, mesh, seed=0, accumulation_steps=accumulation_steps)
    return step, jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@given(row_weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=16, max_size=16))
@example(row_weights=[0.0] * 16)
@example(row_weights=[0.0, 0.0, 1.0, 2.0] * 4)
def test_accumulation_changes_nothing_but_rounding(sizes, row_weights):
    """Uneven weights, microbatches and whole devices of weight 0 included."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(16, 4, 3)).astype(np.float32)
    weights = np.array(row_weights, np.float32)[:, None] * generator.integers(0, 2, (16, 4)).astype(np.float32)
    batch = {"inputs": inputs, "targets": inputs.sum(-1), "weights": weights}
    results = []
    for accumulation_steps in (1, 2, 4):
        step, start, shardings = compiled(sizes, accumulation_steps)
        state, metrics = step(jax.device_put(start, shardings), batch)
        results.append(jax.device_get((state.parameters, metrics)))
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, results[0])


def test_more_steps_need_less_memory():
    mesh = mesh_of(dp=1)
    optimizer = optax.sgd(0.1)
    batch = {
        "inputs": np.zeros((64, 256, 3), np.float32),
        "targets": np.zeros((64, 256), np.float32),
        "weights": np.ones((64, 256), np.float32),
    }
    temporary = []
    for accumulation_steps in (1, 8):
        graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
        step = make_train_step(squared_error, graphdef, optimizer, mesh, seed=0, accumulation_steps=accumulation_steps)
        memory = compile_step(step, state, batch).memory_analysis()
        assert memory is not None
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[1] < temporary[0] / 2


def test_wrong_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1, got 0"):
        make_train_step(squared_error, None, optax.sgd(1.0), mesh_of(), seed=0, accumulation_steps=0)
    message = "batch size 6 of batch['x'] is not divisible by dp=2 x fsdp=1 x accumulation_steps=2; pad it to 8"
    with pytest.raises(ValueError, match=re.escape(message)):
        split_microbatches(mesh_of(dp=2), {"x": jnp.zeros(6)}, 2)
