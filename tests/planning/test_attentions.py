"""Ways to attend as training steps."""

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.config import from_mapping
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.planning.attentions import AttentionVariant, StepSettings, chunks_of, divisible, step_request
from ring_rl.training.mesh import MeshConfig
from small_models import small_transformer

ONE = AttentionVariant(
    label="one",
    strategy="ring",
    sequence_devices=1,
    tensor_devices=1,
    ulysses_size=1,
    saved_activations="none",
    feed_forward_blockwise=True,
)
OVER = dataclasses.replace(ONE, sequence_devices=None)


@pytest.fixture
def settings(ring_request):
    return StepSettings(
        layout="zigzag",
        vocabulary_size=64,
        tied_embedding=False,
        feed_forward_block=128,
        loss_block=256,
        attention_block="auto",
        heads_at_once=1,
        tpu_dtype="bfloat16",
        gpu_dtype="float32",
        optimizer=ring_request.optimizer,
    )


def test_one_sequence_a_device_and_one_over_all(settings):
    step = {"devices": 8, "estimated": False, "tokens_a_device": 512}
    one = step_request(ONE, small_transformer(), settings, **step)
    over = step_request(OVER, small_transformer(), settings, **step)
    assert (one.context, one.batch_size, one.mesh.fsdp, one.mesh.sp, one.weights_over_ring) == (512, 8, 8, 1, False)
    assert (over.context, over.batch_size, over.mesh.fsdp, over.mesh.sp, over.weights_over_ring) == (
        4096,
        1,
        1,
        8,
        True,
    )
    vanilla = step_request(dataclasses.replace(ONE, strategy="dense"), small_transformer(), settings, **step)
    assert (one.heads_at_once, over.heads_at_once, vanilla.heads_at_once) == (1, 1, None)
    for request in (one, over):
        assert request.loss_chunks == 2
        assert request.model.transformer.feed_forward_chunks == 4
        assert request.model.transformer.compute_dtype == "bfloat16"


def test_devices_divide_into_groups_that_share_a_sequence_and_its_heads(settings):
    groups = dataclasses.replace(ONE, sequence_devices=4, tensor_devices=2)
    request = step_request(groups, small_transformer(), settings, devices=16, estimated=False, tokens_a_device=512)
    assert request.mesh == MeshConfig(dp=1, fsdp=2, tp=2, sp=4)
    assert (request.context, request.batch_size, request.weights_over_ring) == (2048, 2, True)
    assert dataclasses.replace(groups, sequence_devices=None).mesh(16) == MeshConfig(dp=1, fsdp=1, tp=2, sp=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_devices": 0}, "sequence_devices of one must be at least 1, got 0"),
        ({"tensor_devices": -1}, "tensor_devices of one must be at least 1, got -1"),
        ({"strategy": "dense", "sequence_devices": 2}, "set sequence_devices to 1, or strategy to ring"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ONE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ulysses_size": 0}, "ulysses_size of one must be at least 1"),
        ({"ulysses_size": 2}, "and 1 unless strategy is hybrid; got 2 with strategy=ring"),
        ({"label": ""}, "needs a label"),
    ],
)
def test_a_way_to_attend_that_says_two_things_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ONE, **changes)


@pytest.mark.parametrize("heads", [0, -1])
def test_heads_at_once_are_refused_before_anything_is_compiled(settings, heads):
    with pytest.raises(ValueError, match="heads_at_once must be at least 1, or null for all heads"):
        dataclasses.replace(settings, heads_at_once=heads)


def test_a_plain_feed_forward_is_one_chunk_and_gpus_have_their_own_dtype(settings):
    plain = dataclasses.replace(ONE, feed_forward_blockwise=False)
    kernels = dataclasses.replace(settings, attention_block="pallas_tpu")
    request = step_request(plain, small_transformer(), kernels, devices=2, estimated=True, tokens_a_device=512)
    assert request.model.transformer.feed_forward_chunks == 1
    assert request.model.transformer.compute_dtype == "float32"
    assert request.attention_block == "auto"


@given(tokens=st.integers(1, 5000), block=st.integers(1, 5000))
def test_chunks_are_equal_no_larger_than_the_block_and_few(tokens, block):
    chunks = chunks_of(tokens, block)
    assert tokens % chunks == 0
    assert tokens // chunks <= block
    assert all(tokens % fewer or tokens // fewer > block for fewer in range(1, chunks))


@pytest.mark.parametrize(
    ("name", "devices", "width", "head_dim"),
    [
        ("llama_3b", 8, 3200, 100),
        ("llama_3b", 256, 3328, 104),
        ("llama_3b", 512, 3584, 112),
        ("llama_7b", 512, 4096, 128),
        ("llama_13b", 512, 5120, 128),
        ("llama_30b", 512, 6656, 128),
        ("llama_65b", 2048, 8192, 128),
    ],
)
def test_a_width_that_devices_do_not_divide_is_rounded_up(pytestconfig, name, devices, width, head_dim):
    text = (pytestconfig.rootpath / "conf" / "transformer" / f"{name}.yaml").read_text()
    model = from_mapping(TransformerConfig, yaml.safe_load(text))
    rounded = divisible(model, devices)
    assert (rounded.width, rounded.head_dim) == (width, head_dim)
    assert rounded.width == rounded.query_heads * rounded.head_dim
    assert (rounded is model) == (model.width % devices == 0)


def test_heads_that_are_not_the_width_stay_as_they_are():
    assert divisible(small_transformer(width=20), 8) == small_transformer(width=24)
