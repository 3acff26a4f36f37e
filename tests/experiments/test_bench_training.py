"""The training benchmark in small, and its search for the longest context with a made-up memory."""

import csv
import json

import pytest

TINY = [
    "transformer@agent.transformer=tiny",
    "agent.transformer.width=16",
    "agent.transformer.layers=1",
    "episode_steps=8",
    "trajectories=[2]",
    "steps=1",
    "mesh.sp=1",
]


def test_it_times_a_step_and_says_where(call_script, tmp_path, capsys):
    call_script("bench_training", *TINY, "longest=false", "peak_flops_per_second=1e12", f"output={tmp_path / 'out'}")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    figures = dict(pair.split("=") for pair in last.split())
    assert int(figures["tokens"]) == 2 * 8 * 4
    assert 0 < float(figures["seconds"]) < 60
    assert 0 <= float(figures["model_flops_utilisation"]) < 1
    assert figures["longest_tokens"] == "unknown"
    (row,) = csv.DictReader((tmp_path / "out" / "training.csv").open())
    assert row["trajectories"] == "2"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config"]["episode_steps"] == 8
    with pytest.raises(SystemExit):
        call_script("bench_training", *TINY, f"output={tmp_path / 'out'}")
    assert "set overwrite=true" in capsys.readouterr().err


@pytest.mark.parametrize("most", [2, 3, 8, 13, 100])
def test_the_search_ends_within_an_eighth_of_the_longest(load_script, monkeypatch, most):
    script = load_script("bench_training")

    def made_up_step(config, trajectories):
        if trajectories > most:
            raise script.DoesNotFit
        return script.Measured(
            trajectories=trajectories,
            tokens=10 * trajectories,
            parameters=1,
            model_flops=1,
            needed_bytes=1,
            seconds=1.0,
            model_flops_utilisation=None,
            memory_gib=1.0,
        )

    monkeypatch.setattr(script, "timed_step", made_up_step)
    monkeypatch.setattr(script.dataclasses, "replace", lambda config, **_: config)
    found = script.longest_context(None, made_up_step(None, 2), lambda _: None)
    longest = max([2, *(row.trajectories for row in found)])
    assert longest <= most <= longest + max(1, longest // 8)
