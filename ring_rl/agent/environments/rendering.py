"""Pictures of recorded physics states, drawn without a screen.

Drawing needs a system library (EGL or OSMesa) that a training node seldom has, and a broken driver can kill the
process that tries it. So a process of its own draws, and its failure comes back as a reason.

Importing this module needs no simulator; drawing does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.atomic_file import atomic_file
from ring_rl.typing import Float64, Int

__all__ = ["BACKENDS", "Rendering", "render_contact_sheet", "render_video"]

BACKENDS = ("egl", "osmesa")
"""What `MUJOCO_GL` is set to, in the order of trying: on the GPU, then in software."""

_GAP_PIXELS = 4


@dataclass(frozen=True)
class Rendering:
    """What became of an attempt to draw: a file, or the reason why there is none.

    Attributes:
        path: The file, or None.
        backend: The backend that drew it, or None.
        reason: Why there is no file, in one line with a remedy, or None.
    """

    path: Path | None
    backend: str | None
    reason: str | None


def render_contact_sheet(
    task: str,
    physics_LP: Float64[np.ndarray, "L P"],
    path: Path,
    *,
    frames: int,
    columns: int,
    frame_size: tuple[int, int],
    overwrite: bool,
    backends: Sequence[str] = BACKENDS,
    timeout_seconds: float = 300.0,
) -> Rendering:
    """Draws `frames` states, evenly spaced from first to last, in rows from left to right with their numbers.

    Args:
        task: "cartpole_swingup" and the like.
        physics_LP: Recorded states, as in `Trajectory.physics`.
        path: The picture; its suffix chooses the format (.png).
        frames: How many states; fewer if there are fewer.
        columns: Pictures in a row.
        frame_size: Width and height of one picture in pixels.
        overwrite: Whether an existing file may be replaced.
        backends: Tried in this order.
        timeout_seconds: For each of them.

    Returns:
        The file, or the reason why this machine cannot draw; that is never an exception.

    Raises:
        ValueError: unknown task, states of another shape, or numbers below 1.
        FileExistsError: the file exists and may not be replaced; FileNotFoundError: its folder does not.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    steps = _choose_steps(task, physics_LP, path, frames, frame_size, overwrite)
    pictures, backend, reason = _draw(task, physics_LP[steps], frame_size, backends, timeout_seconds)
    if pictures is None:
        return Rendering(None, None, reason)
    with atomic_file(path, overwrite=overwrite) as temporary:
        _arrange(pictures, steps, columns).save(temporary)
    return Rendering(path, backend, None)


def render_video(
    task: str,
    physics_LP: Float64[np.ndarray, "L P"],
    path: Path,
    *,
    frames: int,
    frames_per_second: float,
    frame_size: tuple[int, int],
    overwrite: bool,
    backends: Sequence[str] = BACKENDS,
    timeout_seconds: float = 300.0,
) -> Rendering:
    """Draws `frames` states, evenly spaced from first to last, as a GIF that repeats; see `render_contact_sheet`."""
    if frames_per_second <= 0 or frames_per_second > 100:
        raise ValueError(f"frames_per_second must be above 0 and at most 100, GIF's limit; got {frames_per_second}")
    steps = _choose_steps(task, physics_LP, path, frames, frame_size, overwrite)
    pictures, backend, reason = _draw(task, physics_LP[steps], frame_size, backends, timeout_seconds)
    if pictures is None:
        return Rendering(None, None, reason)
    first, *rest = [Image.fromarray(picture) for picture in pictures]
    with atomic_file(path, overwrite=overwrite) as temporary:
        first.save(
            temporary, format="GIF", save_all=True, append_images=rest, duration=1000 / frames_per_second, loop=0
        )
    return Rendering(path, backend, None)


def _choose_steps(
    task: str, physics_LP: np.ndarray, path: Path, frames: int, frame_size: tuple[int, int], overwrite: bool
) -> Int[np.ndarray, " frame"]:
    """Checks everything that is the caller's to get right, before a process is started."""
    physics_dim = DOMAINS[parse_task(task)[0]].physics_dim
    if physics_LP.ndim != 2 or physics_LP.shape[1] != physics_dim or len(physics_LP) == 0:
        raise ValueError(f"physics of {task} must have shape (steps, {physics_dim}), got {physics_LP.shape}")
    if frames < 1 or min(frame_size) < 1:
        raise ValueError(f"frames and frame_size must be at least 1, got {frames} and {frame_size}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}; create it first")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists and is not overwritten; move it away or choose another name")
    return np.unique(np.linspace(0, len(physics_LP) - 1, frames).round().astype(int))


def _draw(
    task: str, physics: np.ndarray, frame_size: tuple[int, int], backends: Sequence[str], timeout_seconds: float
) -> tuple[UInt8[np.ndarray, "frame height width 3"] | None, str | None, str]:
    """Pictures and the backend that drew them; or None twice and the reason."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        states, pictures = Path(folder) / "states.npy", Path(folder) / "pictures.npy"
        np.save(states, physics)
        command = [sys.executable, "-m", __name__, task, str(states), str(pictures), *map(str, frame_size)]
        for backend in backends:
            environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
            try:
                finished = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
                )
            except subprocess.TimeoutExpired:
                failures.append(f"{backend}: took longer than {timeout_seconds:g} s")
                continue
            except OSError as error:
                failures.append(f"{backend}: no process could be started ({error.strerror})")
                continue
            if finished.returncode == 0 and pictures.exists():
                return np.load(pictures), backend, ""
            last_words = finished.stderr.strip().splitlines()[-1:] or ["no message"]
            failures.append(f"{backend}: {last_words[0][:200]} (exit status {finished.returncode})")
    remedy = "install libegl1 or libosmesa6 with the system's package manager"
    return None, None, f"nothing can draw on this machine ({'; '.join(failures)}); {remedy}"


def _arrange(
    pictures: UInt8[np.ndarray, "frame height width 3"], steps: Int[np.ndarray, " frame"], columns: int
) -> Image.Image:
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (columns * (width + _GAP_PIXELS) - _GAP_PIXELS, rows * (height + _GAP_PIXELS) - _GAP_PIXELS)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, step) in enumerate(zip(pictures, steps, strict=True)):
        row, column = divmod(index, columns)
        corner = (column * (width + _GAP_PIXELS), row * (height + _GAP_PIXELS))
        sheet.paste(Image.fromarray(picture), corner)
        draw.text((corner[0] + 4, corner[1] + 2), f"step {step}", fill="white", stroke_width=1, stroke_fill="black")
    return sheet


def _draw_states(task: str, states_path: Path, pictures_path: Path, width: int, height: int) -> None:
    """Runs in a process of its own, with `MUJOCO_GL` set."""
    from ring_rl.agent.environments.simulations import load_simulation

    physics = load_simulation(task, flat_observation=False).physics
    pictures = []
    for state in np.load(states_path):
        physics.set_state(state)
        physics.forward()
        pictures.append(physics.render(height=height, width=width, camera_id=0))
    np.save(pictures_path, np.stack(pictures))


if __name__ == "__main__":
    _task, _states, _pictures, _width, _height = sys.argv[1:]
    _draw_states(_task, Path(_states), Path(_pictures), int(_width), int(_height))
