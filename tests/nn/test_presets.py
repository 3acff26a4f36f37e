"""conf/transformer/ says how large its models are; counted here, without making one."""

from pathlib import Path

import jax
import pytest
import yaml
from flax import nnx

from ring_rl.config import from_mapping
from ring_rl.nn.transformer import Transformer, TransformerConfig

PRESETS = Path(__file__).parents[2] / "conf" / "transformer"
PARAMETERS = {
    "tiny": 0.09e6,
    "base": 19e6,
    "100m": 99e6,
    "350m": 352e6,
    "llama_tiny": 0.393e6,
    "llama_3b": 3.22e9,
    "llama_7b": 6.48e9,
    "llama_13b": 12.7e9,
    "llama_30b": 32.1e9,
    "llama_65b": 64.7e9,
    "smollm2_135m": 106e6,
    "retrieval_tiny": 0.133e6,
    "plain_tiny": 0.426e6,
}


def test_every_preset_is_counted():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_is_as_large_as_it_says(name):
    config = from_mapping(TransformerConfig, yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    assert count == pytest.approx(PARAMETERS[name], rel=0.02)
