import csv
import json
import re

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
    others = "protocol.other_target_fractions=[0.7]"
    call_script("evaluate_agent", f"runs=[{run_dir}]", f"output={tmp_path / 'out'}", *PROTOCOL, others)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("agentic_transformer=")
    with (tmp_path / "out" / "returns.csv").open() as file:
        rows = list(csv.DictReader(file))
    conditions = {(row["agent"], row["context"], row["target_fraction"], row["headline"]) for row in rows}
    assert conditions == {
        ("agentic_transformer", "carried", "0.85", "1"),
        ("agentic_transformer", "cleared", "0.85", "1"),
        ("agentic_transformer", "carried", "0.7", "0"),
        ("agentic_transformer", "cleared", "0.7", "0"),
        ("uniformly random", "none", "", "1"),
        ("uniformly random, held 4 steps", "none", "", "1"),
    }
    assert len(rows) == 6 * 2 * 2
    # With the first episode of a context there is nothing yet that could be cleared.
    first = {row["context"]: row["return"] for row in rows if row["row"] == row["episode"] == "0" and row["headline"]}
    assert first["carried"] == first["cleared"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    by_hand = [float(row["return"]) for row in rows if row["agent"] == "uniformly random"]
    assert summary["scores"]["uniformly random"]["mean"]["mean"] == pytest.approx(sum(by_hand) / 4, rel=1e-4)
    # The random policy is the 0 of the scale, the best of the data its 100.
    assert summary["return_scale"]["random"] == pytest.approx(sum(by_hand) / 4, rel=1e-4)
    assert summary["return_scale"]["best"] == summary["data"]["best"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"\| uniformly random \| .* \| 0\.0 \[", table)
    assert "agentic_transformer, target 0.7 of best" in table
    (test,) = summary["in_context"].values()
    paired = [
        [
            float(row["return"])
            for row in rows
            if (row["context"], row["headline"], row["episode"]) == (context, "1", "1")
        ]
        for context in ("carried", "cleared")
    ]
    by_hand = sum(a - b for a, b in zip(*paired, strict=True)) / 2
    assert test["over_rows"]["difference"]["mean"] == pytest.approx(by_hand, abs=1e-2)
    assert (test["unit"], summary["purpose"]) == ("environment rows", "reporting")
    assert "agentic_transformer: carried - cleared" in (tmp_path / "out" / "in_context.md").read_text()
    pictures = ("return_by_episode", "return_by_target", "returns_in_data", "in_context", "performance_profile")
    for name in (*(f"{each}.png" for each in pictures), "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    # Devices that share the cache change rounding only, which a swinging pole makes more of; test_rollout is exact.
    (tmp_path / "shared").mkdir()
    # Of an earlier evaluation, which had a context to clear.
    (tmp_path / "shared" / "in_context.png").write_bytes(b"stale")
    once_more = [
        f"output={tmp_path / 'shared'}",
        "overwrite=true",
        "cache_devices=4",
        "random_policy=false",
        "cleared_context=false",
    ]
    call_script("evaluate_agent", f"runs=[{run_dir}]", *once_more, *PROTOCOL)
    shared = json.loads((tmp_path / "shared" / "summary.json").read_text())["scores"]["agentic_transformer"]
    assert shared["mean"]["mean"] == pytest.approx(summary["scores"]["agentic_transformer"]["mean"]["mean"], rel=0.1)
    assert not (tmp_path / "shared" / "in_context.png").exists()
    again = refused(call_script, "evaluate_agent", f"runs=[{run_dir}]", f"output={tmp_path / 'out'}", *PROTOCOL)
    assert "returns.csv" in again
    assert "already; choose another output or set overwrite=true" in again


def test_bad_input(call_script, refused, tmp_path, run_dir):
    def complaint(*options):
        return refused(call_script, "evaluate_agent", f"output={tmp_path / 'out'}", *PROTOCOL, *options)

    assert "no checkpoint" in complaint(f"runs=[{tmp_path / 'nothing'}]")
    assert "no runs to evaluate" in complaint("runs=[]")
    assert "at least 1 episode and 2 rows" in complaint(f"runs=[{run_dir}]", "protocol.rows=1")
    assert "two runs of agentic_transformer have seed 0" in complaint(f"runs=[{run_dir},{run_dir}]")
    too_long = complaint(f"runs=[{run_dir}]", "protocol.episodes=3")
    assert "3 episodes do not fit into one context of 2, which agentic_transformer has" in too_long
    assert "must be different finite numbers" in complaint(
        f"runs=[{run_dir}]", "protocol.other_target_fractions=[0.85]"
    )
    assert "needs 64 devices, but there are 8" in complaint(f"runs=[{run_dir}]", "cache_devices=64")
    assert "must be at least 0, got -1" in complaint(f"runs=[{run_dir}]", "protocol.seed=-1")


def test_my_own_notes_are_not_overwritten(call_script, refused, tmp_path, run_dir):
    (tmp_path / "table.md").write_text("my notes")
    refused(call_script, "evaluate_agent", f"runs=[{run_dir}]", f"output={tmp_path}", *PROTOCOL)
    assert (tmp_path / "table.md").read_text() == "my notes"


def test_an_agent_of_shorter_episodes_is_refused(call_script, refused, tmp_path):
    import numpy as np

    from ring_rl.agent.episodes.exorl import write_episode
    from ring_rl.agent.episodes.trajectory import Trajectory

    buffer = tmp_path / "cartpole" / "policy_search_cartpole_swingup" / "buffer"
    buffer.mkdir(parents=True)
    for index in range(3):
        generator = np.random.default_rng(index)
        short = Trajectory(
            observations=generator.normal(size=(41, 5)).astype(np.float32),
            actions=np.zeros((40, 1), np.float32),
            rewards=generator.uniform(size=40).astype(np.float32),
            discounts=np.ones(40, np.float32),
            physics=np.zeros((41, 4)),
        )
        write_episode(buffer, index, short)
    options = ["loop.steps=2", "optimizer.warmup_steps=1", "wandb.mode=disabled", "batch.batch_size=2"]
    small = ["agent.transformer.layers=1", "agent.transformer.width=16", "agent.chain.trajectories=2"]
    call_script("train_agent", f"run_dir={tmp_path / 'run'}", f"data.root={tmp_path}", *options, *small)
    complaint = refused(call_script, "evaluate_agent", f"runs=[{tmp_path / 'run'}]", f"output={tmp_path}", *PROTOCOL)
    assert "was trained on episodes of 40 control steps, cartpole_swingup has 1000" in complaint
