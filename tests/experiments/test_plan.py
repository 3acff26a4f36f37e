"""A plan from command line to results; its formulas are tested in tests/planning."""

import csv
import json
import re
from functools import partial

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.kernels.hardware import HARDWARE
from ring_rl.planning.memory_model import StepMemory
from ring_rl.planning.topology import machine_named

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
    plan = script.make_plan(configured("hardware=v5e-8", "mesh.sp=4", "mesh.strategy=ring"))
    found, best = plan.found, plan.best
    figures = dict(pair.split("=") for pair in plan.line.split())
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
    assert "every hop hides" in printed
    assert "Assumed: TPU v5e" in printed
    assert plan.note == ""


def test_gpus_are_an_estimate(script, configured, capsys):
    script.make_plan(configured("hardware=gpu:4xH100-80GB"))
    assert "(estimate)" in capsys.readouterr().out


def test_a_plan_without_a_ring_leaves_no_picture_of_one(script, configured, tmp_path):
    script.make_plan(configured("hardware=gpu:4xH100-80GB", "mesh.strategy=ring", "mesh.sp=4"))
    picture = tmp_path / "plan" / "timeline.png"
    assert picture.exists()
    script.make_plan(configured("hardware=gpu:1xH100-80GB", "overwrite=true"))
    assert not picture.exists()


def test_nothing_is_overwritten_unasked(script, configured):
    script.make_plan(configured("hardware=gpu:1xH100-80GB"))
    with pytest.raises(FileExistsError, match="choose another output or set overwrite=true"):
        script.make_plan(configured("hardware=gpu:1xH100-80GB"))


def test_what_does_not_fit_names_the_smallest_that_would(script, configured):
    """The named slice does, and the next smaller one does not."""
    with pytest.raises(ValueError, match=r"no mesh of v5e-4 does; the nearest, .* GiB") as refusal:
        script.make_plan(configured("hardware=v5e-4", "transformer=llama_7b"))
    assert "\n" not in str(refusal.value)
    named = re.search(r"; the smallest that would do is (v5e-(\d+)), as .*sp=", str(refusal.value))
    assert named is not None
    assert script.make_plan(configured(f"hardware={named[1]}", "transformer=llama_7b")).best
    smaller = f"v5e-{int(named[2]) // 2}"
    with pytest.raises(ValueError, match=f"no mesh of {smaller} does"):
        script.make_plan(configured(f"hardware={smaller}", "transformer=llama_7b", "overwrite=true"))


def test_where_nothing_fits_with_all_heads_one_is_tried(script, configured, monkeypatch, capsys):
    """Whatever the formula of memory says: here that all heads at once are too much."""

    def too_much_at_once(sizes, *, compiler):
        return StepMemory({"attention": 2**40 if sizes.request.heads_at_once is None else 2**20}, "attention")

    monkeypatch.setattr("ring_rl.planning.suggest.step_memory", too_much_at_once)
    plan = script.make_plan(configured("hardware=v5e-4"))
    assert "heads_at_once=1 " in plan.line
    assert plan.best.sizes.request.heads_at_once == 1
    assert "with heads_at_once=1, none with all heads at once" in " ".join(capsys.readouterr().out.split())


def test_nodes_of_gpus_are_joined_by_infiniband(script):
    cluster = partial(script.cluster_of, rates_of=None, node_gpus=8)
    one, four = (cluster(machine_named(f"gpu:{count}xH100-80GB")) for count in (8, 32))
    assert (one.node_devices, four.node_devices) == (None, 8)
    assert one.device.name == four.device.name == "H100 NVLink"
    assert four.between_nodes.name == "H100 InfiniBand"
    same = script.cluster_of(machine_named("gpu:32xH100-80GB"), rates_of="H100 InfiniBand", node_gpus=8)
    assert (same.device.name, same.node_devices) == ("H100 InfiniBand", None)
    with pytest.raises(ValueError, match="no rates are known between nodes of MI300X"):
        cluster(machine_named("gpu:16xMI300X-192GB"))


def test_a_core_has_its_share_of_a_chip(script):
    cluster = partial(script.cluster_of, rates_of=None, node_gpus=8)
    assert cluster(machine_named("v3-32")).device.flops_per_second == HARDWARE["TPU v3"].flops_per_second / 2
    assert cluster(machine_named("v4-32")).device == HARDWARE["TPU v4"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=v5e-7"], r"^unknown TPU slice 'v5e-7'.*; the smallest that would do is v5e-1, as 1 device"),
        (["hardware=v7-8"], r"^unknown TPU slice 'v7-8'; .*such as v5e-256$"),
        (["hardware=gpu:4"], r"^cannot read 'gpu:4'; .* such as gpu:8xA100-80GB$"),
        (["hardware=gpu:4xAbacus-80GB"], r"^no rates are known of 'Abacus NVLink'; set rates_of to one of .*H100"),
        (["hardware=v5e-8", "batch_tokens=1"], r"^a batch of 1 tokens holds no sequence.*; raise batch_tokens$"),
        (
            ["hardware=v5e-8", "mesh.sp=16"],
            r"^no mesh of 8 devices has sp=16: .*; the smallest that would do is v5e-16, as .*sp=16",
        ),
        (["hardware=v5e-8", "mesh.tp=3"], r"^no mesh of 8 devices has tp=3: .*; none up to v5e-256 would do: shorten"),
        (
            ["hardware=gpu:2xH100-80GB", "transformer=llama_7b", "mesh.sp=1", "mesh.dp=1", "mesh.tp=1"],
            r"^no mesh of gpu:2xH100-80GB does; .*; (the smallest that would do is|none up to) gpu:",
        ),
    ],
)
def test_impossible_requests_are_refused_in_a_line_that_helps(script, configured, overrides, message):
    with pytest.raises(ValueError, match=message) as refusal:
        script.make_plan(configured(*overrides))
    assert "\n" not in str(refusal.value)


def test_bad_settings_are_refused(configured):
    for override, message in (
        ("policies=[]", "policies needs at least one"),
        ("timeline.slow_devices=[[0,0]]", "a positive speed"),
        ("token_budget=0", "token_budget must be positive"),
        ("rates.link_share=2", "link_share must lie in"),
        ("node_gpus=0", "node_gpus must be at least 1"),
        ("heads_at_once=0", "heads_at_once must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            configured(override)
