"""Verdicts on claims: their rule, and how many seeds are enough."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trimask.diffusion.studies.claims import (
    BLOCK,
    LEAST_SEEDS,
    SEEDS,
    Claim,
    Effect,
    more_seeds,
    paired_effect,
    power_of,
    seeds_for,
    table_of_claims,
)


def test_an_effect_is_the_mean_of_differences_with_students_interval():
    differences = [0.01, 0.03, 0.02, 0.05]
    effect = paired_effect(differences)
    low, high = stats.t.interval(0.95, 3, np.mean(differences), stats.sem(differences))
    assert effect.mean == pytest.approx(0.0275) and effect.interval == pytest.approx((low, high))
    assert effect.deviation == pytest.approx(np.std(differences, ddof=1))


@pytest.mark.parametrize(
    ("mean", "half", "seeds", "verdict"),
    [
        (0.02, 0.01, 5, "shown"),
        (0.02, 0.01, 4, "undecided"),  # too few seeds
        (0.02, 0.03, 5, "undecided"),  # the interval holds 0
        (0.008, 0.007, 5, "shown"),  # above 0, and maybe as much as matters
        (0.004, 0.001, 5, "refuted"),  # above 0, and less than what matters
        (-0.02, 0.01, 5, "refuted"),
        (0.0, 0.009, 3, "refuted"),
    ],
)
def test_the_verdict_follows_its_rule(mean, half, seeds, verdict):
    assert Effect(mean, half, [0.0] * seeds).decide(0.01) == verdict


@settings(deadline=None)
@given(st.floats(0.01, 25.0), st.floats(1e-3, 0.1))
def test_seeds_for_an_effect_show_it_with_a_probability_of_80_percent(ratio, smallest):
    deviation = ratio * smallest
    seeds = seeds_for(deviation, smallest)

    def power(n):
        shift = smallest * n**0.5 / deviation
        if shift > 20:
            return 1.0  # SciPy says nan
        return 1 - stats.nct.cdf(stats.t.ppf(0.975, n - 1), n - 1, shift)

    assert power_of(seeds, deviation, smallest) == pytest.approx(power(seeds), abs=1e-6)
    assert power(seeds) >= 0.8 and (seeds == LEAST_SEEDS or power(seeds - 1) < 0.8)


def test_more_seeds_are_those_that_would_decide():
    for mean in (0.012, 0.008, 0.004):
        spread = np.array([-1.0, 1.0, -1.0, 1.0, 0.0]) * 0.02
        effect = paired_effect((mean + spread).tolist())
        assert effect.decide(0.01) == "undecided"
        seeds = more_seeds(effect, 0.01) + 5
        half = [stats.t.ppf(0.975, n - 1) * effect.deviation / n**0.5 for n in (seeds, seeds - 1)]
        distance = max(mean, 0.01 - mean)
        assert half[0] < distance <= half[1]
    assert more_seeds(paired_effect([0.02, 0.0201, 0.0199, 0.02, 0.02]), 0.01) == 0


def test_no_seed_is_used_twice_within_a_block():
    used = [seed for seeds in SEEDS.values() for seed in seeds]
    assert len(used) == len(set(used)) and max(used) < BLOCK


def test_claims_are_a_table_with_what_would_decide_them():
    claims = [
        Claim(claim="a", verdict="shown", effect="+1 %", rule="r"),
        Claim(claim="b", verdict="undecided", effect="+0 %", rule="r", more="7 more seeds"),
    ]
    assert table_of_claims(claims).splitlines()[2:] == [
        "| a | **shown** | +1 % |",
        "| b | **undecided**; 7 more seeds would decide | +0 % |",
        "",
        "Verdicts are not corrected for being many.",
    ]
