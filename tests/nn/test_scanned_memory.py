"""A scanned stack must not keep what an unrolled one doesn't: a differentiated scan hoists what no layer changes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_rl.nn.saved_activations import rematerialised
from ring_rl.nn.token_context import token_context
from ring_rl.nn.weights import gathered, weight_specs, without_first_dimension
from small_models import retrieval_aids

LAYERS, UNROLLED_LAYERS, TOKENS, RING_SIZE = 6, 2, 4096, 2
LOCAL_TOKENS = TOKENS // RING_SIZE


def unrolled(model, x, positions, parallel, segment_ids):
    """The layers of `Transformer.__call__` in a Python loop."""
    local = parallel.local()
    definition, blocks = nnx.split(model.blocks)
    specs = weight_specs(blocks, local)
    layer_specs = without_first_dimension(specs)

    def run(blocks, x, positions, segment_ids):
        context = token_context(model.config, positions, segment_ids, local)

        def layer(x, shards):
            block = nnx.merge(definition, gathered(shards, layer_specs, local, dtype=jnp.dtype("float32")))
            return block(x, context, local)

        for index in range(model.config.layers):
            shards = jax.tree.map(lambda x, index=index: x[index], blocks)
            x = rematerialised(layer, model.config.saved_activations)(x, shards)
        return x

    tokens = local.token_spec
    in_specs = (specs, tokens, tokens, tokens)
    return jax.shard_map(run, mesh=local.mesh, in_specs=in_specs, out_specs=tokens)(blocks, x, positions, segment_ids)


AIDS = retrieval_aids(key_shift_initial=0.5)


def compiled(transformers, layout, *, packed, aids, layers, scanned):
    """The gradient in the parameters."""
    # The unrolled layers know of no flag, so all of them have positions.
    model = transformers.make(layers=layers, attention_block_size=256, retrieval=AIDS if aids else None)
    parallel = transformers.parallel(1, 1, 1, RING_SIZE, layout=layout)
    graphdef, parameters = nnx.split(model)

    def loss(parameters, x, positions, segment_ids):
        model = nnx.merge(graphdef, parameters)
        if scanned:
            return jnp.sum(model(x, positions, parallel, segment_ids=segment_ids))
        return jnp.sum(unrolled(model, x, positions, parallel, segment_ids))

    tokens = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    x = jax.ShapeDtypeStruct((1, TOKENS, transformers.width), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(parameters, x, tokens, tokens if packed else None).compile()


@pytest.mark.parametrize(
    ("layout", "packed", "aids"),
    [("zigzag", False, False), ("contiguous", False, False), ("contiguous", True, False), ("zigzag", True, True)],
)
def test_scanned_layers_cost_no_more_than_unrolled_ones_and_their_carries(transformers, layout, packed, aids):
    scanned = compiled(transformers, layout, packed=packed, aids=aids, layers=LAYERS, scanned=True)
    # Two layers bound more tightly than six: what works in one layer is needed once, however many there are.
    loop = compiled(transformers, layout, packed=packed, aids=aids, layers=UNROLLED_LAYERS, scanned=False)
    carry_bytes = 4 * LOCAL_TOKENS * transformers.width
    allowed = loop.memory_analysis().temp_size_in_bytes + LAYERS * carry_bytes
    assert scanned.memory_analysis().temp_size_in_bytes <= allowed
    # A mask for all pairs of a device's tokens, the smallest that could be hoisted, would be seen above and here.
    mask_bytes = LOCAL_TOKENS**2
    assert mask_bytes > allowed - scanned.memory_analysis().temp_size_in_bytes
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w+\[([\d,]+)\]", scanned.as_text())]
    assert max(sizes) < LOCAL_TOKENS**2
