"""Which ways to attend fit: compiled for a tiny model, and what the script makes of the figures."""

import csv
import json

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.training.dry_run import DryRun
from ring_rl.training.tables import markdown_table

SMALL = [
    "trajectories=[2]",
    "episode_steps=64",
    "devices=2",
    "agent.transformer.layers=2",
    "agent.transformer.width=16",
    "agent.transformer.feed_forward_width=64",
    "agent.transformer.query_heads=2",
    "agent.transformer.key_value_heads=2",
    "agent.transformer.head_dim=8",
    "agent.transformer.attention_block_size=64",
    "agent.transformer.compute_dtype=float32",
]
GB = 10**9


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("attention_memory")


@pytest.fixture
def composed(pytestconfig):
    def call(name, *overrides):
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            return resolve(compose(name, overrides=list(overrides)))

    return call


@pytest.fixture
def made_up(script, monkeypatch):
    """Figures in place of compilation: 1 GB a trajectory; dense attention ten times that, and refused at 128."""

    def compiled(config, variant, trajectories):
        dense = variant.strategy == "dense"
        needed = None if dense and trajectories == 128 else trajectories * GB * (10 if dense else 1)
        return DryRun(
            mesh="",
            parameters=350_000_000,
            tokens=config.devices * trajectories * config.episode_steps * 4,
            model_flops=None,
            state_bytes=0,
            needed_bytes=needed,
            available_bytes=None,
            available_source="",
            compiler_message=None,
        )

    monkeypatch.setattr(script, "compiled", compiled)


def test_each_choice_needs_less_than_the_one_before(script, composed):
    config = from_mapping(script.AttentionMemoryConfig, composed("attention_memory", *SMALL))
    needed = {
        name: script.compiled(config, config.variants[name], 2).needed_bytes
        for name in ("vanilla", "memory_efficient", "blockwise", "ring")
    }
    assert list(needed.values()) == sorted(needed.values(), reverse=True)
    # Both layers keep the weights and the logits of 512 x 512 scores of 2 heads in float32.
    scores = 4 * 2 * 512 * 512
    assert needed["vanilla"] - needed["memory_efficient"] > 2 * scores
    assert needed["ring"] < 0.8 * needed["blockwise"]


def test_what_is_compiled_is_what_attention_sets(script, composed):
    """The group that trains an agent so, and the variants that are measured, are one."""
    variants = from_mapping(script.AttentionMemoryConfig, composed("attention_memory")).variants
    for name in ("vanilla", "memory_efficient", "blockwise", "ring"):
        trained, variant = composed("train_agent", f"attention={name}"), variants[name]
        transformer = trained["agent"]["transformer"]
        assert trained["parallel"]["strategy"] == variant.strategy
        assert trained["parallel"]["weights_over_ring"] == variant.chain_over_devices
        assert transformer["saved_activations"] == variant.saved_activations
        assert transformer["feed_forward_chunks"] == variant.feed_forward_chunks
        alone = {"dp": 1, "fsdp": -1, "tp": 1, "sp": 1}
        assert trained["mesh"] == ({**alone, "fsdp": 1, "sp": -1} if variant.chain_over_devices else alone)


def test_the_preset_has_the_size_that_the_paper_names(script, composed):
    config = from_mapping(script.AttentionMemoryConfig, composed("attention_memory"))
    trunk = config.agent.transformer
    layer = trunk.width * trunk.head_dim * 2 * (trunk.query_heads + trunk.key_value_heads)
    layer += 2 * trunk.width * trunk.feed_forward_width
    assert trunk.layers * layer == pytest.approx(350e6, rel=0.02)
    assert (config.trajectories, config.episode_steps) == ((32, 128), 1000)


def test_the_report_says_what_fits_where(call_script, made_up, tmp_path, capsys):
    call_script("attention_memory", f"output={tmp_path}")
    with (tmp_path / "memory.csv").open() as file:
        rows = {(row["attention"], int(row["trajectories"])): row for row in csv.DictReader(file)}
    assert len(rows) == 12
    assert rows["ring", 32]["tokens"] == "128000"
    verdicts = lambda *key: [rows[key][name] for name in ("A100 NVLink", "H200 NVLink", "TPU v4")]  # noqa: E731
    assert verdicts("ring", 32) == ["fits", "fits", "fits"]
    assert verdicts("ring", 128) == ["oom", "fits", "oom"]
    assert verdicts("vanilla", 128) == ["oom", "oom", "oom"]
    assert rows["vanilla", 128]["needed_bytes"] == ""
    table = (tmp_path / "table.md").read_text().splitlines()
    (blockwise,) = [line for line in table if line.startswith("| blockwise") and "512,000" in line]
    assert [cell.strip() for cell in blockwise.split("|")[-5:-1]] == ["oom", "fits", "oom", "oom"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert np.isclose(summary["hardware"]["TPU v4"]["memory_bytes"], 32e9)
    last = dict(pair.split("=") for pair in capsys.readouterr().out.splitlines()[-1].split())
    assert last["vanilla_32"] == "320.0:oom"
    assert last["vanilla_128"] == "inf:oom"
    assert last["ring_32"] == "32.0:fits"


def test_bad_input_is_refused_in_one_line(call_script, refused, made_up, tmp_path):
    call = lambda *overrides: refused(call_script, "attention_memory", f"output={tmp_path}", *overrides)  # noqa: E731
    assert "unknown hardware 'abacus'; choose of A100 NVLink" in call("hardware=[abacus]")
    assert "paper.spiral is no variant" in call("+paper.spiral={}")
    assert list(tmp_path.iterdir()) == []
    call_script("attention_memory", f"output={tmp_path}")
    assert "overwrite=true" in call()


def test_the_committed_table_follows_from_its_figures_and_says_what_the_paper_says(script, composed, pytestconfig):
    folder = pytestconfig.rootpath / "experiments" / "results" / "attention_memory"
    config = from_mapping(script.AttentionMemoryConfig, composed("attention_memory"))
    with (folder / "memory.csv").open() as file:
        read = list(csv.DictReader(file))
    rows = [
        script.Row(
            variant=row["attention"],
            trajectories=int(row["trajectories"]),
            tokens=int(row["tokens"]),
            parameters=int(row["parameters"]),
            needed_bytes=int(row["needed_bytes"]),
        )
        for row in read
    ]
    assert (folder / "table.md").read_text() == markdown_table(script.table_rows(config, rows))
    # What is called vanilla there is what it was compiled as.
    for row in read:
        variant = config.variants[row["attention"]]
        assert (row["strategy"], row["saved_activations"]) == (variant.strategy, variant.saved_activations)
    verdicts = {(row.variant, str(row.trajectories)): row.verdict("A100 NVLink") for row in rows}
    published = {(name, count): said for name, each in config.paper.items() for count, said in each.items()}
    assert published.items() <= verdicts.items()
