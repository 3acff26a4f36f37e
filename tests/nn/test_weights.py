import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.nn.logical_axes import named
from ring_rl.nn.weights import weight_specs

WIDE = {"width": 32, "query_heads": 8, "key_value_heads": 4, "feed_forward_width": 512, "layers": 3}
TOKENS = 4096


def collectives(text):
    """(kind, dtype, shape) of every array that travels in a compiled program."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    sent = []
    for results, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", results):
            sent.append((kind, dtype, tuple(int(n) for n in shape.split(",") if n)))
    return sent


@pytest.fixture(scope="module")
def compile_gradients(transformers):
    """Compiled gradients, for parameters and activations that lie where training puts them."""

    def run(sizes, **changes):
        model, around = transformers.make(**(WIDE | changes)), transformers.parallel(*sizes)
        graphdef, parameters = nnx.split(model)
        specs = jax.tree.leaves(weight_specs(parameters, around.local()), is_leaf=lambda x: isinstance(x, P))
        leaves, structure = jax.tree.flatten(parameters)
        shardings = structure.unflatten([NamedSharding(around.mesh, spec) for spec in specs])
        parameters = structure.unflatten(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(around.mesh, spec))
            for x, spec in zip(leaves, specs, strict=True)
        )
        placed = NamedSharding(around.mesh, around.token_spec)
        batch = transformers.batch
        x = jax.ShapeDtypeStruct((batch, TOKENS, WIDE["width"]), jnp.float32, sharding=placed)
        positions = jax.ShapeDtypeStruct((batch, TOKENS), jnp.int32, sharding=placed)

        def loss(parameters, x, positions):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, parameters)(x, positions, around).astype(jnp.float32)))

        return jax.jit(jax.grad(loss), out_shardings=shardings).lower(parameters, x, positions).compile()

    return run


def test_specs_follow_the_names_where_the_mesh_divides(transformers):
    _, blocks = nnx.split(transformers.make().blocks)
    local = transformers.parallel(1, 2, 2, 2).local()
    specs = weight_specs(blocks, local)
    assert specs["attention"]["query"]["kernel"] == P(None, "fsdp", "tp")
    assert specs["feed_forward_out"]["kernel"] == P(None, "tp", "fsdp")
    assert specs["feed_forward_in"]["bias"] == P(None, "tp")
    assert specs["attention_norm"]["scale"] == P(None, "fsdp")
    alone = weight_specs(blocks, transformers.parallel(1, 1, 1, 8).local())
    assert set(jax.tree.leaves(alone, is_leaf=lambda x: isinstance(x, P))) == {P(None, None, None), P(None, None)}
    _, odd = nnx.split(nnx.Linear(3, 4, kernel_metadata=named("width", "hidden"), rngs=nnx.Rngs(0)))
    assert weight_specs(odd, local)["kernel"] == P(None, "tp")


def test_weights_travel_and_activations_stay(transformers, compile_gradients):
    """The only transfer of whole activations is the sum of tensor parallelism."""
    chunks, (dp, fsdp, tp, sp) = 4, (1, 2, 2, 2)
    program = compile_gradients((dp, fsdp, tp, sp), feed_forward_chunks=chunks)
    sent = collectives(program.as_text())
    kinds = {kind for kind, _, _ in sent}
    assert {"all-gather", "reduce-scatter", "collective-permute"} <= kinds
    assert "all-to-all" not in kinds
    largest_weight = WIDE["width"] * WIDE["feed_forward_width"] // tp
    for kind, _, shape in sent:
        if kind in ("all-gather", "reduce-scatter"):
            assert np.prod(shape) <= largest_weight
    # The sums of activations over the tensor axis: this device's tokens, whole or a chunk of them.
    local_tokens = transformers.batch // fsdp * TOKENS // sp
    sums = {int(np.prod(shape)) for kind, _, shape in sent if kind == "all-reduce" and np.prod(shape) > largest_weight}
    assert sums <= {local_tokens * WIDE["width"], local_tokens * WIDE["width"] // chunks}


def equations(jaxpr, loops=0):
    """(loops around it, equation) for all of a traced program."""
    for equation in jaxpr.eqns:
        yield loops, equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, loops + (equation.primitive.name in ("scan", "while")))


def traced_gradients(transformers, around, **changes):
    loss, arguments, _ = transformers.loss_function(transformers.make(**changes), around)
    return list(equations(jax.jit(jax.grad(loss, has_aux=True)).trace(*arguments).jaxpr.jaxpr))


def test_gradients_are_summed_once_a_layer_whatever_the_chunks(transformers):
    """Inside the loop over layers, and not inside the one over chunks that is inside it."""
    traced = traced_gradients(transformers, transformers.parallel(1, 2, 2, 2), feed_forward_chunks=4)
    sums = [(loops, x.params["axes"]) for loops, x in traced if x.primitive.name.startswith("psum")]
    of_weights = sorted((loops, axes) for loops, axes in sums if "sp" in axes)
    # The last norm; then every parameter of a layer. All have a width, over which fsdp has summed already, but for
    # the bias of the feed-forward's hidden layer.
    assert of_weights == [(0, ("dp", "sp")), (1, ("dp", "fsdp", "sp")), *[(1, ("dp", "sp"))] * 9]
    assert {loops for loops, axes in sums if axes == ("tp",)} == {1, 2}


def test_weights_travel_in_bfloat16_and_gradients_are_summed_in_float32(transformers):
    """As traced: a CPU sends either in float32."""
    traced = traced_gradients(transformers, transformers.parallel(1, 2, 1, 4), compute_dtype="bfloat16")
    dtypes = {"all_gather": set(), "reduce_scatter": set(), "psum": set()}
    for _, equation in traced:
        # The ring's own transfers are not of concern here.
        if equation.params.get("axis_name") in ("fsdp", ("fsdp",)) or "sp" in equation.params.get("axes", ()):
            for name, seen in dtypes.items():
                if equation.primitive.name.startswith(name):
                    seen.add(equation.invars[0].aval.dtype.name)
    assert dtypes == {"all_gather": {"bfloat16"}, "reduce_scatter": {"float32"}, "psum": {"float32"}}


def test_chunks_bound_the_hidden_activations(transformers, compile_gradients):
    one, eight = (compile_gradients((1, 2, 2, 2), feed_forward_chunks=n) for n in (1, 8))
    hidden_bytes = 4 * transformers.batch // 2 * TOKENS // 2 * WIDE["feed_forward_width"] // 2
    saved = one.memory_analysis().temp_size_in_bytes - eight.memory_analysis().temp_size_in_bytes
    assert saved > 0.8 * hidden_bytes
