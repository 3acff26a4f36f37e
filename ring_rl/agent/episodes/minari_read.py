"""Reads Minari data sets, D4RL's among them, as episodes.

    <MINARI_DATASETS_PATH or ~/.minari/datasets>/<dataset_id>/data/

Observations become flat float32 vectors, nested ones leaf by leaf in the order in which the set's own space lists
its keys; actions are scaled from the set's action space to [-1, 1]; a termination is a discount of 0. What was
recorded of the environment goes into every checkpoint (`RecordedEnvironment`).

Needs Minari: `pip install 'ring_rl[minari]'`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ring_rl.agent.environments.domains import DOMAINS, parse_task, task_names
from ring_rl.agent.environments.recorded import ActionRange, RecordedEnvironment, leaves_of_space
from ring_rl.agent.episodes.derived import progress_bar
from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.agent.episodes.trajectory import Trajectory

__all__ = ["MINARI_METADATA", "MinariDataConfig", "MinariSet"]

# Where `minari_write` keeps what Minari's own format has no place for.
MINARI_METADATA = "ring_rl"
_OWN_ENVIRONMENT = re.compile(r"ring_rl/(.+)-v0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinariDataConfig:
    """A Minari data set.

    Attributes:
        name: "minari".
        dataset_id: Its id, "mujoco/halfcheetah/medium-v0".
        download: Fetch it from Minari's server if it is not on this machine.
        max_episodes: Read at most so many, evenly spaced over the recording; null reads all.
    """

    name: Literal["minari"]
    dataset_id: str
    download: bool
    max_episodes: int | None

    def __post_init__(self) -> None:
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"max_episodes must be at least 1, got {self.max_episodes}; use null to read all")


class MinariSet:
    """An open Minari data set.

    Attributes:
        dataset_id: Its id.
        task: What it is called here: "gymnasium/<id>", or "cartpole_swingup" and the like where it was exported from
            here; None where the set does not say in which environment it was recorded.
        action_repeat: Control steps a decision, of a task of ours; 1 for others, whose steps are decisions.
        environment: What was recorded of its environment.

    Raises:
        FileNotFoundError: There is no such set here and `download` is off.
        ImportError: Minari is not installed.
        ValueError: It holds what agents here cannot read, or a damaged file.
    """

    def __init__(self, config: MinariDataConfig) -> None:
        self.dataset_id = config.dataset_id
        self._dataset = _open(config)
        count = self._dataset.total_episodes
        if count == 0:
            raise ValueError(f"the Minari data set {self.dataset_id} holds no episode")
        kept = min(config.max_episodes or count, count)
        self._indices = self._dataset.episode_indices[np.arange(kept) * count // kept]
        metadata: dict[str, Any] = self._dataset.storage.read_raw_metadata(self._dataset.storage.data_path)
        self._own: dict[str, Any] | None = metadata.get(MINARI_METADATA)
        spec = json.loads(metadata["env_spec"]) if metadata.get("env_spec") else None
        steps = [int(each["total_steps"]) for each in self._dataset.storage.get_episode_metadata(self._indices)]
        limit = max(*steps, 0, (spec or {}).get("max_episode_steps") or 0)
        try:
            self.environment = RecordedEnvironment(
                environment_id="" if spec is None else spec["id"],
                spec=metadata.get("env_spec"),
                observation=leaves_of_space(_serialised_space(self._dataset, metadata, "observation")),
                action_range=_action_range(_serialised_space(self._dataset, metadata, "action")),
                max_episode_steps=limit,
            )
        except ValueError as error:
            raise ValueError(f"the Minari data set {self.dataset_id} cannot be read: {error}") from None
        self.task, self.action_repeat = None if spec is None else f"gymnasium/{spec['id']}", 1
        ours = None if spec is None else _OWN_ENVIRONMENT.fullmatch(spec["id"])
        if spec is not None and ours is not None and ours[1] in task_names() and not spec.get("additional_wrappers"):
            sizes = DOMAINS[parse_task(ours[1])[0]]
            if (sizes.observation_dim, sizes.action_dim) == (
                self.environment.observation_dim,
                self.environment.action_dim,
            ):
                self.task, self.action_repeat = ours[1], int(spec["kwargs"].get("action_repeat", 1))

    def check_task(self, task: str) -> None:
        """Raises ValueError unless `task` names the environment in which the set was recorded."""
        if self.task is not None and task != self.task:
            raise ValueError(f"{self.dataset_id} was recorded in another task than {task}; set task={self.task}")
        if self.task is None and not task.startswith("gymnasium/"):
            raise ValueError(
                f"{self.dataset_id} does not say in which environment it was recorded; set task=gymnasium/<id>, the "
                f"environment's id, got task={task}"
            )

    def recorded_environment(self, task: str) -> RecordedEnvironment | None:
        """What evaluation builds the environment from; None for a task of ours, which needs nothing.

        Raises:
            ValueError: The set was not recorded in `task`.
        """
        self.check_task(task)
        if not task.startswith("gymnasium/"):
            return None
        if self.task is not None:
            return self.environment
        return dataclasses.replace(self.environment, environment_id=task.removeprefix("gymnasium/"))

    def episodes(self, *, progress: bool) -> EpisodeSet:
        """All of them, in the set's order.

        Raises:
            ValueError: An episode whose arrays do not fit the set's spaces, or with a NaN; the message names it.
        """
        trajectories: list[Trajectory] = []
        with progress_bar(shown=progress) as bar:
            job = bar.add_task(f"reading {self.dataset_id}", total=len(self._indices))
            for episode in self._dataset.iterate_episodes(self._indices):
                try:
                    trajectories.append(self._trajectory(episode))
                except (ValueError, KeyError) as error:
                    raise ValueError(f"{self.dataset_id}, episode {episode.id}: {error}") from None
                bar.advance(job)
        return EpisodeSet(tuple(trajectories))

    def _trajectory(self, episode: Any) -> Trajectory:
        steps = len(episode.rewards)
        actions = np.asarray(episode.actions).reshape(steps, -1)
        if actions.shape[1] != self.environment.action_dim:
            raise ValueError(f"actions have {actions.shape[1]} entries, the space {self.environment.action_dim}")
        discounts = 1.0 - np.asarray(episode.terminations, np.float32)
        physics = None
        if self._own is not None:
            discounts = np.asarray(episode.infos["discount"], np.float32)[1:]
            physics = episode.infos.get("physics")
        trajectory = Trajectory(
            observations=self.environment.flatten(episode.observations, rows=(steps + 1,)),
            actions=self.environment.action_range.to_unit(actions),
            rewards=np.asarray(episode.rewards).reshape(steps).astype(np.float32),
            discounts=discounts,
            physics=physics,
        )
        for name in ("observations", "actions", "rewards"):
            if not np.isfinite(getattr(trajectory, name)).all():
                raise ValueError(f"{name} hold a NaN or an infinite value")
        return trajectory


def _open(config: MinariDataConfig) -> Any:
    try:
        import minari
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise ImportError(f"Minari data sets need minari ({error}): pip install 'ring_rl[minari]'") from error
    folder: Path = get_dataset_path(config.dataset_id)
    if not (folder / "data").is_dir() and not config.download:
        here = ", ".join(minari.list_local_datasets()) or "none"
        raise FileNotFoundError(
            f"no Minari data set {config.dataset_id!r} at {folder}; here are: {here}; data.download=true fetches it "
            "from Minari's server"
        )
    try:
        return minari.load_dataset(config.dataset_id, download=config.download)
    except Exception as error:  # whatever a server, a damaged file or another version of the format brings
        raise ValueError(
            f"the Minari data set {config.dataset_id} cannot be opened: {' '.join(str(error).split())}"
        ) from error


def _serialised_space(dataset: Any, metadata: dict[str, Any], kind: Literal["observation", "action"]) -> dict[str, Any]:
    """A space as the set wrote it down: turned into a Gymnasium space, its keys might be sorted anew."""
    from minari.serialization import serialize_space

    recorded = metadata.get(f"{kind}_space")
    return json.loads(recorded if recorded is not None else str(serialize_space(getattr(dataset, f"{kind}_space"))))


def _action_range(space: dict[str, Any]) -> ActionRange:
    if space["type"] != "Box":
        raise ValueError(f"actions are of a {space['type']} space; only Box can be learnt from")
    low, high = (np.asarray(space[bound], np.float64).reshape(-1).tolist() for bound in ("low", "high"))
    return ActionRange(low=tuple(low), high=tuple(high))
