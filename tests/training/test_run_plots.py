import json

import numpy as np
import pytest
import yaml

from ring_rl.training import run_plots
from ring_rl.training.run_plots import plot_curves, plot_final_by_setting
from ring_rl.training.run_table import make_table
from ring_rl.training.saved_runs import find_runs, read_run

LOSS = {"loss": "minimize"}


def table_of(folder, runs, **options):
    """A table of made-up runs: (settings, losses of all steps)."""
    for number, (settings, losses) in enumerate(runs):
        run = folder / str(number)
        run.mkdir()
        config = {"seed": 0, **settings, "loop": {"steps": len(losses)}}
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1) if loss is not None]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    saved = [read_run(path, steps_key="loop.steps", goals=LOSS) for path in find_runs([folder])]
    return make_table(saved, goals=LOSS, seed_key="seed", ignore=(), **options)


@pytest.fixture
def drawn(monkeypatch):
    """The figures, in place of their files."""
    figures = []
    monkeypatch.setattr(run_plots, "write_figure", lambda figure, path: figures.append(figure))
    return figures


def test_curves_show_means_bands_and_steps_that_all_seeds_have(tmp_path, drawn):
    runs = [({"seed": 0}, [4.0, 3.0, 1.0]), ({"seed": 1}, [6.0, None, 3.0])]
    plot_curves(table_of(tmp_path, runs), "loss", tmp_path / "a.png", largest_count=8)
    [axes] = drawn[0].axes
    [line] = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 5.0], [3, 2.0]])
    [band] = axes.collections
    # t of one degree of freedom is 12.706, and the standard error of two values is half their distance.
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(5 + 12.706, rel=1e-4)
    assert axes.get_title() == "mean over seeds, 95% band"


def test_one_seed_has_a_curve_and_no_band(tmp_path, drawn):
    plot_curves(table_of(tmp_path, [({}, [1.0])]), "loss", tmp_path / "a.png", largest_count=8)
    [axes] = drawn[0].axes
    assert not axes.collections
    assert axes.lines[0].get_marker() == "o"


def test_configurations_that_are_not_drawn_are_counted_in_the_title(tmp_path, drawn):
    table = table_of(tmp_path, [({"rate": rate}, [2.0, 1.0 + rate]) for rate in (3, 1, 2)])
    plot_curves(table, "loss", tmp_path / "a.png", largest_count=2)
    [axes] = drawn[0].axes
    assert axes.get_title().endswith("the best 2 of 3 configurations")
    assert [line.get_label() for line in axes.lines] == ["rate 1, 1 seed", "rate 2, 1 seed"]


def test_final_values_stand_at_their_settings(tmp_path, drawn):
    """Numbers on an axis that fits their range, other values side by side; a panel a setting."""
    settings = [(1e-4, "cosine"), (1e-2, "linear"), (1e-3, "cosine")]
    runs = [({"rate": rate, "schedule": name}, [rate * 100]) for rate, name in settings]
    plot_final_by_setting(table_of(tmp_path, runs), "loss", tmp_path / "a.png")
    by_rate, by_schedule = drawn[0].axes
    assert by_rate.get_xscale() == "log"
    np.testing.assert_allclose(sorted(by_rate.lines[0].get_xdata()), [1e-4, 1e-3, 1e-2])
    assert [label.get_text() for label in by_schedule.get_xticklabels()] == ["cosine", "linear"]
    points = by_schedule.lines[0].get_xydata()
    np.testing.assert_allclose(points[points[:, 0] == 1], [[1, 1.0]])


def test_rows_that_lack_a_setting_are_left_out_of_its_panel(tmp_path, drawn):
    table = table_of(tmp_path, [({"rate": 1}, [1.0]), ({"rate": 1, "width": 2}, [2.0]), ({"rate": 2}, [3.0])])
    assert table.keys == ("rate", "width")
    plot_final_by_setting(table, "loss", tmp_path / "a.png")
    assert len(drawn[0].axes[1].lines[0].get_xdata()) == 1


def test_no_setting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one configuration only"):
        plot_final_by_setting(table_of(tmp_path, [({}, [1.0])]), "loss", tmp_path / "a.png")


def test_pictures_are_written(tmp_path):
    (tmp_path / "runs").mkdir()
    table = table_of(tmp_path / "runs", [({"rate": rate}, [2.0, 1.0]) for rate in (1, 2, 3, 4)])
    plot_curves(table, "loss", tmp_path / "curves.png", largest_count=8)
    plot_final_by_setting(table, "loss", tmp_path / "final.png")
    for name in ("curves", "final"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
