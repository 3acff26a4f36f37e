import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from ring_rl.config import from_mapping, to_mapping
from ring_rl.lm.model import LanguageModel, LanguageModelConfig


def readings(language, model, batch, around, *, chunks=1):
    """Logits, predictions, their log-probabilities and losses of every token, in natural order."""
    graphdef, parameters = nnx.split(model)
    placed, natural = language.in_layout(batch, around)

    @jax.jit
    def run(parameters, batch):
        model = nnx.merge(graphdef, parameters)
        hidden = model.hidden(batch.tokens, batch.positions, around, segment_ids=batch.segment_ids)
        losses = model.token_losses(hidden, batch.targets, around, chunks=chunks)
        return model.logits(hidden), *model.predictions(hidden, around, chunks=chunks), losses

    return [np.asarray(x)[:, natural] for x in run(jax.device_get(parameters), placed)]


@pytest.fixture(scope="module")
def alone(language):
    """The model with every part, and what one device reads from it."""
    model = language.make(language.config(**language.everything))
    return model, readings(language, model, language.batch(), language.parallel())


def test_every_part_is_what_its_definition_says(language, alone):
    model, (logits, *_) = alone
    real = language.batch().segment_ids >= 0
    expected = language.reference_logits(model, language.batch())
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-4, atol=1e-4)


def test_without_the_aids_it_is_a_llama(language):
    model = language.make(language.config(tied=True))
    logits, *_ = readings(language, model, language.batch(), language.parallel())
    real = language.batch().segment_ids >= 0
    expected = language.reference_logits(model, language.batch())
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-4, atol=1e-4)


def test_readings_are_those_of_the_logits(language, alone):
    _, (logits, best, best_log_probability, losses) = alone
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_array_equal(best, logits.argmax(axis=-1))
    np.testing.assert_allclose(best_log_probability, log_probabilities.max(axis=-1), atol=1e-5)
    targets = language.batch().targets
    picked = np.take_along_axis(log_probabilities, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, np.where(targets >= 0, -picked, 0), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"sp": 2, "layout": "contiguous", "tp": 2},
        {"sp": 4, "strategy": "ulysses", "key_value_heads": 4},
        {"sp": 4, "fsdp": 2, "weight_axes": ("fsdp", "sp")},
        {"sp": 8},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_ring_changes_nothing(language, alone, options):
    heads = {"key_value_heads": options.pop("key_value_heads")} if "key_value_heads" in options else {}
    model, expected = alone
    if heads:
        model = language.make(language.config(**(language.everything | heads)))
        expected = readings(language, model, language.batch(), language.parallel())
    got = readings(language, model, language.batch(), language.parallel(**options), chunks=2)
    real = language.batch().segment_ids >= 0
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x[real], y[real], atol=1e-5)


def test_no_document_sees_another(language, alone):
    """Neither through attention, nor convolution, nor shifted keys: what stands before its own begin is as nothing."""
    model, (logits, *_) = alone
    batch = language.batch()
    changed = dataclasses.replace(batch, tokens=np.where(batch.segment_ids == 1, 3, batch.tokens).astype(np.int32))
    other, *_ = readings(language, model, changed, language.parallel())
    untouched = (batch.segment_ids != 1) & (batch.segment_ids >= 0)
    np.testing.assert_array_equal(other[untouched], logits[untouched])
    assert np.abs(other - logits)[batch.segment_ids == 1].max() > 0.1


@pytest.fixture(scope="module")
def whole(language):
    """A row a document, so that a cache can hold it: (model, tokens, logits)."""
    model = language.make(language.config(**language.everything))
    tokens = np.random.default_rng(3).integers(0, language.vocabulary_size, size=(2, 24)).astype(np.int32)
    around, positions = language.parallel(), np.broadcast_to(np.arange(24), (2, 24))
    hidden = nnx.jit(lambda model, tokens: model.hidden(tokens, positions, around))(model, tokens)
    return model, tokens, np.asarray(model.logits(hidden))


@pytest.mark.parametrize("sizes", [(24,), (1, 5, 1, 17)])
def test_decoding_gives_what_the_whole_sequence_gives(whole, sizes):
    model, tokens, expected = whole
    cache, decode = model.begin(batch=2, capacity=24), nnx.jit(LanguageModel.decode)
    for end in np.cumsum(sizes):
        start = int(cache.length)
        logits, cache = decode(model, tokens[:, start:end], cache)
        np.testing.assert_allclose(logits, expected[:, end - 1], atol=1e-4)
    assert int(cache.length) == 24


def test_rows_of_different_lengths_grow_each_from_its_own_end(whole):
    """Prompts of 9 and 4 tokens padded to 9, then one token each, then none in one row."""
    model, tokens, expected = whole
    decode = nnx.jit(LanguageModel.decode)
    cache = model.begin(batch=2, capacity=24).with_row_lengths()
    ends = np.zeros(2, int)
    for counts in ([9, 4], [1, 1], [0, 1]):
        new = np.full((2, max(counts)), 5, np.int32)
        for row, count in enumerate(counts):
            new[row, :count] = tokens[row, ends[row] : ends[row] + count]
        logits, cache = decode(model, new, cache, counts=jnp.asarray(counts))
        ends += counts
        np.testing.assert_array_equal(cache.length, ends)
        for row in np.flatnonzero(counts):
            np.testing.assert_allclose(logits[row], expected[row, ends[row] - 1], atol=1e-4)
    with pytest.raises(ValueError, match=r"the cache has one length; use cache.with_row_lengths\(\)"):
        model.decode(tokens[:, :2], model.begin(batch=2, capacity=24), counts=jnp.asarray([1, 2]))


def test_a_ring_shares_the_cache(language, whole):
    model, tokens, expected = whole
    around = language.parallel(sp=2)
    like = jax.eval_shape(lambda: model.begin(batch=2, capacity=1))
    empty = partial(like.emptied, capacity=12, axis_name="sp", slot_block=4)
    specs = jax.eval_shape(empty).specs("sp")
    graphdef, parameters = nnx.split(model)
    on_mesh = partial(jax.shard_map, mesh=around.mesh)
    cache = jax.jit(on_mesh(empty, in_specs=(), out_specs=specs))()
    step = on_mesh(
        lambda parameters, tokens, cache: nnx.merge(graphdef, parameters).decode(tokens, cache),
        in_specs=(P(), P(), specs),
        out_specs=(P(), specs),
    )
    for end in (12, 24):
        logits, cache = jax.jit(step)(jax.device_get(parameters), tokens[:, end - 12 : end], cache)
        np.testing.assert_allclose(logits, expected[:, end - 1], atol=1e-4)


def test_keys_may_start_as_queries(language):
    aids = dataclasses.replace(language.aids, keys_start_as_queries=True)
    attention = LanguageModel(
        language.config(retrieval=aids, key_value_heads=2), rngs=nnx.Rngs(0)
    ).transformer.blocks.attention
    query = np.asarray(attention.query.kernel[...]).reshape(2, 16, 2, 2, 8)
    np.testing.assert_array_equal(np.asarray(attention.key.kernel[...]).reshape(2, 16, 2, 8), query[:, :, :, 0])
    assert np.abs(query[:, :, :, 0] - query[:, :, :, 1]).max() > 0.1


def test_the_embedding_starts_as_wide_as_it_says(language):
    config = dataclasses.replace(language.config(), vocabulary_size=4000)
    model = nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()
    assert float(jnp.std(model.vocabulary.embedding[...])) == pytest.approx(0.5, rel=0.02)
    assert float(jnp.std(model.vocabulary.head[...])) == pytest.approx(0.02, rel=0.02)


def test_a_config_survives_json(language):
    config = language.config(**language.everything)
    assert from_mapping(LanguageModelConfig, to_mapping(config)) == config


def test_what_cannot_be_is_refused(language):
    for changes, message in [
        ({"rotary_fraction": 1.5}, r"rotary_fraction must lie in \[0, 1\], got 1.5"),
        ({"rotary_fraction": 0.4}, r"head_dim=8 times rotary_fraction=0.4 must be even"),
        ({"no_position_layers": (2,)}, r"names layer 2, but layers are 0 to 1"),
        ({"no_position_layers": (1, 1)}, r"names a layer twice: \[1, 1\]"),
        ({"norm_epsilon": 0.0}, r"norm_epsilon must be positive, got 0.0"),
        ({"rotary_base": 1.0}, r"rotary_base must be above 1, got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            language.config(**changes)
    with pytest.raises(ValueError, match=r"convolution_width must be at least 1 .* got 0"):
        dataclasses.replace(language.aids, convolution_width=0)
    with pytest.raises(ValueError, match=r"key_shift_initial must lie in \[0, 1\], got 2.0"):
        dataclasses.replace(language.aids, key_shift_initial=2.0)
    with pytest.raises(ValueError, match=r"embedding_scale must be positive, got 0.0"):
        dataclasses.replace(language.config(), embedding_scale=0.0)


def test_a_mesh_that_tears_neighbours_apart_is_refused(language):
    trunk = language.config(**language.everything).transformer
    size = {"batch": 2, "length": 64}
    trunk.check(language.parallel(sp=8), **size)
    with pytest.raises(ValueError, match="layout=striped tears neighbouring tokens apart"):
        trunk.check(language.parallel(sp=2, layout="striped"), **size)
    with pytest.raises(ValueError, match="strategy=hybrid shares a sequence over two axes"):
        trunk.check(language.parallel(sp=4, strategy="hybrid", ulysses_size=2), **size)
    with pytest.raises(ValueError, match="chunks of 2 tokens are shorter than the 3"):
        trunk.check(language.parallel(sp=8), batch=2, length=32)
    language.config().transformer.check(language.parallel(sp=2, layout="striped"), **size)
