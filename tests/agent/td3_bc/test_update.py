import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ring_rl.agent.episodes.episode_set import EpisodeSet
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.td3_bc.losses import actor_loss, bellman_targets, critic_loss
from ring_rl.agent.td3_bc.networks import TD3BC
from ring_rl.agent.td3_bc.transitions import draw, transitions_of
from ring_rl.agent.td3_bc.update import Optimizers, initial_state, make_update_step
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.state import noise_key

BATCH, RATE, SEED = 16, 1e-2, 5


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def transitions(chains):
    return transitions_of(chains.episode_set(3))


@pytest.fixture(scope="module")
def learner(td3, mesh):
    """`learner(updates=4, ...)`: a fresh state and its step."""
    optimizers = Optimizers(optax.adam(RATE), optax.adam(RATE))
    make_model = lambda rngs: TD3BC(td3.network_config(), rngs=rngs)  # noqa: E731
    graphdef = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]

    def make(*, updates, **changes):
        state = initial_state(make_model, optimizers, seed=SEED, mesh=mesh)
        step = make_update_step(
            graphdef,
            optimizers,
            mesh,
            config=td3.learning_config(**changes),
            seed=SEED,
            batch_size=BATCH,
            updates=updates,
            learning_rate=lambda update: 0.001 * update,
        )
        return graphdef, state, step

    return make


def copy_of(state):
    """One that outlives its donation."""
    return jax.tree.map(np.array, state)


def by_hand(td3, graphdef, parameters, transitions, *, updates, delay, steps):
    """The method, update by update, as the papers' pseudo-code has it: a counter and a remainder."""
    config, adam = td3.learning_config(actor_delay=delay), optax.adam(RATE)
    transitions = jax.tree.map(jnp.asarray, transitions)

    @jax.jit
    def update_critics(trained, targets, moments, key):
        batch_key, smoothing_key = jax.random.split(key)
        batch = draw(transitions, batch_key, size=BATCH)
        y = bellman_targets(nnx.merge(graphdef, targets), batch, smoothing_key, config)
        # The whole model's gradient; of it only the critics' part is used.
        loss, gradient = jax.value_and_grad(lambda p: critic_loss(nnx.merge(graphdef, p), batch, y).loss)(trained)
        moves, moments = adam.update(gradient["critics"], moments)
        return optax.apply_updates(trained["critics"], moves), moments, batch, loss

    @jax.jit
    def update_actor(trained, moments, batch):
        gradient = jax.grad(lambda p: actor_loss(nnx.merge(graphdef, p), batch, config).loss)(trained)
        moves, moments = adam.update(gradient["actor"], moments)
        return optax.apply_updates(trained["actor"], moves), moments

    trained = targets = parameters
    moments = {name: adam.init(parameters[name]) for name in ("actor", "critics")}
    losses = []
    for step in range(steps):
        keys = jax.random.split(jax.random.fold_in(noise_key(SEED), step), (updates // delay, delay)).reshape(-1)
        for count, key in enumerate(keys, start=1):
            critics, moments["critics"], batch, loss = update_critics(trained, targets, moments["critics"], key)
            losses.append(float(loss))
            actor = trained["actor"]
            if count % delay == 0:
                whole = nnx.State({"actor": actor.raw_mapping, "critics": critics.raw_mapping})
                actor, moments["actor"] = update_actor(whole, moments["actor"], batch)
            trained = nnx.State({"actor": actor.raw_mapping, "critics": critics.raw_mapping})
            if count % delay == 0:
                targets = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, trained, targets)
    return trained, targets, losses


def test_a_step_is_so_many_updates_by_the_pseudo_code(td3, learner, transitions):
    graphdef, state, step = learner(updates=4, actor_delay=2)
    start = copy_of(state.parameters)
    parameters, targets, losses = by_hand(td3, graphdef, start, transitions, updates=4, delay=2, steps=2)
    state, _ = step(state, transitions)
    state, metrics = step(state, transitions)
    assert int(state.step) == 2
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.tree.leaves(state.parameters), jax.tree.leaves(parameters))
    jax.tree.map(close, jax.tree.leaves(state.optimizer_state.targets), jax.tree.leaves(targets))
    close(metrics["loss"], np.mean(losses[4:]))
    assert float(metrics["learning_rate"]) == pytest.approx(0.001 * 7)


def test_actor_and_targets_wait_for_the_critics(learner, transitions):
    """One round of four: four updates of the critics, one of the actor."""
    _, state, step = learner(updates=4, actor_delay=4)
    before = copy_of(state)
    after, _ = step(state, transitions)
    assert int(after.optimizer_state.critics[0].count) == 4
    assert int(after.optimizer_state.actor[0].count) == 1
    # The one actor step by Adam moves no weight further than its rate, the four of the critics do.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.parameters, after.parameters)
    assert max(jax.tree.leaves(moved["actor"])) <= RATE * 1.01
    assert max(jax.tree.leaves(moved["critics"])) > RATE * 1.5


def test_steps_of_a_seed_repeat_to_the_bit(learner, transitions):
    _, first, step = learner(updates=2)
    _, second, _ = learner(updates=2)
    for _ in range(2):
        first, _ = step(first, transitions)
        second, _ = step(second, transitions)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(("updates", "delay", "remedy"), [(5, 2, "use 6"), (0, 2, "use 2"), (-1, 3, "use 3")])
def test_updates_that_the_delay_does_not_divide_are_refused(learner, updates, delay, remedy):
    with pytest.raises(ValueError, match=f"updates_per_step={updates}.*{remedy}"):
        learner(updates=updates, actor_delay=delay)


def point_episodes(generator, count=20, length=20):
    """A point on a line pays its distance from 0; whoever moves it acts at random, so imitation stands still."""
    episodes = []
    for _ in range(count):
        actions = generator.uniform(-1, 1, size=(length, 1)).astype(np.float32)
        positions = [generator.uniform(-1, 1)]
        for action in actions[:, 0]:
            positions.append(np.clip(positions[-1] + 0.2 * action, -1, 1))
        positions = np.array(positions, np.float32)[:, None]
        episodes.append(
            Trajectory(
                observations=positions,
                actions=actions,
                rewards=-np.abs(positions[1:, 0]),
                discounts=np.ones(length, np.float32),
                physics=None,
            )
        )
    return EpisodeSet(tuple(episodes))


def test_it_learns_what_its_data_never_did(td3, mesh):
    """From random motion it learns to go to the middle; with alpha 0, plain cloning, it stays where it is."""
    transitions = transitions_of(point_episodes(np.random.default_rng(0)))
    optimizers = Optimizers(optax.adam(3e-3), optax.adam(3e-3))
    make_model = lambda rngs: TD3BC(td3.network_config((32, 32), 1, 1), rngs=rngs)  # noqa: E731
    graphdef = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]
    final_distance = {}
    for alpha in (0.0, 2.5):
        state = initial_state(make_model, optimizers, seed=0, mesh=mesh)
        step = make_update_step(
            graphdef,
            optimizers,
            mesh,
            config=td3.learning_config(value_weight=alpha, target_rate=0.02),
            seed=0,
            batch_size=64,
            updates=600,
            learning_rate=lambda _: jnp.float32(3e-3),
        )
        state, metrics = step(state, transitions)
        assert np.isfinite(metrics["loss"])
        actor = nnx.merge(graphdef, state.parameters)
        positions = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
        for _ in range(12):
            positions = np.clip(positions + 0.2 * np.asarray(actor.actions(positions)), -1, 1)
        final_distance[alpha] = np.abs(positions).mean()
    assert final_distance[2.5] < 0.15
    assert final_distance[0.0] > 2 * final_distance[2.5]
