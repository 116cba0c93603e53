"""The tables of `trimask evaluate`, of made-up results."""

from trimask.diffusion.evaluation.results import Bound, Evaluation, Memorisation, Score
from trimask.scripts import evaluate


def score(**changes):
    usual = {
        "dataset": "drawn",
        "task": "text_to_image",
        "split": "test",
        "judge": "label",
        "examples": 12,
        "value": 0.875,
        "interval": (0.625, 0.96875),
        "is_share": True,
        "higher_is_better": True,
        "on_real": 0.9375,
        "mean_nfe": 7.25,
    }
    return Score(**(usual | changes))


def bound(**changes):
    usual = {"dataset": "sums", "task": "text", "modality": "text", "split": "test", "examples": 9}
    return Bound(**(usual | {"bits_per_token": 1.5, "half_width": 0.25, "bits_per_character": 2.125} | changes))


def printed(monkeypatch, result):
    """Title → (columns, rows) of every table."""
    tables = {}
    monkeypatch.setattr(evaluate, "table", lambda title, columns, rows: tables.update({title: (columns, rows)}))
    evaluate.print_evaluation(result)
    return tables


def test_all_tables(monkeypatch):
    word_errors = {"judge": "word_error_rate", "is_share": False, "higher_is_better": False, "on_real": None}
    result = Evaluation(
        step=12_345,
        scores=[
            score(),
            score(**word_errors, task="image_to_text", value=1.23456, interval=(1.0, 1.5), examples=3),
            score(judge="frechet", is_share=False, value=12345.678, interval=None, on_real=0.0001234, mean_nfe=1.0),
        ],
        bounds=[
            bound(),
            bound(dataset=None, task=None, modality="image", half_width=None, bits_per_character=None, examples=11),
        ],
        memorisation=[
            Memorisation(
                dataset="drawn",
                task="text_to_image",
                split="test",
                generated=8,
                copied=0.125,
                distinct=7,
                real=6,
                real_copied=0.25,
                real_distinct=5,
            )
        ],
    )
    assert printed(monkeypatch, result) == {
        "Scores at step 12,345": (
            ["task", "held out", "judge", "score", "95 % over examples", "real media", "NFE", "examples"],
            [
                ["text to image", "drawn test", "label", "87.5%", "62.5% – 96.9%", "93.8%", "7.2", "12"],
                ["image to text", "drawn test", "word error rate", "1.235", "1 – 1.5", "", "7.2", "3"],
                ["text to image", "drawn test", "frechet", "1.235e+04", "", "0.0001234", "1.0", "12"],
            ],
        ),
        "Bits per token": (
            ["task", "held out", "bits ± 95 % over examples", "per character", "examples"],
            [
                ["text", "sums test", "1.500 ± 0.250", "2.125", "9"],
                ["all image", " test", "1.500", "", "11"],
            ],
        ),
        "Memorisation": (
            ["task", "held out", "copies of training items", "distinct", "real: copies", "real: distinct"],
            [["text to image", "drawn test", "12.5%", "7 of 8", "25.0%", "5 of 6"]],
        ),
    }


def test_what_is_not_judged_is_noted_as_it_is(capsys):
    evaluate.print_evaluation(Evaluation(step=1, bounds=[bound()], notes=["text on [b]sums[/b] is not judged"]))
    assert "Note: text on [b]sums[/b] is not judged\n" in capsys.readouterr().out


def test_without_scores_or_samples_there_are_bits_alone(monkeypatch):
    assert list(printed(monkeypatch, Evaluation(step=1, bounds=[bound()]))) == ["Bits per token"]
