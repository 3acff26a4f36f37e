"""The paper's table of agents from one command; conf/reproduce_agent.yaml documents every key."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.reproduction.cost import cost_lines
from ring_rl.agent.reproduction.evaluated import stale_reason
from ring_rl.agent.reproduction.plan import Cell, PresetConfig, training_groups
from ring_rl.agent.reproduction.published import PublishedTable
from ring_rl.agent.reproduction.settings import differing_settings
from ring_rl.child_process import run_script
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point

REPOSITORY = Path(__file__).parents[1]
run = functools.partial(run_script, REPOSITORY)
Phase = Literal["collect", "train", "evaluate", "report"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceAgentConfig:
    """Which comparison, and where its parts lie."""

    preset: PresetConfig
    published: PublishedTable
    runs: Path
    output: Path
    data_root: Path
    phases: tuple[Phase, ...]
    dry_run: bool
    partial: bool

    @property
    def cells(self) -> list[Cell]:
        """Every cell of the preset."""
        return list(self.preset.cells(self.runs))

    def chance(self, task: str) -> Path:
        """Where the returns of random actions are kept."""
        return self.runs / task / "chance.json"


def collect(config: ReproduceAgentConfig) -> None:
    """Brings every domain's data set up to what the preset asks for."""
    for domain, tasks in config.preset.domains.items():
        if config.preset.data == "fetch":
            run("datasets/exorl/fetch.py", domain, "rnd", "--root", str(config.data_root))
        else:
            overrides = config.preset.collect[domain]
            run("datasets/exorl/collect.py", f"root={config.data_root}", *overrides)
        for task in tasks:
            overrides = data_overrides(config.preset, task)
            run("datasets/exorl/relabel.py", f"task={task}", *overrides, f"data.root={config.data_root}")


def data_overrides(preset: PresetConfig, task: str) -> list[str]:
    """Those of a task's training overrides that say which data are read."""
    return [each for each in (*preset.train, *preset.tasks[task]) if each.startswith(("data=", "data."))]


def train(config: ReproduceAgentConfig) -> None:
    """Trains what is missing: a Hydra multirun for each variant and kind of task."""
    preset = config.preset
    groups = training_groups(preset, [cell for cell in config.cells if not cell.trained])
    for number, group in enumerate(groups):
        variant = preset.variants[group.variant]
        print(f"\ntraining {number + 1} of {len(groups)}: {variant.label} on {', '.join(group.tasks)}", flush=True)
        run(
            "experiments/train_agent.py",
            "-m",
            *(("hydra/launcher=workers", f"hydra.launcher.n_jobs={preset.workers}") if preset.workers > 1 else ()),
            f"hydra.sweep.dir={config.runs}/multirun",
            *preset.train,
            *variant.train,
            *group.overrides,
            f"data.root={config.data_root}",
            f"label='{variant.label}'",
            f"run_dir={config.runs}/${{task}}/{group.variant}/seed_${{seed}}",
            f"task={','.join(group.tasks)}",
            f"seed={','.join(map(str, group.seeds))}",
        )


def evaluate(config: ReproduceAgentConfig) -> None:
    """Evaluates every trained cell that has no evaluation under this protocol, and chance on every task."""
    from ring_rl.agent.environments.environment import make_vector_environment
    from ring_rl.agent.evaluation.protocol import load_agent
    from ring_rl.agent.reproduction.evaluated import evaluate_cell, evaluate_chance

    preset = config.preset
    cells = [cell for cell in config.cells if cell.trained or not config.partial]
    for cell in cells:
        if not cell.trained:
            run_of = cell.run()
            reason = "not trained" if run_of is None else run_of.problem
            raise ValueError(
                f"{cell.run_dir} is {reason}; train it first: phases=[train], or set partial=true to pass it over"
            )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("evaluating", total=len(cells) + len(preset.tasks))
        for task in preset.tasks:

            def environments(action_repeat: int, task: str = task):
                return make_vector_environment(
                    task, count=preset.protocol.rows, action_repeat=action_repeat, batched=True
                )

            progress.update(bar, description=f"evaluating {task}, chance")
            if stale_reason(config.chance(task), preset.protocol, step=0):
                action_dim = DOMAINS[parse_task(task)[0]].action_dim
                evaluate_chance(config.chance(task), environments, preset.protocol, action_dim=action_dim)
            progress.advance(bar)
            for cell in (each for each in cells if each.task == task):
                progress.update(bar, description=f"evaluating {task}, {preset.variants[cell.variant].label}")
                if why_unfinished(config, cell):
                    evaluate_cell(cell, load_agent(cell.run_dir), environments, preset.protocol)
                progress.advance(bar)


def why_unfinished(config: ReproduceAgentConfig, cell: Cell) -> str | None:
    """What a cell lacks; None for one that is trained, and evaluated after its last step under this protocol."""
    run_of = cell.run()
    if run_of is None or run_of.problem is not None:
        return "not trained" if run_of is None else run_of.problem
    return stale_reason(cell.evaluation, config.preset.protocol, step=run_of.last_step)


def left_to_do(config: ReproduceAgentConfig) -> list[Cell]:
    """Cells that are not trained or not evaluated as this preset asks."""
    return [cell for cell in config.cells if why_unfinished(config, cell)]


def check_settings(config: ReproduceAgentConfig) -> None:
    """Raises ValueError if a run on disk is not the one that the preset describes now: its figures would lie."""
    for cell in config.cells:
        if differences := differing_settings(config.preset, cell):
            raise ValueError(
                f"{cell.run_dir} was trained with other settings than the preset has ({'; '.join(differences)}); "
                "move it away to train it again, or choose another runs="
            )


def announce(config: ReproduceAgentConfig) -> None:
    """Says what there is, what is left, and about how long it will take."""
    preset = config.preset
    lines = cost_lines(preset, config.cells, left_to_do(config))
    table = Table(title=f"{preset.name}: {len(preset.tasks)} tasks, {len(preset.seeds)} seeds, for {preset.hardware}")
    for column in ("agent", "finished", "left", "seconds a cell", "hours left", "by"):
        table.add_column(column)
    for line in lines:
        source = "measured here" if line.measured else preset.expectation
        table.add_row(
            preset.variants[line.variant].label,
            str(line.finished),
            str(line.left),
            f"{line.seconds_a_cell:.0f}",
            f"{line.seconds / 3600:.2f}",
            source,
        )
    Console(width=120).print(table)
    hours = sum(line.seconds for line in lines) / 3600 / preset.workers
    print(
        f"cells={len(config.cells)} left={sum(line.left for line in lines)} workers={preset.workers} "
        f"hours_left={hours:.2f}",
        flush=True,
    )


def report(config: ReproduceAgentConfig) -> None:
    """Writes the tables and pictures."""
    from ring_rl.agent.reproduction.report import write_report

    missing = left_to_do(config)
    finished = [cell for cell in config.cells if cell not in missing]
    if not finished or (missing and not config.partial):
        remedy = "finish them, or set partial=true for a table of what there is" if finished else "train and evaluate"
        raise ValueError(
            f"{len(missing)} of {len(config.cells)} cells are not finished, {missing[0].run_dir} is one "
            f"({why_unfinished(config, missing[0])}); {remedy}"
        )
    for task in {cell.task: None for cell in finished}:
        if reason := stale_reason(config.chance(task), config.preset.protocol, step=0):
            raise ValueError(f"{config.chance(task)}: {reason}; evaluate chance first: phases=[evaluate]")
    figures = write_report(
        config.preset,
        finished,
        chance={task: config.chance(task) for task in config.preset.tasks},
        published=config.published,
        output=config.output,
    )
    print(" ".join(f"{name}={value}" for name, value in figures.items()))


def reproduce(config: ReproduceAgentConfig) -> None:
    """Announces, then goes through the phases in their order."""
    check_settings(config)
    announce(config)
    if config.dry_run:
        return
    phases: dict[Phase, Callable[[ReproduceAgentConfig], None]] = {
        "collect": collect,
        "train": train,
        "evaluate": evaluate,
        "report": report,
    }
    for name, phase in phases.items():
        if name in config.phases:
            phase(config)


@hydra.main(config_path="../conf", config_name="reproduce_agent", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a table."""
    with exit_on_bad_input():
        reproduce(from_mapping(ReproduceAgentConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
