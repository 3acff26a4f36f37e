from __future__ import annotations

import io
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from rich.console import Console

from ring_rl.nn.logical_axes import named
from ring_rl.training.dry_run import DryRun, device_memory, dry_run, needed_bytes, print_dry_run
from ring_rl.training.mesh import MeshConfig, batch_sharding, make_mesh
from ring_rl.training.state import abstract_state
from ring_rl.training.step import Loss, make_train_step

WIDTH = 512


class Square(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, width: int = WIDTH):
        self.square = nnx.Linear(width, width, kernel_metadata=named("width", "hidden"), use_bias=False, rngs=rngs)

    def __call__(self, inputs_BTM: jax.Array) -> jax.Array:
        return self.square(inputs_BTM)


def sum_of_squares(model: Square, batch: jax.Array, key: jax.Array) -> Loss:
    del key
    return Loss(jnp.sum(model(batch) ** 2), jnp.float32(batch[..., 0].size), {})


def report_of(*, fsdp=1, tp=1, width=WIDTH, device_memory_gib=None, model_flops=None) -> DryRun:
    mesh = make_mesh(MeshConfig(dp=1, fsdp=fsdp, tp=tp, sp=1))
    optimizer = optax.adam(1e-3)
    graphdef, state = abstract_state(lambda rngs: Square(rngs, width=width), optimizer, mesh=mesh)
    step = make_train_step(sum_of_squares, graphdef, optimizer, mesh, seed=0)
    batch = jax.ShapeDtypeStruct((8, 4, width), jnp.float32)
    batch = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=batch_sharding(mesh, batch))
    return dry_run(
        step, state, batch, mesh=mesh, tokens=32, model_flops=model_flops, device_memory_gib=device_memory_gib
    )


def test_the_report_of_a_small_model():
    report = report_of(model_flops=6 * 32 * WIDTH**2)
    assert (report.parameters, report.tokens) == (WIDTH**2, 32)
    # Kernel and two moments in float32, the step and Adam's count.
    assert report.state_bytes == 3 * 4 * WIDTH**2 + 8
    assert report.needed_bytes is not None
    assert report.needed_bytes > report.state_bytes + 4 * WIDTH**2, "the gradient needs room too"
    assert report.fits
    assert report.summary() == (
        f"parameters={WIDTH**2} tokens_per_step=32 model_flops_per_step={6 * 32 * WIDTH**2} "
        f"state_bytes={report.state_bytes} needed_bytes={report.needed_bytes} "
        f"available_bytes={report.available_bytes} fits=true"
    )


def test_sharding_divides_the_state_and_what_is_needed():
    whole, shared = report_of(), report_of(fsdp=4, tp=2)
    assert shared.parameters == whole.parameters
    assert shared.state_bytes == (whole.state_bytes - 8) // 8 + 8
    assert shared.needed_bytes is not None
    assert whole.needed_bytes is not None
    assert shared.needed_bytes < 0.6 * whole.needed_bytes


def test_a_model_that_no_machine_holds_is_reported_and_not_made():
    report = report_of(fsdp=8, width=2**17)
    assert report.parameters == 2**34
    assert report.state_bytes == 3 * 4 * 2**34 // 8 + 8
    assert report.fits is False
    assert report.summary().endswith("fits=false")


@pytest.mark.parametrize(("gib", "fits"), [(1.0, True), (0.002, False)])
def test_memory_can_be_configured(gib, fits):
    report = report_of(device_memory_gib=gib)
    assert (report.available_bytes, report.available_source) == (int(gib * 2**30), "configured")
    assert report.fits is fits


def test_impossible_memory_is_refused():
    with pytest.raises(ValueError, match="device_memory_gib must be positive, got 0"):
        report_of(device_memory_gib=0)


def test_what_is_needed_is_what_the_program_allocates():
    """At least the argument, the result, and one matrix product of the same size in between."""
    side = 256

    def function(x):
        return jnp.sin(x @ x) @ x

    compiled = jax.jit(function).lower(jax.ShapeDtypeStruct((side, side), jnp.float32)).compile()
    assert needed_bytes(compiled, platform="cpu") >= 3 * 4 * side**2
    memory = SimpleNamespace(peak_memory_in_bytes=7)
    assert needed_bytes(SimpleNamespace(memory_analysis=lambda: memory), platform="tpu") == 7
    with pytest.raises(ValueError, match="the backend abacus does not report the memory of a program"):
        needed_bytes(SimpleNamespace(memory_analysis=lambda: None), platform="abacus")


class Device(SimpleNamespace):
    def memory_stats(self):
        return self.statistics


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (
            Device(platform="gpu", device_kind="NVIDIA H100", statistics={"bytes_limit": 5}),
            (5, "reported by the device"),
        ),
        (
            Device(platform="tpu", device_kind="TPU v5e", statistics=None),
            (16_000_000_000, "data sheet of TPU v5e"),
        ),
        (
            Device(platform="gpu", device_kind="Abacus 3", statistics={}),
            (None, "unknown for Abacus 3; set device_memory_gib"),
        ),
    ],
    ids=["reported", "data sheet", "unknown"],
)
def test_a_device_is_asked_before_its_data_sheet(device, expected):
    assert device_memory(device) == expected


def test_virtual_devices_share_one_memory():
    available, source = device_memory(jax.devices()[0])
    assert source == "this machine's memory over 8 CPU devices"
    assert available is not None
    assert 2**26 < available < 2**50


def test_a_refusing_compiler_is_a_verdict_and_other_errors_are_not():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    _, state = abstract_state(Square, optax.sgd(1.0), mesh=mesh)

    def step_that_raises(message: str):
        def compile_step():
            raise jax.errors.JaxRuntimeError(message)

        return SimpleNamespace(lower=lambda state, batch: SimpleNamespace(compile=compile_step))

    def run(message: str) -> DryRun:
        step = step_that_raises(message)
        return dry_run(step, state, None, mesh=mesh, tokens=1, model_flops=None, device_memory_gib=1.0)

    report = run("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\n Used 20G of 16G")
    assert report.fits is False
    assert report.compiler_message == "Ran out of memory in memory space hbm. Used 20G of 16G"
    assert "needed_bytes=unknown" in report.summary()
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run("INTERNAL: broken")


@pytest.mark.parametrize("width", [40, 200])
def test_the_table_ends_with_one_line_for_programs(width):
    report = report_of(device_memory_gib=0.002)
    text = io.StringIO()
    print_dry_run(report, console=Console(file=text, width=width))
    lines = text.getvalue().strip().splitlines()
    assert lines[-1] == report.summary()
    assert re.search(r"fits\s*│\s*no", text.getvalue())
    assert "262,144" in text.getvalue()
