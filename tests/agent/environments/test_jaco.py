import numpy as np
import pytest

pytest.importorskip("dm_control", reason="environments need the simulator: pip install 'ring_rl[simulator]'")

from dm_control import composer
from dm_control.composer.initializers import ToolCenterPointInitializer
from dm_control.composer.variation import distributions
from dm_control.entities.manipulators import kinova
from dm_control.manipulation.shared import arenas, observations, robots
from dm_control.utils import rewards

from ring_rl.agent.environments.jaco import TARGETS, make_simulation

pytestmark = pytest.mark.simulator


class ComposerReach(composer.Task):
    """The task as one writes it for dm_control's composer, with the manipulation suite's own observables."""

    def __init__(self, target):
        self._target = np.array(target)
        settings = observations.PERFECT_FEATURES
        self._arena, self._arm, self._hand = arenas.Standard(), robots.make_arm(settings), robots.make_hand(settings)
        assert isinstance(self._arm, kinova.JacoArm)
        self._arm.attach(self._hand)
        self._arena.attach_offset(self._arm, offset=robots.ARM_OFFSET)
        self.control_timestep = 0.04
        corners = distributions.Uniform((-0.2, -0.2, 0.02), (0.2, 0.2, 0.4))
        self._place_hand = ToolCenterPointInitializer(self._hand, self._arm, position=corners)

    @property
    def root_entity(self):
        return self._arena

    def initialize_episode(self, physics, random_state):
        self._hand.set_grasp(physics, close_factors=random_state.uniform())
        self._place_hand(physics, random_state)

    def get_reward(self, physics):
        distance = np.linalg.norm(physics.bind(self._hand.tool_center_point).xpos - self._target)
        return rewards.tolerance(distance, bounds=(0, 0.05), margin=0.05)


@pytest.mark.parametrize("task", ["reach_top_left", "reach_bottom_right"])
def test_it_equals_the_task_in_dm_controls_composer(task):
    """The same seed: the same start, then the same observations in the same order, states and rewards."""
    simulation = make_simulation(task, flat_observation=True)
    reference = composer.Environment(ComposerReach(TARGETS[task]), time_limit=10.0, random_state=3)
    simulation.task.random.seed(3)
    rng = np.random.default_rng(0)
    specification = simulation.action_spec()
    for _ in range(2):
        ours, theirs = simulation.reset(), reference.reset()
        for _ in range(25):
            expected = np.concatenate([np.ravel(each) for each in theirs.observation.values()])
            np.testing.assert_array_equal(ours.observation["observations"], expected)
            np.testing.assert_array_equal(simulation.physics.get_state(), reference.physics.get_state())
            assert ours.reward == theirs.reward
            control = rng.uniform(specification.minimum, specification.maximum)
            ours, theirs = simulation.step(control), reference.step(control)


def test_an_episode_has_250_steps_as_in_the_composer():
    simulation = make_simulation("reach_top_left", flat_observation=True)
    reference = composer.Environment(ComposerReach(TARGETS["reach_top_left"]), time_limit=10.0, random_state=0)
    for environment in (simulation, reference):
        environment.reset()
        control = np.zeros(9)
        lasts = [environment.step(control).last() for _ in range(250)]
        assert lasts == [False] * 249 + [True]


def test_the_reward_is_one_at_the_target_and_a_tenth_at_twice_its_radius():
    simulation = make_simulation("reach_top_right", flat_observation=True)
    simulation.reset()
    task, physics = simulation.task, simulation.physics
    pinch = physics.named.data.site_xpos[task.hand.tool_center_point.full_identifier]
    for distance, reward in ((0.0, 1.0), (0.049, 1.0), (0.1, 0.1)):
        pinch[:] = TARGETS["reach_top_right"] + np.array([0.0, 0.0, distance])
        assert task.get_reward(physics) == pytest.approx(reward)


def test_episodes_start_with_the_pinch_point_above_the_table_and_the_fingers_at_different_widths():
    simulation = make_simulation("reach_top_left", flat_observation=False)
    simulation.task.random.seed(0)
    places, fingers = [], []
    for _ in range(20):
        observation = simulation.reset().observation
        places.append(observation["hand/pinch_site_pos"])
        fingers.append(observation["hand/joints_pos"])
    assert (np.abs(places)[:, :2] <= 0.2).all()
    assert (np.array(places)[:, 2] >= 0.02).all()
    assert (np.array(places)[:, 2] <= 0.4).all()
    assert np.ptp(places, axis=0).min() > 0.1
    assert np.ptp(fingers) > 0.5
