"""Stages of a language model: what changes from one to the next, and what is refused before anything is made."""

import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.lm.key_words import key_words
from ring_rl.lm.rows.compact_lines import CompactLinesConfig, CompactLinesData
from ring_rl.lm.stages import StageConfig, StageSchedule, make_stages
from ring_rl.lm.tokenizer.compact_tokenizer import compact_tokenizer
from ring_rl.lm.tokenizer.load import tokenizer_from_mapping
from ring_rl.lm.training_task import LossConfig
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.input import InputConfig
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.step import compile_step
from small_models import small_language_model, small_transformer
from small_optimizer import adamw

TOKENIZER = compact_tokenizer(key_words("small"))
OPTIMIZER = adamw()


def model(**changes):
    trunk = {
        "layers": 1,
        "key_value_heads": 1,
        "norm_epsilon": 1e-5,
        "feed_forward": "none",
        "feed_forward_width": 0,
        "saved_activations": "all",
    }
    return small_language_model(
        vocabulary_size=TOKENIZER.vocabulary_size,
        embedding_scale=0.1,
        trained_positions=0,
        transformer=small_transformer(**(trunk | changes)),
    )


def stage(**changes):
    values = {
        "length": None,
        "lines": 4,
        "short_share": 0.0,
        "batch_size": 2,
        "accumulation_steps": 1,
        "rotary_base": None,
        "steps": 10,
        "minimum_steps": 0,
        "advance_when": None,
        "schedule": None,
        "keep_moments": True,
    }
    return StageConfig(**(values | changes))


def stages_of(stages, *, sp=1, chunks=1, layout="zigzag", of_model=None):
    config = CompactLinesConfig(name="compact_lines", words="small", queries=4, fewest_lines=1, loss_on="answers")
    return make_stages(
        stages,
        of_model or model(),
        CompactLinesData(config, TOKENIZER),
        TOKENIZER,
        optimizer=OPTIMIZER,
        loss=LossConfig(chunks=chunks, z_loss=0.0),
        parallel=SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=sp)), layout=layout),
        seed=3,
        extra={"label": "test"},
    )


def test_a_stage_changes_length_base_and_schedule_and_later_ones_keep_the_base():
    schedule = StageSchedule(learning_rate=1e-4, warmup_steps=0, schedule="constant", final_learning_rate_fraction=1.0)
    made = stages_of(
        {
            "short": stage(),
            "long": stage(lines=None, length=96, rotary_base=500.0, schedule=schedule, batch_size=1),
            "longest": stage(lines=12),
        },
        sp=2,
    )
    assert [each.name for each in made] == ["short", "long", "longest"]
    # 72 and 144 tokens: 4 and 12 lines with 4 questions; the second asks for its own.
    assert [each.task.tokens for each in made] == [2 * 72, 96, 2 * 144]
    assert [each.task.model_config["transformer"]["rotary_base"] for each in made] == [100.0, 500.0, 500.0]
    assert [each.task.model_config["trained_positions"] for each in made] == [72, 96, 144]
    assert [each.optimizer.learning_rate for each in made] == [1e-3, 1e-4, 1e-3]
    assert made[1].optimizer.weight_decay == OPTIMIZER.weight_decay
    assert list(made[1].task.extra["stages"]) == ["short", "long"]
    assert tokenizer_from_mapping(made[0].task.extra["tokenizer"]).words == TOKENIZER.words


def test_lines_are_padded_to_what_the_ring_divides():
    (made,) = stages_of({"only": stage(lines=3)}, sp=8)
    row = made.task.rows.row(0)
    assert len(row.tokens) == 64
    assert (row.targets >= 0).sum() == 9 * 6 - 1


def test_stages_draw_different_rows():
    made = stages_of({"first": stage(), "second": stage()})
    assert (made[0].task.rows.row(0).tokens != made[1].task.rows.row(0).tokens).any()


def test_every_stage_has_the_parameters_of_the_first():
    """So a checkpoint goes on in the next stage: a base is no parameter."""
    made = stages_of({"first": stage(), "second": stage(rotary_base=1e6, lines=8)})
    shapes = []
    for each in made:
        state = nnx.state(nnx.eval_shape(lambda each=each: each.task.make_model(nnx.Rngs(0))), nnx.Param)
        shapes.append(jax.tree.map(lambda x: x.shape, state))
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, *shapes))


@pytest.mark.parametrize(
    ("changes", "options", "complaint"),
    [
        (
            {"length": 100, "lines": None},
            {"sp": 8},
            "stages.only: length=100 is not divisible by the ring of 8 .*use 112",
        ),
        ({"lines": 20_000}, {}, "stages.only: these words name between 1 and 16384 lines"),
        ({}, {"chunks": 5}, "stages.only: loss.chunks=5 does not divide the 72 tokens"),
        ({"minimum_steps": 11}, {}, "minimum_steps must lie in"),
        ({"length": 8, "lines": None}, {}, "stages.only: "),
    ],
)
def test_a_stage_that_cannot_be_is_named(changes, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        stages_of({"only": stage(**changes)}, **options)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"length": 64}, "either length or lines"),
        ({"lines": None}, "either length or lines"),
        ({"short_share": 1.5}, "short_share must lie in"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_stages_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        stage(**changes)


def test_losses_are_checked():
    with pytest.raises(ValueError, match=r"loss\.chunks must be at least 1"):
        LossConfig(chunks=0, z_loss=0.0)
    with pytest.raises(ValueError, match=r"loss\.z_loss must not be negative"):
        LossConfig(chunks=1, z_loss=-1.0)


def test_rows_fit_the_step_that_reads_them():
    """The task's rows, cut to a ring, are what its loss takes; one step, which every stage shares."""
    (made,) = stages_of({"only": stage(steps=6)}, sp=2)
    prepared = made.task.prepare(
        seed=0, steps=6, optimizer=OPTIMIZER, accumulation_steps=1, input=InputConfig(threads=1, prefetch_batches=1)
    )
    state = prepared.create_state()
    compiled = compile_step(prepared.step, state, prepared.stream.abstract_batch)
    losses = []
    for _ in range(6):
        state, metrics = compiled(state, next(prepared.stream))
        losses.append(float(metrics["loss"]))
    prepared.stream.close()
    assert np.isfinite(losses).all()
    # Ten digits are likely from the start; the words are soon known to be no answers.
    assert losses[-1] < losses[0]
    assert float(metrics["loss_weight"]) == 2 * 4 * 5
    assert 0 <= float(metrics["answer_accuracy"]) <= 1
