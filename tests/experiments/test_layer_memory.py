"""Table 1 in compiled memory: what the script makes of the compiler's figures."""

import csv
import json

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.planning.layer_activations import LayerMemory

SMALL = ["tokens=1024", "dense_tokens=1024", "width=32", "heads=4", "block_size=64", "feed_forward_chunks=16"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("layer_memory")


@pytest.fixture
def config(script, pytestconfig):
    def call(*overrides):
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            return from_mapping(script.LayerMemoryConfig, resolve(compose("layer_memory", overrides=list(overrides))))

    return call


@pytest.fixture
def made_up(script, monkeypatch):
    """Five times the table in place of compilation, q, k, v and out in a blockwise attention."""
    asked = []

    def compile_layer(program, shape, devices, *, attention_block, heads_at_once):
        asked.append(program)
        array = shape.element_bytes * shape.tokens * shape.width
        if program.part == "feed_forward":
            arrays = 1 if program.blockwise else 4
        elif program.dense:
            arrays = shape.heads * shape.tokens / shape.width
        else:
            arrays = 3 if program.ring else 2
        return LayerMemory(activation_bytes=int(5 * arrays * array), compile_seconds=0.5)

    monkeypatch.setattr(script, "compile_layer", compile_layer)
    return asked


def test_ratios_are_held_against_the_table(script, made_up, call_script, refused, capsys, tmp_path):
    output = tmp_path / "memory"
    call_script("layer_memory", f"output={output}", *SMALL)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    figures = dict(figure.split("=") for figure in last.split())
    for direction in ("forward", "training"):
        assert figures[f"{direction}_vanilla_off"] == "+0.000"
        assert figures[f"{direction}_memory_efficient_attention_off"] == "+0.000"
        # Two arrays where the table counts one; a ring of one would have three.
        assert figures[f"{direction}_blockwise_transformer_off"] == "+1.000"
        assert figures[f"{direction}_blockwise_transformer_as_ring_off"] == "-0.333"
    # Eight cells, of which some are the same program: three attentions and two feed-forwards, in two directions.
    assert len(made_up) == len(set(made_up)) == 10

    with (output / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    array = 4 * 1024 * 32
    assert [int(row["paper_bytes"]) / array for row in rows[:4]] == [4 * 1024 / 32, 4, 1, 3]
    assert (
        "| ring | forward | 1,024 | 15.00 s h | 5.00 s h | 2 | 3.00 s h | 5.00 |  |  |"
        in (output / "table.md").read_text()
    )
    assert (output / "memory.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["compile_seconds"] == 5.0
    assert {"commit", "versions"} <= set(summary)
    assert "holds memory.csv" in refused(call_script, "layer_memory", f"output={output}", *SMALL)


def test_the_vanilla_row_may_have_fewer_tokens(script, made_up, config):
    rows, _ = script.compiled(config(*SMALL, "dense_tokens=512"))
    assert {row.architecture: row.tokens for row in rows}["vanilla"] == 512
    assert all(script.deviation(rows, row) == pytest.approx(0) for row in rows if row.architecture == "vanilla")


def test_the_paper_counts_bfloat16(script, config):
    shape = config(*SMALL).shape("ring")
    assert script.paper_bytes("ring", shape) == 2 * 6 * 1024 * 32


def test_refusals(call_script, refused, tmp_path):
    small = ("layer_memory", f"output={tmp_path / 'memory'}", *SMALL)
    assert "machine=v5e-8 has 8 chips, not 4" in refused(call_script, *small, "machine=v5e-8", "devices=4")
    assert "devices must be at least 2 for a ring, got 1" in refused(call_script, *small, "devices=1")
    assert "unknown TPU slice 'v5e-9'" in refused(call_script, *small, "machine=v5e-9")
