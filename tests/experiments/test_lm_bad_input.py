"""What is wrong with a model, its tokenizer or its corpus, every language script says in one line, before any work.

The model is the committed tiny LLaMA, in copies from which something is missing, or which say something else.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from safetensors import safe_open

from ring_rl.config import to_mapping
from ring_rl.lm.load_model import ModelOverrides
from ring_rl.lm.pretrained.load import load_pretrained
from ring_rl.lm.tokenizer.word_tokenizer import WordTokenizer
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.state import TrainState

TINY_LLAMA = Path(__file__).parents[1] / "lm" / "pretrained" / "tiny_llama"
WORDS = [f"w{index}" for index in range(96)]
SCRIPTS = ("train_lm", "evaluate_lm", "generate")


@pytest.fixture
def llama(tmp_path):
    """A copy of the tiny LLaMA that a test may spoil."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY_LLAMA / name, folder / name)
    return folder


@pytest.fixture
def options(tmp_path):
    """Overrides of a script for a model and a corpus, all of whose results would go to tmp_path / "out"."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "one.txt").write_text(" ".join(WORDS * 4))
    words = tmp_path / "words.txt"

    def of(script, model, vocabulary=WORDS):
        words.write_text("".join(f"{word}\n" for word in vocabulary))
        kind, place = ("run", "run_dir") if (model / "checkpoints").exists() else ("huggingface", "path")
        given = [f"model={kind}", f"model.{place}={model}", f"model.tokenizer={{name: words, path: {words}}}"]
        output = tmp_path / "out"
        match script:
            case "train_lm":
                return [
                    *given,
                    f"run_dir={output}",
                    "training_data=documents",
                    "documents@training_data.documents=text_folder",
                    f"training_data.documents.source.root={corpus}",
                    "stages=single",
                    "stages.main.length=64",
                    "stages.main.batch_size=1",
                    "wandb.mode=disabled",
                    "mesh.sp=1",
                ]
            case "evaluate_lm":
                documents = ["documents@suite.documents=text_folder", f"suite.documents.source.root={corpus}"]
                sizes = ["suite.lengths=[32]", "suite.document_tokens=32", "suite.stride=16"]
                sizes += ["suite.samples=1", "suite.chunks=1"]
                # The corpus is one document.
                part = ["suite.documents.part=all"]
                return [*given, f"output={output}", "suite=perplexity", *documents, *sizes, *part]
            case "generate":
                return [*given, f"output={output / 'texts.jsonl'}", "prompt=w1"]

    return of


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def split_into_shards(folder):
    """Two shards of which the second is not there."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        names = list(file.keys())
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "model.safetensors").rename(folder / shards[0])
    index = {"weight_map": {name: shards[position % 2] for position, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("script", SCRIPTS)
def test_models_that_are_not_whole_or_not_llamas(script, call_script, refused, options, llama, tmp_path):
    def complaint(vocabulary=WORDS):
        said = refused(call_script, script, *options(script, llama, vocabulary))
        assert not (tmp_path / "out").exists()
        return said

    assert "the tokenizer" in (said := complaint([*WORDS, "one_more"]))
    assert "97 ids, but the model embeds 96 tokens" in said
    edited(llama, architectures=["MixtralForCausalLM"], model_type="mixtral")
    assert "describes a model of type 'mixtral'" in complaint()
    edited(llama, architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=True)
    assert "asks for attention_bias=True, which is not supported" in complaint()
    edited(llama, attention_bias=False, rope_scaling={"rope_type": "made_up", "factor": 2.0})
    assert "made_up" in complaint()
    edited(llama, rope_scaling=None, intermediate_size=100)
    assert "mlp.down_proj.weight is [64, 96], the configuration says [64, 100]" in complaint()
    edited(llama, intermediate_size=96)
    split_into_shards(llama)
    assert "lacks 1 of its 2 shards: model-00002-of-00002.safetensors" in complaint()


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_of_which_a_part_is_gone(script, call_script, refused, options, tmp_path):
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    loaded = load_pretrained(
        TINY_LLAMA,
        parallel=SequenceParallel(mesh=mesh, layout="contiguous"),
        compute_dtype="float32",
        overrides=ModelOverrides(
            feed_forward_chunks=1,
            attention_block_size=16,
            saved_activations="none",
            rotary_base=None,
            rotary_scaling=None,
        ),
    )
    parameters = nnx.state(loaded.model, nnx.Param)
    run_dir = tmp_path / "run"
    extra = {"tokenizer": WordTokenizer(WORDS).to_mapping(), "label": "tiny", "seed": 0}
    with Checkpointer(
        run_dir / "checkpoints", keep=1, model_config=to_mapping(loaded.config), extra=extra
    ) as checkpointer:
        checkpointer.save(TrainState(jnp.int32(1), parameters, optax.sgd(0.1).init(parameters)))
    gone = [path for path in (run_dir / "checkpoints").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert gone
    for path in gone:
        path.unlink()
    said = refused(call_script, script, *options(script, run_dir))
    assert "cannot be read" in said
    assert "move that folder away to fall back on an earlier one" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["train_lm", "evaluate_lm"])
def test_an_empty_corpus(script, call_script, refused, options, llama, tmp_path):
    given = options(script, llama)
    (tmp_path / "corpus" / "one.txt").unlink()
    assert "holds no file like **/*.txt" in refused(call_script, script, *given)
    (tmp_path / "corpus" / "one.txt").write_text("")
    nothing = {"train_lm": "none of 1 documents has 2 tokens", "evaluate_lm": "no document has 32 tokens"}
    assert nothing[script] in refused(call_script, script, *given)
    assert not (tmp_path / "out").exists()


def test_a_context_beyond_the_trained_one_is_evaluated_with_a_warning(call_script, options, llama, tmp_path):
    (tmp_path / "corpus" / "one.txt").write_text(" ".join(WORDS * 2))
    longer = ["suite.lengths=[128]", "suite.document_tokens=128", "suite.rules=[truncated]"]
    with pytest.warns(
        UserWarning, match=r"128 tokens is beyond the 64 positions .*rotary_base=500, rotary_scaling=None"
    ):
        call_script("evaluate_lm", *options("evaluate_lm", llama), *longer)
    assert (tmp_path / "out" / "samples.jsonl").read_text().count("\n") == 1
