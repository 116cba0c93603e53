"""Output of `trimask evaluate --likelihood` for made-up bits."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trimask.scripts import evaluate, evaluate_likelihood


def test_of_choices_the_likeliest_is_chosen_and_each_has_its_numbers():
    estimates = np.array([[4.0, 2.0, 9.0], [5.0, 3.0, 9.5], [3.0, 1.0, 8.5]])
    scores = evaluate_likelihood._scores(estimates, [2, 3, 4], True)
    # Student's t of two degrees of freedom is 4.303; the deviations are 1, 1 and ½.
    assert scores.pop("half_width") == pytest.approx([4.303 / 3**0.5, 4.303 / 3**0.5, 4.303 / 12**0.5], rel=1e-3)
    assert scores == {"bits": [4.0, 2.0, 9.0], "tokens": [2, 3, 4], "chosen": 1, "is_close": False}
    single = evaluate_likelihood._scores(estimates[:, :1], [2], False)
    assert (single["bits"], single["tokens"]) == (4.0, 2) and "chosen" not in single


def test_a_lead_within_the_interval_of_the_paired_difference_is_close():
    """The two differ by less than the error of each estimate, but by more than the error of their difference."""
    first = np.array([[4.0], [40.0], [400.0]])
    assert not evaluate_likelihood._scores(np.concatenate([first, first + 1], axis=1), [1, 1], True)["is_close"]
    assert evaluate_likelihood._scores(np.concatenate([first, 2 * first], axis=1), [1, 1], True)["is_close"]
    assert not evaluate_likelihood._scores(first, [1], True)["is_close"]


ANSWERS = [{"text": "x", "bits": 6.0, "tokens": 4}, {"text": "y", "bits": 10.0, "tokens": 4}]
CHOICES = [
    {"choices": ["a", "b"], "answer": 1, "chosen": 1, "is_close": False},
    {"choices": ["a", "b"], "answer": 0, "chosen": 0, "is_close": False},
    {"choices": ["a", "b"], "answer": 0, "chosen": 1, "is_close": False},
    {"choices": ["a", "b"], "chosen": 1, "is_close": False},  # no answer is named as the right one
]


@pytest.mark.parametrize(
    ("entries", "rows"),
    [
        # Bits of 4 tokens are 2 off their mean either way: 1.96 · √2 · √8 / 8 is 0.98.
        (ANSWERS, [["bits per token", "2.000 ± 0.980", "2"], ["bits per answer", "8.000", "2"]]),
        (ANSWERS[:1], [["bits per token", "1.500", "1"], ["bits per answer", "6.000", "1"]]),
        (CHOICES, [["right choices", "66.7% (20.8% – 93.9%)", "3"]]),
        (CHOICES[3:], None),
        ([CHOICES[3] | {"is_close": True}], [["undecided choices; increase --draws", "1", "1"]]),
    ],
    ids=["answers", "one answer", "choices", "choices without answers", "close choices"],
)
def test_what_is_printed_is_bits_of_answers_and_the_share_of_right_choices(monkeypatch, capsys, entries, rows):
    tables = []
    monkeypatch.setattr(evaluate_likelihood, "table", lambda *shown: tables.append(shown) or "")
    evaluate_likelihood._print(entries, Path("out.jsonl"))
    assert tables == (
        [] if rows is None else [("Likelihood (bound)", ["", "with 95 % over examples", "examples"], rows)]
    )
    assert capsys.readouterr().out.strip().endswith(f"Scores of {len(entries)} lines: out.jsonl")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"lines.jsonl, line 1: not UTF-8 text: "):
        evaluate_likelihood.read(tmp_path / "lines.jsonl", None)


@pytest.mark.parametrize("asked", ['"text": "x"', '"prompt": "x", "image": "a.png"'])
def test_an_answer_without_choices_is_refused_by_its_line(tmp_path, asked):
    (tmp_path / "lines.jsonl").write_text(f'\n{{{asked}, "answer": 0}}\n')
    prompts = SimpleNamespace(tokenizers=SimpleNamespace(codecs={"image": None}))
    with pytest.raises(
        ValueError, match=r"lines.jsonl, line 2: answer is the index of the right choice, .* no choices"
    ):
        evaluate_likelihood.read(tmp_path / "lines.jsonl", prompts)


@pytest.mark.parametrize(("given", "out"), [([], "likelihood.jsonl"), (["--out", "there"], "there")])
def test_the_estimate_is_made_as_was_asked_for(monkeypatch, tmp_path, given, out):
    asked, run = [], SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(evaluate, "load", lambda *which: asked.append(which) or run)
    monkeypatch.setattr(evaluate.evaluate_likelihood, "run", lambda *arguments: asked.append(arguments))
    numbers = ["--draws", "3", "--rows", "5", "--seed", "7"]
    evaluate.main(["x", "--likelihood", "asked.jsonl", *numbers, *given])
    settings = evaluate_likelihood.LikelihoodSettings(draws=3, rows=5, seed=7)
    where = tmp_path / out if not given else Path(out)
    assert asked == [(Path("x"), None), (run, Path("asked.jsonl"), where, settings)]
