"""What each memory option saves: compiled for a tiny model, and how the script searches and reports."""

import csv
import json

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

# Enough tokens for every option to save something that it is made for, and little of all else.
SMALL = [
    "tokens=2048",
    "devices=2",
    "layout=contiguous",
    "vocabulary=512",
    "transformer.layers=2",
    "transformer.width=16",
    "transformer.query_heads=2",
    "transformer.key_value_heads=2",
    "transformer.head_dim=8",
    "transformer.feed_forward_width=128",
    "transformer.attention_block_size=256",
    "options.feed_forward_chunks=4",
    "options.loss_chunks=8",
]
OPTIONS = [
    "saved activations: none",
    "feed-forward in 4 steps",
    "loss in 8 steps",
    "weights and moments sharded over the ring",
]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("memory_by_option")


@pytest.fixture
def config(script, pytestconfig):
    with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
        return from_mapping(script.MemoryByOptionConfig, resolve(compose("memory_by_option", overrides=SMALL)))


@pytest.fixture
def made_up(script, monkeypatch):
    """A made-up cost in place of compilation: (1 + what the options leave of 9) MiB for 2048 tokens."""

    def needed(config, options, tokens):
        activations = {"products": 3, "attention": 2, "none": 1}[options.saved_activations]
        chunked = 2 / options.feed_forward_chunks + 2 / options.loss_chunks
        state = 2 / (config.devices if options.weights_over_ring else 1)
        return round(2**20 * (1 + tokens / 2048 * (activations + chunked) + state))

    monkeypatch.setattr(script, "needed", needed)


def rows_of(folder):
    with (folder / "memory.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_each_option_saves_memory_and_all_together_save_most(script, config):
    every = script.variants(config)
    compiled = {
        name: script.needed(config, every[name], config.tokens)
        for name in ("plain ring", *OPTIONS, script.ALL_TOGETHER)
    }
    for name in OPTIONS:
        assert compiled[script.ALL_TOGETHER] < compiled[name] < compiled["plain ring"], compiled


def test_every_option_has_a_row_alone_and_one_without_it(script, config):
    rows = script.variants(config)
    further = [f"saved activations: {policy}" for policy in config.further_policies]
    without = [f"all but: {name}" for name in OPTIONS]
    assert list(rows) == ["plain ring", *further, *OPTIONS, script.ALL_TOGETHER, *without]
    fields = vars(config.plain)
    for name in OPTIONS:
        changed = [field for field in fields if getattr(rows[name], field) != fields[field]]
        assert len(changed) == 1
        left = [field for field in fields if getattr(rows[f"all but: {name}"], field) == fields[field]]
        assert left == changed


def test_the_report_holds_every_row_and_how_far_the_same_memory_reaches(
    script, made_up, call_script, refused, capsys, tmp_path
):
    output = tmp_path / "memory"
    arguments = ("memory_by_option", f"output={output}", *SMALL, "multiples=[2,3,4,8]")
    call_script(*arguments)
    # Plain 10 MiB; all together 1 + (1 + 0.5 + 0.25) + 1, and 1.75 more for each further context: 4 fit, 8 do not.
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "plain_mib=10 all_mib=4 context_ratio_in_same_memory=4"

    rows = rows_of(output)
    assert {"plain ring", *OPTIONS, *(f"all but: {name}" for name in OPTIONS)} < set(rows)
    assert rows["loss in 8 steps"]["loss_chunks"] == "8"
    assert float(rows["all together, 4 x the context"]["needed_bytes"]) == 2**20 * (2 + 4 * 1.75)
    table = (output / "table.md").read_text()
    assert table.count("\n") == 2 + len(rows)
    assert "| loss in 8 steps | 2,048 | 8 | 82% |" in table
    assert "| all together, 8 x the context | 16,384 | 16 | 160% |" in table
    assert (output / "memory.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["config"]["tokens"] == 2048
    assert {"commit", "device", "versions"} <= set(summary)

    before = (output / "memory.csv").read_bytes()
    assert "holds memory.csv" in refused(call_script, *arguments)
    assert (output / "memory.csv").read_bytes() == before
    call_script(*arguments, "overwrite=true", "multiples=[]")
    assert not any("x the context" in name for name in rows_of(output))


def test_the_search_ends_with_the_first_context_that_does_not_fit(script, made_up, call_script, tmp_path, capsys):
    call_script("memory_by_option", f"output={tmp_path / 'memory'}", *SMALL, "multiples=[5,6,7]")
    contexts = [name for name in rows_of(tmp_path / "memory") if "x the context" in name]
    assert contexts == ["all together, 5 x the context"]
    assert capsys.readouterr().out.strip().endswith("context_ratio_in_same_memory=1")


@pytest.mark.parametrize("multiples", ["[4,2]", "[2,2]", "[1,2]"])
def test_contexts_must_ascend(call_script, refused, tmp_path, multiples):
    complaint = refused(call_script, "memory_by_option", f"output={tmp_path / 'memory'}", f"multiples={multiples}")
    assert "multiples must ascend and be at least 2" in complaint
    assert not (tmp_path / "memory").exists()
