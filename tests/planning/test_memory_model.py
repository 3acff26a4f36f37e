"""Memory by formula: what must hold whatever a compiler does, and a compiled sample."""

import dataclasses

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.planning.compiled_step import compile_memory
from ring_rl.planning.memory_model import saved_bytes, step_memory
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.training.mesh import MeshConfig
from small_steps import small_request

# Enough tokens that what is kept of them outweighs what any program keeps.
SAMPLE = {
    "transformer": {
        "layers": 8,
        "width": 64,
        "query_heads": 2,
        "key_value_heads": 2,
        "head_dim": 32,
        "feed_forward_width": 128,
        "feed_forward_chunks": 8,
        "attention_block_size": 256,
    },
    "vocabulary_size": 64,
    "loss_chunks": 16,
    "context": 16384,
}


def memory(compiler="cpu", *, microbatches=1, **changes):
    return step_memory(StepSizes(small_request(**changes), microbatches=microbatches), compiler=compiler)


@pytest.mark.parametrize("compiler", ["cpu", "tpu"])
def test_parts_add_up_and_state_is_exact(compiler):
    found = memory(compiler)
    sizes = StepSizes(small_request())
    assert found.total == sum(found.parts.values())
    assert found.parts["parameters"] == 4 * sizes.parameters()
    assert found.parts["optimizer moments"] == 8 * sizes.parameters()


@settings(max_examples=30, deadline=None)
@given(
    saved=st.sampled_from(["none", "attention", "products", "all"]),
    compiler=st.sampled_from(["cpu", "tpu"]),
    ring=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_more_tokens_or_layers_need_more_and_a_ring_less(saved, compiler, ring, dtype):
    def total(*, context=1024, layers=2, sp=ring):
        transformer = {"saved_activations": saved, "compute_dtype": dtype, "layers": layers}
        return memory(compiler, transformer=transformer, context=context, mesh={"sp": sp}).total

    assert total(context=2048) > total()
    assert total(layers=3) > total()
    # The same tokens on twice the devices; a ring of two holds others' keys besides, so four are compared with one.
    assert total(sp=4 * ring) < total()


def test_memory_stays_when_context_and_ring_grow_together():
    totals = {memory("tpu", context=1024 * sp, mesh={"sp": sp}).total for sp in (4, 8, 16, 256)}
    assert len(totals) == 1
    # Of two devices one never sends on what it receives.
    assert memory("tpu", context=2048, mesh={"sp": 2}).total < totals.pop()


MANY_HEADS = {"width": 64, "query_heads": 8, "key_value_heads": 8, "head_dim": 8}


def attention_of_many_heads(heads_at_once, **changes):
    step = {"transformer": MANY_HEADS, "mesh": {"sp": 4}, "context": 4096} | changes
    return memory("tpu", heads_at_once=heads_at_once, **step).parts["attention"]


def test_some_heads_at_a_time_shrink_a_ring():
    assert attention_of_many_heads(1) < attention_of_many_heads(2) < attention_of_many_heads(4)
    assert attention_of_many_heads(4) < attention_of_many_heads(None)
    # Groups are equal: three of eight are two.
    assert attention_of_many_heads(3) == attention_of_many_heads(2)
    # Rows take turns, too.
    assert attention_of_many_heads(8, batch_size=2) < attention_of_many_heads(None, batch_size=2)


@pytest.mark.parametrize(("strategy", "held"), [("ring", 8), ("ulysses", 2)])
def test_all_heads_at_a_time_are_as_if_nothing_were_asked(strategy, held):
    alike = {attention_of_many_heads(heads, strategy=strategy) for heads in (held, held + 1, None)}
    assert len(alike) == 1
    assert attention_of_many_heads(1, strategy=strategy) not in alike


def test_tpu_kernels_pad_heads_and_the_xla_block_does_not():
    def attention(head_dim, block):
        changes = {"transformer": MANY_HEADS | {"head_dim": head_dim}, "mesh": {"sp": 4}, "context": 4096}
        return memory("tpu", attention_block=block, **changes).parts["attention"]

    assert attention(64, "auto") == attention(128, "auto") == attention(256, "auto") // 2
    assert attention(64, "xla") == attention(128, "xla") // 2


def test_policies_save_what_they_name():
    sizes = lambda saved: StepSizes(small_request(transformer={"saved_activations": saved, "feed_forward_width": 48}))  # noqa: E731
    saved = {name: saved_bytes(sizes(name), compiler="tpu") for name in ("none", "offload", "attention", "products")}
    # Two layers of 64 tokens; width and heads 16, two heads, float32.
    assert saved == {
        "none": 2 * 64 * 16 * 4,
        "offload": 0,
        "attention": 2 * 64 * (32 + 2) * 4,
        "products": 2 * 64 * (6 * 16 + 2 * 48 + 2) * 4,
    }


def test_the_cpu_compiler_keeps_bfloat16_as_float32():
    narrow = StepSizes(small_request(transformer={"compute_dtype": "bfloat16"}))
    assert saved_bytes(narrow, compiler="cpu") == 2 * saved_bytes(narrow, compiler="tpu")


def test_weights_shared_by_the_ring_are_held_once():
    apart = memory(mesh={"sp": 4}, weights_over_ring=False)
    shared = memory(mesh={"sp": 4}, weights_over_ring=True)
    assert shared.parts["parameters"] * 4 == apart.parts["parameters"]
    assert shared.total < apart.total


def test_microbatches_need_sums():
    assert memory(microbatches=2).total == memory().total + memory().parts["parameters"]


def test_dense_scores_are_quadratic():
    long, short = (memory(strategy="dense", context=context).parts["attention"] for context in (4096, 2048))
    assert long == 4 * short


def test_the_loss_takes_over_where_it_sees_all_tokens_at_once():
    assert memory(vocabulary_size=4096, context=1024).moment == "the loss"
    assert memory(vocabulary_size=4096, context=1024, loss_chunks=64).moment != "the loss"


@pytest.mark.parametrize(("saved", "chunks"), [("none", 1), ("attention", 1), ("products", 4), ("all", 4)])
def test_a_compiled_step_is_within_a_tenth(saved, chunks):
    transformer = SAMPLE["transformer"] | {"saved_activations": saved, "feed_forward_chunks": chunks}
    request = dataclasses.replace(
        small_request(**SAMPLE | {"transformer": transformer}), mesh=MeshConfig(dp=1, fsdp=1, tp=1, sp=2)
    )
    compiled = compile_memory(request, jax.devices()[:2])
    planned = step_memory(StepSizes(request), compiler="cpu")
    assert compiled.state_bytes == pytest.approx(
        planned.parts["parameters"] + planned.parts["optimizer moments"], abs=64
    )
    assert compiled.peak_bytes is not None
    assert planned.total == pytest.approx(compiled.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "auto"}, "strategy='auto' is chosen on the devices"),
        ({"mesh": {"sp": -1}}, "put a number in place of -1"),
        ({"mesh": {"dp": 2}}, "batch of 1 sequences is not divisible by dp=2"),
        ({"mesh": {"tp": 4}, "batch_size": 1}, "query_heads=2 cannot be shared by tp=4"),
        ({"mesh": {"sp": 3}}, "pad to 66"),
        ({"mesh": {"sp": 2}, "strategy": "dense"}, "needs each sequence whole"),
        ({"ulysses_size": 2}, "does not divide sp=1"),
        ({"mesh": {"sp": 2}, "ulysses_size": 2}, "means nothing to ring"),
        ({"loss_chunks": 3}, "cannot be cut into 3 loss chunks"),
        ({"mesh": {"fsdp": 3}, "batch_size": 3}, "width=16 cannot be shared by the 3 devices"),
    ],
)
def test_what_cannot_be_planned_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        StepSizes(small_request(**changes))
