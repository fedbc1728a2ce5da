"""Exact thresholds: the integer decision is the real chain's, and the error bound covers what floats do."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3nn_deploy.thresholds import Add, BatchNorm, Mul, decide, evaluate, half_way, square_root, switching_point

UNIT32 = Fraction(1, 1 << 24)
floats = st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6, allow_subnormal=False
)
positive = st.floats(width=32, min_value=2.0**-20, max_value=1e6)


@st.composite
def chains(draw: st.DrawFn) -> tuple:
    norm = BatchNorm(
        Fraction(draw(floats)),
        square_root(Fraction(draw(positive)) + Fraction(1e-5)),
        Fraction(draw(floats)),
        Fraction(draw(floats)),
    )
    before = draw(
        st.lists(st.one_of(st.builds(Mul, floats.map(Fraction)), st.builds(Add, floats.map(Fraction))), max_size=2)
    )
    return (*before, norm)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(chains(), st.integers(-20000, 0), st.integers(0, 20000))
def test_the_integer_decision_is_that_of_the_real_chain(steps: tuple, low: int, high: int) -> None:
    decision = decide(steps, Fraction(1), low, high, UNIT32)
    for u in {low, high, 0, *(decision.sign * (decision.theta + d) for d in (-2, -1, 0, 1))}:
        if low <= u <= high:
            assert (decision.sign * u >= decision.theta) == (evaluate(steps, Fraction(u), UNIT32)[0] >= 1)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(floats, positive, floats, floats, positive, st.integers(-1000000, 1000000), st.booleans())
def test_the_error_bound_covers_batch_norm_in_float32(
    mean: float, var: float, gamma: float, beta: float, scale: float, u: int, near: bool
) -> None:
    if near:  # where x and mean cancel
        mean = float(np.float32(u * scale * (1 + mean * 1e-12)))
    steps = (
        Mul(Fraction(scale)),
        BatchNorm(Fraction(mean), square_root(Fraction(var) + Fraction(1e-5)), Fraction(gamma), Fraction(beta)),
    )
    value, bound = evaluate(steps, Fraction(u), UNIT32)
    x = torch.full((3, 17), float(u)) * scale
    m, v, g, b = (torch.full((17,), p, dtype=torch.float32) for p in (mean, var, gamma, beta))
    results = [
        torch.nn.functional.batch_norm(x, m, v, g, b, False, 0.0, 1e-5),
        (x - m) * torch.rsqrt(v + 1e-5) * g + b,
        (x - m) / torch.sqrt(v + 1e-5) * g + b,
        x * (g / torch.sqrt(v + 1e-5)) + (b - m * (g / torch.sqrt(v + 1e-5))),
    ]
    for got in {float(r) for result in results for r in result.flatten() if bool(torch.isfinite(r))}:
        assert abs(Fraction(got) - value) <= bound


def test_square_roots_are_exact_where_they_are_rational() -> None:
    assert square_root(Fraction(9, 16)) == Fraction(3, 4)
    root = square_root(Fraction(2))
    assert abs(root * root - 2) < Fraction(1, 1 << 250)


@pytest.mark.parametrize(
    ("gamma", "beta", "sign", "theta"), [(1.0, 0.0, 1, 8), (-1.0, 0.0, -1, -2), (0.0, 1.0, 1, -50), (0.0, 0.99, 1, 51)]
)
def test_signs_and_constants(gamma: float, beta: float, sign: int, theta: int) -> None:
    steps = (BatchNorm(Fraction(5), Fraction(5, 2), Fraction(gamma), Fraction(beta)),)  # reaches 1 at u = 7.5 or 2.5
    decision = decide(steps, Fraction(1), -50, 50, UNIT32)
    assert (decision.sign, decision.theta, decision.ambiguous) == (sign, theta, False)


def test_a_tie_is_ambiguous_and_fires_at_equality() -> None:
    steps = (BatchNorm(Fraction(100), Fraction(3), Fraction(1, 2), Fraction(1)),)  # reaches 1 exactly at u = 100
    decision = decide(steps, Fraction(1), 0, 1000, UNIT32)
    assert (decision.theta, decision.switch, decision.ambiguous) == (100, 100, True)
    assert half_way(decision) == Fraction(199, 2)


def test_a_compare_without_rounding_is_never_ambiguous() -> None:
    decision = decide((), Fraction(7), 0, 10, UNIT32)
    assert (decision.theta, decision.ambiguous) == (7, False)


def test_thresholds_out_of_reach_are_clamped_and_stay() -> None:
    for beta, theta in ((1e30, -10), (-1e30, 21)):
        decision = decide(
            (BatchNorm(Fraction(0), Fraction(1), Fraction(1), Fraction(beta)),), Fraction(1), -10, 20, UNIT32
        )
        assert (decision.theta, decision.ambiguous, half_way(decision)) == (theta, False, None)


def test_the_switching_point_of_a_falling_chain() -> None:
    assert switching_point((Mul(Fraction(-2)), Add(Fraction(3))), Fraction(1)) == (-1, Fraction(-1))
    assert np.sign(float(evaluate((Mul(Fraction(-2)), Add(Fraction(3))), Fraction(1), UNIT32)[0])) == 1
