import csv
import json

import pytest

pytestmark = pytest.mark.simulator


@pytest.fixture(scope="module")
def run_dir(call_script, data_root, tmp_path_factory):
    """A run of an agent too young to know anything."""
    path = tmp_path_factory.mktemp("runs") / "young"
    options = ["loop.steps=2", "optimizer.warmup_steps=1", "wandb.mode=disabled", "batch.batch_size=2"]
    small = ["agent.transformer.layers=1", "agent.transformer.width=16", "agent.chain.trajectories=2"]
    call_script("train_agent", f"run_dir={path}", f"data.root={data_root}", *options, *small)
    return path


PROTOCOL = ["protocol.episodes=2", "protocol.rows=2", "render=false"]


def test_an_evaluation_leaves_table_csv_and_pictures(call_script, refused, run_dir, tmp_path, capsys):
    call_script("evaluate_agent", f"runs=[{run_dir}]", f"output={tmp_path / 'out'}", *PROTOCOL)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("agentic_transformer=")
    with (tmp_path / "out" / "returns.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = {row["agent"] for row in rows}
    assert labels == {
        "agentic_transformer",
        "agentic_transformer, context cleared",
        "uniformly random",
        "uniformly random, held 4 steps",
    }
    assert len(rows) == 4 * 2 * 2
    # With the first episode of a context there is nothing yet that could be cleared.
    first = [row["return"] for row in rows if row["episode"] == "0" and row["agent"].startswith("agentic")]
    assert first[:2] == first[2:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    by_hand = [float(row["return"]) for row in rows if row["agent"] == "uniformly random"]
    assert summary["scores"]["uniformly random"]["mean"]["mean"] == pytest.approx(sum(by_hand) / 4, rel=1e-4)
    for name in ("return_by_episode.png", "returns_in_data.png", "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    again = refused(call_script, "evaluate_agent", f"runs=[{run_dir}]", f"output={tmp_path / 'out'}", *PROTOCOL)
    assert "holds an evaluation already; choose another output or set overwrite=true" in again


def test_bad_input(call_script, refused, tmp_path, run_dir):
    def complaint(*options):
        return refused(call_script, "evaluate_agent", f"output={tmp_path / 'out'}", *PROTOCOL, *options)

    assert "no checkpoint" in complaint(f"runs=[{tmp_path / 'nothing'}]")
    assert "no runs to evaluate" in complaint("runs=[]")
    assert "at least 1 episode and 2 rows" in complaint(f"runs=[{run_dir}]", "protocol.rows=1")
    assert not (tmp_path / "out").exists()
