import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_rl.lm.generate import CHECK_EVERY, GREEDY, Generator, Sampling, generate
from ring_rl.lm.generation import cache
from ring_rl.lm.generation.steps import compiled_steps
from ring_rl.lm.model import LanguageModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh
from small_models import retrieval_aids, small_language_model, small_transformer

V, CHUNK, NEW = 40, 8, 5
# Shorter and longer than chunks, whole ones, and one that is at its end in the first chunk.
LENGTHS = (1, 8, 19, 31)
WARM = Sampling(temperature=1.5, top_k=20, top_p=0.95)


def config():
    """With everything that decoding has to remember: keys, values, a convolution's inputs, the key before."""
    transformer = small_transformer(
        query_heads=4,
        head_dim=4,
        feed_forward_width=32,
        rotary_fraction=0.5,
        no_position_layers=(1,),
        retrieval=retrieval_aids(length_scale_initial=0.5),
        attention_block_size=8,
    )
    return small_language_model(vocabulary_size=V, transformer=transformer)


def ring(size, **others):
    if size is None:
        return None
    sizes = {"dp": 1, "fsdp": 1, "tp": 1, "sp": size} | others
    return SequenceParallel(mesh=make_mesh(MeshConfig(**sizes)), layout="zigzag")


@pytest.fixture(scope="module")
def model():
    made = LanguageModel(config(), rngs=nnx.Rngs(0))
    # Logits that differ by more than rounding, so that the most likely token is the same one everywhere.
    made.vocabulary.head[...] = made.vocabulary.head[...] * 50.0
    return made


@pytest.fixture(scope="module")
def prompts():
    generator = np.random.default_rng(0)
    return [generator.integers(0, V, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(scope="module")
def generator_on(model):
    """A generator for each ring, made once."""
    made = {}

    def on(size, chunk_size=CHUNK):
        if (size, chunk_size) not in made:
            made[size, chunk_size] = Generator(model, parallel=ring(size), chunk_size=chunk_size)
        return made[size, chunk_size]

    return on


@pytest.fixture(scope="module")
def alone(generator_on, prompts):
    """What one device writes, greedily and drawn."""
    return {
        sampling: generator_on(None)(prompts, max_new_tokens=NEW, sampling=sampling, key=jax.random.key(7))
        for sampling in (GREEDY, WARM)
    }


@pytest.fixture(scope="module")
def forward(model):
    """Log-probabilities [T, V] of the whole sequence at once, without any cache."""
    one = ring(1)
    longest = max(LENGTHS) + NEW

    @jax.jit
    def whole(parameters, tokens):
        positions = jnp.arange(tokens.shape[1])[None]
        merged = nnx.merge(graphdef, parameters)
        return jax.nn.log_softmax(merged.logits(merged.hidden(tokens, positions, one)))

    graphdef, parameters = nnx.split(model)

    def log_probabilities(tokens):
        # Causal: what stands behind changes nothing.
        padded = np.zeros((1, longest + longest % 2), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(whole(parameters, padded))[0, : len(tokens)]

    return log_probabilities


def assert_same(got, expected):
    for tokens, other in zip(got.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(tokens, other)
    for numbers, other in zip(got.log_probabilities, expected.log_probabilities, strict=True):
        np.testing.assert_allclose(numbers, other, atol=1e-4)
    assert got.stopped == expected.stopped


def test_greedy_tokens_are_the_argmax_of_the_whole_forward_pass(alone, forward, prompts):
    got = alone[GREEDY]
    assert len({tuple(tokens.tolist()) for tokens in got.tokens}) > 1
    for prompt, tokens, numbers in zip(prompts, got.tokens, got.log_probabilities, strict=True):
        assert len(tokens) == len(numbers) == NEW
        before = forward(np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(tokens, before.argmax(axis=-1))
        np.testing.assert_allclose(numbers, before.max(axis=-1), atol=1e-4)
    assert got.stopped == (False,) * len(prompts)


def test_drawn_tokens_have_the_probabilities_that_the_model_gives_them(alone, forward, prompts):
    got = alone[WARM]
    assert any((a != b).any() for a, b in zip(got.tokens, alone[GREEDY].tokens, strict=True))
    for prompt, tokens, numbers in zip(prompts, got.tokens, got.log_probabilities, strict=True):
        before = forward(np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(numbers, before[np.arange(NEW), tokens], atol=1e-4)


@pytest.mark.parametrize("size", [2, 8])
def test_a_ring_that_shares_the_cache_writes_the_same(generator_on, alone, prompts, size):
    for sampling, expected in alone.items():
        got = generator_on(size)(prompts, max_new_tokens=NEW, sampling=sampling, key=jax.random.key(7))
        assert_same(got, expected)


def test_devices_that_share_the_prompts_write_the_same(model, alone, prompts):
    """Three prompts on 2 x 2 devices that share rows, of which a fourth prompt is nobody's; a ring of 2 for each."""
    writer = Generator(model, parallel=ring(2, dp=2, fsdp=2), chunk_size=CHUNK)
    got = writer(prompts[:3], max_new_tokens=NEW, sampling=WARM, key=jax.random.key(7))
    assert len(got.tokens) == len(got.stopped) == 3
    for tokens, other in zip(got.tokens, alone[WARM].tokens, strict=False):
        np.testing.assert_array_equal(tokens, other)


def test_chunks_change_nothing(generator_on, alone, prompts):
    for sampling, expected in alone.items():
        got = generator_on(None, 64)(prompts, max_new_tokens=NEW, sampling=sampling, key=jax.random.key(7))
        assert_same(got, expected)


def test_a_prompts_text_depends_on_no_other_prompt(generator_on, alone, prompts):
    others = [prompts[0], prompts[2][::-1], prompts[2], prompts[0]]
    got = generator_on(None)(others, max_new_tokens=NEW, sampling=WARM, key=jax.random.key(7))
    np.testing.assert_array_equal(got.tokens[2], alone[WARM].tokens[2])
    # The same prompt at another place draws otherwise.
    assert (got.tokens[0] != got.tokens[3]).any()


def test_a_stop_token_ends_its_row_and_is_not_part_of_it(generator_on, alone, prompts):
    greedy = alone[GREEDY].tokens
    stop = int(greedy[2][2])
    expected = [tokens[: list(tokens).index(stop)] if stop in tokens else tokens for tokens in greedy]
    got = generator_on(None)(prompts, max_new_tokens=NEW, sampling=GREEDY, stop_ids=[stop])
    assert got.stopped == tuple(stop in tokens for tokens in greedy)
    for tokens, numbers, want in zip(got.tokens, got.log_probabilities, expected, strict=True):
        np.testing.assert_array_equal(tokens, want)
        assert len(numbers) == len(want)


def test_nothing_is_written_after_all_rows_have_stopped(generator_on, prompts):
    reported = []
    got = generator_on(None)(
        prompts,
        max_new_tokens=100,
        sampling=GREEDY,
        stop_ids=range(V),
        on_progress=lambda done, total: reported.append((done, total)),
    )
    assert got.stopped == (True,) * len(prompts)
    assert [len(tokens) for tokens in got.tokens] == [0] * len(prompts)
    longest, total = max(LENGTHS), max(LENGTHS) + 100
    assert reported == [
        (8, total),
        (16, total),
        (24, total),
        (longest, total),
        (longest + CHECK_EVERY, total),
        (total,) * 2,
    ]


def test_prompts_of_other_lengths_compile_nothing_new(generator_on, alone, prompts):
    steps = compiled_steps(config(), GREEDY, None, slot_block=128)
    programs = lambda: steps.read._cache_size() + steps.write._cache_size()  # noqa: E731
    before = programs()
    generator_on(None)([prompt[:9] for prompt in prompts], max_new_tokens=3, sampling=GREEDY)
    assert before
    assert programs() == before


def test_the_function_is_the_generator(model, alone, prompts):
    got = generate(
        model, prompts, parallel=None, max_new_tokens=NEW, sampling=WARM, key=jax.random.key(7), chunk_size=CHUNK
    )
    assert_same(got, alone[WARM])


def test_what_cannot_be_done_is_refused_before_anything_is_computed(model, generator_on, prompts, monkeypatch):
    with pytest.raises(ValueError, match="chunk_size must be at least 1 token, got 0"):
        Generator(model, parallel=None, chunk_size=0)
    writer = generator_on(None)
    with pytest.raises(ValueError, match=r"temperature=1.5 draws at random and needs a key"):
        writer(prompts, max_new_tokens=1, sampling=WARM)
    with pytest.raises(ValueError, match=r"prompt 3 has 31 tokens, .*max_length=33; .*lower max_new_tokens to 2"):
        writer(prompts, max_new_tokens=NEW, sampling=GREEDY, max_length=33)
    with pytest.raises(ValueError, match="prompt 0 holds token 40"):
        writer([np.array([V])], max_new_tokens=NEW, sampling=GREEDY)
    # 2 · layers · rows · slots · key-value heads · head dimension numbers of 4 bytes.
    needed = 2 * 2 * len(prompts) * 128 * 2 * 4 * 4
    monkeypatch.setattr(cache, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"a cache of 4 rows of 128 tokens takes .* read fewer prompts at once"):
        writer(prompts, max_new_tokens=NEW, sampling=GREEDY)
    monkeypatch.setattr(cache, "free_bytes", lambda device: needed)
    writer(prompts, max_new_tokens=NEW, sampling=GREEDY)
