"""Judges: their contract, every built-in judge compared with a formula, and functions of users."""

import dataclasses
import math
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg

from trimask.diffusion.evaluation import features, judges
from trimask.diffusion.evaluation.features import audio_features, frechet_distance, image_features
from trimask.diffusion.evaluation.intervals import (
    half_width_of_mean,
    half_width_of_one,
    ratio_and_half_width,
    standard_error_of,
    wilson_interval,
)
from trimask.diffusion.evaluation.judges import (
    JUDGES,
    NamedJudge,
    Scores,
    TrainingMedia,
    answer_of,
    are_labels,
    final_number,
    number_of,
    open_judge,
    word_error_rate,
)

WORDS = ("one: #### 1", "two: #### 2", "three: #### 3")


def _media(modality, rng, word):
    """An example whose media depend on its word, with noise."""
    number = WORDS.index(word)
    if modality == "text":
        return word
    if modality == "image":
        picture = rng.integers(0, 40, (8, 6, 1))
        picture[:, number * 2 : number * 2 + 2] += 200
        return picture.astype(np.uint8)
    time = np.arange(1600) / 8000
    return (0.3 * np.sin(2 * np.pi * 400 * 2**number * time) + 0.01 * rng.normal(size=1600)).astype(np.float32)


def _training(modality, count=30, seed=0):
    rng = np.random.default_rng(seed)
    texts = [WORDS[number % 3] for number in range(count)]
    media = [_media(modality, rng, word) for word in texts]
    references = [{"text": word, modality: item} for word, item in zip(texts, media, strict=True)]
    return TrainingMedia("drawn", modality, media, references, SimpleNamespace(sample_rate_hz=8000))


CASES = [
    (name, modality)
    for name, kind in JUDGES.items()
    for modality in (("text",) if kind.judges == "text" else ("image", "audio"))
]


@pytest.fixture(scope="module", params=CASES, ids=" of ".join)
def case(request):
    """A fitted built-in judge, with held-out media and references to judge."""
    name, modality = request.param
    training, held_out = _training(modality), _training(modality, 12, seed=1)
    return open_judge(name, modality, lambda: training), list(held_out.media), list(held_out.references)


def _value(found):
    return found if isinstance(found, float) else found.totals.sum() / found.counts.sum()


def test_a_judge_gives_one_score_or_one_per_item(case):
    judge, media, references = case
    found = judge("test", media, references)
    assert isinstance(found, float) or found.totals.shape == found.counts.shape == (12,)


def test_a_judge_finds_real_media_better_than_those_of_other_captions(case):
    judge, media, references = case
    wrong = [media[0]] * 12
    right, mistaken = _value(judge("test", media, references)), _value(judge("test", wrong, references))
    assert right > mistaken if judge.higher_is_better else right < mistaken
    assert right == pytest.approx(1.0 if judge.higher_is_better else 0.0, abs=1e-6)


def test_a_judge_says_the_same_twice_and_in_any_order(case):
    judge, media, references = case
    media = [media[0], *media[:-1]]  # some are wrong
    order = np.random.default_rng(3).permutation(12)
    first, again = judge("test", media, references), judge("test", media, references)
    shuffled = judge("test", [media[i] for i in order], [references[i] for i in order])
    if isinstance(first, float):
        assert first == again
        assert shuffled == pytest.approx(first, rel=1e-6)  # sums of floats in another order
    else:
        np.testing.assert_array_equal(first.totals, again.totals)
        np.testing.assert_array_equal(first.totals[order], shuffled.totals)


# Word error rate


@pytest.mark.parametrize(
    ("answer", "errors"),
    [
        ("the cat sat on the mat", 0),
        ("the cat sat on mat", 1),
        ("a cat sat on the mat", 1),
        ("the cat sat on the big mat", 1),
        ("dogs", 6),
        ("", 6),
    ],
)
def test_word_errors_are_those_counted_by_hand(answer, errors):
    found = word_error_rate([answer], [{"text": "the cat sat on the mat"}])
    assert (found.totals, found.counts) == ([errors], [6])


def test_word_error_rate_is_of_the_whole_set_and_not_the_mean_of_rates():
    judge = open_judge("word_error_rate", "text", lambda: None)
    found = judge("test", ["x", "a b c d e f g", "noise"], [{"text": t} for t in ("a", "a b c d e f g", "")])
    assert _value(found) == pytest.approx((1 + 0 + 1) / (1 + 7 + 0))


# Answers


@pytest.mark.parametrize(
    ("text", "answer"), [("13 9 933", "933"), ("933", "933"), ("", ""), ("933 ", ""), ("a  b\nc", "b\nc")]
)
def test_an_answer_is_what_stands_after_the_last_space(text, answer):
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so #### 72", "72"),
        ("#### 1 then #### -1,234.50\n5", "-1234.5"),
        ("#### $3", "3"),
        ("#### -$3.0", "-3"),
        ("#### $-.5.", "-0.5"),
        ("<answer>1</answer> <answer>\n2 eggs\n</answer> #### 3", "2"),
        ("#### 12,34", None),
        ("#### --5", "-5"),
        ("#### \u0665", None),
        ("72", None),
        ("<answer>72", None),
    ],
)
def test_a_number_is_what_is_tagged_or_stands_after_the_mark(text, number):
    assert number_of(text) == (None if number is None else Decimal(number))


def test_a_reference_without_a_number_is_met_by_none():
    assert final_number(["#### x", "#### 1"], [{"text": "#### y"}, {"text": "#### 1.0"}]) == [False, True]


# Labels


def test_captions_that_do_not_repeat_are_no_labels():
    assert are_labels(["one", "two"] * 3)
    assert not are_labels([f"a picture of {number}" for number in range(100)])
    assert not are_labels([f"{number // 2}" for number in range(100)])
    assert not are_labels(["one"] * 100)


def test_a_label_judge_of_captions_that_are_no_labels_is_refused():
    training = TrainingMedia("photos", "image", [], [{"text": f"photo {number % 1200}"} for number in range(1205)])
    with pytest.raises(ValueError, match=r"photos has 1,200 different captions of 1,205, 1,195 of them once"):
        open_judge("label", "image", lambda: training)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_nothing_is_recognised_in_an_even_picture_or_in_silence(modality):
    training = _training(modality)
    judge = open_judge("label", modality, lambda: training)
    three, references = training.media[:3], training.references[:3]
    for share, right in ((0.0, 0), (0.05, 0), (0.5, 3)):
        fainter = [(share * medium).astype(medium.dtype) for medium in three]
        assert judge("test", fainter, references).totals.sum() == right, share


# Fréchet


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(5, 5)) for _ in range(2)]
    means = [rng.normal(size=5) for _ in range(2)]
    samples = [rng.normal(size=(n, 5)) @ root + mean for n, root, mean in zip((7, 400), roots, means, strict=True)]
    (m1, c1), (m2, c2) = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in samples]
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(*samples) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_two_known_normal_distributions():
    # Means 1 and 4, variances 2 and 8: 9 + 2 + 8 - 2 * sqrt(16) = 11.
    ours, theirs = (np.array([[m - v**0.5], [m], [m + v**0.5]]) for m, v in ((1.0, 2.0), (4.0, 8.0)))
    assert frechet_distance(ours, theirs) == pytest.approx(11)


def test_frechet_distance_of_fewer_items_than_features_is_finite_and_zero_to_itself():
    few = np.random.default_rng(0).normal(size=(3, 50))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert 0 < frechet_distance(few, few + 1) < np.inf
    with pytest.raises(ValueError, match="at least 2 items of each set, got 1 and 3"):
        frechet_distance(few[:1], few)


# Features


def test_features_of_a_sound_do_not_change_with_loudness_or_silence_around_it():
    word = _media("audio", np.random.default_rng(0), WORDS[1]) * np.hanning(1600).astype(np.float32)
    quiet, early, late = (np.pad(word, pad).astype(np.float32) for pad in ((400, 1200), (400, 1200), (1200, 400)))
    features = audio_features([quiet * 0.1, early, late], 8000)
    np.testing.assert_allclose(features[0], features[1], atol=0.01)
    np.testing.assert_allclose(features[1], features[2], atol=0.01)
    other = audio_features([early, np.pad(_media("audio", np.random.default_rng(0), WORDS[0]), (800, 800))], 8000)
    assert np.abs(other[1] - features[1]).max() > 1


def test_features_of_silence_and_of_tiny_or_even_pictures_are_finite():
    assert np.isfinite(audio_features([np.zeros(800, np.float32)], 8000)).all()
    for shape in [(1, 1, 1), (1, 9, 3), (4, 6, 1), (28, 28, 1)]:
        assert np.isfinite(image_features([np.full(shape, 7, np.uint8)])).all()


def test_an_edge_counts_for_its_direction_in_its_cell():
    picture = np.zeros((14, 14, 1), np.uint8)
    picture[:, 8:] = 255  # grows to the right: direction 0
    shares = image_features([picture]).reshape(7, 7, 8) ** 2
    assert shares[..., 0].sum() == pytest.approx(1, abs=1e-3)
    assert shares[:, 3, 0].sum() == pytest.approx(0.5, abs=1e-3)
    turned = image_features([np.rot90(picture, -1).copy()]).reshape(7, 7, 8) ** 2  # grows downwards
    assert turned[..., 2].sum() == pytest.approx(1, abs=1e-3)


def test_pictures_are_looked_at_a_few_at_a_time(monkeypatch):
    pictures = [np.random.default_rng(n).integers(0, 256, (9, 14, 3), np.uint8) for n in range(8)]
    together, looked_at, edges = image_features(pictures), [], features._edges
    monkeypatch.setattr(features, "_edges", lambda images: looked_at.append(len(images)) or edges(images))
    monkeypatch.setattr(features, "_PIXELS", 3 * 9 * 14 + 1)
    np.testing.assert_array_equal(image_features(pictures), together)
    assert looked_at == [3, 3, 2]


# Judges of the user's


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the module opinions into the working directory."""

    def write(source):
        name = f"opinions_{len(list(tmp_path.iterdir()))}_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    monkeypatch.chdir(tmp_path)
    return write


def test_a_function_of_the_working_directory_judges(module):
    name = module(
        "def longer(media, references):\n    return [len(m) > len(r['text']) for m, r in zip(media, references)]"
    )
    found = open_judge(f"{name}:longer", "text", lambda: None)("text", ["ab", "a"], [{"text": "a"}, {"text": "a"}])
    np.testing.assert_array_equal(found.totals, [1, 0])


def test_frechet_takes_features_of_the_users(module):
    name = module("import numpy as np\ndef size(media):\n    return [[len(m)] for m in media]")
    texts = TrainingMedia("t", "text", ["a", "bb", "ccc"], [{"text": text} for text in ("a", "bb", "ccc")])
    judge = open_judge(f"frechet@{name}:size", "text", lambda: texts)
    # Lengths 3, 4, 5 against 1, 2, 3: means apart by 2, variances equal.
    assert judge("text", ["aaa", "aaaa", "aaaaa"], texts.references) == pytest.approx(4)


@pytest.mark.parametrize(
    ("name", "modality", "message"),
    [
        ("bleu", "text", "no judge 'bleu'; there are exact_match, .*and module:function"),
        ("nowhere_to_be_found:f", "text", "module 'nowhere_to_be_found' cannot be imported"),
        ("math:nothing", "text", "module 'math' has no function 'nothing'"),
        ("math:pi", "text", "module 'math' has no function 'pi'"),
        ("label", "text", "judge label judges media, not text"),
        ("exact_match", "image", "judge exact_match judges text, not image"),
        ("label@math:sin", "image", "only frechet takes features"),
        ("frechet", "text", "judge frechet judges media, not text"),
    ],
)
def test_a_judge_that_is_not_there_is_refused(name, modality, message):
    with pytest.raises(ValueError, match=message):
        open_judge(name, modality, lambda: _training("image"))


def test_a_module_that_fails_is_named(module):
    name = module("raise RuntimeError('no graphics card')")
    with pytest.raises(ValueError, match=f"judge {name}:f: .*no graphics card"):
        open_judge(f"{name}:f", "text", lambda: None)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0, 3.0], r"one per item, here 2; got shape \(3,\)"),
        ([[1.0, 2.0]], r"got shape \(1, 2\)"),
        (None, "NaN"),
        ("good", "must return numbers, got str"),
        ([0.5, float("nan")], "NaN or infinite"),
        (Scores([1, 2], [1]), r"got shape \(1,\)"),
        (Scores([1, 2], [0, 0]), "sum to zero"),
    ],
)
def test_a_result_of_another_shape_is_refused_with_judge_and_task(result, message):
    judge = NamedJudge("my:own", lambda *_: result, None, None)
    with pytest.raises(ValueError, match=f"judge my:own of text_to_image.*{message}"):
        judge("text_to_image", ["a", "b"], [{}, {}])


def test_an_error_inside_a_judge_names_judge_and_task():
    judge = NamedJudge("my:own", lambda media, references: 1 / 0, None, None)
    with pytest.raises(ValueError, match="judge my:own of image_to_text failed: ZeroDivisionError"):
        judge("image_to_text", ["a"], [{}])


# Intervals


def test_the_interval_of_a_quotient_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        counts = rng.integers(1, 30, 150).astype(float)
        value, half = ratio_and_half_width(counts * 2 + rng.normal(size=150) * counts, counts)
        covered += abs(value - 2) < half
    assert 0.92 < covered / 400 < 0.98


def test_the_quotient_of_equal_counts_is_the_mean():
    totals = np.array([2.0, 5.0, 6.0, 6.0])
    value, half = ratio_and_half_width(totals, np.full(4, 2.0))
    assert value == pytest.approx((totals / 2).mean())
    assert half == pytest.approx(1.96 * (totals / 2).std(ddof=1) / 2)
    assert ratio_and_half_width(totals[:1], np.ones(1)) == (2.0, None)


def test_intervals_of_means_and_of_single_draws_are_as_wide_as_students():
    """The quantile 97.5 % of Student's distribution is tan(0.475 π) = 12.706 for two values, and 4.30265 for three."""
    assert half_width_of_mean([1.0, 3.0]) == pytest.approx(math.tan(0.475 * math.pi))
    assert half_width_of_mean([1.0, 2.0, 6.0]) == pytest.approx(4.30265 * 7**0.5 / 3**0.5, rel=1e-5)
    assert half_width_of_mean([2.0]) is None
    assert half_width_of_one(0.5, 3) == pytest.approx(4.30265 * 0.5, rel=1e-5)
    assert standard_error_of((0.5 - 1.96 * 0.125, 0.5 + 1.96 * 0.125)) == pytest.approx(0.125)


def test_a_share_of_none_or_all_has_an_interval_inside_zero_and_one():
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_features_of_another_shape_or_of_none_are_refused():
    with pytest.raises(ValueError, match="there are no features of text; give some with frechet@module:function"):
        judges._builtin_features(dataclasses.replace(_training("image"), modality="text"))
    for shape in ((3,), (4, 2)):
        with pytest.raises(ValueError, match=rf"here 3 items; got shape \({shape[0]}"):
            judges._matrix(np.zeros(shape), 3)
    assert judges._matrix([[1, 2], [3, 4], [5, 6]], 3).shape == (3, 2)
