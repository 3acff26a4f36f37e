"""The engine beside a bare loop, tiny: that both take the same steps, and what is reported of them."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

SMALL = [
    "virtual_devices=2",
    "mesh.sp=2",
    "agent.transformer.layers=1",
    "agent.transformer.width=16",
    "agent.transformer.head_dim=4",
    "agent.transformer.feed_forward_width=16",
    "agent.chain.trajectories=2",
    "batch.batch_size=2",
    "optimizer.warmup_steps=1",
    "episodes=4",
    "episode_steps=20",
    "rounds=2",
    "steps=5",
    "log_every=2",
]


@dataclasses.dataclass
class Measured:
    """One call of the script: where it wrote to, its last line, and the two loops that it compiled."""

    output: Path
    last_line: str
    contest: Any


@pytest.fixture(scope="module")
def measured(load_script, call_script, tmp_path_factory):
    script, output = load_script("bench_engine"), tmp_path_factory.mktemp("bench") / "engine"
    contests, printed = [], io.StringIO()
    make = script.Contest
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(script, "Contest", lambda config: contests.append(make(config)) or contests[-1])
        call_script("bench_engine", f"output={output}", *SMALL)
    return Measured(output, printed.getvalue().strip().splitlines()[-1], contests[0])


def test_the_report_follows_from_its_rounds(measured):
    result = json.loads((measured.output / "engine.json").read_text())
    engine, bare = (np.array(result["seconds_a_step"][name]) for name in ("engine", "bare"))
    assert engine.shape == bare.shape == (2,)
    assert (engine > 0).all()
    assert (bare > 0).all()
    assert result["engine_over_bare_loop"] == pytest.approx(np.median(engine / bare))
    assert result["engine_ms"] == pytest.approx(1e3 * np.median(engine))
    assert result["bare_ms"] == pytest.approx(1e3 * np.median(bare))
    assert result["input_wait"] == pytest.approx(np.median(result["input_waits"]))
    assert all(0 <= wait <= 1 for wait in result["input_waits"])
    assert result["config"]["mesh"]["sp"] == 2
    assert {"commit", "device", "versions"} <= set(result)
    assert dict(word.split("=") for word in measured.last_line.split()) == {
        "engine_over_bare_loop": f"{result['engine_over_bare_loop']:.3f}",
        "engine_ms": f"{result['engine_ms']:.1f}",
        "bare_ms": f"{result['bare_ms']:.1f}",
        "input_wait": f"{result['input_wait']:.4f}",
    }
    title, _, theirs, mine = (measured.output / "table.md").read_text().splitlines()
    assert title == "| loop | ms a step | of the bare loop | waiting for input |"
    assert theirs.endswith(f"| {result['bare_ms']:.1f} | 1.000 |  |")
    shown = f"{result['engine_ms']:.1f} | {result['engine_over_bare_loop']:.3f} | {100 * result['input_wait']:.2f}%"
    assert mine == f"| the engine | {shown} |"


def test_a_measurement_is_not_overwritten(measured, call_script, refused):
    before = (measured.output / "engine.json").read_bytes()
    assert "holds engine.json" in refused(call_script, "bench_engine", f"output={measured.output}", *SMALL)
    assert (measured.output / "engine.json").read_bytes() == before


def test_both_loops_take_the_same_steps(measured):
    contest = measured.contest
    _, state = contest._begin()
    parameters, optimizer_state = (jax.tree.map(jax.numpy.copy, x) for x in (state.parameters, state.optimizer_state))
    for _ in range(3):
        parameters, optimizer_state, loss = contest.bare_step(
            parameters, optimizer_state, contest.batch, jax.random.key(0)
        )
        state, metrics = contest.engine_step(state, contest.batch)
        np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(state.parameters), jax.tree.leaves(parameters), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("rounds=0", "rounds must be at least 1, got 0"),
        ("steps=20", "steps must be more than log_every=20"),
    ],
)
def test_what_cannot_be_measured_is_refused(call_script, refused, tmp_path, override, rule):
    assert rule in refused(call_script, "bench_engine", f"output={tmp_path / 'engine'}", override)
    assert not (tmp_path / "engine").exists()
