"""The entry point that asks language models: every suite, on a model that knows nothing."""

import csv
import json
import shutil

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from ring_rl.config import to_mapping
from ring_rl.lm.key_words import key_words
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.compact_tokenizer import compact_tokenizer
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.state import TrainState
from small_models import small_language_model, small_transformer

TRANSFORMER = small_transformer(layers=1, attention_block_size=128)


@pytest.fixture(scope="module")
def save_run():
    """`save_run(folder, tokenizer)`: a run's checkpoint of random weights, as training leaves it."""

    def save(folder, tokenizer, *, step=3, weights=0):
        config = small_language_model(vocabulary_size=tokenizer.vocabulary_size, transformer=TRANSFORMER)
        parameters = nnx.state(LanguageModel(config, rngs=nnx.Rngs(weights)), nnx.Param)
        state = TrainState(jnp.asarray(step), parameters, optax.sgd(0.1).init(parameters))
        extra = {"label": "young", "seed": 0, "tokenizer": tokenizer.to_mapping()}
        with Checkpointer(folder / "checkpoints", keep=2, model_config=to_mapping(config), extra=extra) as checkpointer:
            checkpointer.save(state)
        return folder

    return save


@pytest.fixture(scope="module")
def lines_run(save_run, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "lines", compact_tokenizer(key_words("small")))


@pytest.fixture(scope="module")
def byte_run(save_run, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "bytes", ByteTokenizer())


def asked(call_script, run_dir, output, *options):
    call_script("evaluate_lm", "model=run", f"model.run_dir={run_dir}", f"output={output}", *options)
    return json.loads((output / "summary.json").read_text())


SMALL_LINES = ["suite.lengths=[54,108]", "suite.samples=4", "questions.batch_tokens=256", "questions.chunk_size=32"]


def test_an_evaluation_leaves_samples_tables_and_pictures_and_goes_on(
    call_script, refused, save_run, lines_run, tmp_path, capsys
):
    output = tmp_path / "out"
    both = "questions.modes=[teacher_forced,generated]"
    with pytest.warns(UserWarning, match=r"beyond the 64 positions that the model was trained on \(rotary_base=100"):
        summary = asked(call_script, lines_run, output, *SMALL_LINES, both)
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert last_line.startswith("compact_lines_54_generated=")
    assert {(each["mode"], each["length"]) for each in summary["scores"]} == {
        (mode, length) for mode in ("teacher_forced", "generated") for length in (54, 108)
    }
    assert all(each["score"]["count"] == 4 for each in summary["scores"])
    assert (summary["model"], summary["trained_length"]) == ("young", 64)
    assert "Ring Attention" in summary["published"]["curves"][0]["label"]
    lines = (output / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 16
    with (output / "accuracy.csv").open() as file:
        rows = {(row["mode"], row["length"]): row for row in csv.DictReader(file)}
    by_hand = [json.loads(line) for line in lines]
    for (mode, length), row in rows.items():
        scores = [each["score"] for each in by_hand if (each["mode"], str(each["length"])) == (mode, length)]
        assert float(row["score"]) == sum(scores) / 4
        # 54 tokens are five lines and a question, 108 eleven.
        assert float(row["items"]) == int(length) / 9 - 1
    for picture in ("accuracy_by_length.png", "accuracy_by_depth.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert not (output / "heat_map.png").exists()
    harness = json.loads((output / "harness_results.json").read_text())
    assert set(harness["results"]) == {"compact_lines", "compact_lines_teacher_forced"}

    # Nothing is asked again; more samples are.
    asked(call_script, lines_run, output, *SMALL_LINES, both)
    assert (output / "samples.jsonl").read_text().splitlines() == lines
    more = asked(call_script, lines_run, output, *SMALL_LINES, "suite.samples=5")
    assert (output / "samples.jsonl").read_text().splitlines()[:16] == lines
    assert {each["score"]["count"] for each in more["scores"]} == {5}
    # Other questions, or another checkpoint, belong into another folder.
    complaint = refused(asked, call_script, lines_run, output, *SMALL_LINES, "suite.seed=1")
    assert "suite.seed: saved 0, wanted 1" in complaint
    older = save_run(tmp_path / "older", compact_tokenizer(key_words("small")), step=2)
    assert "model.step: saved 3, wanted 2" in refused(asked, call_script, older, output, *SMALL_LINES)
    # A model of the same label, seed and step that is another one would be given the answers of the first.
    other = save_run(tmp_path / "other", compact_tokenizer(key_words("small")), weights=1)
    assert "weights: saved" in refused(asked, call_script, other, output, *SMALL_LINES)
    assert (output / "samples.jsonl").read_text().splitlines()[:16] == lines


def test_needles_become_a_heat_map(call_script, refused, byte_run, tmp_path):
    options = ["suite.lengths=[700]", "suite.depths=[0,1]", "suite.samples=2", "questions.batch_tokens=4096"]
    with pytest.warns(UserWarning, match="beyond the 64 positions"):
        summary = asked(call_script, byte_run, tmp_path / "out", "suite=needle", *options)
    assert summary["scores"][0]["score"]["count"] == 4
    assert (tmp_path / "out" / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    text = tmp_path / "text.txt"
    text.write_text("Another text altogether. " * 99)
    changed = (f"suite.haystack={text}", *options)
    assert "text: saved" in refused(asked, call_script, byte_run, tmp_path / "out", "suite=needle", *changed)


def test_perplexity_of_documents(call_script, refused, byte_run, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in (("a", "abc " * 40), ("b", "xyz " * 50), ("short", "too short")):
        (texts / f"{name}.txt").write_text(text)
    options = [
        "suite=perplexity",
        "documents@suite.documents=text_folder",
        f"suite.documents.source.root={texts}",
        "suite.documents.part=all",
        "suite.lengths=[16,32]",
        "suite.stride=8",
        "suite.document_tokens=48",
        "suite.chunks=1",
    ]
    summary = asked(call_script, byte_run, tmp_path / "out", *options)
    assert len(summary["documents"]) == 2
    tokens = {(each["rule"], each["length"]): each["tokens"] for each in summary["perplexity"]}
    assert tokens == {("truncated", 16): 30, ("truncated", 32): 62, ("sliding", 16): 94, ("sliding", 32): 94}
    # Random weights know nothing: about as good as guessing one of 258, and no better than some letters.
    assert all(30 < each["value"] < 3000 for each in summary["perplexity"])
    assert (tmp_path / "out" / "perplexity_by_length.png").read_bytes().startswith(b"\x89PNG")
    # The same corpus elsewhere is the same evaluation; another one of the same place in the configuration is not.
    shutil.copytree(texts, tmp_path / "copy")
    moved = [option.replace(str(texts), str(tmp_path / "copy")) for option in options]
    assert asked(call_script, byte_run, tmp_path / "out", *moved)["perplexity"] == summary["perplexity"]
    (tmp_path / "copy" / "a.txt").write_text("quite another " * 40)
    assert "text: saved" in refused(asked, call_script, byte_run, tmp_path / "out", *moved)
    complaint = refused(asked, call_script, byte_run, tmp_path / "other", *options, "suite.document_tokens=4096")
    assert "no document has 4096 tokens" in complaint


def test_bad_input_is_one_line_and_leaves_nothing_behind(call_script, refused, lines_run, tmp_path):
    def complaint(*options, run_dir=lines_run):
        return refused(asked, call_script, run_dir, tmp_path / "out", *options)

    assert "no checkpoint" in complaint(run_dir=tmp_path / "nothing")
    assert "lengths must be positive and ascend" in complaint("suite.lengths=[2,1]")
    assert "at least one mode" in complaint("questions.modes=[]")
    # The words of needles are not among those of lines.
    assert "is not among the" in complaint("suite=needle")
    assert "needs 64 devices" in complaint("mesh.sp=64")
    assert not (tmp_path / "out").exists()
