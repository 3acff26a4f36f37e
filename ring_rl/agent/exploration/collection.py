"""Fills a folder of the ExoRL layout with an explorer's episodes.

    <root>/<domain>/<algorithm>/collection.json    what was asked for, with which versions, and the returns
                                card.md            the returns on every task of the domain, once it is complete
                                returns.png        their histograms
                                relabelled/        rewards of the tasks that were not recorded
                                explorer.npz       while it is being filled: what the explorer has learnt
                                buffer/episode_000000_1000.npz ...

An interrupted collection goes on where it stopped, to the same episodes: what is there is kept and never written
again. An explorer that learns goes on from its state on disk; episodes after that, or all where it keeps no state,
are played again on the way. Episodes under way when the process died are played again too.

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ring_rl.agent.environments.batched_physics import BatchedPhysics
from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.episodes.exorl import EpisodeSet, read_episodes, write_episode
from ring_rl.agent.episodes.relabel_cache import RelabelConfig
from ring_rl.agent.exploration.card import card_facts, returns_of_every_task, write_card
from ring_rl.agent.exploration.collection_record import claim_folder, read_record, recorded_indices, write_record
from ring_rl.agent.exploration.explorer_state import load_explorer_state, save_explorer_state
from ring_rl.agent.exploration.explorers import (
    Explorer,
    NoiseConfig,
    NoiseExplorer,
    UniformConfig,
    UniformExplorer,
)
from ring_rl.agent.exploration.play import play_batch
from ring_rl.agent.exploration.policy_search import PolicySearch, PolicySearchConfig
from ring_rl.agent.exploration.rnd_explorer import RNDConfig, RNDExplorer
from ring_rl.config import to_mapping

__all__ = ["CollectionConfig", "ExplorerConfig", "collect", "make_explorer", "play_batch"]

_STATE_FILE = "explorer.npz"

ExplorerConfig = UniformConfig | NoiseConfig | PolicySearchConfig | RNDConfig


@dataclass(frozen=True)
class CollectionConfig:
    """What to collect, and where.

    Attributes:
        task: "cartpole_swingup" and the like; the episodes carry its rewards.
        explorer: Who acts.
        episodes: How many are recorded.
        seed: Together with the rest it determines every episode.
        root: The folder that holds the domains.
        algorithm: Folder inside the domain's.
        threads: That step episodes side by side; null takes one a processor core. Changes nothing but speed.
        save_state_seconds: At least so long between two saves of what an explorer has learnt; 0 saves after every
            batch.
    """

    task: str
    explorer: UniformConfig | NoiseConfig | PolicySearchConfig | RNDConfig
    episodes: int
    seed: int
    root: Path
    algorithm: str
    threads: int | None
    save_state_seconds: float

    def __post_init__(self) -> None:
        domain, _ = parse_task(self.task)
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if Path(self.algorithm).name != self.algorithm or self.algorithm in ("", ".", ".."):
            raise ValueError(f"algorithm names one folder, got {self.algorithm!r}; leave out slashes and dots")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 or null, got {self.threads}")
        if self.save_state_seconds < 0:
            raise ValueError(f"save_state_seconds must not be negative, got {self.save_state_seconds}")
        steps, hold = DOMAINS[domain].episode_steps, self.explorer.action_hold
        if steps % hold:
            raise ValueError(
                f"{self.task} has {steps} control steps, not divisible by action_hold {hold}; use a divisor"
            )

    @property
    def folder(self) -> Path:
        """`<root>/<domain>/<algorithm>`."""
        return self.root / parse_task(self.task)[0] / self.algorithm


def make_explorer(config: CollectionConfig) -> Explorer:
    """Builds the explorer of a configuration; ValueError where `episodes` does not suit it."""
    spec = DOMAINS[parse_task(config.task)[0]]
    match config.explorer:
        case UniformConfig():
            return UniformExplorer(
                config.explorer, episodes=config.episodes, action_dim=spec.action_dim, seed=config.seed
            )
        case NoiseConfig():
            return NoiseExplorer(
                config.explorer, episodes=config.episodes, action_dim=spec.action_dim, seed=config.seed
            )
        case PolicySearchConfig():
            return PolicySearch(
                config.explorer,
                episodes=config.episodes,
                observation_dim=spec.observation_dim,
                action_dim=spec.action_dim,
                seed=config.seed,
            )
        case RNDConfig():
            return RNDExplorer(
                config.explorer,
                episodes=config.episodes,
                episode_steps=spec.episode_steps,
                observation_dim=spec.observation_dim,
                action_dim=spec.action_dim,
                seed=config.seed,
            )


def collect(config: CollectionConfig, *, progress: bool) -> EpisodeSet:
    """Brings a folder up to `config.episodes` episodes and returns them all.

    Args:
        config: What and where. A folder that was filled with other settings is refused.
        progress: Whether to show a progress bar with the time left.

    Raises:
        ValueError: the folder holds other settings or episodes of unknown origin; the simulation is unstable.
        KeyboardInterrupt: passed on, after the record of what was finished has been written.
    """
    explorer = make_explorer(config)
    buffer = config.folder / "buffer"
    seconds = claim_folder(config.folder, _settings(config), reward_free=explorer.reward_free)
    missing = set(range(config.episodes)) - recorded_indices(buffer)
    if not missing and read_record(config.folder).get("complete"):
        # Its record says who made it; this process did not.
        return read_episodes(buffer, max_episodes=None, progress=progress)
    start = time.monotonic()
    try:
        if missing:
            _fill(config, explorer, buffer, missing, progress=progress)
    except BaseException:
        if recorded_indices(buffer):
            spent = seconds + time.monotonic() - start
            _summarise(config, explorer, buffer, seconds=spent, progress=progress)
        raise
    (config.folder / _STATE_FILE).unlink(missing_ok=True)  # nothing is left to go on with
    spent = seconds + time.monotonic() - start
    return _summarise(config, explorer, buffer, seconds=spent, progress=progress)


def _fill(config: CollectionConfig, explorer: Explorer, buffer: Path, missing: set[int], *, progress: bool) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    threads = config.threads or os.cpu_count() or 1
    console = Console(stderr=True)
    with (
        BatchedPhysics(config.task, threads=threads) as physics,
        Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar,
    ):
        job = bar.add_task(f"playing {config.task}", total=sum(explorer.batch_sizes))
        number, first = _resume(config, explorer, missing)
        bar.advance(job, sum(explorer.batch_sizes[:number]))
        saved_at = time.monotonic()
        while number < len(explorer.batch_sizes):
            batch = explorer.batch(number)
            indices = range(first, first + batch.recorded)
            # An explorer that learns must see every batch again; the others can skip what is there.
            if explorer.learns or not missing.isdisjoint(indices):
                try:
                    trajectories = play_batch(physics, batch, action_hold=config.explorer.action_hold)
                except FloatingPointError as error:
                    raise ValueError(str(error)) from error
                for index, trajectory in zip(indices, trajectories, strict=False):
                    if index in missing:
                        write_episode(buffer, index, trajectory)
                explorer.learn(number, trajectories)
                best = max(trajectory.episode_return for trajectory in trajectories)
                bar.update(job, description=f"playing {config.task}, best of the batch {best:.0f}")
            first += batch.recorded
            bar.advance(job, explorer.batch_sizes[number])
            number += 1
            if time.monotonic() - saved_at >= config.save_state_seconds:
                state = explorer.state()
                if state is not None:
                    save_explorer_state(config.folder / _STATE_FILE, state, batch=number, episode=first)
                saved_at = time.monotonic()


def _resume(config: CollectionConfig, explorer: Explorer, missing: set[int]) -> tuple[int, int]:
    """The batch and the episode to go on with; brings the explorer's state back where it helps."""
    path = config.folder / _STATE_FILE
    if not path.exists():
        return 0, 0
    state, batch, episode = load_explorer_state(path)
    if min(missing) < episode:  # an earlier episode is gone: only playing from the first brings it back
        return 0, 0
    explorer.restore(state)
    return batch, episode


def _summarise(
    config: CollectionConfig, explorer: Explorer, buffer: Path, *, seconds: float, progress: bool
) -> EpisodeSet:
    """Writes the record, and the card once the set is complete."""
    episodes = read_episodes(buffer, max_episodes=None, progress=progress)
    record = write_record(
        config.folder, _settings(config), reward_free=explorer.reward_free, episodes=episodes, seconds=seconds
    )
    if record["complete"]:
        domain = parse_task(config.task)[0]
        returns = returns_of_every_task(
            config.folder,
            domain=domain,
            recorded_task=config.task,
            # The states were recorded by this very simulator, so there is little to verify.
            config=RelabelConfig(threads=config.threads, verify_episodes=1, tolerance=1e-6),
            progress=progress,
        )
        write_card(config.folder, returns, title=f"{domain}/{config.algorithm}", facts=card_facts(record))
    return episodes


def _settings(config: CollectionConfig) -> dict[str, Any]:
    """What determines the episodes; the folder and the threads do not."""
    settings = to_mapping(config)
    return {key: settings[key] for key in ("task", "episodes", "seed", "explorer")}
