"""Cells, the multiruns that train them, and presets that make no sense."""

import dataclasses
import itertools

import pytest
import yaml

from ring_rl.agent.reproduction.cost import cost_lines
from ring_rl.agent.reproduction.plan import training_groups
from ring_rl.training.metrics import JsonlWriter


def finish(cell, *, steps=10, last=10, speed=2.0):
    """Leaves what a training run leaves."""
    cell.run_dir.mkdir(parents=True)
    (cell.run_dir / "config.yaml").write_text(yaml.safe_dump({"loop": {"steps": steps}}))
    writer = JsonlWriter(cell.run_dir / "metrics.jsonl", resume_step=0)
    writer.write(last, {"loss": 1.0, "performance/steps_per_second": speed})
    writer.close()


def test_every_combination_is_a_cell_with_a_folder_of_its_own(preset, tmp_path):
    cells = list(preset.cells(tmp_path))
    assert len({cell.run_dir for cell in cells}) == len(cells) == 3 * 2 * 3
    assert {(cell.variant, cell.task, cell.seed) for cell in cells} == set(
        itertools.product(preset.variants, preset.tasks, preset.seeds)
    )
    assert not any(cell.trained for cell in cells)


def test_a_cell_counts_as_trained_at_its_last_step_only(preset, tmp_path):
    first, second = list(preset.cells(tmp_path))[:2]
    finish(first)
    finish(second, last=9)
    assert first.trained
    assert not second.trained


def test_groups_cover_all_that_is_missing_and_tasks_with_other_overrides_go_apart(preset, tmp_path):
    cells = list(preset.cells(tmp_path))
    missing = cells[1:]
    groups = training_groups(preset, missing)
    covered = {
        (group.variant, task, seed) for group in groups for task, seed in itertools.product(group.tasks, group.seeds)
    }
    assert covered >= {(cell.variant, cell.task, cell.seed) for cell in missing}
    for group in groups:
        assert {preset.tasks[task] for task in group.tasks} == {group.overrides}
    assert training_groups(preset, []) == []


def test_what_is_left_is_priced_by_what_was_measured(preset, tmp_path):
    cells = list(preset.cells(tmp_path))
    of_long = [cell for cell in cells if cell.variant == "long"]
    finish(of_long[0], steps=10, last=10, speed=2.0)
    lines = {line.variant: line for line in cost_lines(preset, cells, cells[1:])}
    assert (lines["long"].finished, lines["long"].left) == (1, 5)
    assert lines["long"].measured
    assert lines["long"].seconds == pytest.approx(5 * 5.0)
    assert not lines["clone"].measured
    assert lines["clone"].seconds == pytest.approx(6 * 10.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": ()}, "one of them is empty"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"tasks": {"cartpole_swing": ()}}, "unknown task 'cartpole_swing'"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"collect": {"cartpole": ()}}, "collect says nothing of jaco"),
        ({"bootstrap_samples": 10}, "bootstrap_samples must be at least 100"),
        ({"variants": {}}, "one of them is empty"),
    ],
)
def test_presets_that_make_no_sense_are_refused(preset, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(preset, **changes)


def test_a_comparison_asks_for_one_target(preset):
    protocol = dataclasses.replace(preset.protocol, other_target_fractions=(0.5,))
    with pytest.raises(ValueError, match="one target"):
        dataclasses.replace(preset, protocol=protocol)


def test_claims_about_variants_that_are_not_there_are_refused(preset):
    fewer = {name: each for name, each in preset.variants.items() if name != "shuffled"}
    with pytest.raises(ValueError, match="unknown variants shuffled"):
        dataclasses.replace(preset, variants=fewer)
