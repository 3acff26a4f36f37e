"""The figure from one command: presets that can be run, prices, and a whole figure in small."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
PRESETS = sorted(path.stem for path in (CONF / "reproduce_lm" / "preset").glob("*.yaml"))


def composed(config_name, overrides=(), folder=CONF):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        return resolve(compose(config_name, overrides=list(overrides)))


@pytest.fixture
def reproduce(load_script):
    """The script's function on a composed configuration, as its command line makes it."""
    script = load_script("reproduce_lm")

    def call(*overrides):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF / "reproduce_lm"), version_base="1.3"):
            cfg = compose("reproduce_lm", overrides=list(overrides))
        script.main.__wrapped__(cfg)

    return call


@pytest.fixture(params=PRESETS)
def config(request, load_script, tmp_path):
    overrides = [f"preset={request.param}", "weights=llama", f"runs={tmp_path}"]
    mapping = composed("reproduce_lm", overrides, CONF / "reproduce_lm")
    return from_mapping(load_script("reproduce_lm").ReproduceLMConfig, mapping)


def test_every_cell_of_a_preset_is_a_training_and_an_evaluation_that_can_be_configured(config, load_script):
    """A typo in a preset must not be found by its last cell."""
    script = load_script("reproduce_lm")
    train_config, evaluate_config = load_script("train_lm").TrainLmConfig, load_script("evaluate_lm").EvaluateLMConfig
    for cell in config.cells:
        name, *overrides = script.training_command(config.preset, cell)
        training = from_mapping(train_config, composed(Path(name).stem, overrides))
        assert (training.seed, training.run_dir) == (cell.seed, cell.run_dir)
        assert training.label == config.preset.variants[cell.variant].label
        lengths = []
        for name, *overrides in script.evaluation_commands(config.preset, cell):
            asked = from_mapping(evaluate_config, composed(Path(name).stem, overrides))
            assert (asked.suite.name, asked.suite.unit, asked.questions.modes) == (
                "line_retrieval",
                "tokens",
                (config.preset.mode,),
            )
            lengths += [(each, asked.suite.samples) for each in asked.suite.lengths]
        assert lengths == [(each.tokens, each.samples) for each in cell.lengths]


def test_claims_are_asked_with_enough_samples(config):
    for claim in config.preset.claims:
        (asked,) = (each for each in config.preset.variants[claim.variant].lengths if each.tokens == claim.tokens)
        assert asked.samples * len(config.preset.seeds) >= (600 if config.preset.name != "paper" else 50)


TINY = """
name: tiny
hardware: nothing at all
expectation: made up
needs_weights: false
train:
  - mesh.sp=1
  - wandb.mode=disabled
  - model.transformer.layers=1
  - model.transformer.width=16
  - model.transformer.head_dim=8
  - stages=single
  - stages.main.length=72
  - stages.main.batch_size=2
  - stages.main.steps=2
  - loop.log_every=1
  - optimizer.warmup_steps=0
  - training_data.queries=2
  - training_data.fewest_lines=2
evaluate: [suite.form=compact, questions.batch_tokens=512]
mode: teacher_forced
seeds: [0, 1]
variants:
  small:
    label: "small, one layer"
    train: []
    evaluate: []
    lengths: [{tokens: 54, samples: 3}, {tokens: 72, samples: 2}]
    expected_seconds: 3600
claims:
  - {variant: small, tokens: 54, accuracy: 0.0, minutes: 60}
  - {variant: small, tokens: 72, accuracy: 1.0, minutes: null}
"""


@pytest.fixture
def tiny(load_script, tmp_path, call_script, monkeypatch):
    """The configuration of a figure of two small runs, whose commands run in this process."""
    script = load_script("reproduce_lm")
    monkeypatch.setattr(script, "run", lambda name, *overrides: call_script(Path(name).stem, *overrides))
    mapping = composed("reproduce_lm", ["preset=cpu"], CONF / "reproduce_lm")
    mapping |= {"preset": yaml.safe_load(TINY), "runs": str(tmp_path / "runs"), "output": str(tmp_path / "results")}
    return from_mapping(script.ReproduceLMConfig, mapping)


def test_a_whole_figure(tiny, load_script, capsys, monkeypatch):
    script = load_script("reproduce_lm")
    script.reproduce(dataclasses.replace(tiny, dry_run=True))
    assert "cells=2 left=2 hours_left=2.00" in capsys.readouterr().out
    assert not tiny.runs.exists()
    with pytest.raises(ValueError, match="seed_0 is not trained to its end; train it first"):
        script.reproduce(dataclasses.replace(tiny, phases=("evaluate",)))
    with pytest.raises(ValueError, match=r"2 of 2 cells are not finished.*; train and evaluate"):
        script.reproduce(dataclasses.replace(tiny, phases=("report",)))

    script.reproduce(tiny)
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert last_line.endswith("cells=2")
    rows = [line.split(",") for line in (tiny.output / "accuracy.csv").read_text().splitlines()]
    assert [row[:4] for row in rows[1:]] == [
        ["small", seed, length, count] for length, count in (("54", "3"), ("72", "2")) for seed in ("0", "1")
    ]
    # A line is nine tokens, as is the question with its answer.
    assert {row[8] for row in rows[1:]} == {"5.0", "7.0"}
    assert (tiny.output / "accuracy_by_length.png").read_bytes().startswith(b"\x89PNG")
    assert "small, one layer" in (tiny.output / "table.md").read_text()
    training = (tiny.output / "training.md").read_text()
    assert "| small, one layer | 1 | 2 | 288 |" in training
    summary = json.loads((tiny.output / "summary.json").read_text())
    assert summary["trained_length"] == {"small": 72}
    assert [claim["holds"] for claim in summary["claims"]] == [True, False]
    assert summary["claims"][0]["samples_a_seed"] == 3

    # Nothing is left to do, and nothing is done again.
    monkeypatch.setattr(script, "run", lambda *command: pytest.fail(f"ran {command}"))
    script.reproduce(tiny)
    assert "cells=2 left=0 hours_left=0.00" in capsys.readouterr().out

    # More samples are a part of the work only.
    small = tiny.preset.variants["small"]
    more = dataclasses.replace(small, lengths=(small.lengths[0], dataclasses.replace(small.lengths[1], samples=4)))
    grown = dataclasses.replace(tiny.preset, variants={"small": more})
    ran = []
    monkeypatch.setattr(script, "run", lambda *command: ran.append(command))
    script.evaluate(dataclasses.replace(tiny, preset=grown))
    assert len(ran) == 2
    assert all("suite.lengths=[72]" in command and "suite.samples=4" in command for command in ran)

    # A run that the preset no longer describes is not passed off as one that it does.
    other = dataclasses.replace(tiny.preset, train=(*tiny.preset.train, "stages.main.steps=7"))
    with pytest.raises(
        ValueError, match=r"other settings than the preset has \(stages.main.steps: saved 2, wanted 7\)"
    ):
        script.reproduce(dataclasses.replace(tiny, preset=other))


def test_what_is_missing_can_be_left_out(tiny, load_script):
    script = load_script("reproduce_lm")
    script.run(*script.training_command(tiny.preset, tiny.cells[0]))
    partial = dataclasses.replace(tiny, partial=True)
    script.evaluate(partial)
    script.report(partial)
    assert "1 of 2" in (tiny.output / "table.md").read_text()
    with pytest.raises(ValueError, match=r"1 of 2 cells are not finished.*or set partial=true"):
        script.report(tiny)


def test_bad_presets_are_one_line(reproduce, refused, tmp_path):
    runs = f"runs={tmp_path}"
    assert "name their folder: weights=" in refused(reproduce, "preset=paper", runs)
    assert "unknown variant nobody" in refused(
        reproduce, runs, "preset.claims=[{variant: nobody, tokens: 1024, accuracy: 1, minutes: null}]"
    )
    assert "where it is not asked" in refused(
        reproduce, runs, "preset.claims=[{variant: plain, tokens: 5, accuracy: 1, minutes: null}]"
    )
    assert "seeds must differ" in refused(reproduce, runs, "preset.seeds=[0,0]")
    assert "lengths of LLaMA's block, the same curriculum must ascend" in refused(
        reproduce, runs, "preset.variants.plain.lengths=[]"
    )
