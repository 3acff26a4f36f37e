"""How fast a large data set is opened and read, and in how much memory; conf/bench_reader.yaml documents every key."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import hydra
import jax
import numpy as np
from omegaconf import DictConfig
from rich.progress import track

from ring_rl.agent.chain_batch import BatchLayout, ChainSampler
from ring_rl.agent.environments.domains import DOMAINS
from ring_rl.agent.episodes.exorl import EpisodeSet, write_episode
from ring_rl.agent.episodes.load import normalisation_of
from ring_rl.agent.episodes.store import STORE_FOLDER
from ring_rl.agent.episodes.store_write import make_store, open_store
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.hindsight import ChainConfig
from ring_rl.agent.training_task import BatchConfig
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.input import InputConfig, RowStream
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.tables import markdown_table

OUTPUTS = ("reader.json", "table.md")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderBenchmarkConfig:
    """What is made, read and measured."""

    domain: str
    episodes: int
    episode_steps: int
    compressed_episodes: int
    folder: Path | None
    chain: ChainConfig
    batch: BatchConfig
    input: InputConfig
    chains: int
    batches: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise ValueError(f"unknown domain {self.domain!r}; known are {', '.join(DOMAINS)}")
        for name in ("episode_steps", "compressed_episodes", "chains", "batches"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.episodes < self.chain.trajectories:
            raise ValueError(f"episodes={self.episodes} must be at least chain.trajectories={self.chain.trajectories}")


def synthetic_episode(config: ReaderBenchmarkConfig, index: int) -> Trajectory:
    """Random numbers in the shapes of the domain."""
    spec, steps = DOMAINS[config.domain], config.episode_steps
    generator = np.random.default_rng(index)
    return Trajectory(
        observations=generator.normal(size=(steps + 1, spec.observation_dim)).astype(np.float32),
        actions=generator.uniform(-1, 1, (steps, spec.action_dim)).astype(np.float32),
        rewards=generator.uniform(size=steps).astype(np.float32),
        discounts=np.ones(steps, np.float32),
        physics=generator.normal(size=(steps + 1, spec.physics_dim)),
    )


def write_uncompressed(folder: Path, index: int, trajectory: Trajectory) -> None:
    """As `write_episode` in a fraction of its time."""
    rewards = trajectory.rewards[:, None]
    np.savez(
        folder / f"episode_{index:06d}_{trajectory.length}.npz",
        observation=trajectory.observations,
        action=np.concatenate([np.zeros_like(trajectory.actions[:1]), trajectory.actions]),
        reward=np.concatenate([np.zeros_like(rewards[:1]), rewards]),
        discount=np.ones((trajectory.length + 1, 1), np.float32),
        physics=np.empty(0) if trajectory.physics is None else trajectory.physics,
    )


def conversion_figures(config: ReaderBenchmarkConfig, folder: Path) -> dict[str, float]:
    """Makes the whole set in `folder`, converts it, and converts a compressed part of it beside."""
    part = folder / "compressed"
    for buffer in (part / "buffer", folder / "buffer"):
        buffer.mkdir(parents=True)
    for index in range(config.compressed_episodes):
        write_episode(part / "buffer", index, synthetic_episode(config, index))
    for index in track(range(config.episodes), "making episodes", transient=True):
        write_uncompressed(folder / "buffer", index, synthetic_episode(config, index))
    begin = time.perf_counter()
    make_store(part, progress=False)
    middle = time.perf_counter()
    make_store(folder, progress=True)
    end = time.perf_counter()
    return {
        "converted_episodes_per_second": config.compressed_episodes / (middle - begin),
        "uncompressed_converted_episodes_per_second": config.episodes / (end - middle),
    }


def reading_figures(config: ReaderBenchmarkConfig, folder: Path) -> dict[str, float]:
    """Opens the converted set and draws chains from it, in a process that did not make it."""
    before = resident_megabytes()
    begin = time.perf_counter()
    store = open_store(folder)
    if store is None:
        raise ValueError(f"{folder} has no store of its episodes")
    episodes = store.episodes(np.arange(config.episodes), 0, action_repeat=1)
    normalisation_of(episodes)
    opened = time.perf_counter()
    figures = {"open_seconds": opened - begin, "resident_mb_before_opening": before}
    sampler = ChainSampler(episodes, config.chain, BatchLayout(ring_size=1, **dataclasses.asdict(config.batch)), seed=0)
    figures["resident_mb_opened"] = resident_megabytes()
    forget_pages(folder / STORE_FOLDER)
    figures |= {
        f"{name}_from_disk": value for name, value in drawn(sampler, range(config.chains, 2 * config.chains))[0].items()
    }
    in_memory, resident = drawn(sampler, range(config.chains))
    figures |= in_memory
    tenth = max(1, len(resident) // 10)
    figures["resident_mb_first_tenth"] = max(resident[:tenth])
    figures["resident_mb_last_tenth"] = max(resident[-tenth:])
    through_input, resident_with_batches = drawn_through_input(config, sampler)
    figures |= through_input
    figures["resident_mb_largest"] = max([*resident, *resident_with_batches])
    figures["episodes_read_mb"] = data_megabytes(episodes)
    return figures


def drawn(sampler: ChainSampler, indices: range) -> tuple[dict[str, float], list[float]]:
    """Chains a second and a second of processor time, and the resident memory after each chain."""
    resident = []
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for index in indices:
        sampler.row(index)
        resident.append(resident_megabytes())
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    figures = {"chains_per_second": len(indices) / seconds, "chains_per_cpu_second": len(indices) / cpu_seconds}
    return figures, resident


def drawn_through_input(config: ReaderBenchmarkConfig, sampler: ChainSampler) -> tuple[dict[str, float], list[float]]:
    """As `drawn`, by the training's input, which also places them on the device; the memory after each batch.

    Its first batches, made ahead before the clock starts, are not counted.
    """
    ahead = config.input.prefetch_batches + 1
    stream = RowStream(
        sampler,
        batch_size=config.batch.batch_size,
        steps=config.batches + ahead,
        mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1)),
        layout=config.batch.layout,
        ring_size=1,
        config=config.input,
    )
    resident = []
    with contextlib.closing(stream):
        for _ in range(ahead):
            jax.block_until_ready(next(stream))
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for _ in range(config.batches):
            jax.block_until_ready(next(stream))
            resident.append(resident_megabytes())
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    chains = config.batches * config.batch.batch_size
    return {
        "input_chains_per_second": chains / seconds,
        "input_chains_per_cpu_second": chains / cpu_seconds,
    }, resident


def forget_pages(folder: Path) -> None:
    """Lets the system forget what it holds of these files in memory, so that reading them waits for the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_megabytes() -> float:
    """The memory that this process has in RAM, page by page."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def data_megabytes(episodes: EpisodeSet) -> float:
    """What the episodes would take in memory, without physics states."""
    numbers = episodes.lengths * (episodes.observation_dim + episodes.action_dim + 2) + episodes.observation_dim
    return float(4 * numbers.sum() / 1e6)


def measure(config: ReaderBenchmarkConfig) -> None:
    """Makes the set, measures, removes it and writes the report."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    with tempfile.TemporaryDirectory(dir=config.folder) as scratch:
        folder = Path(scratch)
        figures = conversion_figures(config, folder)
        # Its memory must not be that of making the set.
        spawned = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as process:
            figures |= process.submit(reading_figures, config, folder).result()
    settings = {**to_mapping(config), "output": str(config.output), "folder": None}
    result = {
        **figures,
        "config": settings,
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "grain", "numpy"),
    }
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "reader.json", json.dumps(result, indent=2) + "\n")
    write_whole(config.output / "table.md", report(config, figures))
    print(
        f"open_seconds={figures['open_seconds']:.2f} chains_per_second={figures['chains_per_second']:.0f} "
        f"chains_per_cpu_second={figures['chains_per_cpu_second']:.0f} "
        f"chains_per_second_from_disk={figures['chains_per_second_from_disk']:.0f} "
        f"input_chains_per_second={figures['input_chains_per_second']:.0f} "
        f"resident_mb_largest={figures['resident_mb_largest']:.0f} "
        f"converted_episodes_per_second={figures['converted_episodes_per_second']:.0f}"
    )


def report(config: ReaderBenchmarkConfig, figures: dict[str, float]) -> str:
    """The table."""
    chain = f"chains of {config.chain.trajectories} x {config.episode_steps} steps"

    def speeds(name: str) -> list[str]:
        by_cpu = name.replace("_per_second", "_per_cpu_second")
        return [f"{figures[name]:.0f} chains/s", f"{figures[by_cpu]:.0f}"]

    def memory(name: str) -> list[str]:
        return [f"{figures[f'resident_mb_{name}']:.0f} MB", ""]

    read = f"{config.episodes} episodes of {config.domain}, {figures['episodes_read_mb']:.0f} MB without states"
    rows = [
        [read, "measured", "a second of processor time"],
        ["converting, compressed as published", f"{figures['converted_episodes_per_second']:.0f} episodes/s", ""],
        ["opening", f"{figures['open_seconds']:.2f} s", ""],
        [f"{chain}, files in memory", *speeds("chains_per_second")],
        [f"{chain}, files on disk", *speeds("chains_per_second_from_disk")],
        [f"{chain}, through the training's input", *speeds("input_chains_per_second")],
        ["resident memory before opening", *memory("before_opening")],
        ["resident memory, opened", *memory("opened")],
        ["resident memory, first tenth of the chains", *memory("first_tenth")],
        ["resident memory, last tenth of the chains", *memory("last_tenth")],
        ["resident memory, largest, with the input's batches", *memory("largest")],
    ]
    return markdown_table(rows)


@hydra.main(config_path="../conf", config_name="bench_reader", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(ReaderBenchmarkConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
