from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ring_rl.nn.logical_axes import named
from ring_rl.training.mesh import MeshConfig, make_mesh, shard_batch
from ring_rl.training.state import create_state, noise_key
from ring_rl.training.step import Loss, compile_step, compiled_report, make_train_step


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, inputs_BTF: jax.Array) -> jax.Array:
        return self.out(nnx.tanh(self.hidden(inputs_BTF)))[..., 0]


def squared_error(model: Mlp, batch: dict, key: jax.Array) -> Loss:
    error_BT = (model(batch["inputs"]) - batch["targets"]) ** 2
    noise = jax.random.uniform(key)
    weight = batch["weights"].sum()
    return Loss(
        total=(error_BT * batch["weights"]).sum(),
        weight=weight,
        metrics={"noise": (noise, jnp.float32(1)), "absent": (jnp.float32(0), jnp.float32(0))},
    )


def make_batch(step: int, *, weight: float = 1.0) -> dict:
    generator = np.random.default_rng(step)
    inputs = generator.normal(size=(4, 16, 3)).astype(np.float32)
    weights = weight * (generator.uniform(size=(4, 16)) < 0.7).astype(np.float32)
    return {"inputs": inputs, "targets": inputs.sum(-1), "weights": weights}


def run(dp: int, sp: int, *, steps: int, seed: int = 0):
    mesh = make_mesh(MeshConfig(dp=dp, fsdp=1, tp=1, sp=sp))
    optimizer = optax.adam(1e-2)
    graphdef, state = create_state(Mlp, optimizer, seed=seed, mesh=mesh)
    step = make_train_step(
        squared_error, graphdef, optimizer, mesh, seed=seed, learning_rate=lambda step: 0.01 * (step + 1)
    )
    history = []
    for index in range(steps):
        state, metrics = step(state, shard_batch(mesh, make_batch(index)))
        history.append(jax.device_get(metrics))
    return state, history


def test_loss_falls_and_metrics_are_complete():
    state, history = run(1, 8, steps=30)
    assert int(state.step) == 30
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert set(history[0]) == {"loss", "loss_weight", "gradient_norm", "learning_rate", "noise", "absent"}
    assert history[0]["absent"] == 0
    np.testing.assert_allclose(history[4]["learning_rate"], 0.05, rtol=1e-6)


def test_the_mesh_changes_nothing_but_rounding():
    _, alone = run(1, 1, steps=5)
    for dp, sp in ((1, 8), (4, 2)):
        _, sharded = run(dp, sp, steps=5)
        np.testing.assert_allclose(
            [metrics["loss"] for metrics in sharded], [metrics["loss"] for metrics in alone], rtol=1e-5
        )


def test_loss_is_the_global_weighted_mean():
    mesh = make_mesh(MeshConfig(dp=2, fsdp=1, tp=1, sp=4))
    optimizer = optax.sgd(0.0)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    model = nnx.merge(graphdef, jax.device_get(state.parameters))
    batch = make_batch(0)
    errors = (np.asarray(model(batch["inputs"])) - batch["targets"]) ** 2
    expected = (errors * batch["weights"]).sum() / batch["weights"].sum()
    _, metrics = make_train_step(squared_error, graphdef, optimizer, mesh, seed=0)(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_weight"], batch["weights"].sum())


def test_gradient_norm_is_that_of_the_mean_loss():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=2))
    optimizer = optax.sgd(1e-3)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    batch = make_batch(0)

    def mean_loss(parameters):
        loss = squared_error(nnx.merge(graphdef, parameters), batch, jax.random.key(0))
        return loss.total / loss.weight

    gradients = jax.grad(mean_loss)(jax.device_get(state.parameters))
    expected = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients)))
    _, metrics = make_train_step(squared_error, graphdef, optimizer, mesh, seed=0)(state, batch)
    np.testing.assert_allclose(metrics["gradient_norm"], expected, rtol=1e-5)


def test_an_empty_batch_has_loss_zero_and_moves_nothing():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=2))
    optimizer = optax.sgd(1.0)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    before = jax.device_get(state.parameters)
    state, metrics = make_train_step(squared_error, graphdef, optimizer, mesh, seed=0)(state, make_batch(0, weight=0.0))
    assert metrics["loss"] == 0
    assert metrics["gradient_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.parameters))


def test_randomness_is_a_function_of_seed_and_step():
    noise = [float(metrics["noise"]) for metrics in run(1, 1, steps=3)[1]]
    assert len(set(noise)) == 3
    assert [float(metrics["noise"]) for metrics in run(1, 8, steps=3)[1]] == noise
    assert [float(metrics["noise"]) for metrics in run(1, 1, steps=3, seed=1)[1]] != noise
    key = jax.random.fold_in(noise_key(0), 2)
    assert noise[2] == float(jax.random.uniform(key))


def test_the_loss_does_not_draw_what_the_parameters_were_drawn_from():
    class Drawn(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.value = nnx.Param(jax.random.uniform(rngs.params()))

    def loss_function(model: Drawn, batch: dict, key: jax.Array) -> Loss:
        noise = jax.random.uniform(nnx.Rngs(key).params())
        return Loss(model.value[...], jnp.float32(1), {"noise": (noise, jnp.float32(1))})

    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    graphdef, state = create_state(Drawn, optax.sgd(1.0), seed=0, mesh=mesh)
    drawn = float(jax.tree.leaves(state.parameters)[0])
    _, metrics = make_train_step(loss_function, graphdef, optax.sgd(1.0), mesh, seed=0)(state, make_batch(0))
    assert float(metrics["noise"]) != drawn


def test_the_state_is_donated():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=2))
    optimizer = optax.adam(1e-2)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    make_train_step(squared_error, graphdef, optimizer, mesh, seed=0)(state, make_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.parameters))


def test_a_metric_may_not_take_a_name_of_the_step():
    def loss_function(model: Mlp, batch: dict, key: jax.Array) -> Loss:
        loss = squared_error(model, batch, key)
        return Loss(loss.total, loss.weight, {"loss": (loss.total, loss.weight)})

    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    optimizer = optax.sgd(1.0)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    with pytest.raises(ValueError, match="the step reports loss itself"):
        make_train_step(loss_function, graphdef, optimizer, mesh, seed=0)(state, make_batch(0))


def ring_loss(hops: int):
    """A loss that sends its inputs `hops` times round the ring, unrolled."""

    def loss_function(model: Mlp, batch: dict, key: jax.Array) -> Loss:
        mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=4))
        spec = jax.sharding.PartitionSpec(("dp", "fsdp"), "sp")

        @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec)
        def rotate(values):
            for _ in range(hops):
                values = jax.lax.ppermute(values, "sp", [(i, (i + 1) % 4) for i in range(4)]) + 1
            return values

        return squared_error(model, {**batch, "inputs": rotate(batch["inputs"])}, key)

    return loss_function


@pytest.mark.parametrize("hops", [0, 1, 3])
def test_report_counts_the_hops_of_a_ring(hops):
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=4))
    optimizer = optax.sgd(1e-3)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    step = make_train_step(ring_loss(hops), graphdef, optimizer, mesh, seed=0)
    report = compiled_report(compile_step(step, state, shard_batch(mesh, make_batch(0))))
    assert report["collective_permutes"] == hops
    shard_bytes = 4 * 4 * (3 + 1 + 1) * 4
    parameter_bytes = 4 * (3 * 16 + 16 + 16 + 1)
    assert report["argument_bytes"] >= shard_bytes + parameter_bytes
    assert report["peak_bytes"] > 0
    assert report["temporary_bytes"] > 0


class Wide(nnx.Module):
    """Computes in bfloat16 with float32 parameters, named so that fsdp and tp shard them."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(
            3, 256, kernel_metadata=named(None, "hidden"), bias_metadata=named("hidden"), dtype=jnp.bfloat16, rngs=rngs
        )
        self.square = nnx.Linear(
            256, 256, kernel_metadata=named("hidden", "width"), use_bias=False, dtype=jnp.bfloat16, rngs=rngs
        )
        self.out = nnx.Linear(256, 1, kernel_metadata=named("width", None), dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, inputs_BTF: jax.Array) -> jax.Array:
        hidden = nnx.tanh(self.square(nnx.tanh(self.hidden(inputs_BTF))))
        return self.out(hidden)[..., 0].astype(jnp.float32)


def wide_step(optimizer: optax.GradientTransformation, *, dp: int = 1, fsdp: int = 1, tp: int = 1):
    mesh = make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=1))
    graphdef, state = create_state(Wide, optimizer, seed=0, mesh=mesh)
    step = make_train_step(squared_error, graphdef, optimizer, mesh, seed=0, accumulation_steps=2)
    batch = {name: np.repeat(values, 4, axis=0) for name, values in make_batch(0).items()}
    return step, state, shard_batch(mesh, batch)


def test_shardings_are_kept_and_the_step_compiles_once():
    step, state, batch = wide_step(optax.adam(1e-3), fsdp=4, tp=2)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert state.parameters["square"]["kernel"].get_value().addressable_shards[0].data.shape == (128, 64)
    with count_compilations() as compilations:
        for _ in range(3):
            state, metrics = step(state, batch)
    assert compilations == ["step_function"]
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert all(metric.sharding.is_fully_replicated for metric in metrics.values())


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """The names of the jitted functions that are compiled inside."""
    names, logger = [], logging.getLogger("jax._src.interpreters.pxla")

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage()):
                names.append(found.group(1))

    handler = Names()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)


def test_fsdp_gathers_parameters_and_holds_an_eighth_of_the_state():
    reports, texts = {}, {}
    for name, sizes in {"dp": {"dp": 8}, "fsdp": {"fsdp": 8}}.items():
        compiled = compile_step(*wide_step(optax.adam(1e-3), **sizes))
        reports[name], texts[name] = compiled_report(compiled), compiled.as_text() or ""
    assert "all-gather" in texts["fsdp"]
    assert "all-gather" not in texts["dp"]
    # Gradients are summed over the batch's shards; where the backend has no reduce-scatter, in full.
    assert re.search(r"reduce-scatter|all-reduce", texts["fsdp"])
    whole = 4 * (256 * 256 + 3 * 256 + 256 + 256)
    held = {name: report["argument_bytes"] for name, report in reports.items()}
    assert held["dp"] > 3 * whole
    assert held["dp"] - held["fsdp"] > 0.95 * 3 * (256 * 256 * 4) * 7 / 8


def test_gradients_and_moments_are_float32_where_the_model_computes_in_bfloat16():
    seen = []

    def record(updates, state, parameters=None):
        del parameters
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(updates))
        return updates, state

    optimizer = optax.chain(optax.GradientTransformation(lambda _: optax.EmptyState(), record), optax.adam(1e-3))
    step, state, batch = wide_step(optimizer)
    state, metrics = step(state, batch)
    floating = [x.dtype for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(seen) == set(floating) == {jnp.dtype(jnp.float32)}
