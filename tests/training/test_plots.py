from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from ring_rl.training.plots import RUN_PANELS, plot_learning_curve, plot_run


def write_run(folder, losses):
    folder.mkdir()
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i + 1, "loss": loss}) + "\n" for i, loss in enumerate(losses)))
    return path


def read_picture(path):
    from matplotlib.image import imread

    return imread(path)


def test_the_curve_is_drawn_and_an_older_picture_replaced(tmp_path):
    path = write_run(tmp_path / "a", [3.0, 2.0, None, 1.0])
    out = tmp_path / "plots" / "loss.png"
    plot_learning_curve(path, out)
    first = read_picture(out)
    assert first.shape[:2] == (600, 960)
    plot_learning_curve([path, write_run(tmp_path / "b", [1.0, 2.0, 3.0])], out, labels=["one", "two"])
    assert np.any(read_picture(out) != first)
    assert [file.name for file in out.parent.iterdir()] == ["loss.png"]


def test_a_single_point_is_visible(tmp_path):
    out = tmp_path / "one.svg"
    plot_learning_curve(write_run(tmp_path / "a", [2.0]), out)
    assert "<use" in out.read_text().split('id="line2d_')[-1]


def test_a_run_at_a_glance_has_a_panel_for_each_metric_it_recorded(tmp_path):
    names = list(RUN_PANELS)
    path = tmp_path / "metrics.jsonl"
    # The first record has no rates yet; the last metric is never reported, as on a CPU.
    records = [
        {"step": step} | {name: float(step) for name in (names[:3] if step == 1 else names[:5])} for step in (1, 2, 3)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_run(path, tmp_path / "plots" / "run.svg")
    drawn = (tmp_path / "plots" / "run.svg").read_text()
    titles = [RUN_PANELS[name] for name in names]
    # Matplotlib writes the text beside the glyphs that it draws.
    assert [title for title in titles if f"<!-- {title} -->" in drawn] == titles[:5]
    path.write_text('{"step": 1, "evaluation/return": 3.0}\n')
    with pytest.raises(ValueError, match="holds none of loss, gradient_norm"):
        plot_run(path, tmp_path / "run.png")


def test_bad_input_is_named(tmp_path):
    path = write_run(tmp_path / "a", [1.0])
    with pytest.raises(ValueError, match="holds no value of accuracy; its metrics are: loss"):
        plot_learning_curve(path, tmp_path / "a.png", metric="accuracy")
    with pytest.raises(ValueError, match="1 metrics files need as many labels, got 2"):
        plot_learning_curve([path], tmp_path / "a.png", labels=["a", "b"])
    with pytest.raises(ValueError, match="no known picture format; end it with"):
        plot_learning_curve(path, tmp_path / "a.docx")
    with pytest.raises(FileNotFoundError, match="no metrics file"):
        plot_learning_curve(tmp_path / "absent.jsonl", tmp_path / "a.png")


def test_neither_pyplot_nor_a_backend_is_touched(tmp_path):
    path = write_run(tmp_path / "a", [1.0, 2.0])
    source = (
        "import pathlib, sys; from ring_rl.training.plots import plot_learning_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_learning_curve(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", source, str(path), str(tmp_path / "a.pdf")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
