"""Packed documents are as good as documents one by one: the same loss and gradients, on any ring."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.kernels.layout import to_layout
from ring_rl.lm.documents.modality import KIND_TEXT, KIND_UNWEIGHTED
from ring_rl.lm.documents.packed_documents import PackedDocuments
from ring_rl.lm.documents.packing import PackingConfig
from ring_rl.lm.documents.tokenized import TokenizedDocument, TokenizedDocuments, TokenizedPart
from ring_rl.lm.loss import make_language_loss
from ring_rl.lm.model import LanguageModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh
from small_models import retrieval_aids, small_language_model, small_transformer

V, T = 29, 64
# Two rows, in which documents begin and end within, and at the edges of, the chunks of every ring.
LENGTHS = (33, 17, 10, 5, 65, 2)


@pytest.fixture(scope="module")
def model():
    """With everything that could look into the document before: attention, positions, a convolution, shifted keys."""
    transformer = small_transformer(
        key_value_heads=1,
        rotary_fraction=0.5,
        retrieval=retrieval_aids(length_scale_initial=0.5),
        attention_block_size=8,
    )
    config = small_language_model(vocabulary_size=V, trained_positions=0, transformer=transformer)
    made = LanguageModel(config, rngs=nnx.Rngs(0))
    # Losses that depend on what was read by far more than rounding.
    made.vocabulary.head[...] = made.vocabulary.head[...] * 20.0
    graphdef, state = nnx.split(made)
    return graphdef, jax.device_get(state)


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        kinds = generator.choice([KIND_UNWEIGHTED, KIND_TEXT], size=length, p=[0.3, 0.7]).astype(np.uint8)
        kinds[-1] = KIND_TEXT
        made.append(TokenizedDocument(str(number), generator.integers(V, size=length).astype(np.int32), kinds))
    return made


def rows_of(documents, loss_weights):
    """All rows of an epoch, as a batch in natural order."""
    config = PackingConfig(long_documents="cut", loss_weights=loss_weights, open_rows=4)
    tokenized = TokenizedDocuments([TokenizedPart.of(documents, vocabulary_size=V, kinds=2)], vocabulary_size=V)
    packed = PackedDocuments(
        tokenized, row_length=T, config=config, kind_weights=np.array([0.0, 1.0], np.float32), seed=0
    )
    return jax.tree.map(lambda *rows: np.stack(rows), *(packed.row(i) for i in range(packed.rows_per_epoch)))


@pytest.fixture(scope="module")
def loss_and_gradients(model):
    """`loss_and_gradients(ring_size)`: of a batch in natural order (Σ loss, Σ weight, gradients)."""
    graphdef, state = model

    @functools.cache
    def on_ring(size):
        around = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=size)), layout="zigzag")
        loss_function = make_language_loss(around, chunks=2, z_loss=0.0)

        @jax.jit
        def compiled(state, batch):
            def total(state):
                loss = loss_function(nnx.merge(graphdef, state), batch, jax.random.key(0))
                return loss.total, loss.weight

            return jax.value_and_grad(total, has_aux=True)(state)

        def of_batch(batch):
            in_layout = jax.tree.map(lambda x: to_layout(x, axis=1, ring_size=size, layout="zigzag"), batch)
            (total, weight), gradients = jax.device_get(compiled(state, in_layout))
            return total, weight, gradients

        return of_batch

    return on_ring


@pytest.fixture(scope="module")
def one_by_one(loss_and_gradients, documents):
    """By the way of weighing: (Σ loss, Σ weight, Σ gradients) over documents that each have a row of their own.

    Without segment ids: nothing is there that could keep documents apart, as there is but one.
    """
    alone = loss_and_gradients(1)
    sums = {}
    for weighing in ("per_token", "per_document"):
        batches = [dataclasses.replace(rows_of([each], weighing), segment_ids=None) for each in documents]
        assert all(len(batch.tokens) == 1 for batch in batches)
        sums[weighing] = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *map(alone, batches))
    return sums


@pytest.mark.parametrize("ring_size", [1, 2, 4, 8])
def test_packed_documents_give_the_loss_and_gradients_of_documents_one_by_one(
    loss_and_gradients, documents, one_by_one, ring_size
):
    on_ring = loss_and_gradients(ring_size)
    for weighing, (expected_total, expected_weight, expected_gradients) in one_by_one.items():
        batch = rows_of(documents, weighing)
        assert len(batch.tokens) < len(documents)  # or nothing would be packed
        total, weight, gradients = on_ring(batch)
        np.testing.assert_allclose(weight, expected_weight, rtol=1e-6)
        np.testing.assert_allclose(total, expected_total, rtol=1e-5)
        for path, expected in jax.tree_util.tree_leaves_with_path(expected_gradients):
            got = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
            scale = np.abs(expected).max()
            assert scale > 0, path
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * scale, err_msg=str(path))


def test_unmasked_packing_is_something_else(loss_and_gradients, documents, one_by_one):
    """What the tests above would not see, were documents too alike: without segment ids the loss is another one."""
    batch = rows_of(documents, "per_token")
    naive = dataclasses.replace(batch, segment_ids=np.where(batch.segment_ids < 0, -1, 0).astype(np.int32))
    total, _, _ = loss_and_gradients(1)(naive)
    assert abs(total / one_by_one["per_token"][0] - 1) > 1e-3


def test_each_document_counts_one(one_by_one):
    assert one_by_one["per_document"][1] == pytest.approx(len(LENGTHS))
