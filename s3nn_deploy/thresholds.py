"""Exact thresholds: where a chain of float operations between an integer sum and a spike switches, and by what margin.

Between the integer u and the compare stand, per channel, only additions, multiplications and batch norms: a monotone real
function of u. Its switching point is computed in rationals (square roots to `PRECISION` bits), theta is the integer on its
firing side. The float chain that PyTorch runs errs by a few units in the last place, not equally on every processor; a
channel whose decision at theta or theta - 1 lies within the proven bound of that error is ambiguous.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

PRECISION = 256
"""Bits to which square roots are computed; float32 needs 24."""

ROUNDINGS = 8
"""Units of relative rounding in a batch norm's factor alpha = gamma / sigma, and in a product with x - mean.

eps to float and var + eps (2, halved by the root), the root (1), its reciprocal (1; 4 where it is an approximate rsqrt),
times gamma (1), x - mean and the product with it (2). Where a kernel computes x * alpha + (beta - mean * alpha) instead of
(x - mean) * alpha + beta, the error of alpha still only meets their difference, and x * alpha, mean * alpha,
beta - mean * alpha and the result are rounded once each.
"""

TINY = Fraction(1, 1 << 120)
"""Absolute error charged to each operation for results that underflow (float32's smallest normal number is 2^-126)."""

OVERFLOW = 1 << 126
"""A chain with an intermediate beyond this may be infinite or NaN in float32: its error is then without bound."""

UNBOUNDED = Fraction(1 << 4096)
"""Stands for an error without bound."""


@dataclass(frozen=True)
class Add:
    """v + value."""

    value: Fraction


@dataclass(frozen=True)
class Mul:
    """v * value (a division is a multiplication by the exact inverse)."""

    value: Fraction


@dataclass(frozen=True)
class BatchNorm:
    """(v - mean) / sigma * gamma + beta, with sigma = sqrt(var + eps)."""

    mean: Fraction
    sigma: Fraction
    gamma: Fraction
    beta: Fraction


@dataclass(frozen=True)
class Slack:
    """v itself, which the floats before it may have missed by up to `bound`."""

    bound: Fraction


Step = Add | Mul | BatchNorm | Slack


@dataclass(frozen=True)
class Decision:
    """What one channel does: it fires where `sign * u >= theta`.

    Attributes:
        sign: 1 or -1 (a falling chain; the filter is negated). A constant channel has sign 1.
        theta: within [low, high + 1] of sign * u, the reachable range; at its ends the channel always or never fires.
        switch: the switching point in units of sign * u; None where the chain is constant.
        ambiguous: the float chain cannot be relied on to decide every reachable u alike.
    """

    sign: int
    theta: int
    switch: Fraction | None
    ambiguous: bool


def square_root(x: Fraction) -> Fraction:
    """The square root of x >= 0 to a relative precision of 2^-PRECISION, exact where it is rational of that size."""
    num, den = x.numerator, x.denominator
    shift = max(0, 2 * PRECISION - (num * den).bit_length()) // 2 + 1
    return Fraction(math.isqrt(num * den << 2 * shift), den << shift)


def switching_point(steps: tuple[Step, ...], threshold: Fraction) -> tuple[int, Fraction | None]:
    """(sign, x): the chain reaches `threshold` where sign * u >= x. (0, None) for a constant chain."""
    sign, x = 1, threshold
    for step in reversed(steps):
        match step:
            case Slack():
                pass
            case Add(value):
                x -= value
            case Mul(value):
                if value == 0:
                    return 0, None
                x, sign = x / value, sign if value > 0 else -sign
            case BatchNorm(mean, sigma, gamma, beta):
                if gamma == 0:
                    return 0, None
                x, sign = (x - beta) * sigma / gamma + mean, sign if gamma > 0 else -sign
    return sign, sign * x


def evaluate(steps: tuple[Step, ...], u: Fraction, unit: Fraction) -> tuple[Fraction, Fraction]:
    """The chain's real value at u, and a bound on the error of its float evaluation with unit roundoff `unit`."""
    v, error = u, Fraction(0)
    for step in steps:
        largest = abs(v)
        match step:
            case Slack(bound):
                error += bound
            case Add(value):
                v += value
                error += unit * (abs(v) + error) + TINY
            case Mul(value):
                v, error = v * value, error * abs(value)
                if value != 0 and not (_is_power_of_two(value) and abs(value) > TINY):
                    error += unit * (abs(v) + error) + TINY
            case BatchNorm(mean, sigma, gamma, beta):
                alpha = gamma / sigma
                if alpha == 0:
                    v, error = beta, Fraction(0) if error < UNBOUNDED else UNBOUNDED
                    continue
                new = alpha * (v - mean) + beta
                distance = abs(alpha) * (abs(v - mean) + error)
                rounded = abs(alpha) * (abs(v) + error + abs(mean)) + abs(beta - alpha * mean) + abs(new)
                largest = max(rounded, abs(alpha), abs(mean) + abs(v))
                slips = unit * (ROUNDINGS * distance + rounded) * (1 + 32 * unit)
                v, error = new, abs(alpha) * error + slips + TINY * (1 + abs(v) + abs(mean))
        if max(largest, abs(v)) > OVERFLOW:
            error = UNBOUNDED
    return v, error


def _is_power_of_two(value: Fraction) -> bool:
    return abs(value.numerator).bit_count() == 1 and value.denominator.bit_count() == 1


def decide(
    steps: tuple[Step, ...], threshold: Fraction, low: int, high: int, unit: Fraction, strict: bool = False
) -> Decision:
    """The integer decision of a channel whose u lies in [low, high], for a float chain of unit roundoff `unit`.

    It fires where the chain is at or above `threshold`; with `strict`, above it.
    """
    sign, x = switching_point(steps, threshold)
    if x is None:
        value = evaluate(steps, Fraction(0), unit)[0]
        fires = value > threshold or (value == threshold and not strict)
        theta, sign = (low if fires else high + 1), 1
    else:
        low, high = (low, high) if sign > 0 else (-high, -low)
        theta = min(max(math.floor(x) + 1 if strict else math.ceil(x), low), high + 1)
    checked = {u for u in (low, theta - 1, theta, high) if low <= u <= high}
    sure = all(_sure(steps, threshold, Fraction(sign * u), unit) for u in checked)
    return Decision(sign, theta, x, not sure)


def _sure(steps: tuple[Step, ...], threshold: Fraction, u: Fraction, unit: Fraction) -> bool:
    """Whether every float evaluation at u decides as the real chain does.

    Farther from the switching point it does so too, where nothing overflows: per unit of u the value moves by |A|, the
    bound by a few roundings of |A|.
    """
    value, error = evaluate(steps, u, unit)
    return abs(value - threshold) > error or error == 0


def half_way(decision: Decision) -> Fraction | None:
    """The u at which the chain should meet its threshold: between theta - 1 and theta; None where it may stay as it is.

    A channel may stay if it is constant, or already within an eighth of half-way, or if it is sure and always or never
    fires (its switching point is then out of reach).
    """
    if decision.switch is None:
        return None
    middle = decision.theta - Fraction(1, 2)
    if abs(decision.switch - middle) <= Fraction(1, 8):
        return None
    unreachable = not decision.ambiguous and not decision.theta - 1 < decision.switch <= decision.theta
    return None if unreachable else decision.sign * middle
