"""The longest context that trains, by model, machine and way to attend.

conf/context_limits.yaml documents every key.
"""

import contextlib
import sys

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ring_rl.atomic_file import refuse_existing
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.planning.compile_process import CompileProcesses, compiler_versions
from ring_rl.planning.forecast import Forecast
from ring_rl.planning.limits import Cell, CellResult, LimitsConfig, plan_of, report_problems, search_cells
from ring_rl.planning.limits_report import OUTPUTS, check_writable, headline, table_rows, write_limits
from ring_rl.planning.probe_cache import ProbeCache, open_probe_cache
from ring_rl.planning.topology import require_libtpu


def limits(config: LimitsConfig) -> dict[Cell, CellResult]:
    """Searches what is not known yet, reports, and returns every cell.

    Raises:
        ValueError: No cell can be compiled; the error says why the first cannot, and what would do. Or nothing can be
            written to `output`, or `probes` is a file of something else.
        ImportError: A row is a TPU slice and libtpu is not installed.
        FileExistsError: There are results already, or another process adds to the file of probes.
    """
    if not (config.overwrite or config.dry_run):
        refuse_existing(config.output, OUTPUTS)
    if not config.dry_run:
        check_writable(config.output)
    plans = [plan_of(config, cell) for cell in config.cells]
    problems = report_problems(plans)
    if not (config.dry_run or config.partial) and any(not plan.machine.estimated for plan in plans):
        require_libtpu()
    console = Console()
    for problem in problems:
        console.print(f"not compiled: {problem}", soft_wrap=True, highlight=False)
    # What compiles nothing writes no probe, and may look on while another process compiles.
    looks_on = config.dry_run or config.partial
    with contextlib.nullcontext(ProbeCache(config.probes)) if looks_on else open_probe_cache(config.probes) as cache:
        forecast = Forecast(
            plans,
            cache,
            expected_seconds=config.expected_seconds,
            expected_gpu_seconds=config.expected_gpu_seconds,
        )
        console.print(forecast.describe(config), soft_wrap=True, highlight=False)
        if looks_on:
            found = [plan.result(plan.known(cache)) for plan in plans]
        else:
            found = _search(config, forecast, cache, console)
        results = {each.plan.cell: each for each in found}
        if not config.dry_run:
            write_limits(config, results, cache, versions=compiler_versions())
            _show(config, results, console)
    return results


def _search(config: LimitsConfig, forecast: Forecast, cache: ProbeCache, console: Console) -> list[CellResult]:
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with CompileProcesses() as processes, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=forecast.remaining, left=forecast.left(config.processes))

        def on_probe(plan, length, memory):
            forecast.compiled(plan, memory)
            progress.update(bar, completed=forecast.done, total=forecast.total, left=forecast.left(config.processes))
            said = "does not fit" if memory.peak_bytes is None else f"{memory.peak_bytes / 1e9:.2f} GB"
            seconds = memory.lower_seconds + memory.compile_seconds
            progress.console.print(f"{plan.cell}: {length:,} tokens a device: {said} ({seconds:.0f} s)", soft_wrap=True)

        def on_done(result):
            forecast.finished(result)
            progress.update(bar, completed=forecast.done, total=forecast.total, left=forecast.left(config.processes))
            if result.failure:
                progress.console.print(f"{result.plan.cell}: failed: {result.failure}", soft_wrap=True)

        return search_cells(
            forecast.plans, cache, processes, workers=config.processes, on_probe=on_probe, on_done=on_done
        )


def _show(config: LimitsConfig, results: dict[Cell, CellResult], console: Console) -> None:
    lines = table_rows(config, results)
    table = Table(*lines[0], title="longest context, thousands of tokens (the paper's)", title_justify="left")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)
    print(headline(config, results))


@hydra.main(config_path="../conf", config_name="context_limits", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a table."""
    with exit_on_bad_input():
        results = limits(from_mapping(LimitsConfig, resolve(cfg)))
    if any(each.failure for each in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)
