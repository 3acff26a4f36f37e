"""Kills a training at random moments, resumes it, and compares it to the bit with one that was never interrupted.

conf/check_resume.yaml documents every key. The last line is `kills=10 during_save=5 resumes_equal=10 ...`.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import hydra
import jax
import numpy as np
from omegaconf import DictConfig
from rich.progress import track

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.checkpoint_format import load_arrays, whole_steps
from ring_rl.training.metrics import read_metrics, without_performance

# What a run may take to reach the next moment; a machine that is busy with other things is slow.
PATIENCE_SECONDS = 600
_POLL_SECONDS = 0.002


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckResumeConfig:
    """What is killed, how often, and by which signal."""

    command: tuple[str, ...]
    folder: Path
    kills: int
    signal: Literal["SIGKILL", "SIGTERM"]
    seed: int

    def __post_init__(self) -> None:
        if self.kills < 1:
            raise ValueError(f"kills must be at least 1, got {self.kills}")
        if not self.command:
            raise ValueError("command is empty; name an entry point such as experiments/train_agent.py")


@dataclasses.dataclass(frozen=True)
class Resumes:
    """How a run that was killed compares.

    Attributes:
        kills: that met a running process.
        during_save: of these, how many left a checkpoint half written.
        equal: after how many the resumed process wrote the records of the uninterrupted run, all but those about
            the machine; the last one must have ended with its arrays, too.
        final_equal: the records and the last checkpoint, in every array, are those of the uninterrupted run.
    """

    kills: int
    during_save: int
    equal: int
    final_equal: bool


def main_check(config: CheckResumeConfig) -> None:
    """Trains once without interruption and once with many, and prints how they compare."""
    if config.folder.exists():
        raise FileExistsError(f"{config.folder} exists; move it away or choose another folder")
    whole, interrupted = config.folder / "whole", config.folder / "interrupted"

    def command(run: Path) -> list[str]:
        return [sys.executable, *config.command, f"run_dir={run}"]

    _finish(command(whole))
    numbers = [signal.Signals[config.signal]] * config.kills
    resumes = kill_and_resume(command, interrupted, whole=whole, signals=numbers, seed=config.seed)
    print(
        f"signal={config.signal} kills={resumes.kills} during_save={resumes.during_save} "
        f"resumes_equal={resumes.equal} final_arrays_equal={resumes.final_equal}"
    )
    if resumes.equal < config.kills or not resumes.final_equal:
        raise ValueError(f"a resumed run differs from an uninterrupted one; compare {interrupted} with {whole}")


def kill_and_resume(
    command: Callable[[Path], list[str]], run: Path, *, whole: Path, signals: list[signal.Signals], seed: int
) -> Resumes:
    """Run `command(run)`, killed once by each of the signals, to its end, and compare it with the run in `whole`.

    The moments are spread over the run, each at a random time within its share of the steps. Every second SIGKILL
    waits for a checkpoint that is being written.

    Raises:
        ValueError: the run failed, or ended before the last kill.
    """
    generator = random.Random(seed)
    expected = _records(whole)
    steps = expected[-1]["step"]
    hard = during_save = equal = 0
    for index, number in enumerate(track(signals, description="kills")):
        first, last = (int(steps * (index + share) / (len(signals) + 1)) for share in (0.2, 1.0))
        at_step = generator.randint(first, last)
        if number == signal.SIGTERM:
            # Only a process that trains can save and leave; the records so far are another one's.
            at_step = max(at_step, _last_step(run) + 1)
        with subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                _wait_until(lambda at_step=at_step: _last_step(run) >= at_step, process)
                hard += number == signal.SIGKILL
                if number == signal.SIGKILL and hard % 2 == 0:
                    _stop_while_it_saves(run, process, seconds=generator.uniform(0, 0.01))
                else:
                    time.sleep(generator.uniform(0, 0.05))
                process.send_signal(number)
                _, errors = process.communicate(timeout=PATIENCE_SECONDS)
            finally:
                process.kill()
        if process.returncode != (-number if number == signal.SIGKILL else 130):
            raise ValueError(f"the run ended with {process.returncode} before it was killed: {errors[-300:]}")
        during_save += _half_written(run)
        # What stands there now was written by the process that resumed after the kill before this one.
        equal += index > 0 and _records(run) == expected[: len(_records(run))]
    _finish(command(run))
    final_equal = _records(run) == expected and _same_arrays(run, whole, steps)
    return Resumes(len(signals), during_save, equal + final_equal, final_equal)


def _finish(command: list[str]) -> None:
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if finished.returncode:
        raise ValueError(f"{' '.join(command)} ended with {finished.returncode}: {finished.stderr[-300:]}")


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready() and process.poll() is None:
        if time.monotonic() > deadline:
            raise ValueError(f"the run made no step for {PATIENCE_SECONDS} s; see whether it runs by itself")
        time.sleep(_POLL_SECONDS)


def _stop_while_it_saves(run: Path, process: subprocess.Popen, *, seconds: float) -> None:
    """Freeze the process some time into a save: without that the checkpoint may be whole before a kill arrives."""
    while True:
        _wait_until(lambda: _half_written(run), process)
        if process.poll() is not None:
            return
        time.sleep(seconds)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if _half_written(run):
            return
        process.send_signal(signal.SIGCONT)
        seconds = 0.0


def _records(run: Path) -> list[dict]:
    return [without_performance(record) for record in read_metrics(run / "metrics.jsonl")]


def _last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    return records[-1]["step"] if records else 0


def _half_written(run: Path) -> bool:
    return any("tmp" in path.name for path in (run / "checkpoints").iterdir())


def _same_arrays(run: Path, whole: Path, step: int) -> bool:
    if not whole_steps(run / "checkpoints")[-1] == whole_steps(whole / "checkpoints")[-1] == step:
        return False
    pair = (load_arrays(each / "checkpoints", step=step) for each in (run, whole))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), *pair)
    return all(jax.tree.leaves(same))


@hydra.main(config_path="../conf", config_name="check_resume", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a check."""
    with exit_on_bad_input():
        main_check(from_mapping(CheckResumeConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
