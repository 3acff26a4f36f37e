"""What is known before anything is compiled."""

import dataclasses

import pytest

from ring_rl.planning.feasibility import first_guess, model_sizes, problem_of
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.planning.topology import machine_named
from small_steps import small_request


def test_sizes_of_a_model_are_those_of_its_arrays():
    request = small_request()
    sizes = model_sizes(request, devices=1)
    assert sizes.parameters == StepSizes(request).parameters()
    # Parameters and two moments in float32, and counters of a few bytes.
    assert sizes.state_bytes == pytest.approx(12 * sizes.parameters, abs=64)
    assert model_sizes(request, devices=4).state_bytes == sizes.state_bytes // 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"sp": 16}}, "8 devices do not divide into groups of 16"),
        ({"strategy": "hybrid", "ulysses_size": 3}, "ulysses_size=3 does not divide sp=8 devices"),
        ({"mesh": {"tp": 4, "sp": 2}}, "tp=4 does not divide query_heads=2"),
        ({"strategy": "ulysses"}, "2 query heads cannot be shared by the 8 devices"),
        ({"strategy": "hybrid", "ulysses_size": 4}, "2 query heads cannot be shared by the 4 devices"),
    ],
)
def test_what_cannot_run_whatever_its_context_says_why(changes, message):
    problem = problem_of(small_request(**{"mesh": {"sp": 8}, **changes}), machine_named("v5e-8"))
    assert problem is not None
    assert message in problem
    assert "\n" not in problem


def test_what_may_run_has_no_problem():
    assert problem_of(small_request(mesh={"sp": 8}), machine_named("v5e-8")) is None


def test_state_that_alone_is_too_much_says_by_how_much():
    request = small_request(mesh={"sp": 8}, transformer={"feed_forward_width": 2**22, "layers": 64})
    problem = problem_of(request, machine_named("v5e-8"))
    # Three matrices of 16 x 2**22 a layer, 12 bytes each.
    assert problem is not None
    assert f"take {64 * 3 * 16 * 2**22 * 12 / 8 / 1e9:.1f} GB on each of 8 devices, which have 16.9" in problem


def test_a_search_begins_with_more_tokens_on_more_memory_and_fewer_layers():
    request = small_request()
    small, large = machine_named("v5e-8"), machine_named("v5p-8")
    assert first_guess(request, large) > first_guess(request, small) > 0
    deeper = small_request(transformer={"layers": 4})
    assert first_guess(deeper, small) < first_guess(request, small)
    dense = dataclasses.replace(request, strategy="dense")
    # Scores grow with the square of the tokens.
    assert first_guess(dense, small) < first_guess(request, small)
