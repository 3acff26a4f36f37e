"""Whether a run on disk is the one that a preset asks for now."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser

from ring_rl.agent.episodes.load import DATA_MAY_DIFFER
from ring_rl.agent.reproduction.plan import Cell, PresetConfig
from ring_rl.training.run import MAY_DIFFER

__all__ = ["differing_settings"]


def differing_settings(preset: PresetConfig, cell: Cell) -> list[str]:
    """One line a setting in which a cell's run differs from its preset: `"loop.steps: saved 700, wanted 1400"`.

    Compared are the values that the preset names, and task, seed and label. A choice of a whole file (`agent=td3_bc`)
    stands for values that it does not name, and what may change when a run goes on may have changed. Empty where there
    is no run yet.
    """
    run = cell.run()
    if run is None or not run.config:
        return []
    saved, wanted = run.config, {}
    named = (*preset.train, *preset.variants[cell.variant].train, *preset.tasks[cell.task])
    for override in OverridesParser.create().parse_overrides(list(named)):
        key = override.key_or_group
        if override.package is None and ("." in key or key in saved):
            wanted[key] = override.value()
    wanted |= {"task": cell.task, "seed": cell.seed, "label": preset.variants[cell.variant].label}
    free = (*MAY_DIFFER, *DATA_MAY_DIFFER)
    return [
        f"{key}: saved {saved.get(key)}, wanted {value}"
        for key, value in wanted.items()
        if saved.get(key) != value and not any(key == path or key.startswith(f"{path}.") for path in free)
    ]
