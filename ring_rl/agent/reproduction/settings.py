"""Whether a run on disk is the one that a preset asks for now."""

from __future__ import annotations

from ring_rl.agent.episodes.load import DATA_MAY_DIFFER
from ring_rl.agent.reproduction.plan import Cell, PresetConfig
from ring_rl.training import preset_settings
from ring_rl.training.run import MAY_DIFFER

__all__ = ["differing_settings"]


def differing_settings(preset: PresetConfig, cell: Cell) -> list[str]:
    """One line a setting in which a cell's run differs from its preset; empty where there is no run yet.

    Compared are the values that the preset names, and task, seed and label.
    """
    run = cell.run()
    if run is None or not run.config:
        return []
    variant = preset.variants[cell.variant]
    return preset_settings.differing_settings(
        run.config,
        [*preset.train, *variant.train, *preset.tasks[cell.task]],
        {"task": cell.task, "seed": cell.seed, "label": variant.label},
        may_differ=(*MAY_DIFFER, *DATA_MAY_DIFFER),
    )
