"""The card of a set of episodes: what they return on every task of their domain, as a table and a picture.

<root>/<domain>/<algorithm>/card.md        quantiles of the returns, a row a task
                            returns.png    their histograms, a panel a task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ring_rl.agent.environments.domains import DOMAINS
from ring_rl.agent.episodes.derived import signatures
from ring_rl.agent.episodes.exorl import EpisodeFiles, list_episodes
from ring_rl.agent.episodes.relabel_cache import RelabelConfig, relabelled_rewards
from ring_rl.atomic_file import write_whole
from ring_rl.training.plots import write_figure
from ring_rl.training.tables import markdown_table
from ring_rl.typing import Float64

__all__ = ["QUANTILES", "card_facts", "plot_returns", "quantile_rows", "returns_of_every_task", "write_card"]

QUANTILES: Mapping[str, float] = {
    "min": 0.0,
    "p10": 0.1,
    "p25": 0.25,
    "median": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p99": 0.99,
    "max": 1.0,
}


def returns_of_every_task(
    folder: Path, *, domain: str, recorded_task: str, config: RelabelConfig, progress: bool
) -> dict[str, Float64[np.ndarray, " E"]]:
    """The returns of all episodes of `folder`, by task; rewards that are computed stay beside the data.

    Args:
        folder: The set's, with `buffer/` in it.
        domain: Whose tasks.
        recorded_task: Whose rewards the episodes carry.
        config: How those of the others are computed.
        progress: Whether to show progress bars.

    Raises:
        ValueError, OSError, ImportError: as `relabelled_rewards`.
    """
    paths = list_episodes(folder / "buffer")
    episodes, marks = EpisodeFiles(paths, reward_column=0), signatures(paths)
    returns = {}
    for name in DOMAINS[domain].tasks:
        task = f"{domain}_{name}"
        rewards = relabelled_rewards(
            folder, episodes, marks, task=task, recorded_task=recorded_task, config=config, progress=progress
        )
        returns[task] = np.array([each.sum(dtype=np.float64) for each in rewards])
    return returns


def write_card(
    folder: Path, returns: Mapping[str, Float64[np.ndarray, " E"]], *, title: str, facts: Mapping[str, str]
) -> None:
    """Writes `card.md` and `returns.png`, in place of older ones.

    Args:
        folder: Where to; it must exist.
        returns: By task.
        title: Heads the card.
        facts: Lines of the card's first table.
    """
    plot_returns({title: returns}, folder / "returns.png", title=title)
    parts = [
        f"# {title}\n",
        markdown_table([["", ""], *[[name, value] for name, value in facts.items()]]),
        "Returns of its episodes on every task of the domain, not discounted:\n",
        markdown_table([["task", *QUANTILES], *[[task, *quantile_rows(each)] for task, each in returns.items()]]),
        "![returns](returns.png)\n",
    ]
    write_whole(folder / "card.md", "\n".join(parts))


def card_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What a collection's record says, for its card."""
    settings = record["settings"]
    return {
        "explorer": settings["explorer"]["name"],
        "looks at the task's reward": "no" if record["reward_free"] else "yes",
        "episodes": str(record["episodes"]),
        "actions held for": f"{settings['explorer']['action_hold']} control steps",
        "rewards in the files": f"of {settings['task']}",
        "seed": str(settings["seed"]),
        "collected in": f"{record['seconds']:.0f} s" if "seconds" in record else "unknown",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        "commit": str(record["git_commit"]),
    }


def quantile_rows(returns: Float64[np.ndarray, " E"]) -> Sequence[str]:
    """The quantiles as text, two decimals where they are small."""
    decimals = 0 if np.abs(returns).max() >= 10 else 2
    return [f"{np.quantile(returns, level):.{decimals}f}" for level in QUANTILES.values()]


def plot_returns(sets: Mapping[str, Mapping[str, Float64[np.ndarray, " E"]]], path: Path, *, title: str) -> None:
    """Histograms of returns: a panel a task, a line a set."""
    tasks = list(next(iter(sets.values())))
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.8 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, task in zip(panels, tasks, strict=False):
        values = [returns[task] for returns in sets.values()]
        edges = np.linspace(min(each.min() for each in values), max(each.max() for each in values) + 1e-9, 41)
        for number, (name, each) in enumerate(zip(sets, values, strict=True)):
            label = f"{name}: median {np.median(each):.3g}, best {each.max():.3g}"
            style = {"histtype": "stepfilled", "alpha": 0.35} if len(sets) == 1 else {"histtype": "step"}
            axes.hist(each, bins=edges, color=f"C{number}", label=label, **style)
        axes.set_yscale("log")
        axes.set_title(task, fontsize="medium")
        axes.set_xlabel("return of an episode")
        axes.set_ylabel("episodes")
        axes.legend(fontsize="x-small")
    for axes in list(figure.axes)[len(tasks) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    write_figure(figure, path)
