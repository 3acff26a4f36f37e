"""Memory as ring and context grow together: flat on a ring, not on one device; compiled for a tiny model."""

import csv
import json

import pytest

SMALL = [
    "transformer=llama_tiny",
    "transformer.layers=1",
    "transformer.width=32",
    "transformer.query_heads=2",
    "transformer.key_value_heads=1",
    "transformer.head_dim=16",
    "transformer.feed_forward_width=32",
    "transformer.attention_block_size=128",
    "transformer.feed_forward_chunks=1",
    "vocabulary_size=64",
    "tokens_a_device=512",
    "chunks=4",
    "ring_sizes=[1,4]",
]


def test_a_device_of_a_larger_ring_needs_no_more(call_script, tmp_path, capsys):
    call_script("lm_memory", *SMALL, f"output={tmp_path}")
    line = capsys.readouterr().out.strip().splitlines()[-1]
    figures = {name: float(value) for name, value in (each.split("=") for each in line.split())}
    rows = {
        (int(row["devices"]), int(row["tokens"])): row
        for row in csv.DictReader((tmp_path / "memory.csv").read_text().splitlines())
    }
    assert set(rows) == {(1, 512), (4, 2048), (1, 2048)}
    for name in ("training_bytes", "perplexity_bytes"):
        small, ring, alone = (int(rows[case][name]) for case in ((1, 512), (4, 2048), (1, 2048)))
        # A ring holds the blocks of keys and values that are under way, besides; how many does not depend on its size.
        assert ring < 1.6 * small
        assert alone > 1.5 * ring
        assert figures[f"{name}_growth"] == pytest.approx(ring / small, abs=1e-3)
        assert figures[f"{name}_growth_of_one_device"] == pytest.approx(alone / small, abs=1e-3)
    assert json.loads((tmp_path / "summary.json").read_text())["config"]["ring_sizes"] == [1, 4]
    assert (tmp_path / "memory.png").stat().st_size > 0
    assert len((tmp_path / "table.md").read_text().splitlines()) == 5


def test_a_measurement_is_not_overwritten(call_script, refused, tmp_path):
    (tmp_path / "memory.csv").write_text("mine")
    assert "holds memory.csv already" in refused(call_script, "lm_memory", *SMALL, f"output={tmp_path}")
    assert "chunks=5 must divide" in refused(call_script, "lm_memory", *SMALL, "chunks=5")
    assert (tmp_path / "memory.csv").read_text() == "mine"
