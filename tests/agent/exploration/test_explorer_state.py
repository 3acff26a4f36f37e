import numpy as np
import pytest

from ring_rl.agent.exploration.explorer_state import load_explorer_state, save_explorer_state

STATE = {"learner": {"0": {"kernel": np.eye(2, dtype=np.float32)}, "step": np.asarray(3)}, "decisions": np.asarray(7)}


def test_nested_arrays_come_back_with_what_comes_next(tmp_path):
    path = tmp_path / "explorer.npz"
    for batch in (3, 4):  # the second replaces the first
        save_explorer_state(path, STATE, batch=batch, episode=20 * batch)
    state, batch, episode = load_explorer_state(path)
    assert (batch, episode) == (4, 80)
    np.testing.assert_array_equal(state["learner"]["0"]["kernel"], np.eye(2))
    assert int(state["learner"]["step"]) == 3
    assert int(state["decisions"]) == 7
    assert [each.name for each in tmp_path.iterdir()] == ["explorer.npz"]


def test_a_damaged_file_says_what_to_do(tmp_path):
    path = tmp_path / "explorer.npz"
    save_explorer_state(path, STATE, batch=1, episode=1)
    for content in (path.read_bytes()[:-20], b"", b"somebody's"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"explorer\.npz holds no explorer's state .* played again from the first"):
            load_explorer_state(path)
    with pytest.raises(FileNotFoundError):
        load_explorer_state(tmp_path / "missing.npz")
