import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ring_rl.nn.saved_activations import check_saved_activations

LAYERS = 6


@pytest.fixture(scope="module")
def programs(transformers):
    """Compiled gradients on a ring of 4 under each policy, their arguments, and their jaxprs.

    Of XLA's block, whose every array is in the program that its compiler counts.
    """
    made = {}

    def program(policy):
        if policy not in made:
            model = transformers.make(saved_activations=policy, layers=LAYERS)
            loss, arguments, _ = transformers.loss_function(model, transformers.parallel(1, 1, 1, 4, local_block="xla"))
            traced = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).trace(*arguments)
            made[policy] = traced.lower().compile(), arguments, str(traced.jaxpr)
        return made[policy]

    return program


def hops(program):
    return len(re.findall(r"\bcollective-permute(?:-start)?\(", program[0].as_text()))


def temporary_bytes(program):
    return program[0].memory_analysis().temp_size_in_bytes


def test_only_none_runs_the_ring_again(programs):
    assert hops(programs("attention")) == hops(programs("products")) == hops(programs("offload"))
    assert hops(programs("none")) > hops(programs("attention"))


def test_what_is_saved_is_what_the_policy_names(transformers, programs):
    """A layer's input; attention's output and log-sum-exp besides; the result of every product besides."""
    config, tokens = transformers.config(), transformers.batch * transformers.tokens // 4
    attention_bytes = 4 * tokens * config.query_heads * (config.head_dim + 1)
    inputs_bytes = 4 * tokens * config.width
    none, attention, products, everything = (
        temporary_bytes(programs(name)) for name in ("none", "attention", "products", "all")
    )
    # The layer at work has its attention either way.
    assert attention - none == pytest.approx((LAYERS - 1) * attention_bytes, abs=attention_bytes / 2)
    assert products - attention > LAYERS * inputs_bytes
    assert everything - products > LAYERS * inputs_bytes


def test_all_does_nothing_twice(programs):
    """Of a layer's forward products none is left in the backward loop."""
    products = lambda program: len(re.findall(r"\bdot\(", program[0].as_text()))  # noqa: E731
    assert hops(programs("all")) == hops(programs("products"))
    assert products(programs("all")) == products(programs("products")) < products(programs("none"))


@pytest.mark.parametrize("policy", ["all", "attention", "none", "offload"])
def test_what_is_saved_does_not_change_the_result(transformers, programs, policy):
    compiled, arguments, _ = programs(policy)
    expected, _, _ = programs("products")
    got, expected = jax.device_get((compiled(*arguments), expected(*arguments)))
    transformers.assert_close(got, expected, rtol=1e-5)


def test_offload_keeps_every_layers_input_and_attention_on_the_host(transformers, programs):
    """In the traced program, where types name the memory; a CPU's own memory is the host's."""
    batch, tokens = transformers.batch, transformers.tokens // 4
    stacked = {
        f"f32<host>[{LAYERS},{batch},{tokens},16]",
        f"f32<host>[{LAYERS},{batch},{tokens},4,4]",
        f"f32<host>[{LAYERS},{batch},4,{tokens}]",
    }
    assert stacked <= set(re.findall(r"f32<host>\[[\d,]+\]", programs("offload")[2]))
    assert "<host>" not in programs("attention")[2]


def test_a_device_without_host_memory_is_refused_with_the_alternatives():
    memory = SimpleNamespace(kind="device")
    device = SimpleNamespace(addressable_memories=lambda: [memory], platform="slate")
    mesh = SimpleNamespace(devices=np.array([device], dtype=object))
    for policy in ("products", "attention", "none"):
        check_saved_activations(policy, mesh)
    message = "saved_activations=offload needs .* pinned_host memory, and slate reaches device; use .*attention or none"
    with pytest.raises(ValueError, match=message):
        check_saved_activations("offload", mesh)
    check_saved_activations("offload", Mesh(np.array(jax.devices()), ("sp",)))
