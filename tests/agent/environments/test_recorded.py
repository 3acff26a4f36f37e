import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.environments.recorded import ActionRange, ObservationLeaf, RecordedEnvironment, leaves_of_space
from ring_rl.config import from_mapping, to_mapping


def box(*shape, dtype="float64"):
    return {"type": "Box", "shape": list(shape), "dtype": dtype}


NESTED = {
    "type": "Dict",
    "subspaces": {
        "z": box(2),
        "a": {"type": "Tuple", "subspaces": [box(1), box(2, 2)]},
        "b": {"type": "Dict", "subspaces": {"inner": box()}},
    },
}


def recorded(observation, low=(-1.0,), high=(1.0,)):
    return RecordedEnvironment(
        environment_id="Made-v0",
        spec=None,
        observation=observation,
        action_range=ActionRange(low=low, high=high),
        max_episode_steps=7,
    )


def test_leaves_stand_in_the_order_of_the_space_and_not_of_the_alphabet():
    leaves = leaves_of_space(NESTED)
    assert [leaf.path for leaf in leaves] == [("z",), ("a", "0"), ("a", "1"), ("b", "inner")]
    assert [leaf.size for leaf in leaves] == [2, 1, 4, 1]


@pytest.mark.parametrize("rows", [(), (3,)])
def test_flat_observations_hold_every_leaf_in_that_order(rows):
    environment = recorded(leaves_of_space(NESTED))
    part = lambda start, *shape: (start + np.arange(np.prod(rows + shape))).reshape(rows + shape)  # noqa: E731
    z, a0, a1, inner = part(0, 2), part(100, 1), part(200, 2, 2), part(300)
    flat = environment.flatten({"b": {"inner": inner}, "a": (a0, a1), "z": z}, rows=rows)
    assert flat.dtype == np.float32
    assert flat.shape == (*rows, environment.observation_dim) == (*rows, 8)
    expected = [each.reshape(*rows, -1) for each in (z, a0, a1, inner)]
    np.testing.assert_array_equal(flat, np.concatenate(expected, axis=-1))


def test_an_observation_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"z has shape \(3,\), expected 2 entries"):
        recorded(leaves_of_space(NESTED)).flatten({"z": np.zeros(3)})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"type": "Discrete", "n": 3}, "the observation is a Discrete space; only Box"),
        ({"type": "Dict", "subspaces": {"look": box(32, 32, 3, dtype="uint8")}}, "look is an image"),
    ],
)
def test_what_is_no_vector_is_refused(space, message):
    with pytest.raises(ValueError, match=message):
        leaves_of_space(space)


finite = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=4), st.data())
def test_actions_come_back_in_their_own_range(bounds, data):
    low, high = zip(*(sorted(pair) for pair in bounds), strict=True)
    action_range = ActionRange(low=low, high=high)
    actions = np.array([[data.draw(st.floats(a, b)) for a, b in zip(low, high, strict=True)] for _ in range(3)])
    unit = action_range.to_unit(actions)
    assert unit.dtype == np.float32
    assert (np.abs(unit) <= 1).all()
    spans = np.array(high) - np.array(low)
    np.testing.assert_allclose(action_range.from_unit(unit), actions, atol=1e-7 * max(spans.max(), 1), rtol=0)
    np.testing.assert_allclose(action_range.from_unit(np.full(len(low), -1.0)), low, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(action_range.from_unit(np.full(len(low), 1.0)), high, rtol=1e-12, atol=1e-9)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8))
def test_the_unit_range_leaves_every_bit(values):
    actions = np.array(values, np.float32)[:, None]
    assert ActionRange(low=(-1.0,), high=(1.0,)).to_unit(actions).tobytes() == actions.tobytes()


def test_actions_beyond_their_range_are_clipped():
    np.testing.assert_array_equal(
        ActionRange(low=(0.0,), high=(4.0,)).to_unit(np.array([[-1.0], [2.0], [9.0]])), [[-1], [0], [1]]
    )


@pytest.mark.parametrize(
    "bounds", [((-np.inf,), (1.0,)), ((0.0,), (np.nan,)), ((1.0,), (0.0,)), ((), ()), ((0.0,), ())]
)
def test_ranges_that_no_agent_could_act_in_are_refused(bounds):
    with pytest.raises(ValueError, match="range"):
        ActionRange(low=bounds[0], high=bounds[1])


def test_a_checkpoint_can_carry_it():
    environment = recorded((ObservationLeaf(path=("a", "0"), size=3),))
    assert from_mapping(RecordedEnvironment, json.loads(json.dumps(to_mapping(environment)))) == environment
