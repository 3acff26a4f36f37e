"""The private names of jax that we use: the first test is the one that fails on a jax that we do not know."""

import inspect
import sys
import types

import jax
import pytest

from ring_rl.kernels.local import private_jax
from ring_rl.kernels.local.private_jax import UnsupportedJaxError, cudnn_attention

NAME = "cudnn_attention_of_a_test"


def _copy(**changes) -> types.ModuleType:
    """A module like jax's, with some of its names replaced, or removed where the replacement is None."""
    real = sys.modules[cudnn_attention.__defaults__[0]]
    module = types.ModuleType(NAME)
    for name in (*private_jax._NAMES, *private_jax._SIGNATURES):
        if changes.get(name, real) is not None:
            setattr(module, name, changes.get(name, getattr(real, name)))
    return module


def test_the_installed_jax_has_every_private_name():
    cudnn = cudnn_attention()
    assert cudnn.causal != cudnn.no_mask
    assert cudnn.heads_before_tokens == 1


@pytest.mark.parametrize("name", [*private_jax._NAMES, *private_jax._SIGNATURES])
def test_a_missing_name_is_named_with_version_and_remedy(monkeypatch, name):
    cudnn_attention()
    monkeypatch.setitem(sys.modules, NAME, _copy(**{name: None}))
    with pytest.raises(UnsupportedJaxError) as error:
        cudnn_attention(NAME)
    message = str(error.value)
    assert f"{NAME}.{name}" in message
    assert f"jax {jax.__version__}" in message
    assert "0.10.0 to 0.12" in message
    assert 'local="xla"' in message
    assert "\n" not in message


def test_changed_arguments_are_reported(monkeypatch):
    cudnn_attention()
    monkeypatch.setitem(sys.modules, NAME, _copy(check_compute_capability=lambda device, capability: True))
    with pytest.raises(UnsupportedJaxError, match=r"check_compute_capability takes \(device, capability\)"):
        cudnn_attention(NAME)


def test_a_missing_module_is_reported():
    with pytest.raises(UnsupportedJaxError, match=r"has no jax\._src\.nothing_here"):
        cudnn_attention("jax._src.nothing_here")


def test_score_functions_of_newer_releases_are_switched_off(monkeypatch):
    cudnn_attention()
    bound = {}

    class Primitive:
        def bind(self, *operands, **settings):
            bound.update(settings)

    def since_0_12(name):
        old = private_jax._SIGNATURES[name]
        parameters = [*old[:10], "score_mod_args", *old[10:], "score_mod"]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        function = lambda *args: None  # noqa: E731
        function.__signature__ = inspect.Signature([inspect.Parameter(p, kind) for p in parameters])
        return function

    names = ("_dot_product_attention_fwd_impl", "_dot_product_attention_bwd_impl")
    changes = {name: since_0_12(name) for name in names} | {"_dot_product_attention_fwd_p_wrapper": Primitive()}
    monkeypatch.setitem(sys.modules, NAME, _copy(**changes))
    cudnn_attention(NAME).forward(scale=1.0)
    assert bound == {"scale": 1.0, "score_mod": None}
