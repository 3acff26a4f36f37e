"""Reading schedules: small programs written for these tests in the form that XLA prints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from ring_rl.kernels.schedule import Schedule

HEADER = "HloModule jit_ring, is_scheduled=true, num_partitions=8\n"
PRODUCT = """
%matrices (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  ROOT %out = f32[8,8]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

%sums (c: f32[8,8]) -> f32[8,8] {
  %c = f32[8,8]{1,0} parameter(0)
  ROOT %twice = f32[8,8]{1,0} add(%c, %c)
}
"""
START = (
    "%start = (bf16[2,8]{1,0:T(8,128)(2,1)}, bf16[2,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1"
)
DONE = "%done = bf16[2,8]{1,0:T(8,128)(2,1)} collective-permute-done(%start)"
MULTIPLY = "%multiply = f32[8,8]{1,0} fusion(%y, %y), kind=kOutput, calls=%matrices"
ADD = "%add = f32[8,8]{1,0} fusion(%y), kind=kLoop, calls=%sums"
KERNEL = '%kernel = (f32[8,8]{1,0}, f32[1,8]{1,0}) custom-call(%y), custom_call_target="tpu_custom_call"'
COPY = '%joined = f32[8,8]{1,0} custom-call(%y), custom_call_target="ConcatBitcast"'


def _program(*lines: str, rest: str = "") -> Schedule:
    body = "\n".join(f"  {line}" for line in lines)
    entry = f"\nENTRY %main (x: bf16[2,8], y: f32[8,8]) -> f32[8,8] {{\n  %x = bf16[2,8] parameter(0)\n{body}\n}}\n"
    return Schedule.parse(HEADER + PRODUCT + rest + entry)


@pytest.mark.parametrize(
    ("lines", "covered_by"),
    [
        ((START, MULTIPLY, DONE), ("multiply",)),
        ((START, KERNEL, MULTIPLY, DONE), ("kernel", "multiply")),
        ((MULTIPLY, START, DONE), ()),
        ((START, DONE, MULTIPLY), ()),
        ((START, ADD, COPY, DONE, KERNEL), ()),
    ],
)
def test_what_multiplies_between_start_and_done_covers(lines, covered_by):
    (permute,) = _program(*lines).permutes()
    assert permute.covered_by == covered_by
    assert permute.overlapped == bool(covered_by)
    assert permute.asynchronous
    assert (permute.array, permute.bytes, permute.trips) == ("bf16[2,8]", 32, 1)


def test_a_synchronous_permute_is_not_hidden():
    (permute,) = _program("%moved = f32[4,8]{1,0} collective-permute(%x), channel_id=1", MULTIPLY).permutes()
    assert not permute.asynchronous
    assert not permute.overlapped
    assert permute.bytes == 128


def test_starts_whose_names_begin_alike_are_told_apart():
    one, ten = (
        line.replace("%start", f"%start.{i}").replace("%done", f"%done.{i}") for i, line in ((1, START), (10, START))
    )
    done_one, done_ten = (DONE.replace("%start", f"%start.{i}").replace("%done", f"%done.{i}") for i in (1, 10))
    first, second = _program(one, ten, done_ten, MULTIPLY, done_one).permutes()
    assert (first.name, first.overlapped) == ("start.1", True)
    assert (second.name, second.overlapped) == ("start.10", False)


LOOP = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %p = (s32[], f32[8,8]) parameter(0)
  {start}
  {multiply}
  {done}
  ROOT %next = (s32[], f32[8,8]) tuple(%p, %multiply)
}}

%condition (p.1: (s32[], f32[8,8])) -> pred[] {{
  %p.1 = (s32[], f32[8,8]) parameter(0)
  %limit = s32[]{{:T(128)}} constant(6)
  %i = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i, {limit}), direction=LT
}}
"""
WHILE = "%loop = (s32[], f32[8,8]{1,0}) while(%t), condition=%condition, body=%body"


def test_a_loop_is_counted_once_and_says_how_often_it_runs():
    loop = LOOP.format(start=START, multiply=MULTIPLY, done=DONE, limit="%limit")
    outside = (
        START.replace("%start", "%start.2"),
        WHILE,
        DONE.replace("%start", "%start.2").replace("%done", "%done.2"),
    )
    first, second = _program(*outside, rest=loop).permutes()
    assert (first.name, first.trips, first.covered_by) == ("start.2", 1, ("loop",))
    assert (second.name, second.trips, second.computation) == ("start", 6, "body")


def test_a_count_that_only_the_program_knows():
    loop = LOOP.format(start=START, multiply=MULTIPLY, done=DONE, limit="%p.1")
    assert [permute.trips for permute in _program(WHILE, rest=loop).permutes()] == [None]


def test_computations_that_do_not_run_do_not_count():
    loop = LOOP.format(start=START, multiply=MULTIPLY, done=DONE, limit="%limit")
    assert _program(MULTIPLY, rest=loop).permutes() == []


def test_what_is_no_schedule_is_refused():
    with pytest.raises(ValueError, match="is_scheduled=true; compile it"):
        Schedule.parse("HloModule jit_ring\n" + PRODUCT)
    with pytest.raises(ValueError, match="no ENTRY"):
        Schedule.parse(HEADER + PRODUCT)
    with pytest.raises(ValueError, match="never awaited"):
        _program(START, MULTIPLY).permutes()


def test_a_real_program():
    """Of this machine's compiler, whose permutes are synchronous on a CPU."""
    mesh = DeviceMesh(np.array(jax.devices()[:2]), ("sp",))

    def passed_on(x):
        step = lambda _, x: jax.lax.ppermute(x @ x, "sp", [(0, 1), (1, 0)])  # noqa: E731
        return jax.lax.fori_loop(0, 5, step, jax.lax.ppermute(x, "sp", [(0, 1), (1, 0)]))

    over_devices = jax.jit(jax.shard_map(passed_on, mesh=mesh, in_specs=P("sp"), out_specs=P("sp")))
    text = over_devices.lower(jnp.ones((16, 8), jnp.float32)).compile().as_text()
    schedule = Schedule.parse(text)
    permutes = schedule.permutes()
    assert len(permutes) == 2
    assert {permute.bytes for permute in permutes} == {256}
    assert not any(permute.overlapped for permute in permutes)
