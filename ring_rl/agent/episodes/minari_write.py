"""Writes episodes as a Minari data set, with all that we hold of them.

| here                     | in Minari                                                                 |
|--------------------------|---------------------------------------------------------------------------|
| observations (L+1, O)    | observations                                                              |
| actions (L, A)           | actions, of the space Box(-1, 1)                                          |
| rewards (L,)             | rewards                                                                   |
| discounts (L,)           | terminations (discount 0), truncations (the last step of other episodes); |
|                          | and as they are in infos["discount"], (L+1,), beginning with a 1          |
| physics (L+1, P)         | infos["physics"]                                                          |
| task, card               | metadata "ring_rl"; the environment as `env_spec`                         |

`minari_read` gives back the same arrays, bit for bit.

Needs Minari: `pip install 'ring_rl[minari]'`.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ring_rl.agent.environments.domains import parse_task
from ring_rl.agent.episodes.derived import progress_bar
from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.agent.episodes.minari_read import MINARI_METADATA
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.config import to_mapping

__all__ = ["MinariCard", "check_new_dataset", "write_minari"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinariCard:
    """What a reader is told of a data set.

    Attributes:
        author: Who made it; null leaves it out.
        author_email: How to reach them; null leaves it out.
        algorithm_name: Who acted; null leaves it out.
        code_permalink: Where the code is that made it; null leaves it out.
        description: Free text; null leaves it out.
    """

    author: str | None
    author_email: str | None
    algorithm_name: str | None
    code_permalink: str | None
    description: str | None


def check_new_dataset(dataset_id: str) -> Path:
    """The folder of a data set that is yet to be written.

    Raises:
        FileExistsError: There is such a set.
        ImportError: Minari is not installed.
        ValueError: A malformed id.
    """
    try:
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise ImportError(f"Minari data sets need minari ({error}): pip install 'ring_rl[minari]'") from error
    if re.fullmatch(r"[-\w]+(/[-\w]+)*-v\d+", dataset_id) is None:
        raise ValueError(f"a Minari id reads namespace/name-v0, got {dataset_id!r}")
    folder: Path = get_dataset_path(dataset_id)
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is not overwritten; choose another name or version")
    return folder


def write_minari(
    dataset_id: str,
    episodes: EpisodeSet,
    *,
    task: str,
    action_repeat: int,
    card: MinariCard,
    collection: Mapping[str, Any] | None,
    progress: bool,
) -> Path:
    """Writes a Minari data set, in full or not at all, where Minari looks for it.

    `minari.load_dataset(dataset_id).recover_environment()` rebuilds the environment wherever ring_rl and its
    simulator are installed; the data need neither.

    Args:
        dataset_id: "namespace/name-v0".
        episodes: One row a decision.
        task: Whose rewards they carry.
        action_repeat: Control steps a decision.
        card: What a reader is told.
        collection: Plain JSON that says how the episodes were collected, kept with the set.
        progress: Whether to show a progress bar with the time left.

    Returns:
        The set's folder.

    Raises:
        FileExistsError: There is such a set. It is not overwritten.
        ImportError: Minari is not installed.
        ValueError: A malformed id, or actions outside [-1, 1].
    """
    folder = check_new_dataset(dataset_id)
    import gymnasium
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Hidden names are no data sets to Minari: one that is half written is not found.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        storage = MinariStorage.new(
            partial / "data",
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (episodes.observation_dim,), np.float32),
            action_space=gymnasium.spaces.Box(-1.0, 1.0, (episodes.action_dim,), np.float32),
            env_spec=_environment_spec(task, action_repeat),
        )
        told = {key: value for key, value in to_mapping(card).items() if value is not None}
        people = {key: {told.pop(key)} for key in ("author", "author_email") if key in told}
        own = {"task": task, "action_repeat": action_repeat, "collection": collection}
        storage.update_metadata(
            {"dataset_id": dataset_id, "minari_version": minari.__version__, MINARI_METADATA: own, **told, **people}
        )
        storage.update_episodes(_buffers(episodes, progress=progress))
        partial.rename(folder)  # fails where another process was faster
    return folder


def _environment_spec(task: str, action_repeat: int) -> Any:
    """What `register_environments` registers, known without a simulator."""
    from gymnasium.envs.registration import EnvSpec

    parse_task(task)
    return EnvSpec(
        id=f"ring_rl/{task}-v0",
        entry_point="ring_rl.agent.environments.environment:make_environment",
        kwargs={"task": task, "action_repeat": action_repeat},
    )


def _buffers(episodes: EpisodeSet, *, progress: bool) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    with progress_bar(shown=progress) as bar:
        job = bar.add_task("writing episodes", total=len(episodes.trajectories))
        for index, trajectory in enumerate(episodes.trajectories):
            if np.abs(trajectory.actions).max() > 1:
                raise ValueError(f"episode {index} has an action outside [-1, 1]; Minari's set promises that range")
            yield EpisodeBuffer(**_episode_arrays(trajectory))
            bar.advance(job)


def _episode_arrays(trajectory: Trajectory) -> dict[str, Any]:
    terminations = trajectory.discounts == 0
    truncations = np.zeros_like(terminations)
    truncations[-1] = not terminations[-1]
    infos = {"discount": np.concatenate([np.ones(1, np.float32), trajectory.discounts])}
    if trajectory.physics is not None:
        infos["physics"] = trajectory.physics
    return {
        "observations": trajectory.observations,
        "actions": trajectory.actions,
        "rewards": trajectory.rewards,
        "terminations": terminations,
        "truncations": truncations,
        "infos": infos,
    }
