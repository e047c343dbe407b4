"""Levels keep the noise of the trained chain exactly; t_boom means the level it says."""

import itertools
import math
import operator
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from diffusers import DDPMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from boomgen.errors import UsageError
from boomgen.levels import flow, parse_t_boom, respaced, spaced, variance_exploding

RULES = ["even", "fastdpm-linear", "fastdpm-quadratic"]


def trained(betas: np.ndarray) -> list[float]:
    """abar_i = prod_{j <= i} (1 - beta_j), by plain multiplication of float64."""
    return list(itertools.accumulate((1 - betas).tolist(), operator.mul))


LINEAR = trained(np.linspace(1e-4, 0.02, 1000))  # DDPM, FastDPM, Patched Diffusion on ImageNet
LINEAR_025 = trained(np.linspace(1e-4, 0.025, 1000))  # Patched Diffusion on FFHQ
SCALED_LINEAR = trained(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # Stable Diffusion


def chain(abar, steps, rule="even"):
    return respaced(abar, spaced(len(abar), steps, rule))


# ------------------------------------------------------------------------------------------------------ t_boom


@pytest.mark.parametrize("steps", [10, 40, 100, 250, 1000])
def test_every_decimal_is_the_level_it_names(steps):
    """n / steps, written out as a decimal, is level n; int(0.29 * 100) is 28."""
    levels = chain(LINEAR, steps)
    texts = [str(Decimal(n) / steps) for n in range(steps + 1)]
    assert [levels.level(parse_t_boom(text)[0]) for text in texts] == list(range(steps + 1))


@pytest.mark.parametrize("text", ["0.29", ".29", "0.290", "29e-2", "29/100", "2900/10000"])
def test_writings_of_one_fraction(text):
    assert parse_t_boom(text)[0] == Fraction(29, 100)
    assert chain(LINEAR, 100).level(parse_t_boom(text)[0]) == 29


@pytest.mark.parametrize(("text", "steps"), [("40/100", 100), ("0/5", 5), ("5/5", 5), ("0.4", None), ("0", None)])
def test_a_level_fixes_the_steps_and_a_number_does_not(text, steps):
    assert parse_t_boom(text)[1] == steps


@given(st.integers(1, 10**6), st.data())
def test_levels_round_trip(steps, data):
    """'n/S' is level n of S for every chain."""
    n = data.draw(st.integers(0, steps))
    assert parse_t_boom(f"{n}/{steps}") == (Fraction(n, steps), steps)


@given(st.decimals(0, 1, places=12))
@example(Decimal("0.1"))
@example(Decimal("1E-12"))
def test_decimals_round_trip(number):
    """No binary rounding on the way: the fraction has the digits that were written."""
    value, steps = parse_t_boom(str(number))
    assert (value * 10**12).denominator == 1
    assert (Decimal(int(value * 10**12)) / 10**12, steps) == (number, None)


NO_LEVEL = "^t_boom {!r} is not a level; expected a number in [0, 1] or a level as 40/100$"
OUTSIDE = "^t_boom {} is outside the chain; expected 0 (the source) to 1 (purely synthetic)$"


@pytest.mark.parametrize(
    ("text", "message"),
    [(text, NO_LEVEL) for text in ("nan", "sNaN", "inf", "-inf", "x", "", "1/0", "0/0", "/", "1/", "1/2/3", "0.4/1")]
    + [(text, OUTSIDE) for text in ("-0.1", "1.01", "41/40", "-1/40", "1/-40", "-1/-40", "1.0000000000000000001")],
)
def test_errors_of_t_boom(text, message):
    """What was got, what was expected, in one line; wrong use (exit code 2), never a traceback or a clamped value."""
    literal = "^" + re.escape(message.format(text)[1:-1]) + "$"
    with pytest.raises(UsageError, match=literal):
        parse_t_boom(text)


@pytest.mark.parametrize(("text", "level"), [("0", 0), ("1", 100), ("0.4049", 40), ("0.4051", 41), ("0.0051", 1)])
def test_nearest_level(text, level):
    """Between two levels the nearer one is taken."""
    assert chain(LINEAR, 100).level(parse_t_boom(text)[0]) == level


@pytest.mark.parametrize(("text", "steps"), [("0.0049", 100), ("1e-9", 1000), ("0.04", 10)])
def test_too_small_a_t_boom_is_an_error(text, steps):
    """It must not turn into t_boom = 0 in silence: that would publish the sources themselves."""
    value = parse_t_boom(text)[0]
    message = rf"^t_boom {re.escape(f'{float(value):g}')} of {steps} steps is less than half a step; "
    with pytest.raises(UsageError, match=rf"{message}expected at least 1/{steps}, or more --steps$"):
        chain(LINEAR, steps).level(value)


@given(st.sampled_from(RULES), st.integers(2, 300), st.fractions(0, 1), st.fractions(0, 1))
def test_level_grows_with_t_boom(rule, steps, one, other):
    """A larger t_boom is never less noise; 0 is level 0 and 1 is the last level."""
    levels = chain(LINEAR, steps, rule)
    low, high = (max(value, Fraction(1, steps)) for value in sorted([one, other]))
    assert 1 <= levels.level(low) <= levels.level(high) <= levels.count
    assert (levels.level(Fraction(0)), levels.level(Fraction(1))) == (0, levels.count)


# -------------------------------------------------------------------------------------------- respaced chains


def assert_keeps(levels, abar, indices):
    """Exactly the trained abar at the indices, in float64."""
    assert {levels.a.dtype, levels.s.dtype, levels.t.dtype} == {np.dtype(np.float64)}
    assert levels.a.tolist() == [1.0, *(math.sqrt(abar[i]) for i in indices)]
    assert levels.s.tolist() == [0.0, *(math.sqrt(1 - abar[i]) for i in indices)]
    assert levels.t.tolist() == [0.0, *indices]
    assert levels.count == len(indices)


@pytest.mark.parametrize("abar", [LINEAR, LINEAR_025, SCALED_LINEAR], ids=["linear", "linear.025", "scaled"])
@pytest.mark.parametrize("steps", [1, 2, 50, 250, 1000])
@pytest.mark.parametrize("rule", RULES)
def test_respaced_keeps_abar(abar, steps, rule):
    """Respacing chooses levels of the trained chain; it makes no new ones."""
    indices = spaced(1000, steps, rule)
    levels = respaced(abar, indices)
    assert_keeps(levels, abar, sorted(set(indices)))
    assert levels.steps == steps
    assert [levels.abar(k) for k in range(1, levels.count + 1)] == pytest.approx([abar[int(t)] for t in levels.t[1:]])


@given(st.sets(st.integers(0, 999), min_size=1))
def test_respaced_keeps_abar_at_any_indices(chosen):
    """Also where no rule made the indices (an LCM's few trained levels, say)."""
    indices = sorted(chosen)
    levels = respaced(LINEAR, indices)
    assert_keeps(levels, LINEAR, indices)
    assert levels.of_step == tuple(range(len(indices) + 1))


def test_noise_grows_from_level_to_level():
    levels = chain(LINEAR, 1000)
    shares = [levels.abar(k) for k in range(1001)]
    assert shares[0] == 1
    assert (np.diff(shares) < 0).all()
    assert np.allclose(levels.a**2 + levels.s**2, 1, atol=1e-15)


# ----------------------------------------------------------------------------------------------- spacing rules


def test_even_spacing_of_250():
    """Patched Diffusion's T = 250: the indices round(i * 999 / 249)."""
    assert spaced(1000, 250) == [round(i * 999 / 249) for i in range(250)]


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 25, 30, 40, 50, 100, 200, 250, 500, 999, 1000])
def test_even_spacing_is_the_linspace_of_diffusers(steps):
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert spaced(1000, steps) == scheduler.timesteps.tolist()[::-1]


@pytest.mark.parametrize("steps", [27, 53, 199, 205])
def test_even_spacing_differs_from_diffusers_only_at_halves(steps):
    """At some lengths i * 999 / (S - 1) is a half, which floats may round either way; ours is exact, half to even."""
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    ours, theirs, i = np.array(spaced(1000, steps)), scheduler.timesteps.numpy()[::-1], np.arange(steps)
    distance = np.abs(2 * (ours * (steps - 1) - i * 999))  # in halves of 1 / (S - 1)
    assert (distance <= steps - 1).all()
    assert (ours != theirs).any()
    assert (distance[ours != theirs] == steps - 1).all()
    assert (ours[distance == steps - 1] % 2 == 0).all()


@pytest.mark.parametrize("steps", [2, 10, 20, 50, 100, 250, 500, 1000])
def test_fastdpm_rules(steps):
    """The STEP rules as the paper's code has them (FengNiMa/FastDPM_pytorch 6540c1c, generate.py:134-153)."""
    c = 999 / (steps - 1)
    assert spaced(1000, steps, "fastdpm-linear") == [math.floor(i * c) for i in range(steps)]
    root = math.sqrt(800) / (steps - 1)
    quadratic = spaced(1000, steps, "fastdpm-quadratic")
    assert quadratic[-1] == 800
    assert quadratic[:-1] == [math.floor((i * root) ** 2) for i in range(steps - 1)]


@pytest.mark.parametrize("steps", [14, 124, 200])
def test_fastdpm_linear_reaches_the_last_level(steps):
    """In floats, as FastDPM's code has it, these lengths stop at 998; the exact rule always ends at 999."""
    assert math.floor((steps - 1) * (999 / (steps - 1))) == 998
    assert spaced(1000, steps, "fastdpm-linear") == [i * 999 // (steps - 1) for i in range(steps)]
    assert spaced(1000, steps, "fastdpm-linear")[-1] == 999


def test_fastdpm_quadratic_names_some_levels_twice():
    """100 steps are 96 levels up to index 800; a step still means the index that FastDPM gave it."""
    indices = spaced(1000, 100, "fastdpm-quadratic")
    levels = respaced(LINEAR, indices)
    assert (levels.steps, levels.count, levels.t[-1]) == (100, 96, 800)
    assert indices[:5] == [0, 0, 0, 0, 1]
    assert levels.of_step[:6] == (0, 1, 1, 1, 1, 2)
    assert [levels.t[level] for level in levels.of_step[1:]] == indices
    assert levels.level(Fraction(4, 100)) == 1
    assert levels.level(Fraction(5, 100)) == 2
    assert levels.t[levels.level(Fraction(40, 100))] == 124
    assert levels.level(Fraction(1)) == 96


@given(st.sampled_from(RULES), st.integers(5, 1200), st.data())
@settings(deadline=None)
def test_every_rule_stays_on_the_trained_chain(rule, length, data):
    """Ascending indices of the trained chain, as many as asked; each rule's first is its least noise."""
    steps = data.draw(st.integers(2, length))
    indices = spaced(length, steps, rule)
    assert len(indices) == steps
    assert indices == sorted(indices)
    assert (indices[0], indices[-1] <= length - 1) == (0, True)


@pytest.mark.parametrize("rule", RULES)
def test_a_chain_of_one_step_is_the_noisiest_level(rule):
    assert spaced(1000, 1, rule) == [999]


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("rule", RULES)
def test_errors_of_steps(steps, rule):
    with pytest.raises(UsageError, match=rf"^{steps} steps of a chain trained with 1000; expected 1 to 1000$"):
        spaced(1000, steps, rule)


@pytest.mark.parametrize("steps", [1, 10])
def test_unknown_rule(steps):
    message = r"^unknown spacing 'cubic'; expected one of even, fastdpm-linear, fastdpm-quadratic$"
    with pytest.raises(UsageError, match=message):
        spaced(1000, steps, "cubic")


# -------------------------------------------------------------------------------------- the paper's settings


@pytest.mark.parametrize(
    ("abar", "rule", "t_boom", "index", "noise_power"),
    [
        (SCALED_LINEAR, "even", "200/1000", 199, 0.245),
        (SCALED_LINEAR, "even", "500/1000", 499, 0.722),
        (SCALED_LINEAR, "even", "700/1000", 699, 0.917),
        (SCALED_LINEAR, "even", "800/1000", 799, 0.963),
        (LINEAR, "fastdpm-linear", "40/100", 393, 0.795),
        (LINEAR, "fastdpm-quadratic", "40/100", 124, 0.154),
        (LINEAR, "even", "75/250", 297, 0.599),
        (LINEAR_025, "even", "50/250", 197, 0.398),
        (LINEAR_025, "even", "100/250", 397, 0.867),
        (LINEAR_025, "even", "150/250", 598, 0.989),
    ],
)
def test_settings_of_the_paper(abar, rule, t_boom, index, noise_power):
    """The settings of the paper: the same fraction is 15 % or 80 % of noise, by the rule alone."""
    value, steps = parse_t_boom(t_boom)
    levels = chain(abar, steps, rule)
    level = levels.level(value)
    assert levels.t[level] == index
    assert 1 - levels.abar(level) == pytest.approx(noise_power, abs=5.1e-4)


def test_setting_of_the_paper_for_dlsm():
    """250 of 1000, sigma = .01 * 5000^t, data in [0, 1]: .0836, which on [-1, 1] data is 2.7 % of noise."""
    sigmas = 0.01 * 5000 ** np.linspace(0, 1, 1000)
    level = variance_exploding(sigmas).level(parse_t_boom("250/1000")[0])
    assert (level, variance_exploding(sigmas).s[level]) == (250, pytest.approx(0.0836, abs=5e-5))
    assert 1 - variance_exploding(2 * sigmas).abar(level) == pytest.approx(0.027, abs=5e-4)


# ------------------------------------------------------------------------------------------------ other families

SIGMAS = [0.01, 0.5, 1.0, 50.0]
RATIOS = [0.25, 0.5, 0.75, 1.0]


def test_variance_exploding():
    """x0 + sigma eps, and abar is the signal's share of the power."""
    levels = variance_exploding(SIGMAS)
    assert levels.a.tolist() == [1.0] * 5
    assert levels.s.tolist() == levels.t.tolist() == [0.0, *SIGMAS]
    assert (levels.count, levels.steps, levels.of_step) == (4, 4, (0, 1, 2, 3, 4))
    assert levels.abar(0) == 1
    assert levels.abar(3) == 0.5
    assert levels.abar(4) == pytest.approx(1 / 2501)


def test_flow():
    """(1 - sigma) x0 + sigma eps; the last level is pure noise."""
    levels = flow(RATIOS)
    assert levels.a.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert levels.s.tolist() == levels.t.tolist() == [0.0, *RATIOS]
    assert (levels.count, levels.steps, levels.of_step) == (4, 4, (0, 1, 2, 3, 4))
    assert [levels.abar(k) for k in range(5)] == pytest.approx([1, 0.9, 0.5, 0.1, 0])


@pytest.mark.parametrize("index", [0, 199, 499, 999])
def test_families_agree_at_equal_signal_to_noise(index):
    """sigma = sqrt((1 - abar) / abar), sigma / (1 + sigma) for flow: the same abar in the record."""
    sigma = math.sqrt((1 - LINEAR[index]) / LINEAR[index])
    shares = [levels.abar(1) for levels in (variance_exploding([sigma]), flow([sigma / (1 + sigma)]))]
    assert shares == pytest.approx([LINEAR[index]] * 2)


@pytest.mark.parametrize(("t_boom", "level"), [("0.005", 1), ("0.015", 2), ("0.025", 3), ("0.0249", 2), ("0.995", 100)])
def test_between_two_levels_the_nearest_is_taken_and_halves_go_up(t_boom, level):
    assert chain(LINEAR, 100).level(parse_t_boom(t_boom)[0]) == level


def test_levels_that_do_not_lose_signal_are_refused():
    """diffusers lists sigmas from high to low; a chain built from such a list would run the wrong way."""
    for build in (variance_exploding, flow):
        with pytest.raises(ValueError, match="lose signal"):
            build([0.9, 0.5, 0.1])
