from __future__ import annotations

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.config import from_mapping, to_mapping
from ring_rl.training.optimizer import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    OptimizerConfig,
    learning_rate_at,
    make_optimizer,
    weight_decay_mask,
)
from small_optimizer import adamw

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = adamw(learning_rate=1e-2, warmup_steps=10)
SHARED = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 0,
    "schedule": "constant",
    "final_learning_rate_fraction": 1.0,
    "gradient_clip_norm": None,
}
LION = LionConfig(name="lion", beta1=0.9, beta2=0.98, **SHARED)
ADAFACTOR = AdafactorConfig(
    name="adafactor", decay_exponent=0.8, smallest_factored_dimension=4, update_clip=1.0, **SHARED
)


def with_schedule(schedule: str, *, warmup_steps: int = 10, final: float = 0.1) -> AdamWConfig:
    return dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=warmup_steps, final_learning_rate_fraction=final)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_is_linear_and_spends_no_step_at_zero(schedule):
    rates = [float(learning_rate_at(with_schedule(schedule), step, 100)) for step in range(11)]
    np.testing.assert_allclose(rates[:10], [1e-2 * (step + 1) / 10 for step in range(10)], rtol=1e-6)
    np.testing.assert_allclose(rates[10], 1e-2, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_decay_ends_at_its_fraction(schedule, middle, last):
    config = with_schedule(schedule, warmup_steps=0)
    np.testing.assert_allclose(learning_rate_at(config, 50, 101), 1e-2 * middle, rtol=1e-5)
    np.testing.assert_allclose(learning_rate_at(config, 100, 101), 1e-2 * last, rtol=1e-5)
    np.testing.assert_allclose(learning_rate_at(config, 1000, 101), 1e-2 * last, rtol=1e-5)


def test_cosine_follows_its_formula():
    expected = 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.25)) / 2)
    np.testing.assert_allclose(learning_rate_at(with_schedule("cosine", warmup_steps=0), 25, 101), expected, rtol=1e-5)


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup_steps=st.integers(0, 20),
    total_steps=st.integers(21, 60),
    final=st.floats(0, 1),
)
def test_rate_rises_then_falls_and_stays_in_bounds(schedule, warmup_steps, total_steps, final):
    config = with_schedule(schedule, warmup_steps=warmup_steps, final=final)
    rates = np.asarray(learning_rate_at(config, np.arange(total_steps), total_steps))
    assert rates.dtype == np.float32
    assert np.all(rates > 0) or final == 0 or schedule == "constant"
    assert np.all(rates <= np.float32(1e-2) * (1 + 1e-5))
    assert np.all(np.diff(rates[:warmup_steps]) > 0)
    assert np.all(np.diff(rates[warmup_steps:]) <= 1e-8)


@dataclasses.dataclass(frozen=True)
class Holder:
    optimizer: OptimizerConfig


class Stack(nnx.Module):
    """Two layers stacked along a leading axis, as a scan over layers holds them."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.vmap(in_axes=0)
        def make_layer(layer_rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(3, 3, rngs=layer_rngs)

        self.layers = make_layer(rngs.split(2))
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.embed = nnx.Embed(4, 3, rngs=rngs)


def test_decay_goes_by_name_also_in_stacked_layers():
    parameters = nnx.state(Stack(nnx.Rngs(0)), nnx.Param)
    assert parameters["layers"]["bias"].shape == (2, 3)
    mask = nnx.to_pure_dict(weight_decay_mask(parameters))
    assert mask == {
        "embed": {"embedding": True},
        "layers": {"bias": False, "kernel": True},
        "norm": {"bias": False, "scale": False},
    }


@pytest.mark.parametrize("config", [with_schedule("constant", warmup_steps=0), LION, ADAFACTOR], ids=lambda c: c.name)
def test_decay_moves_only_what_it_should(config):
    parameters = nnx.state(Stack(nnx.Rngs(0)), nnx.Param)
    optimizer = make_optimizer(config, total_steps=10)
    zero_gradients = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(zero_gradients, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(
        updates["layers"]["kernel"].get_value(),
        -1e-2 * 0.1 * parameters["layers"]["kernel"].get_value(),
        rtol=1e-5,
    )
    assert not np.any(updates["layers"]["bias"].get_value())
    assert not np.any(updates["norm"]["scale"].get_value())


@pytest.mark.parametrize("path", sorted((REPOSITORY / "conf" / "optimizer").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_optimizer_of_the_configuration_minimises_a_quadratic(path):
    mapping = {**yaml.safe_load(path.read_text()), "learning_rate": 0.05, "weight_decay": 0.0}
    config = from_mapping(Holder, {"optimizer": mapping}).optimizer
    # Adam is AdamW whose weights do not decay.
    assert config.name == {"adam": "adamw"}.get(path.stem, path.stem)
    assert to_mapping(config) == mapping
    optimizer = make_optimizer(config, total_steps=200)
    target = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)

    @jax.jit
    def step(parameters, state):
        gradients = jax.grad(lambda p: jnp.sum((p["kernel"] - target) ** 2))(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    parameters = {"kernel": jnp.zeros((4, 5))}
    state = optimizer.init(parameters)
    for _ in range(200):
        parameters, state = step(parameters, state)
    np.testing.assert_allclose(parameters["kernel"], target, atol=0.02)


def test_an_unknown_optimizer_names_those_there_are():
    with pytest.raises(ValueError, match=r"optimizer.name.*adamw.*lion.*adafactor"):
        from_mapping(Holder, {"optimizer": {"name": "lyon"}})


def test_a_lion_steps_by_the_learning_rate():
    config = dataclasses.replace(LION, weight_decay=0.0)
    optimizer = make_optimizer(config, total_steps=10)
    parameters = {"kernel": jnp.zeros(3)}
    updates, state = optimizer.update({"kernel": jnp.array([5.0, -1e-3, 0.0])}, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["kernel"], [-1e-2, 1e-2, 0], rtol=1e-6)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) < 3 * 2


def test_adafactor_keeps_a_row_and_a_column_and_bounds_its_update():
    config = dataclasses.replace(ADAFACTOR, weight_decay=0.0, update_clip=0.5)
    optimizer = make_optimizer(config, total_steps=10)
    parameters = {"kernel": jnp.zeros((64, 32)), "bias": jnp.zeros(32)}
    gradients = jax.tree.map(lambda p: 1 + jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape), parameters)
    updates, state = optimizer.update(gradients, optimizer.init(parameters), parameters)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) < 64 + 32 + 32 + 16
    assert np.sqrt(np.mean(updates["kernel"] ** 2)) == pytest.approx(1e-2 * 0.5, rel=1e-4)
    unclipped = make_optimizer(dataclasses.replace(config, update_clip=None), total_steps=10)
    updates, _ = unclipped.update(gradients, unclipped.init(parameters), parameters)
    assert np.sqrt(np.mean(updates["kernel"] ** 2)) == pytest.approx(1e-2, rel=0.1)


def test_clipping_bounds_what_adam_sees():
    # With beta1 = 0 and a second moment of one step, Adam hides the scale; the first moment shows it.
    config = dataclasses.replace(CONFIG, gradient_clip_norm=0.5, beta1=0.0)
    parameters = {"kernel": jnp.zeros(4)}
    optimizer = make_optimizer(config, total_steps=100)
    _, state = optimizer.update({"kernel": jnp.full(4, 100.0)}, optimizer.init(parameters), parameters)
    moments = [leaf for leaf in jax.tree.leaves(state) if np.shape(leaf) == (4,)]
    np.testing.assert_allclose(np.linalg.norm(moments[0]), 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("warmup_steps", -1),
        ("final_learning_rate_fraction", 1.1),
        ("gradient_clip_norm", 0.0),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (LION, "beta1", 1.0),
        (LION, "beta2", -0.1),
        (ADAFACTOR, "decay_exponent", 0.0),
        (ADAFACTOR, "smallest_factored_dimension", 0),
        (ADAFACTOR, "update_clip", 0.0),
        (ADAFACTOR, "learning_rate", -1.0),
    ],
)
def test_impossible_values_of_the_others_are_refused_too(config, field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(config, **{field: value})


def test_warmup_must_end_before_training_does():
    with pytest.raises(ValueError, match="warmup_steps 10 must be fewer than the 5 training steps"):
        make_optimizer(CONFIG, total_steps=5)
