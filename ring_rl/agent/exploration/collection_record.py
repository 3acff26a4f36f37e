"""`collection.json`: how a set of episodes came about, and whether it is complete.

It is written before the first episode, so that no episode is ever of unknown origin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.atomic_file import write_whole
from ring_rl.config import describe_differences
from ring_rl.training.provenance import git_commit, versions

__all__ = ["claim_folder", "read_record", "recorded_indices", "write_record"]


def claim_folder(folder: Path, settings: Mapping[str, Any], *, reward_free: bool) -> float:
    """Refuses a folder of another origin; writes down the settings before the first episode.

    Args:
        folder: The set's; made where it is missing.
        settings: What determines the episodes.
        reward_free: Whether they are independent of the task's reward.

    Returns:
        The seconds that were spent on it so far; those of a process that was killed are not known.

    Raises:
        ValueError: the folder holds other settings or episodes of unknown origin.
    """
    record_path, buffer = folder / "collection.json", folder / "buffer"
    remedy = "choose another folder with algorithm=..."
    if record_path.exists():
        try:
            record = json.loads(record_path.read_text())
            saved, seconds = record["settings"], float(record.get("seconds", 0.0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{record_path} is no record of a collection ({error}); {remedy}") from None
        differences = describe_differences(saved, settings)
        if differences:
            raise ValueError(f"{folder} was collected otherwise ({'; '.join(differences)}); {remedy}")
        buffer.mkdir(exist_ok=True)
        return seconds
    if buffer.is_dir() and any(buffer.iterdir()):
        raise ValueError(f"{folder} holds files but no collection.json to say where from; {remedy}")
    buffer.mkdir(parents=True, exist_ok=True)
    write_record(folder, settings, reward_free=reward_free, episodes=None, seconds=0.0)
    return 0.0


def recorded_indices(buffer: Path) -> set[int]:
    """Which episodes are there."""
    return {int(path.name.split("_")[1]) for path in buffer.glob("episode_*_*.npz")}


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote; empty where it never did."""
    path = folder / "collection.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(
    folder: Path, settings: Mapping[str, Any], *, reward_free: bool, episodes: EpisodeSet | None, seconds: float
) -> dict[str, Any]:
    """Writes `collection.json`, in place of an older one, and returns what it says.

    `rewards_recorded` names the task whose rewards the files carry, whoever explored; those of the domain's other
    tasks are computed from the states. `made_by` lists every version and commit that had a part in the set, `versions`
    and `git_commit` are the last of them.
    """
    maker = {"versions": versions("ring_rl", "dm_control", "mujoco", "numpy"), "git_commit": git_commit()}
    earlier = read_record(folder).get("made_by", [])
    count = 0 if episodes is None else len(episodes.trajectories)
    record = {
        "settings": dict(settings),
        "reward_free": reward_free,
        "rewards_recorded": settings["task"],
        "complete": count == settings["episodes"],
        "episodes": count,
        "seconds": round(seconds, 1),
        "returns": None if episodes is None else dict(episodes.quantiles),
        **maker,
        "made_by": [*(each for each in earlier if each != maker), maker],
    }
    write_whole(folder / "collection.json", json.dumps(record, indent=2) + "\n")
    return record
