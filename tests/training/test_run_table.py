import csv
import io
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.training.run_report import markdown, runs_csv, table_csv
from ring_rl.training.run_table import make_table
from ring_rl.training.saved_runs import find_runs, read_run
from ring_rl.training.statistics import estimate

LOSS = {"loss": "minimize"}


def write_run(folder, config, losses, *, steps=3):
    """A run folder as training leaves it; a loss a step, None for one that is not finite."""
    folder.mkdir(parents=True)
    (folder / "run.lock").touch()
    config = {**config, "run_dir": str(folder), "loop": {"steps": steps}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def table_of(folder, **options):
    goals = options.pop("goals", LOSS)
    runs = [read_run(path, steps_key="loop.steps", goals=goals) for path in find_runs([folder])]
    return make_table(runs, **{"goals": goals, "seed_key": "seed", "ignore": ["run_dir"], **options})


def test_seeds_are_folded_and_the_best_row_comes_first(tmp_path):
    for seed, last in ((0, 1.0), (1, 3.0)):
        write_run(tmp_path / f"slow_{seed}", {"seed": seed, "rate": 0.1}, [9.0, 0.5, last])
        write_run(tmp_path / f"fast_{seed}", {"seed": seed, "rate": 0.2}, [9.0, 8.0, last - 1])
    table = table_of(tmp_path)
    assert [row.settings for row in table.rows] == [{"rate": 0.2}, {"rate": 0.1}]
    assert table.keys == ("rate",)
    slow = table.rows[1]
    assert slow.seeds == (0, 1)
    assert slow.final["loss"] == estimate([1.0, 3.0])
    assert slow.best["loss"].mean == 0.5
    assert table_of(tmp_path, goals={"loss": "maximize"}).rows[0].settings == {"rate": 0.1}
    assert table_of(tmp_path, goals={"loss": "maximize"}).rows[0].best["loss"].mean == 9.0


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([3.0, 2.0], "stopped at step 2 of 3"),
        ([], "stopped at step 0 of 3"),
        ([3.0, 2.0, None], "loss is not finite at its end"),
        ([None, None, None], "it has no metric loss; its metrics are loss"),
    ],
)
def test_a_run_that_did_not_end_well_is_listed_and_its_row_says_so(tmp_path, losses, reason):
    write_run(tmp_path / "good", {"seed": 0}, [3.0, 2.0, 1.0])
    bad = write_run(tmp_path / "bad", {"seed": 1}, losses)
    table = table_of(tmp_path)
    assert [(run.path, run.problem) for run in table.left_out] == [(bad, reason)]
    assert table.rows[0].missing == table.left_out
    assert f"- `{bad}` (seed=1): {reason}" in markdown(table)
    assert "| 1 of 2 |" in markdown(table)
    assert f"{bad},{reason}," in runs_csv(table).replace('"', "")


def test_a_diverged_run_is_called_so(tmp_path):
    write_run(tmp_path / "good", {"seed": 0}, [3.0, 2.0, 1.0])
    bad = write_run(tmp_path / "bad", {"seed": 1}, [3.0])
    (bad / "offending_batch").mkdir()
    (bad / "offending_batch" / "step_1.npz").touch()
    assert table_of(tmp_path).left_out[0].problem == "diverged at step 1 of 3"


def test_a_configuration_that_always_fails_keeps_its_settings(tmp_path):
    write_run(tmp_path / "good", {"seed": 0, "rate": 0.1}, [3.0, 2.0, 1.0])
    write_run(tmp_path / "bad", {"seed": 0, "rate": 10.0}, [3.0])
    table = table_of(tmp_path)
    assert table.keys == ("rate",)
    assert table.rows[0].missing == ()
    assert "(rate=10.0, seed=0): stopped at step 1 of 3" in markdown(table)


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_run_cut_off_at_its_start_is_listed(tmp_path, missing):
    write_run(tmp_path / "good", {"seed": 0}, [3.0, 2.0, 1.0])
    (write_run(tmp_path / "bad", {"seed": 1}, [3.0]) / missing).unlink()
    [left_out] = table_of(tmp_path).left_out
    assert missing in left_out.problem


def test_a_damaged_run_is_listed(tmp_path):
    write_run(tmp_path / "good", {"seed": 0}, [3.0, 2.0, 1.0])
    (write_run(tmp_path / "a", {"seed": 1}, [3.0]) / "metrics.jsonl").write_text("nonsense\n")
    (write_run(tmp_path / "b", {"seed": 2}, [3.0]) / "config.yaml").write_text("a: [")
    (write_run(tmp_path / "c", {"seed": 3}, [3.0]) / "config.yaml").write_text("{}")
    problems = [run.problem for run in table_of(tmp_path).left_out]
    assert [problem.split("(")[0].strip() for problem in problems] == [
        f"line 1 of {tmp_path}/a/metrics.jsonl is no metrics record: 'nonsense'; repair or remove it",
        "config.yaml is no YAML",
        "its configuration has no loop.steps, and no stages",
    ]


def test_no_run_that_counts_is_an_error(tmp_path):
    write_run(tmp_path / "bad", {"seed": 0}, [3.0])
    with pytest.raises(ValueError, match=r"none of the 1 runs counts .*stopped at step 1 of 3"):
        table_of(tmp_path)


def test_the_same_seed_twice_is_refused(tmp_path):
    write_run(tmp_path / "a", {"seed": 0}, [3.0, 2.0, 1.0])
    write_run(tmp_path / "b", {"seed": 0}, [3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match=r"a and .*b are the same configuration with seed=0"):
        table_of(tmp_path)


def test_what_a_name_decides_is_not_shown(tmp_path):
    """Another agent brings settings of its own; the context length of one of them is still swept."""
    chain = {"name": "transformer", "best": 1.0}
    write_run(tmp_path / "a", {"seed": 0, "agent": {**chain, "context": 4}}, [3.0, 2.0, 1.0])
    write_run(tmp_path / "b", {"seed": 0, "agent": {**chain, "context": 8}}, [3.0, 2.0, 1.5])
    write_run(tmp_path / "c", {"seed": 0, "agent": {"name": "cloning", "best": 0.1, "width": 2}}, [3.0, 2.0, 2.0])
    table = table_of(tmp_path)
    assert table.keys == ("agent.name", "agent.context")
    assert list(csv.reader(io.StringIO(table_csv(table))))[3][:3] == ["cloning", "", "1"]


def test_keys_that_hide_a_difference_are_refused(tmp_path):
    write_run(tmp_path / "a", {"seed": 0, "rate": 1, "width": 1}, [3.0, 2.0, 1.0])
    write_run(tmp_path / "b", {"seed": 0, "rate": 1, "width": 2}, [3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="would look alike; add width to keys"):
        table_of(tmp_path, keys=["rate"])
    assert len(table_of(tmp_path, keys=["width"]).rows) == 2


def test_one_seed_has_no_interval_and_the_table_says_so(tmp_path):
    write_run(tmp_path / "a", {"seed": 0}, [3.0, 2.0, 1.0])
    text = markdown(table_of(tmp_path))
    assert text.startswith("| seeds | loss, final | loss, lowest |\n| --- | --- | --- |\n| 1 | 1 | 1 |\n")
    assert "1 of 1 rows have one seed and no interval" in text
    assert "Trained with commit: not recorded." in text


def test_commits_and_devices_of_all_starts_are_named(tmp_path):
    run = write_run(tmp_path / "a", {"seed": 0}, [3.0, 2.0, 1.0])
    starts = [{"step": step, "commit": f"commit{step}", "device": "8 x cpu"} for step in (0, 2)]
    (run / "starts.jsonl").write_text("\n".join(map(json.dumps, starts)))
    assert "Trained with commit: commit0, commit2. Trained with device: 8 x cpu." in markdown(table_of(tmp_path))


def test_folders_are_searched_to_the_bottom_but_not_inside_runs(tmp_path):
    deep = write_run(tmp_path / "x" / "y" / "run", {"seed": 0}, [1.0])
    write_run(deep / "wandb" / "inner", {"seed": 1}, [1.0])
    write_run(tmp_path / ".hydra" / "hidden", {"seed": 2}, [1.0])
    (tmp_path / "x" / "circle").symlink_to(tmp_path)
    assert find_runs([tmp_path, tmp_path / "x"]) == [deep]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no run at or below"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_runs([tmp_path / "nowhere"])


@settings(max_examples=20, deadline=None)
@given(
    runs=st.dictionaries(
        # Numbers of settings: as keys of a dictionary 1, 1.0 and True would be the same.
        st.tuples(st.integers(0, 5), st.integers(0, 3)),
        st.tuples(st.floats(-10, 10), st.booleans()),
        min_size=1,
    )
)
def test_every_run_is_in_one_row_or_left_out(tmp_path_factory, runs):
    folder = tmp_path_factory.mktemp("runs")
    rates = [0.1, 1, 1.0, True, "1", None]
    for number, ((rate, seed), (loss, finished)) in enumerate(runs.items()):
        write_run(folder / str(number), {"seed": seed, "rate": rates[rate]}, [loss] * (3 if finished else 2))
    if not any(finished for _, finished in runs.values()):
        with pytest.raises(ValueError, match="counts"):
            table_of(folder)
        return
    table = table_of(folder)
    in_rows = [run.path for row in table.rows for run in row.runs]
    assert len(table.rows) == len({rate for (rate, _), (_, finished) in runs.items() if finished})
    assert sorted([*in_rows, *(run.path for run in table.left_out)]) == find_runs([folder])
    lines = list(csv.DictReader(io.StringIO(runs_csv(table))))
    assert len(lines) == len(runs)
    assert sum(not line["problem"] for line in lines) == len(in_rows)
