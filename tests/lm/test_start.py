import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.lm.load_model import LoadedModel, ModelOverrides, RunSource
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.start import NewModelConfig, start_from
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.load import ByteTokenizerConfig
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh
from small_models import small_language_model, small_transformer

TRANSFORMER = small_transformer(
    layers=1,
    width=8,
    query_heads=1,
    key_value_heads=1,
    norm_epsilon=1e-5,
    feed_forward="none",
    feed_forward_width=0,
    saved_activations="all",
)
CONFIG = small_language_model(vocabulary_size=256, tied_embedding=True, embedding_scale=0.02, transformer=TRANSFORMER)


@pytest.fixture(scope="module")
def parallel():
    return SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1)), layout="zigzag")


def run_source(folder):
    overrides = ModelOverrides(
        feed_forward_chunks=1, attention_block_size=16, saved_activations="all", rotary_base=None, rotary_scaling=None
    )
    return RunSource(name="run", run_dir=folder, step=None, tokenizer=None, compute_dtype=None, overrides=overrides)


def test_a_new_model_embeds_what_its_data_need(parallel):
    new = NewModelConfig(
        name="new",
        tokenizer=ByteTokenizerConfig(name="bytes"),
        tied_embedding=True,
        embedding_scale=0.02,
        transformer=TRANSFORMER,
    )
    # Text and 64 codes of something else.
    start = start_from(new, parallel=parallel, vocabulary_size=lambda tokenizer: tokenizer.vocabulary_size + 64)
    assert start.config == dataclasses.replace(
        CONFIG, vocabulary_size=ByteTokenizer().vocabulary_size + 64, trained_positions=0
    )
    assert start.parameters is None
    assert start.tokenizer.decode([104, 105]) == "hi"


def test_a_model_without_a_tokenizer_or_with_too_few_ids_is_refused(parallel, monkeypatch, tmp_path):
    def loaded(tokenizer):
        return lambda source, parallel, weights: LoadedModel(None, CONFIG, tokenizer, {"path": str(tmp_path)})

    monkeypatch.setattr("ring_rl.lm.start.load_model", loaded(None))
    with pytest.raises(ValueError, match=r"came without a tokenizer; name one: .model\.tokenizer=.name: file, path"):
        start_from(run_source(tmp_path), parallel=parallel, vocabulary_size=lambda tokenizer: 256)
    monkeypatch.setattr("ring_rl.lm.start.load_model", loaded(ByteTokenizer()))
    with pytest.raises(ValueError, match="the data have 320 ids, but the model embeds 256"):
        start_from(run_source(tmp_path), parallel=parallel, vocabulary_size=lambda tokenizer: 320)


def test_weights_are_read_when_training_begins_and_not_before(parallel, monkeypatch, tmp_path):
    """A dry run and a run that goes on need none, and would hold them for nothing."""
    read, model = [], LanguageModel(CONFIG, rngs=nnx.Rngs(0))

    def loaded(source, parallel, *, weights=True):
        read.append(weights)
        return LoadedModel(model, CONFIG, ByteTokenizer(), {"path": str(tmp_path)})

    monkeypatch.setattr("ring_rl.lm.start.load_model", loaded)
    start = start_from(run_source(tmp_path), parallel=parallel, vocabulary_size=lambda tokenizer: 256)
    assert read == [False]
    assert start.parameters is not None
    jax.tree.map(np.testing.assert_array_equal, start.parameters(), nnx.state(model, nnx.Param))
    assert read == [False, True]
