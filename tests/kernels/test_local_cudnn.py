"""cuDNN's block: what can be known of it without a GPU, and its contract where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_rl.kernels.local import cudnn as cudnn_module
from ring_rl.kernels.local.block import DIAGONAL, EVERYTHING, Demand, Relation, Scoring
from ring_rl.kernels.local.cudnn import CudnnBlock, _as_values, _d_log_sum_exp
from ring_rl.kernels.local.private_jax import UnsupportedJaxError
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.tokens import Cotangents, Keys, Queries

BLOCKS = [CudnnBlock(log_sum_exp_gradient=False), CudnnBlock(log_sum_exp_gradient=True)]
WINDOW = Relation(Mask(causal=True, window=24), offset=0)


def _demand(**changes) -> Demand:
    fields = {
        "dtype": "bfloat16",
        "head_dim": 64,
        "query_heads": 4,
        "key_value_heads": 2,
        "length": 64,
        "devices": 2,
        "relations": (DIAGONAL, EVERYTHING),
        "segments": False,
        "alibi": False,
        "scoring": Scoring(scale=0.125),
        "log_sum_exp_gradient": True,
    }
    return Demand(**(fields | changes))


def _rectangle(generator, *, T=64, S=64, dtype=jnp.bfloat16):
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), dtype)  # noqa: E731
    queries = Queries(draw(2, 4, T, 64), jnp.arange(T, dtype=jnp.int32)[None])
    keys = Keys(draw(2, 2, S, 64), draw(2, 2, S, 64), jnp.arange(S, dtype=jnp.int32)[None])
    return queries, keys, draw(2, 4, T, 64), jnp.asarray(generator.normal(size=(2, 4, T)), jnp.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "not in float32"),
        ({"head_dim": 60}, "head_dim that 8 divides, not 60"),
        ({"segments": True}, "no segment ids"),
        ({"alibi": True}, "no ALiBi"),
        ({"scoring": Scoring(scale=1.0, soft_cap=30.0)}, "no soft cap"),
        ({"scoring": Scoring(scale=1.0, dropout_rate=0.1)}, "no dropout"),
        ({"relations": (Relation(CAUSAL),)}, "along the diagonal alone"),
        ({"relations": (Relation(CAUSAL, 64),)}, "along the diagonal alone"),
        ({"relations": (Relation(Mask(causal=False, window=8), 0),)}, "along the diagonal alone"),
        ({"relations": (Relation(Mask(causal=True, causal_block_size=8), 0),)}, "along the diagonal alone"),
    ],
)
def test_refuses_what_cudnn_cannot_do(change, reason):
    assert reason in BLOCKS[0].refusal(_demand(**change))


def test_refuses_machines_that_cannot_run_it(monkeypatch):
    served = _demand(relations=(DIAGONAL, EVERYTHING, WINDOW))
    if jax.default_backend() == "cpu":
        assert "needs an NVIDIA GPU and this platform is 'cpu'" in BLOCKS[0].refusal(served)

    class Machine:
        capability = (8, 0)

        def cudnn_version(self):
            return 90000

        def capability_at_least(self, capability):
            return self.capability >= tuple(map(int, capability.split(".")))

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn_module, "cudnn_attention", Machine)
    assert BLOCKS[0].refusal(served) is None
    assert "at most 128, not 256" in BLOCKS[0].refusal(_demand(head_dim=256))
    monkeypatch.setattr(Machine, "capability", (9, 0))
    assert BLOCKS[0].refusal(_demand(head_dim=256)) is None
    monkeypatch.setattr(Machine, "capability", (7, 5))
    assert "Ampere" in BLOCKS[0].refusal(served)

    def unsupported():
        raise UnsupportedJaxError("jax is too new")

    monkeypatch.setattr(cudnn_module, "cudnn_attention", unsupported)
    assert BLOCKS[0].refusal(served) == "jax is too new"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("relation", [EVERYTHING, DIAGONAL, WINDOW])
def test_results_have_the_contract_s_shapes_and_dtypes(block, relation):
    queries, keys, d_out, _ = _rectangle(np.random.default_rng(0))
    scoring = Scoring(scale=0.125)

    def both(queries, keys, d_out):
        out, lse = block.forward(queries, keys, relation=relation, scoring=scoring)
        cotangents = Cotangents(out.astype(d_out.dtype), lse, d_out, lse)
        return (out, lse), block.backward(queries, keys, cotangents, relation=relation, scoring=scoring)

    results = jax.tree.leaves(jax.eval_shape(both, queries, keys, d_out))
    assert {x.dtype for x in results} == {jnp.dtype("float32")}
    assert [x.shape for x in results] == [(2, 4, 64, 64), (2, 4, 64), (2, 4, 64, 64), (2, 2, 64, 64), (2, 2, 64, 64)]


def test_what_is_passed_to_cudnn(monkeypatch):
    seen = []

    class Cudnn:
        causal, no_mask, heads_before_tokens = "causal", "none", 1

        def forward(self, q, k, v, *rest, **settings):
            seen.append(settings)
            return q, jnp.zeros((2, 4, 64))

    monkeypatch.setattr(cudnn_module, "cudnn_attention", Cudnn)
    queries, keys, *_ = _rectangle(np.random.default_rng(0))
    for relation in (EVERYTHING, Relation(FULL, 7), DIAGONAL, WINDOW):
        BLOCKS[0].forward(queries, keys, relation=relation, scoring=Scoring(scale=0.25))
    assert [s["mask_type"] for s in seen] == ["none", "none", "causal", "causal"]
    assert [s["sliding_window_length"] for s in seen] == [None, None, None, 24]
    assert {s["scale"] for s in seen} == {0.25}
    assert {s["is_training"] for s in seen} == {True}


@pytest.mark.parametrize("relation", [EVERYTHING, DIAGONAL])
def test_gradient_of_log_sum_exp_as_a_second_backward(relation):
    """The identity that a second call to cuDNN relies on, with a block that can do both."""
    xla, scoring = XlaBlock(block_size=32), Scoring(scale=0.125)
    queries, keys, d_out, d_lse = _rectangle(np.random.default_rng(1), dtype=jnp.float32)
    out, lse = xla.forward(queries, keys, relation=relation, scoring=scoring)
    own = jnp.einsum("bhtd,bhtd->bht", out, d_out)
    backward = lambda keys, c: xla.backward(queries, keys, c, relation=relation, scoring=scoring)  # noqa: E731
    whole = Cotangents(out, lse, d_out, own - d_lse)
    expected = backward(keys, whole)
    first = backward(keys, Cotangents(out, lse, d_out, own))
    v, zero, d_values = _as_values(keys.v.astype(jnp.bfloat16), out.astype(jnp.bfloat16), _d_log_sum_exp(whole))
    delta = jnp.einsum("bhtd,bhtd->bht", zero, d_values).astype(jnp.float32)
    second = backward(
        keys._replace(v=v.astype(jnp.float32)), Cotangents(zero, lse, d_values.astype(jnp.float32), delta)
    )
    assert float(jnp.max(jnp.abs(second[0]))) > 1e-3
    for found, more, wanted in zip(first[:2], second[:2], expected[:2], strict=True):
        np.testing.assert_allclose(found + more, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(first[2], expected[2], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("relation", [EVERYTHING, DIAGONAL, WINDOW])
def test_agrees_with_the_xla_block(block, relation):
    assert block.refusal(_demand(relations=(relation,))) is None
    queries, keys, d_out, d_lse = _rectangle(np.random.default_rng(2))
    scoring, xla = Scoring(scale=0.125), XlaBlock(block_size=64)
    expected_out, expected_lse = xla.forward(queries, keys, relation=relation, scoring=scoring)
    out, lse = block.forward(queries, keys, relation=relation, scoring=scoring)
    np.testing.assert_allclose(out, expected_out, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-3, atol=1e-3)
    # As if other rectangles had added to the sums, and one row had seen nothing.
    global_lse = (expected_lse + 0.5).at[:, :, 3].set(jnp.inf)
    rounded = expected_out.astype(jnp.bfloat16)
    delta = jnp.einsum("bhtd,bhtd->bht", rounded.astype(jnp.float32), d_out.astype(jnp.float32))
    delta = delta - d_lse if block.log_sum_exp_gradient else delta
    cotangents = Cotangents(rounded, global_lse, d_out, delta)
    expected = xla.backward(queries, keys, cotangents, relation=relation, scoring=scoring)
    found = block.backward(queries, keys, cotangents, relation=relation, scoring=scoring)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-2, atol=3e-2)
