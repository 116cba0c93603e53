"""Bounds against exact enumeration, and `trimask evaluate --likelihood`."""

import json
import math

import fakes
import jax
import numpy as np
import pytest
import soundfile
from fakes import VOCABULARY
from jax.tree_util import Partial
from PIL import Image

from trimask.diffusion.evaluation.intervals import mean_and_half_width
from trimask.diffusion.evaluation.likelihood import content_seed, estimates_of_bits, num_asked, target_bits
from trimask.scripts.evaluate import main
from trimask.tokenizers.sequence import Example

CORRELATED = np.array([[[0.02, 0.10], [0.20, 0.03]], [[0.25, 0.05], [0.05, 0.30]]])
DENOISE = Partial(fakes.joint(CORRELATED))
CODES = [(0, 1, 0), (1, 1, 1), (0, 0, 0)]


def estimated_bits(*args, **options):
    return mean_and_half_width(estimates_of_bits(*args, **options))


def example(codes, given=0):
    return Example.of_task(VOCABULARY.tasks["text"], {"text": np.array(codes)}, given)


def test_the_bound_of_an_exact_denoiser_is_the_likelihood():
    """In any order of unmasking, exact conditionals multiply to the joint probability, so that the bound is tight."""
    options, key = {"num_draws": 64, "repeats": 12}, jax.random.key(0)
    bits, half = estimated_bits(key, [example(c) for c in CODES], DENOISE, VOCABULARY, **options)
    exact = np.array([-math.log2(CORRELATED[c]) for c in CODES])
    assert (np.abs(bits - exact) < 2 * half).all() and (half < 0.15 * exact).all()
    given, half = estimated_bits(key, [example(c, 1) for c in CODES], DENOISE, VOCABULARY, **options)
    exact = np.array([-math.log2(CORRELATED[c] / CORRELATED[c[0]].sum()) for c in CODES])
    assert (np.abs(given - exact) < 2 * half + 1e-5).all()


def test_the_bound_is_unbiased():
    options = {"num_draws": 16, "rows": 256, "seeds": range(256)}
    bits = target_bits(jax.random.key(2), [example(CODES[0])] * 256, DENOISE, VOCABULARY, **options)
    exact, standard_error = -math.log2(CORRELATED[CODES[0]]), bits.std(ddof=1) / len(bits) ** 0.5
    assert abs(bits.mean() - exact) < 4 * standard_error < 0.2 * exact


def test_progress_is_the_number_of_examples_that_are_done():
    reports = []
    asked = [example(code, given) for code, given in zip(CODES * 2, (0, 0, 0, 1, 1, 1), strict=True)]
    options = {"num_draws": 2, "rows": 2, "report": lambda *counts: reports.append(counts)}
    target_bits(jax.random.key(0), asked, DENOISE, VOCABULARY, **options)
    assert reports == [(2, 6), (4, 6), (6, 6)]
    reports.clear()
    estimated_bits(jax.random.key(0), asked, DENOISE, VOCABULARY, repeats=3, **options)
    assert reports == [(done, 18) for done in range(2, 20, 2)]


def test_random_subsets_are_all_there_is_of_one_token():
    """With one target token only one set can be masked, so that the estimate has no variance."""
    bits = target_bits(
        jax.random.key(0),
        [example(c, 2) for c in CODES],
        DENOISE,
        VOCABULARY,
        num_draws=1,
    )
    np.testing.assert_allclose(bits, [-math.log2(CORRELATED[c] / CORRELATED[c[:2]].sum()) for c in CODES], rtol=1e-5)


def test_intervals_hold_the_value_as_often_as_they_say():
    examples = [example(CODES[0])] * 200
    bits, half = estimated_bits(
        jax.random.key(1),
        examples,
        DENOISE,
        VOCABULARY,
        num_draws=8,
        seeds=range(200),
        repeats=6,
    )
    held = np.abs(bits + math.log2(CORRELATED[CODES[0]])) < half
    assert 0.88 < held.mean() < 0.99


def test_bits_do_not_depend_on_the_place_among_others():
    options = {"num_draws": 3}
    examples = [example(c, given) for c in CODES for given in (0, 1)]
    bits = target_bits(jax.random.key(3), examples, DENOISE, VOCABULARY, **options)
    again = target_bits(jax.random.key(3), examples[::-1] * 2, DENOISE, VOCABULARY, **options)
    np.testing.assert_array_equal(again, [*bits[::-1], *bits[::-1]])
    assert len({content_seed(e.segments) for e in examples}) == len(examples)


def test_equal_examples_are_computed_once_and_have_equal_bits():
    reports, asked = [], [example(code) for code in (CODES[0], CODES[1], CODES[0])] * 3
    options = {"num_draws": 2, "rows": 1, "report": lambda *counts: reports.append(counts)}
    bits = target_bits(jax.random.key(0), asked, DENOISE, VOCABULARY, **options)
    assert len(set(bits.tolist())) == 2 and (bits.reshape(3, 3) == bits[:3]).all() and bits[0] == bits[2]
    assert reports == [(6, 9), (9, 9)]
    given = [example(CODES[0]), example(CODES[0], 1)]
    both = target_bits(jax.random.key(0), given, DENOISE, VOCABULARY, num_draws=4, seeds=[1, 1])
    assert both[0] != both[1]


def test_tokens_are_those_of_a_text_and_one_end():
    eos = VOCABULARY.eos_code
    asked = {(0, 1, eos, eos, eos): 3, (0, 1, 1): 3, (eos, eos): 1, (0, eos): 2}
    assert {codes: num_asked(example(codes), VOCABULARY) for codes in asked} == asked
    assert num_asked(example((0, 1, eos, eos), 1), VOCABULARY) == 2


def test_an_interval_needs_several_estimates():
    with pytest.raises(ValueError, match="at least 2 estimates, got 1"):
        estimated_bits(jax.random.key(0), [example(CODES[0])], DENOISE, VOCABULARY, num_draws=1, repeats=1)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def score(loaded, tmp_path, monkeypatch):
    """Scores lines with the command and returns what it wrote."""

    def call(*entries, **options):
        monkeypatch.setattr("trimask.scripts.evaluate.load", fakes.opening(loaded, loaded.folder, None))
        (tmp_path / "asked.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        out = tmp_path / "scores.jsonl"
        main([str(loaded.folder), "--likelihood", str(tmp_path / "asked.jsonl"), "--out", str(out), *flags])
        return [json.loads(line) for line in out.read_text().splitlines()]

    return call


def test_every_kind_of_line_gets_its_bits(score, tmp_path, capsys):
    Image.new("L", (6, 4), 90).save(tmp_path / "grey.png")
    soundfile.write(tmp_path / "hum.wav", np.sin(np.arange(1200) / 5), 8000)
    lines = [
        {"text": "01+01=2"},
        {"prompt": "01+01=", "text": "2"},
        {"image": "grey.png", "text": "one"},
        {"audio": "hum.wav", "choices": ["one", "two"], "answer": 1},
        {"prompt": "one", "image": "grey.png"},
    ]
    scores = score(*lines, draws=2)
    assert [{k: v for k, v in s.items() if k in line} for s, line in zip(scores, lines, strict=True)] == lines
    whole, rest, described, chosen, drawn = scores
    assert rest["bits"] < whole["bits"] and rest["tokens"] == 2 and whole["tokens"] == 8
    assert drawn["tokens"] == 6 and len(chosen["bits"]) == 2 and chosen["chosen"] == int(np.argmin(chosen["bits"]))
    assert described["half_width"] > 0 and described["tokens"] == chosen["tokens"][0]
    shown = capsys.readouterr().out
    assert "bits per token" in shown and "right choices" in shown


def test_a_line_has_the_same_score_whatever_else_there_is(score):
    lines = [{"prompt": "01+01=", "text": "2"}, {"prompt": "12+12=", "text": "24"}]
    both, alone = score(*lines, draws=2)[0], score(lines[0], draws=2)[0]
    for other in score(*lines[::-1], lines[0], draws=2)[1:]:
        assert [other[name] for name in ("bits", "half_width")] == pytest.approx([both["bits"], both["half_width"]])
    # The last bits of a product may depend on how many rows it has.
    numbers = {name: pytest.approx(value, rel=1e-6) for name, value in alone.items() if isinstance(value, float)}
    assert both == alone | numbers


def test_choices_are_drawn_alike_and_a_lead_by_chance_is_marked(score, capsys):
    choices = {"prompt": "01+01=", "choices": ["2", "2", "3"]}
    (scored,) = score(choices, draws=1)
    assert scored["bits"][0] == scored["bits"][1] and scored["is_close"]
    assert "undecided choices; increase --draws" in capsys.readouterr().out
    (other,) = score(choices | {"choices": ["2", "7"]}, draws=1)
    assert other["bits"][0] == pytest.approx(scored["bits"][0], rel=1e-6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"texts": "x"}, "line 1: an example is an object with some of answer, audio, choices"),
        ({"text": "x", "choices": ["y"]}, "one answer"),
        ({"prompt": "x"}, "one answer"),
        ({"image": "a.png", "audio": "b.wav", "text": "x"}, "one answer"),
        ({"text": 7}, "text must be a string, got 7"),
        ({"choices": "ab"}, "choices must be a list of strings"),
        ({"choices": []}, "choices must be a list of strings"),
        ({"choices": ["1", "2"], "answer": 2}, "index of a choice, 0 to 1, got 2"),
        ({"text": ""}, "must not be empty"),
        ({"image": "none.png", "text": "one"}, "none.png"),
        ({"text": "x" * 99}, "line 1: a text of 99 tokens does not fit a buffer"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named_and_nothing_is_written(score, tmp_path, line, reason):
    with pytest.raises((ValueError, OSError), match=reason):
        score(line)
    assert not (tmp_path / "scores.jsonl").exists()


def test_an_empty_file_is_refused(score):
    with pytest.raises(ValueError, match="contains no lines"):
        score()
