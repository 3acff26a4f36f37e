"""Relabelled rewards, kept beside the data so that the simulator is needed once a task.

    <set>/relabelled/<task>.npz
        signatures   (E,)       uint64    which episodes, by content
        lengths      (E,)       int64
        rewards      (sum L,)   float32   one episode after the other
        description             JSON: task, versions of the simulator, episodes that were verified

An episode is found by its content, so a set that grew is relabelled where it is new, one that changed where it
changed, and a copied one not at all. Reading needs no simulator.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ring_rl.agent.episodes.derived import exclusive, progress_bar
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.atomic_file import atomic_file
from ring_rl.typing import Float32, Shaped

__all__ = ["RelabelConfig", "relabelled_rewards"]

_FOLDER = "relabelled"
_Rewards = Float32[np.ndarray, " L"]


@dataclass(frozen=True, kw_only=True)
class RelabelConfig:
    """How rewards are recomputed.

    Attributes:
        threads: Of the simulator; null takes one a processor core. Changes nothing but speed.
        verify_episodes: Where it is known for which task the rewards were recorded: episodes, evenly spaced,
            whose recorded rewards must come out again before any other task is relabelled. 0 trusts them.
        tolerance: By how much a reward may differ there.
    """

    threads: int | None
    verify_episodes: int
    tolerance: float

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 or null, got {self.threads}")
        if self.verify_episodes < 0:
            raise ValueError(f"verify_episodes must be at least 0, got {self.verify_episodes}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {self.tolerance}")


def relabelled_rewards(
    folder: Path,
    episodes: Sequence[Trajectory],
    signatures: Shaped[np.ndarray, " E"],
    *,
    task: str,
    recorded_task: str | None,
    config: RelabelConfig,
    progress: bool,
) -> list[_Rewards]:
    """The rewards of `task` for every episode: from the cache, and what it lacks from the simulator.

    Args:
        folder: The data set's, which holds `relabelled/`.
        episodes: One row a control step, with physics; only those the cache lacks are looked at.
        signatures: Of the episodes' content, in the same order.
        task: Whose rewards.
        recorded_task: Whose rewards `episodes` carry, for the verification; None if that is not known.
        config: Threads and verification.
        progress: Whether to show a progress bar with the time left.

    Raises:
        ImportError: rewards are missing and there is no simulator; the message has the command to run elsewhere.
        OSError: rewards are missing and the folder cannot be written.
        ValueError: the verification failed, episodes hold no physics, or a damaged cache.
        KeyboardInterrupt: passed on, after what was finished has been written.
    """
    path = folder / _FOLDER / f"{task}.npz"
    cached = _read(path, task)
    if not _lacking(cached, signatures):
        return [cached[int(each)] for each in signatures]
    try:
        from ring_rl.agent.environments.relabel import relabel
    except ImportError as error:
        raise ImportError(
            f"{folder} holds no rewards of {task}, and relabelling needs the simulator ({error}); install it with "
            f"pip install 'ring_rl[simulator]', or run `python datasets/exorl/relabel.py task={task}` where it is, "
            f"with the same data settings, and copy {path.parent.name}/ here"
        ) from None
    with exclusive(folder, _FOLDER, remedy="relabel a copy of it"):
        simulator = {name: version(name) for name in ("mujoco", "dm_control")}
        known = _read(path, task, simulator=simulator)  # rewards of two simulators are not mixed in one set
        missing = _lacking(known, signatures)
        verified = _verify(episodes, recorded_task, config) if missing else 0
        description = {"task": task, "versions": simulator, "verified_episodes": verified}
        try:
            with progress_bar(shown=progress) as bar:
                job = bar.add_task(f"relabelling {task}", total=len(missing))
                rewards = relabel(task, (episodes[index] for index in missing), threads=config.threads)
                for index, each in zip(missing, rewards, strict=True):
                    known[int(signatures[index])] = each
                    bar.advance(job)
        finally:
            if missing and known:
                path.parent.mkdir(exist_ok=True)
                _write(path, known, description)
    return [known[int(each)] for each in signatures]


def _lacking(cached: dict[int, _Rewards], signatures: Shaped[np.ndarray, " E"]) -> list[int]:
    """Positions of the episodes that the cache does not have, each content once."""
    first_at = {int(each): index for index, each in reversed(list(enumerate(signatures)))}
    return sorted(index for each, index in first_at.items() if each not in cached)


def _verify(episodes: Sequence[Trajectory], recorded_task: str | None, config: RelabelConfig) -> int:
    """How many episodes were compared with their recorded rewards, all of which agreed."""
    from ring_rl.agent.environments.relabel import relabel

    if recorded_task is None or config.verify_episodes == 0:
        return 0
    count = min(config.verify_episodes, len(episodes))
    sample = [episodes[index * len(episodes) // count] for index in range(count)]
    for trajectory, rewards in zip(sample, relabel(recorded_task, sample, threads=config.threads), strict=True):
        errors = np.abs(rewards - trajectory.rewards)
        if errors.max() > config.tolerance:
            step = int(np.argmax(errors))
            raise ValueError(
                f"relabelling {recorded_task}, for which the data were recorded, gives {rewards[step]:.8g} at step "
                f"{step} of an episode where {trajectory.rewards[step]:.8g} was recorded: the simulator is another "
                "version than at the recording, or the actions or states are not what led to the rewards; install "
                "the versions that collection.json names, or set data.relabel.verify_episodes=0 to accept this"
            )
    return count


def _read(path: Path, task: str, *, simulator: dict[str, str] | None = None) -> dict[int, _Rewards]:
    """The cached rewards by signature; none if there is no cache, or if it is of another simulator than asked for."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            description = json.loads(str(arrays["description"]))
            signatures, lengths, rewards = arrays["signatures"], arrays["lengths"], arrays["rewards"]
        if description["task"] != task or len(signatures) != len(lengths) or lengths.sum() != len(rewards):
            raise ValueError("its parts do not fit together")
        found = description["versions"]
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything: BadZipFile, zlib.error, EOFError, struct.error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}); remove it, it is made again") from None
    if simulator is not None and found != simulator:
        return {}
    return dict(zip(map(int, signatures), np.split(rewards, np.cumsum(lengths)[:-1]), strict=True))


def _write(path: Path, rewards: dict[int, _Rewards], description: dict[str, object]) -> None:
    with atomic_file(path, overwrite=True) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            signatures=np.array(list(rewards), dtype=np.uint64),
            lengths=np.array([len(each) for each in rewards.values()], dtype=np.int64),
            rewards=np.concatenate(list(rewards.values())),
            description=np.array(json.dumps(description)),
        )
