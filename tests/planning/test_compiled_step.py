"""Steps compiled for CPU devices, refusals read, and with libtpu a step compiled for a slice."""

import dataclasses
import importlib.util

import jax
import pytest

from ring_rl.config import from_mapping, to_mapping
from ring_rl.planning.compiled_step import StepRequest, compile_memory, lower_step, parse_refusal
from ring_rl.planning.topology import devices_of, machine_named, tpu_slice
from ring_rl.training.mesh import MeshConfig
from small_models import small_language_model, small_transformer


@pytest.fixture(scope="module")
def devices():
    return devices_of(machine_named("gpu:2xA100-80GB"))


def parameters(request):
    """Of the small model, by hand: embedding and head, two layers, the last norm."""
    m, v = request.model.transformer, request.model.vocabulary_size
    layer = 4 * m.width * m.query_heads * m.head_dim + 3 * m.width * m.feed_forward_width + 2 * m.width
    return 2 * v * m.width + m.layers * layer + m.width


def test_a_longer_context_needs_more_and_the_state_is_shared(devices, ring_request):
    short = compile_memory(ring_request, devices)
    long = compile_memory(dataclasses.replace(ring_request, context=1024), devices)
    assert 0 < short.state_bytes < short.peak_bytes < long.peak_bytes
    # Three float32 numbers a parameter, over two devices but for what is small; and some counts.
    assert short.state_bytes == pytest.approx(12 * parameters(ring_request) / 2, rel=0.1)
    assert long.state_bytes == short.state_bytes
    assert short.fits(short.peak_bytes)
    assert not short.fits(short.peak_bytes - 1)
    assert (short.wanted_bytes, short.limit_bytes, short.attention_block) == (None, None, "auto")
    assert short.compile_seconds > 0


def test_weights_kept_whole_on_every_device_are_counted_whole(devices, ring_request):
    whole = dataclasses.replace(ring_request, weights_over_ring=False)
    assert lower_step(whole, devices)[1] == pytest.approx(12 * parameters(ring_request), rel=0.01)


def test_a_request_is_plain_data(ring_request):
    assert from_mapping(StepRequest, to_mapping(ring_request)) == ring_request


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh": MeshConfig(dp=1, fsdp=1, tp=1, sp=4)}, "needs 4 devices, but there are 2"),
        ({"context": 254}, "254"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"attention_block": "pallas_tpu"}, "TPUs only"),
        ({"strategy": "dense"}, "needs each sequence whole"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_compiling(devices, changes, says, ring_request):
    with pytest.raises(ValueError, match=says):
        lower_step(dataclasses.replace(ring_request, **changes), devices)


HBM = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.54G) exceeds "
    "available HBM (15.75G)."
)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (HBM, (int(16.54 * 2**30), int(15.75 * 2**30))),
        (HBM.replace("16.54G", "1.5T"), (int(1.5 * 2**40), int(15.75 * 2**30))),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            (int(20.5 * 2**30), int(15.75 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: out of HBM", (None, None)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INTERNAL: hbm", None),
    ],
)
def test_only_a_want_of_device_memory_is_a_refusal(message, found):
    assert parse_refusal(message) == found


def test_a_refusal_is_an_answer_and_any_other_failure_is_not(devices, monkeypatch, ring_request):
    def failing(message):
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

        return compile

    monkeypatch.setattr(jax.stages.Lowered, "compile", failing(HBM))
    refused = compile_memory(ring_request, devices)
    assert refused.peak_bytes is None
    assert not refused.fits(2**60)
    assert refused.wanted_bytes > refused.limit_bytes == int(15.75 * 2**30)
    monkeypatch.setattr(jax.stages.Lowered, "compile", failing("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compile_memory(ring_request, devices)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (700 MB, extra tpu-compile) is not installed"
)
@pytest.mark.parametrize("block", ["auto", "xla"])
def test_a_tpu_that_is_not_here_compiles_with_its_own_block(block, ring_request):
    model = small_language_model(transformer=small_transformer(attention_block_size=128, compute_dtype="bfloat16"))
    mesh = MeshConfig(dp=1, fsdp=1, tp=1, sp=4)
    request = dataclasses.replace(ring_request, model=model, mesh=mesh, context=2048, attention_block=block)
    memory = compile_memory(request, devices_of(tpu_slice("v5e-4")))
    assert memory.state_bytes < memory.peak_bytes < 2**28
    assert memory.attention_block == ("xla" if block == "xla" else "pallas_tpu")
