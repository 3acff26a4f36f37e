from __future__ import annotations

import math
import statistics

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.training.divergence import (
    FEWEST_LOSSES,
    RECENT_LOSSES,
    DivergenceCheck,
    all_finite,
    save_offending_batch,
)


@given(
    losses=st.lists(st.floats(0.1, 3.0), min_size=FEWEST_LOSSES, max_size=2 * RECENT_LOSSES),
    factor=st.sampled_from([0.5, 0.999, 1.001, 100.0]),
    cut=st.integers(0, 2 * RECENT_LOSSES),
)
def test_a_loss_explodes_beyond_the_ratio_to_the_median_of_the_last_ones(losses, factor, cut):
    ratio = 50.0  # beyond what these losses vary by
    check = DivergenceCheck(ratio)
    for loss in losses[:cut]:
        assert check.complaint({"loss": loss}) is None
    # A resumed run judges by what the checkpoint holds.
    check = DivergenceCheck(ratio, check.recent_losses)
    for loss in losses[cut:]:
        assert check.complaint({"loss": loss}) is None
    assert check.recent_losses == losses[-RECENT_LOSSES:]
    loss = factor * ratio * statistics.median(losses[-RECENT_LOSSES:])
    assert (check.complaint({"loss": loss}) is not None) == (factor > 1)


def test_the_first_losses_and_those_about_zero_never_explode():
    check = DivergenceCheck(2.0)
    for step in range(FEWEST_LOSSES):
        assert check.complaint({"loss": 10.0**step}) is None
    negative = DivergenceCheck(2.0, [-1.0] * FEWEST_LOSSES)
    assert negative.complaint({"loss": 50.0}) is None
    switched_off = DivergenceCheck(None, [1.0] * FEWEST_LOSSES)
    assert switched_off.complaint({"loss": 1e30}) is None


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_forgotten(name, value):
    check = DivergenceCheck(None)
    assert check.complaint({"loss": 1.0, name: value}) == f"{name} is {value}"
    assert check.recent_losses == []


def test_one_number_that_is_not_finite_is_found():
    assert all_finite({"a": jnp.ones((3, 2)), "count": jnp.int32(3)})
    assert all_finite({})
    assert not all_finite({"a": jnp.ones((3, 2)), "b": {"c": jnp.ones(4).at[2].set(jnp.nan)}})
    assert not all_finite([jnp.full(2, -jnp.inf, jnp.bfloat16)])


def test_a_batch_is_kept_whole_under_names_that_lead_to_its_leaves(tmp_path):
    batch = {"tokens": np.arange(6).reshape(2, 3), "extra": [np.float32(0.5), np.ones(2, jnp.bfloat16)]}
    first = save_offending_batch(tmp_path / "offending_batch", 7, batch)
    second = save_offending_batch(tmp_path / "offending_batch", 7, {"tokens": np.zeros(1)})
    assert (first.name, second.name) == ("step_7.npz", "step_7.2.npz")
    saved = dict(np.load(first))
    assert sorted(saved) == ["extra.0", "extra.1", "tokens"]
    np.testing.assert_array_equal(saved["tokens"], batch["tokens"])
    assert saved["extra.1"].dtype == np.float32
    assert saved["extra.1"].tolist() == [1.0, 1.0]
