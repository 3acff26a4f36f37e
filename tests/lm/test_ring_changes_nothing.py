"""One checkpoint on rings of 1, 2, 4 and 8 devices: the same logits, and the same answers to the same questions.

The model is one that has learned to find lines, so that an answer depends on what stands far back, on other devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ring_rl.config import to_mapping
from ring_rl.kernels.layout import from_layout, to_layout
from ring_rl.lm.evaluation.prompts import Prompter, TemplateConfig
from ring_rl.lm.evaluation.run import Questioner, QuestionsConfig
from ring_rl.lm.key_words import KeyWords, key_words
from ring_rl.lm.load_model import ModelOverrides, RunSource, load_model
from ring_rl.lm.loss import make_language_loss
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.tasks.compact_lines import TOKENS_PER_LINE, CompactLines
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.state import TrainState
from small_models import retrieval_aids, small_language_model, small_transformer

RINGS = (1, 2, 4, 8)
LINES, ROWS, MOST_STEPS = 6, 12, 200
QUESTIONS = 8
OVERRIDES = ModelOverrides(
    feed_forward_chunks=1, attention_block_size=16, saved_activations="none", rotary_base=None, rotary_scaling=None
)


def ring(size):
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=size))
    return SequenceParallel(mesh=mesh, layout="zigzag")


def config(vocabulary_size):
    transformer = small_transformer(
        width=64,
        query_heads=1,
        key_value_heads=1,
        head_dim=64,
        norm_epsilon=1e-5,
        feed_forward="none",
        feed_forward_width=0,
        rotary_fraction=0.0,
        retrieval=retrieval_aids(convolution_width=7, key_shift_initial=0.9),
        attention_block_size=64,
        saved_activations="all",
    )
    return small_language_model(
        vocabulary_size=vocabulary_size,
        embedding_scale=0.5,
        trained_positions=2 * LINES * TOKENS_PER_LINE,
        transformer=transformer,
    )


@pytest.fixture(scope="module")
def task():
    small = key_words("small")
    return CompactLines(KeyWords(small.adjectives[:8], small.nouns[:8]))


@pytest.fixture(scope="module")
def run_dir(task, tmp_path_factory):
    """A run that was trained until it found nearly every line."""
    model = LanguageModel(config(task.tokenizer.vocabulary_size), rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(model, nnx.Param)
    language_loss = make_language_loss(ring(1), chunks=1, z_loss=0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, b2=0.95))

    @jax.jit
    def step(parameters, moments, batch):
        def mean(parameters):
            loss = language_loss(nnx.merge(graphdef, parameters), batch, jax.random.key(0))
            right, asked = loss.metrics["answer_accuracy"]
            return loss.total / loss.weight, right / asked

        gradients, accuracy = jax.grad(mean, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, accuracy

    generator, moments = np.random.default_rng(0), optimizer.init(parameters)
    for _ in range(MOST_STEPS):
        rows = [task.row(task.draw(generator, lines=LINES, queries=LINES)) for _ in range(ROWS)]
        parameters, moments, accuracy = step(parameters, moments, jax.tree.map(lambda *leaves: np.stack(leaves), *rows))
        if accuracy > 0.98:
            break
    else:
        pytest.fail(f"the model finds {float(accuracy):.2f} of its lines after {MOST_STEPS} steps; about 30 are usual")
    folder = tmp_path_factory.mktemp("runs") / "finds_lines"
    extra = {"tokenizer": task.tokenizer.to_mapping(), "label": "finds_lines", "seed": 0}
    with Checkpointer(
        folder / "checkpoints", keep=1, model_config=to_mapping(model.config), extra=extra
    ) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), parameters, optimizer.init(parameters)))
    return folder


@pytest.fixture(scope="module")
def on_ring(run_dir):
    """The checkpoint as it is loaded onto a ring, each once."""
    made = {}

    def load(size):
        if size not in made:
            source = RunSource(
                name="run", run_dir=run_dir, step=None, tokenizer=None, compute_dtype=None, overrides=OVERRIDES
            )
            made[size] = ring(size), load_model(source, ring(size))
        return made[size]

    return load


@pytest.fixture(scope="module")
def logits_on(on_ring, task):
    """Of the same two records, in natural order."""
    generator, made = np.random.default_rng(1), {}
    rows = [task.row(task.draw(generator, lines=12, queries=4)) for _ in range(2)]
    tokens = np.stack([row.tokens for row in rows])
    positions = np.stack([row.positions for row in rows])

    def logits(size):
        if size not in made:
            around, loaded = on_ring(size)
            graphdef, parameters = nnx.split(loaded.model)
            order = {"axis": 1, "ring_size": size, "layout": "zigzag"}

            @jax.jit
            def whole(parameters, tokens, positions):
                model = nnx.merge(graphdef, parameters)
                return model.logits(model.hidden(tokens, positions, around))

            made[size] = from_layout(
                np.asarray(whole(parameters, to_layout(tokens, **order), to_layout(positions, **order))), **order
            )
        return made[size]

    return logits


@pytest.fixture(scope="module")
def verdicts_on(on_ring, task):
    """What the checkpoint says to the same questions, in both modes."""
    generator, made = np.random.default_rng(2), {}
    samples = [task.sample(task.draw(generator, lines=14, queries=1)) for _ in range(QUESTIONS)]

    def verdicts(size):
        if size not in made:
            around, loaded = on_ring(size)
            questioner = Questioner(
                loaded.model,
                Prompter(loaded.tokenizer, TemplateConfig(text="{prompt}", begin_with_bos=False)),
                parallel=around,
                questions=QuestionsConfig(modes=("teacher_forced", "generated"), batch_tokens=4096, chunk_size=64),
            )
            made[size] = {
                "teacher_forced": questioner.teacher_forced(samples, batch_size=QUESTIONS),
                "generated": questioner.generated(samples, max_new_tokens=5, batch_size=QUESTIONS),
            }
        return made[size]

    return samples, verdicts


@pytest.mark.parametrize("size", RINGS[1:])
def test_logits_agree(logits_on, size):
    alone = logits_on(1)
    assert np.abs(alone).max() > 5  # of a model that is sure of something
    np.testing.assert_allclose(logits_on(size), alone, atol=1e-4, rtol=0)


def test_the_model_finds_lines_in_twice_as_many_as_it_was_trained_on(verdicts_on):
    samples, verdicts = verdicts_on
    for mode, answered in verdicts(1).items():
        assert np.mean([verdict.score for verdict in answered]) >= 0.75, mode
    assert len({verdict.output for verdict in verdicts(1)["generated"]}) == len(samples)


@pytest.mark.parametrize("size", RINGS[1:])
def test_answers_are_identical(verdicts_on, size):
    _, verdicts = verdicts_on
    for mode, answered in verdicts(size).items():
        alone = verdicts(1)[mode]
        assert [verdict.output for verdict in answered] == [verdict.output for verdict in alone], mode
        assert [verdict.score for verdict in answered] == [verdict.score for verdict in alone], mode
    likelihoods = [
        [verdict.negative_log_likelihood for verdict in verdicts(each)["teacher_forced"]] for each in (1, size)
    ]
    np.testing.assert_allclose(likelihoods[1], likelihoods[0], atol=1e-4)
