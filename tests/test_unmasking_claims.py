"""Verdicts on learned policies: every rule on both sides of its bound."""

from dataclasses import replace

import pytest

from trimask.sampling_rl.studies.unmasking_claims import claims_of
from trimask.sampling_rl.studies.unmasking_report import FrontPoint

IN_BLOCKS, WITHOUT = "policy, blocks of 8", "policy, full"
SPREAD = (-0.01, 0.01, 0.0, 0.005, -0.005)


def heuristic(block, accuracy, nfe, label="threshold", problems=300):
    return FrontPoint(block, label, 0.9, accuracy, nfe, problems)


def policy(block, accuracy, nfe=9.0, seeds=5, number=1.0):
    label = f"policy, blocks of {block}" if block else WITHOUT
    return [FrontPoint(block, label, number, accuracy + SPREAD[s], nfe, 300, s) for s in range(seeds)]


def verdicts(points, labels=(IN_BLOCKS, WITHOUT)):
    return {claim.claim: claim for claim in claims_of(points, labels, "cups")}


THRESHOLDS = [heuristic(8, 0.3, 6.0), heuristic(8, 0.6, 11.0)]
AS_ACCURATE = f"cups: {IN_BLOCKS}, in blocks of 8: as accurate as the best threshold"
CHEAPER = f"cups: {IN_BLOCKS}, in blocks of 8: more accurate than threshold with as many evaluations"


@pytest.mark.parametrize(
    ("points", "as_accurate", "more_accurate"),
    [
        (policy(8, 0.75), "shown", "shown"),
        (policy(8, 0.6), "shown", "shown"),  # equal: 2 points less are allowed
        (policy(8, 0.55), "refuted", "shown"),
        (policy(8, 0.55, nfe=12.0), "refuted", "refuted"),  # beside the value that takes 11 evaluations
        (policy(8, 0.495), "refuted", "shown"),  # beside 48 %, between 6 and 11 evaluations
        (policy(8, 0.48), "refuted", "refuted"),
        (policy(8, 0.75, seeds=4), "undecided", "undecided"),
        (policy(8, 0.75, nfe=3.0), "shown", "undecided"),  # no threshold is as cheap
    ],
)
def test_a_policy_is_judged_beside_thresholds(points, as_accurate, more_accurate):
    claims = verdicts([*THRESHOLDS, *points])
    assert (claims[AS_ACCURATE].verdict, claims[CHEAPER].verdict) == (as_accurate, more_accurate)


def test_effects_are_in_points_of_accuracy_and_say_over_what():
    claims = verdicts([*THRESHOLDS, *policy(8, 0.75, seeds=4)])
    assert claims[CHEAPER].effect.startswith("+27.1% (+25.8% to +28.5%), 4 seeds")
    assert claims[AS_ACCURATE].effect.startswith("+15.1% (+13.8% to +16.5%), 4 seeds")
    assert claims[CHEAPER].more == "1 more seeds"


@pytest.mark.parametrize(
    ("without", "problems", "verdict"),
    [(0.2, 300, "shown"), (0.5, 300, "refuted"), (0.3, 300, "undecided"), (0.2, 20, "undecided")],
)
def test_heuristics_collapse_if_less_than_half_is_left(without, problems, verdict):
    points = [heuristic(8, 0.6, 9.0, problems=problems), heuristic(0, without, 9.0, problems=problems)]
    points += [heuristic(8, 0.9, 9.0, "leftmost"), heuristic(0, 0.89, 9.0, "leftmost")]
    claims = verdicts(points)
    assert claims["cups: threshold collapses without blocks of 8"].verdict == verdict
    assert claims["cups: the most accurate heuristic collapses without blocks of 8"].verdict == "refuted"


@pytest.mark.parametrize(("without", "verdict"), [(0.5, "shown"), (0.3, "refuted"), (0.4, "undecided")])
def test_a_policy_collapses_if_less_than_half_is_left(without, verdict):
    claims = verdicts([*policy(8, 0.8), *policy(0, without)])
    assert claims[f"cups: {WITHOUT}, does not collapse without blocks of 8"].verdict == verdict
    # Of what is hardly ever right nothing is lost; and a policy without blocks is not compared with itself in blocks.
    assert not verdicts([*policy(8, 0.05), *policy(0, without)])
    elsewhere = [replace(point, label=WITHOUT) for point in policy(8, 0.8)]
    assert not verdicts([*elsewhere, *policy(0, without)])


def test_only_wanted_policies_at_their_own_scale_are_judged():
    points = [*THRESHOLDS, *policy(8, 0.9), *policy(8, 0.1, number=2.0)]
    assert verdicts(points)[AS_ACCURATE].verdict == "shown"
    assert not verdicts(points, labels=())
    assert not verdicts([*THRESHOLDS, *policy(8, 0.9, seeds=1)])
