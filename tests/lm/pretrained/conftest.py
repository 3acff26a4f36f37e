"""A small LLaMA that transformers made, copies of it to damage, and meshes of the 8 virtual devices."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.lm.pretrained.load import load_pretrained
from ring_rl.lm.pretrained.overrides import ModelOverrides
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh

FOLDER = Path(__file__).with_name("tiny_llama")
OVERRIDES = ModelOverrides(
    feed_forward_chunks=1, attention_block_size=8, saved_activations="none", rotary_base=None, rotary_scaling=None
)


def parallel(dp=1, fsdp=1, tp=1, sp=1, **options):
    return SequenceParallel(mesh=make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=sp)), layout="contiguous", **options)


def load(path, around=None, **changes):
    options = {"compute_dtype": "float32", "overrides": OVERRIDES, "parallel": around or parallel()}
    return load_pretrained(path, **(options | changes))


def weights(model):
    """Every parameter as numpy, by its dotted name."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(jax.device_get(each.get_value())) for path, each in flat}


def logits(loaded, tokens, around=None):
    around = around or parallel()
    graphdef, parameters = nnx.split(loaded.model)

    @jax.jit
    def forward(parameters, tokens):
        model = nnx.merge(graphdef, parameters)
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model.hidden(tokens, positions, around))

    return np.asarray(forward(parameters, tokens))


@pytest.fixture
def copied(tmp_path):
    """`copied(**changes)`: the model's folder with some keys of its config.json changed; None removes a key."""

    def copy(**changes):
        folder = tmp_path / "llama"
        shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
        mapping = json.loads((FOLDER / "config.json").read_text()) | changes
        kept = {key: value for key, value in mapping.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return copy


@pytest.fixture(scope="session")
def llama():
    """The committed model, and how to load it and look at it."""
    saved = np.load(FOLDER / "logits.npz")
    return SimpleNamespace(
        folder=FOLDER,
        config=json.loads((FOLDER / "config.json").read_text()),
        tokens=saved["tokens"],
        logits={name: saved[name] for name in saved.files if name != "tokens"},
        scalings=json.loads((FOLDER / "scalings.json").read_text()),
        overrides=OVERRIDES,
        parallel=parallel,
        load=load,
        weights=weights,
        compute_logits=logits,
        whole=load(FOLDER),
    )
