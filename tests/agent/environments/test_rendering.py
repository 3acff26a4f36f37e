import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ring_rl.agent.environments import rendering
from ring_rl.agent.environments.rendering import Rendering, render_contact_sheet, render_video

SHEET = {"frames": 5, "columns": 3, "frame_size": (40, 30), "overwrite": False}
STATES = np.linspace(0, 1, 11)[:, None] * np.array([0.5, 3.0, 0.0, 0.0])


def draw_in_colours(task, physics, frame_size, backends, timeout_seconds):
    """Stands for the drawing process: every state becomes a picture of its own grey."""
    width, height = frame_size
    greys = (physics[:, 0] * 500).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (len(physics), height, width, 3)).copy(), "colours", ""


@pytest.mark.simulator
def test_this_machine_draws_or_says_why_not(tmp_path):
    """The real process. Where no backend works, the reason is the result that is tested."""
    pytest.importorskip("dm_control", reason="drawing needs the simulator: pip install 'ring_rl[simulator]'")
    result = render_contact_sheet("cartpole_swingup", STATES, tmp_path / "sheet.png", **SHEET)
    if result.path is None:
        assert result.reason.startswith("nothing can draw on this machine (egl: ")
        assert "osmesa: " in result.reason
        assert list(tmp_path.iterdir()) == []
    else:
        assert result.backend in rendering.BACKENDS
        with Image.open(result.path) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        assert pixels[:30, :40].std() > 5  # something is in the picture
        assert (pixels[12:30, :40] != pixels[12:30, 88:128]).any()  # the pole has moved


def test_an_unusable_backend_is_a_reason_and_no_file(tmp_path):
    """For real: the process starts, fails, and its last words come back."""
    result = render_contact_sheet(
        "cartpole_swingup", STATES, tmp_path / "sheet.png", backends=("no-such-backend",), **SHEET
    )
    assert result.path is None
    assert result.backend is None
    assert result.reason.startswith("nothing can draw on this machine (no-such-backend: ")
    assert "exit status 1" in result.reason
    assert result.reason.endswith("install libegl1 or libosmesa6 with the system's package manager")
    assert "\n" not in result.reason
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_hangs_is_a_reason(tmp_path):
    result = render_contact_sheet(
        "cartpole_swingup", STATES, tmp_path / "sheet.png", backends=("egl",), timeout_seconds=0.01, **SHEET
    )
    assert result == Rendering(None, None, result.reason)
    assert "egl: took longer than 0.01 s" in result.reason


def test_a_process_that_is_killed_leads_to_the_next_backend(tmp_path, monkeypatch):
    run = subprocess.run
    tried = []

    def crash_first(command, *, env, **options):
        tried.append(env["MUJOCO_GL"])
        script = "import os; os.kill(os.getpid(), 11)"
        if len(tried) == 2:
            script = "import sys, numpy; numpy.save(sys.argv[3], numpy.zeros((5, 30, 40, 3), numpy.uint8))"
        return run([sys.executable, "-c", script, *command[3:]], env=env, **options)

    monkeypatch.setattr(subprocess, "run", crash_first)
    result = render_contact_sheet("cartpole_swingup", STATES, tmp_path / "sheet.png", **SHEET)
    assert tried == ["egl", "osmesa"]
    assert result == Rendering(tmp_path / "sheet.png", "osmesa", None)


def test_a_sheet_runs_from_first_to_last_in_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "_draw", draw_in_colours)
    result = render_contact_sheet("cartpole_swingup", STATES, tmp_path / "sheet.png", **SHEET)
    with Image.open(result.path) as sheet:
        assert sheet.size == (3 * 40 + 2 * 4, 2 * 30 + 4)
        corners = [sheet.getpixel((column * 44 + 39, row * 34 + 29))[0] for row in range(2) for column in range(3)]
    assert corners == [0, 50, 125, 200, 250, 255]  # states 0, 2, 5, 8 and 10; the sixth place is empty


def test_fewer_states_than_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "_draw", draw_in_colours)
    result = render_contact_sheet("cartpole_swingup", STATES[:2], tmp_path / "sheet.png", **SHEET)
    with Image.open(result.path) as sheet:
        assert sheet.size == (2 * 40 + 4, 30)


def test_a_video_has_its_frames_and_its_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "_draw", draw_in_colours)
    path = tmp_path / "video.gif"
    options = {"frames": 6, "frame_size": (40, 30), "overwrite": False}
    assert render_video("cartpole_swingup", STATES, path, frames_per_second=20, **options).path == path
    with Image.open(path) as video:
        assert (video.n_frames, video.size, video.info["duration"]) == (6, (40, 30), 50)
    with pytest.raises(ValueError, match="frames_per_second must be above 0"):
        render_video("cartpole_swingup", STATES, tmp_path / "other.gif", frames_per_second=0, **options)


def test_an_existing_file_is_replaced_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "_draw", draw_in_colours)
    path = tmp_path / "sheet.png"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not overwritten"):
        render_contact_sheet("cartpole_swingup", STATES, path, **SHEET)
    assert path.read_bytes() == b"mine"
    assert render_contact_sheet("cartpole_swingup", STATES, path, **{**SHEET, "overwrite": True}).path == path
    assert path.read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("task", "states", "changes", "message"),
    [
        ("cartpole_jump", STATES, {}, "unknown task"),
        ("walker_walk", STATES, {}, r"must have shape \(steps, 18\), got \(11, 4\)"),
        ("cartpole_swingup", STATES[:0], {}, r"got \(0, 4\)"),
        ("cartpole_swingup", STATES, {"frames": 0}, "frames and frame_size"),
        ("cartpole_swingup", STATES, {"frame_size": (0, 30)}, "frames and frame_size"),
        ("cartpole_swingup", STATES, {"columns": 0}, "columns must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_a_process_starts(tmp_path, monkeypatch, task, states, changes, message):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ValueError, match=message):
        render_contact_sheet(task, states, tmp_path / "sheet.png", **{**SHEET, **changes})


def test_a_missing_folder_is_refused():
    with pytest.raises(FileNotFoundError, match="create it first"):
        render_contact_sheet("cartpole_swingup", STATES, Path("nowhere") / "sheet.png", **SHEET)
