import numpy as np
import pytest

pytest.importorskip("dm_control", reason="the clock is the simulator's: pip install 'ring_rl[simulator]'")

import mujoco

from ring_rl.agent.environments import simulator_clock
from ring_rl.agent.environments.environment import make_environment
from ring_rl.agent.environments.simulator_clock import without_clock

pytestmark = pytest.mark.simulator


def timed_steps(model, steps=20):
    """How often a fresh simulation's stopwatch stopped, whether any time passed on it, and where it arrived."""
    data = mujoco.MjData(model)
    data.qvel[:] = 0.1
    mujoco.mj_step(model, data, steps)
    timer = data.timer[mujoco.mjtTimer.mjTIMER_STEP]
    return timer.duration, data.qpos.copy()


def test_the_stopwatch_stands_still_inside_and_goes_on_after_even_an_error():
    model = make_environment("cheetah_run", action_repeat=1).simulation.physics.model.ptr
    duration, reached = timed_steps(model)
    assert duration > 0
    with without_clock():
        inside, reached_inside = timed_steps(model)
        assert inside == 0
        with without_clock():  # inside one another
            assert timed_steps(model)[0] == 0
        assert timed_steps(model)[0] == 0
    np.testing.assert_array_equal(reached_inside, reached)
    with pytest.raises(ZeroDivisionError), without_clock():
        _ = 1 / 0
    assert timed_steps(model)[0] > 0


def test_without_the_library_the_clock_stays(monkeypatch):
    model = make_environment("cheetah_run", action_repeat=1).simulation.physics.model.ptr
    monkeypatch.setattr(simulator_clock, "_clock", lambda: None)
    with without_clock():
        assert timed_steps(model)[0] > 0
