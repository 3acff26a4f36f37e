from __future__ import annotations

import json
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.layout import LAYOUTS, to_layout
from ring_rl.training.input import InputConfig, RowStream
from ring_rl.training.mesh import MeshConfig, batch_sharding, make_mesh

TOKENS, BATCH, STEPS = 16, 4, 6


class Rows:
    """Rows whose every number tells where it comes from."""

    def __init__(self, *, broken: int | None = None, shorter: int | None = None, seconds: float = 0.0):
        self.broken, self.shorter, self.seconds = broken, shorter, seconds
        self.made: list[int] = []
        self.threads: set[str] = set()

    def row(self, index):
        time.sleep(self.seconds)
        self.made.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.broken:
            raise OSError(5, f"row {index} cannot be read")
        tokens = np.arange(TOKENS - (index == self.shorter))
        return {
            "features": np.random.default_rng(index).normal(size=(len(tokens), 3)),
            "positions": tokens.astype(np.int32) + 100 * index,
            "index": np.int32(index),
        }


def stream(rows=None, *, dp=2, fsdp=1, tp=1, sp=4, layout="zigzag", threads=2, prefetch=2):
    return RowStream(
        rows or Rows(),
        batch_size=BATCH,
        steps=STEPS,
        mesh=make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=sp)),
        layout=layout,
        ring_size=sp,
        config=InputConfig(threads=threads, prefetch_batches=prefetch),
    )


def expected_positions(step, *, sp, layout):
    rows = np.stack([np.arange(TOKENS) + 100 * (step * BATCH + i) for i in range(BATCH)])
    return to_layout(rows, axis=1, ring_size=sp, layout=layout)


@given(
    shape=st.sampled_from([(1, 1, 1, 1), (2, 1, 1, 4), (1, 2, 2, 2), (4, 1, 1, 2), (1, 1, 1, 8), (2, 2, 2, 1)]),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 3),
    prefetch=st.integers(1, 3),
)
def test_batches_come_in_order_permuted_and_laid_on_the_mesh(shape, layout, threads, prefetch):
    dp, fsdp, tp, sp = shape
    batches = stream(dp=dp, fsdp=fsdp, tp=tp, sp=sp, layout=layout, threads=threads, prefetch=prefetch)
    mesh = make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=sp))
    for step in range(STEPS):
        batch = next(batches)
        np.testing.assert_array_equal(batch["positions"], expected_positions(step, sp=sp, layout=layout))
        np.testing.assert_array_equal(batch["index"], step * BATCH + np.arange(BATCH))
        shardings = batch_sharding(mesh, batch)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), batch, shardings)))
        for x, abstract in zip(jax.tree.leaves(batch), jax.tree.leaves(batches.abstract_batch), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)
    with pytest.raises(StopIteration):
        next(batches)


def test_a_batch_comes_again_on_the_host_without_disturbing_the_order():
    batches = stream()
    first = jax.device_get(next(batches))
    again = batches.batch_at(0)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(again))
    assert np.asarray(next(batches)["index"])[0] == BATCH


@given(taken=st.integers(0, STEPS))
def test_a_stream_goes_on_from_its_state_on_another_mesh(taken):
    batches = stream()
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    rest = [np.asarray(batch["index"]) for batch in batches]
    resumed = stream(dp=1, sp=8)
    next(resumed)  # what was prefetched before is not handed out after
    resumed.restore(state)
    np.testing.assert_array_equal([np.asarray(batch["index"]) for batch in resumed], rest)
    assert len(rest) == STEPS - taken


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({}, "an input state holds the integers next_step and batch_size, got {}"),
        ({"next_step": 1.5, "batch_size": 4}, "holds the integers"),
        ({"next_step": 1, "batch_size": 8}, "set the batch size to 8"),
        ({"next_step": 7, "batch_size": 4}, "there are 6 steps; raise steps"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, complaint):
    with pytest.raises(ValueError, match=complaint):
        stream().restore(state)


def test_rows_are_made_off_the_calling_thread_and_no_further_ahead_than_asked():
    rows = Rows()
    batches = stream(rows, prefetch=2)
    assert rows.made == [0]
    next(batches)
    deadline = time.monotonic() + 20
    # Row 0 for its shape; the batch in hand and two ahead.
    while len(rows.made) < 1 + 3 * BATCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(rows.made) == sorted([0, *range(3 * BATCH)])
    rows.threads.discard(threading.current_thread().name)
    assert rows.threads
    assert all(name.startswith("grain") for name in rows.threads)


def test_start_prepares_batches_before_the_first_is_asked_for():
    rows = Rows()
    batches = stream(rows)
    batches.start()
    deadline = time.monotonic() + 20
    while len(rows.made) < 1 + 2 * BATCH:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    batches.close()


def test_an_error_of_a_row_reaches_the_caller_as_itself():
    batches = stream(Rows(broken=2 * BATCH + 1))
    next(batches)
    next(batches)
    with pytest.raises(OSError, match="row 9 cannot be read") as error:
        next(batches)
    assert error.value.errno == 5


def test_rows_of_different_shapes_are_refused():
    batches = stream(Rows(shorter=5))
    next(batches)
    with pytest.raises(
        ValueError, match=r"row 5 has the shapes .*float32\[15, 3\].*row 0 has .*; pad rows to one length"
    ):
        next(batches)


def test_closing_waits_for_no_row():
    batches = stream(Rows(seconds=0.3))
    batches.start()
    begin = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - begin < 0.3
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_a_mesh_that_does_not_divide_the_batch_is_refused_at_once():
    with pytest.raises(ValueError, match=r"batch size 4 .* is not divisible by"):
        stream(dp=8, sp=1)
    with pytest.raises(ValueError, match=r"sequence length 16 .* pad"):
        RowStream(
            Rows(),
            batch_size=4,
            steps=1,
            mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1)),
            layout="zigzag",
            ring_size=3,
            config=InputConfig(threads=1, prefetch_batches=1),
        )


def test_settings_must_make_sense():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        InputConfig(threads=0, prefetch_batches=1)
    with pytest.raises(ValueError, match="prefetch_batches must be at least 1, got 0"):
        InputConfig(threads=1, prefetch_batches=0)
