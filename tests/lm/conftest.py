"""Small language models, and what they compute by their definition."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_rl.kernels.layout import permutation
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.rotary_scaling import YarnScaling, rotary_frequencies
from ring_rl.training.mesh import MeshConfig, make_mesh
from small_models import retrieval_aids, small_language_model, small_transformer

V, T = 24, 64
AIDS = retrieval_aids(keys_start_as_queries=False)
YARN = YarnScaling(name="yarn", factor=4.0, original_positions=32, beta_fast=8.0, beta_slow=1.0, attention_factor=None)
# Every part that LLaMA lacks.
EVERYTHING = {
    "rotary_fraction": 0.5,
    "rotary_scaling": YARN,
    "no_position_layers": (1,),
    "retrieval": AIDS,
    "key_value_heads": 2,
}


def config(*, tied=False, **changes):
    trunk = {
        "query_heads": 4,
        "key_value_heads": 4,
        "norm_epsilon": 1e-5,
        "feed_forward_width": 24,
        "saved_activations": "products",
    }
    return small_language_model(
        vocabulary_size=V,
        tied_embedding=tied,
        embedding_scale=0.5,
        trained_positions=T,
        transformer=small_transformer(**(trunk | changes)),
    )


def parallel(*, sp=1, tp=1, dp=1, fsdp=1, layout="zigzag", **options):
    return SequenceParallel(mesh=make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=sp)), layout=layout, **options)


def make(config, seed=0):
    """A model all of whose parameters are random, norms included."""
    model = LanguageModel(config, rngs=nnx.Rngs(seed))
    generator = np.random.default_rng(seed)
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1].endswith("scale"):
            parameter[...] = jnp.asarray(generator.uniform(0.2, 1.0, size=parameter.shape), jnp.float32)
        if path[-1] == "head":
            parameter[...] = jnp.asarray(generator.normal(size=parameter.shape), jnp.float32)
    return model


def batch(seed=0):
    """Two rows: documents of many lengths, padding, and answers of up to three tokens."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, V, size=(2, T)).astype(np.int32)
    ends = [[7, 9, 40, 60], [1, 30, 64, 64]]
    segment_ids = np.full((2, T), -1, np.int32)
    positions = np.zeros((2, T), np.int32)
    targets = np.full((2, T), -1, np.int32)
    for row, borders in enumerate(ends):
        for index, (start, end) in enumerate(zip([0, *borders], borders, strict=False)):
            segment_ids[row, start:end] = index
            positions[row, start:end] = np.arange(end - start)
            targets[row, start : end - 1] = tokens[row, start + 1 : end]
    answers = np.where(np.arange(T) % 5 < 3, np.arange(T) // 5, -1).astype(np.int32)
    return TokenBatch(
        tokens=tokens,
        targets=targets,
        weights=(generator.uniform(size=(2, T)) * (generator.uniform(size=(2, T)) < 0.7)).astype(np.float32),
        positions=positions,
        segment_ids=segment_ids,
        answer_ids=np.broadcast_to(answers, (2, T)).copy(),
    )


def in_layout(batch, around):
    """The batch as the mesh takes it, and what brings its tokens back into natural order."""
    order = permutation(batch.tokens.shape[1], ring_size=around.ring_size, layout=around.layout)
    return jax.tree.map(lambda x: x[:, order], batch), np.argsort(order)


def in_layout_of(around, *arrays):
    """Arrays [B T] as the mesh takes them."""
    order = permutation(arrays[0].shape[1], ring_size=around.ring_size, layout=around.layout)
    return [x[:, order] for x in arrays]


def reference_logits(model, batch):
    """The definition, in float64 numpy and with nothing of ours but the frequencies."""
    trunk = model.config.transformer
    parameters = {
        path: np.asarray(value.get_value(), np.float64)
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    position, index = np.asarray(batch.positions), np.arange(batch.tokens.shape[1])
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    seen = same & (index[:, None] >= index[None, :])

    def norm(x, scale):
        return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + trunk.norm_epsilon)

    def back(x, lag):
        """The token `lag` back, zeros across the border of a document."""
        y = np.zeros_like(x)
        for t in range(lag, x.shape[1]):
            y[:, t] = x[:, t - lag] * same[:, t, t - lag].reshape(-1, *(1,) * (x.ndim - 2))
        return y

    def turned(x, layer):
        if layer in trunk.no_position_layers:
            return x
        by = rotary_frequencies(rotary_dim=trunk.rotary_dim, base=trunk.rotary_base, scaling=trunk.rotary_scaling)
        half = trunk.rotary_dim // 2
        z = (x[..., :half] + 1j * x[..., half : 2 * half]) * by.magnitude
        z = z * np.exp(1j * position[:, :, None, None] * by.per_position)
        return np.concatenate([z.real, z.imag, x[..., 2 * half :]], axis=-1)

    x = parameters["vocabulary", "embedding"][batch.tokens]
    for layer in range(trunk.layers):
        of = lambda *path: parameters["transformer", "blocks", *path][layer]  # noqa: B023, E731
        if trunk.retrieval is not None:
            y, kernel = norm(x, of("convolution_norm", "scale")), of("convolution", "kernel")
            x = x + sum(kernel[lag] * back(y, lag) for lag in range(trunk.retrieval.convolution_width))
        y = norm(x, of("attention_norm", "scale"))
        heads = lambda name: (y @ of("attention", name, "kernel")).reshape(*y.shape[:2], -1, trunk.head_dim)  # noqa: B023, E731
        q, k, v = map(heads, ("query", "key", "value"))
        if trunk.retrieval is not None:
            share = of("attention", "key_shift_scale")[:, None]
            k = (1 - share) * k + share * back(k, 1)
        q, k = turned(q, layer), turned(k, layer)
        if trunk.retrieval is not None:
            q = q * of("attention", "query_scale")[:, None] * np.log(position + 2)[:, :, None, None]
        k, v = (np.repeat(x, trunk.query_heads // trunk.key_value_heads, axis=2) for x in (k, v))
        scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(trunk.head_dim)
        weights = np.exp(np.where(seen[:, None], scores, -np.inf) - scores.max())
        weights = weights / weights.sum(axis=-1, keepdims=True)
        out = np.einsum("bhts,bshd->bthd", weights, v).reshape(*y.shape[:2], -1)
        x = x + out @ of("attention", "out", "kernel")
        y = norm(x, of("feed_forward_norm", "scale"))
        gate = y @ of("feed_forward_gate", "kernel")
        hidden = gate / (1 + np.exp(-gate)) * (y @ of("feed_forward_in", "kernel"))
        x = x + hidden @ of("feed_forward_out", "kernel")
    hidden = norm(x, parameters["transformer", "final_norm", "scale"])
    tied = model.config.tied_embedding
    return hidden @ (parameters["vocabulary", "embedding"].T if tied else parameters["vocabulary", "head"])


@pytest.fixture(scope="session")
def language():
    """Makers of small language models, batches and meshes, and the definition."""
    return SimpleNamespace(
        vocabulary_size=V,
        tokens=T,
        aids=AIDS,
        everything=EVERYTHING,
        config=config,
        parallel=parallel,
        make=make,
        batch=batch,
        in_layout=in_layout,
        in_layout_of=in_layout_of,
        reference_logits=reference_logits,
    )
