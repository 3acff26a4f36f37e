"""Perplexity by both rules: every token's loss is what the rule says, however windows are batched and sharded."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.lm.evaluation.perplexity import Perplexity, losses_by_position, sliding_losses, truncated_losses
from ring_rl.lm.model import LanguageModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh
from small_models import small_language_model, small_transformer

WINDOW, VOCABULARY = 32, 31
LENGTH = 2 * WINDOW + 21


@pytest.fixture(scope="module")
def model():
    transformer = small_transformer(
        layers=1, key_value_heads=1, norm_epsilon=1e-5, rotary_base=10000.0, saved_activations="products"
    )
    config = small_language_model(vocabulary_size=VOCABULARY, trained_positions=0, transformer=transformer)
    made = LanguageModel(config, rngs=nnx.Rngs(0))
    # Losses that differ from token to token, and with what was read, by far more than rounding.
    made.vocabulary.head[...] = made.vocabulary.head[...] * 50.0
    graphdef, state = nnx.split(made)
    # As numpy arrays the weights belong to no device yet and go wherever the mesh is.
    return nnx.merge(graphdef, jax.device_get(state))


@pytest.fixture(scope="module")
def document():
    return np.random.default_rng(0).integers(VOCABULARY, size=LENGTH).astype(np.int32)


@pytest.fixture(scope="module")
def plain(model, document):
    """`plain(begin, i)`: -log p(token i | tokens from `begin` on), of all scores and all logits at once."""
    around = parallel(sp=1, layout="contiguous", strategy="dense")
    graphdef, state = nnx.split(model)

    @jax.jit
    def logits(state, tokens, positions):
        model = nnx.merge(graphdef, state)
        return model.logits(model.hidden(tokens, positions, around))

    @functools.cache
    def of_window(begin):
        window = np.zeros((1, WINDOW), np.int32)
        read = document[begin : begin + WINDOW]
        window[0, : len(read)] = read
        return np.asarray(logits(state, window, np.arange(WINDOW)[None])[0], np.float64)

    def loss(begin, i):
        scores = of_window(begin)[i - 1 - begin]
        return math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[document[i]]

    return loss


def parallel(*, dp=1, sp, layout="zigzag", strategy="ring"):
    return SequenceParallel(mesh=make_mesh(MeshConfig(dp=dp, fsdp=1, tp=1, sp=sp)), layout=layout, strategy=strategy)


@pytest.mark.parametrize("sizes", [{"sp": 1}, {"sp": 8}, {"dp": 2, "sp": 2}])
def test_truncated_windows_are_read_as_one(model, document, plain, sizes):
    documents = [document, document[: WINDOW + 5], document[:WINDOW]]
    losses = truncated_losses(model, documents, length=WINDOW, parallel=parallel(**sizes), chunks=2, batch_size=2)
    expected = [plain(0, i) for i in range(1, WINDOW)]
    assert len(losses) == 3
    for each in losses:
        np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "stride", "length"),
    [
        ({"sp": 1}, 8, LENGTH),
        ({"sp": 8}, 5, LENGTH),
        ({"dp": 2, "sp": 2}, 1, WINDOW + 3),
        ({"sp": 8}, WINDOW, LENGTH),
        ({"sp": 8}, 8, WINDOW + 8 + 1),  # the last window is full
        ({"sp": 8}, 8, 2),
    ],
)
def test_sliding_windows_predict_every_token_once(model, document, plain, sizes, stride, length):
    losses = sliding_losses(
        model,
        document[:length],
        window=WINDOW,
        stride=stride,
        parallel=parallel(**sizes),
        chunks=2,
        batch_size=2,
    )
    # Token i belongs to the first window that holds it as a target.
    begins = [stride * max(math.ceil((i - WINDOW) / stride), 0) for i in range(1, length)]
    expected = [plain(begin, i) for i, begin in enumerate(begins, start=1)]
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)


def test_sums_weigh_tokens_not_documents():
    short, long = np.float32([4.0]), np.float32([1.0, 1.0, 2.0])
    both = Perplexity.of(short) + Perplexity.of(long)
    assert (both.loss_sum, both.tokens) == (8.0, 4)
    assert both.value == pytest.approx(math.exp(2.0))
    assert math.isnan(Perplexity(0.0, 0).mean_loss)
    # 2^24 + 1 is no float32.
    assert Perplexity.of(np.float32([2**24, 1, 1])).loss_sum == 2**24 + 2


def test_losses_by_position_leave_out_what_documents_lack():
    means = losses_by_position([np.float32([1, 2, 3]), np.float32([5])], edges=[0, 1, 3, 9])
    assert [(each.loss_sum, each.tokens) for each in means] == [(6.0, 2), (5.0, 2), (0.0, 0)]
    with pytest.raises(ValueError, match="edges must ascend"):
        losses_by_position([], edges=[0, 0])


def test_what_cannot_be_measured_is_refused(model, document):
    options = {"parallel": parallel(sp=8), "chunks": 1, "batch_size": 1}
    with pytest.raises(ValueError, match="document 1 has 31 tokens, fewer than the length of 32"):
        truncated_losses(model, [document, document[:31]], length=32, **options)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        truncated_losses(model, [document], length=1, **options)
    with pytest.raises(ValueError, match=r"stride must be in \[1, window=32\], got 33"):
        sliding_losses(model, document, window=32, stride=33, **options)
    with pytest.raises(ValueError, match="at least 2 tokens, one to read"):
        sliding_losses(model, document[:1], window=32, stride=8, **options)
    with pytest.raises(ValueError, match="36"):
        sliding_losses(model, document, window=36, stride=8, **options)
