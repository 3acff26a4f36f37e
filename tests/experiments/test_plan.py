"""A plan from command line to results; its formulas are tested in tests/planning."""

import csv
import json

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

SMALL = ["transformer=llama_tiny", "vocabulary_size=512", "context=65536", "batch_tokens=131072", "loss_chunks=4"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("plan")


@pytest.fixture
def configured(script, pytestconfig, tmp_path):
    def configured(*overrides):
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            composed = compose("plan", overrides=[*SMALL, f"output={tmp_path}/plan", *overrides])
        return from_mapping(script.PlanConfig, resolve(composed))

    return configured


def test_a_plan_lists_meshes_and_draws_the_ring(script, configured, tmp_path, capsys):
    found, line = script.plan(configured("hardware=v5e-8", "mesh.sp=4", "mesh.strategy=ring"))
    best = found.fitting[0]
    figures = dict(pair.split("=") for pair in line.split())
    assert (figures["sp"], figures["strategy"], figures["available_gib"]) == ("4", "ring", "15.750")
    assert float(figures["memory_gib"]) == pytest.approx(best.memory.total / 2**30, abs=1e-3)
    # The device at half its speed holds all others up, a whole ring long.
    assert 1.5 < float(figures["slow_device_factor"]) <= 2.01
    with (tmp_path / "plan" / "meshes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.fitting)
    assert float(rows[0]["seconds"]) == best.time.seconds
    summary = json.loads((tmp_path / "plan" / "summary.json").read_text())
    assert sum(summary["best"]["memory"].values()) == best.memory.total
    assert set(summary["timeline_seconds"]) == {
        f"{direction}, {which}"
        for direction in ("forward", "backward")
        for which in ("all alike", "slow devices", "slow links")
    }
    assert (tmp_path / "plan" / "timeline.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "a hop hides" in printed
    assert "Assumed: TPU v5e" in printed


def test_gpus_are_an_estimate(script, configured, capsys):
    script.plan(configured("hardware=gpu:4xH100-80GB"))
    assert "(estimate)" in capsys.readouterr().out


def test_what_does_not_fit_names_what_would(script, configured):
    with pytest.raises(ValueError, match=r"no mesh of v5e-4 does; the nearest, .* GiB.*; v5e-\d+ would do, as dp="):
        script.plan(configured("hardware=v5e-4", "transformer=llama_7b"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=v5e-7"], "unknown TPU slice 'v5e-7'"),
        (["hardware=gpu:4xAbacus-80GB"], "no rates are known of 'Abacus NVLink'"),
        (["hardware=v5e-8", "batch_tokens=1"], "holds no sequence"),
        (["hardware=v5e-8", "mesh.tp=3"], "no mesh of 8 devices"),
    ],
)
def test_impossible_requests_are_refused(script, configured, overrides, message):
    with pytest.raises(ValueError, match=message):
        script.plan(configured(*overrides))


def test_bad_settings_are_refused(configured):
    for override, message in (
        ("policies=[]", "policies needs at least one"),
        ("timeline.slow_devices=[[0,0]]", "a positive speed"),
        ("token_budget=0", "token_budget must be positive"),
        ("rates.link_share=2", "link_share must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            configured(override)
