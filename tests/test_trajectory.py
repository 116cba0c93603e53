"""Traces of answers on their way: their lines, their page, and what a terminal shows."""

import contextlib
import json

import numpy as np
import pytest
from rich.console import Console

from trimask.scripts import generate
from trimask.scripts.inspection import main as inspect
from trimask.scripts.output.terminal import colour
from trimask.scripts.output.trajectory import _live_text, read_trace, text_in_order, trace_page


@pytest.fixture
def traced(loaded, tmp_path, monkeypatch):
    """Calls `trimask generate` with these words and returns the entries of its index."""

    def call(*words):
        monkeypatch.setattr("trimask.scripts.generate.load", {loaded.folder: loaded}.get)
        generate.main([str(loaded.folder), *words, "--out", str(tmp_path / "out")])
        return [json.loads(line) for line in (tmp_path / "out/index.jsonl").read_text().splitlines()]

    return call


def replayed(lines):
    """The codes at the end of a trace, and how many events revealed and masked."""
    head, *events = lines
    codes, known = list(head["start"]), 0
    for event in events:
        assert (event["token"] is None) != (codes[event["position"]] is None)
        codes[event["position"]] = event["token"]
        known += event["token"] is not None
    return codes, known, len(events) - known


@pytest.mark.parametrize("strategy", ["confidence", "remdm_cap"])
def test_a_trace_ends_at_the_answer_and_says_how_sure_it_was(traced, tmp_path, strategy):
    words = ["--prompt", "1+", "--to", "text", "--trace", "--log-probs", "--strategy", strategy, "--steps", "6"]
    words += ["--remask", "0.9"] if strategy == "remdm_cap" else []
    (entry,) = traced(*words, "--no-stop-at-eos", "--temperature", "1")
    lines = read_trace(tmp_path / "out" / entry["trace"])
    codes, revealed, masked = replayed(lines)
    assert None not in codes and (masked > 0) == (strategy == "remdm_cap") and max(e["step"] for e in lines[1:]) == 6
    assert revealed - masked == sum(code is None for code in lines[0]["start"])
    assert all(round(event["confidence"] or 0.0, 6) == (event["confidence"] or 0.0) for event in lines[1:])
    last = {event["position"]: event["confidence"] for event in lines[1:]}
    np.testing.assert_allclose([last[p] for p in sorted(last)], np.exp(entry["log_probs"]), atol=1e-5)
    assert entry["text"].startswith("1+")


def test_the_answer_is_the_one_without_a_trace(traced):
    words = ("--prompt", "one", "two", "--to", "image", "--temperature", "2")
    plain = traced(*words)
    both = traced(*words, "--trace", "--watch")
    assert [{k: v for k, v in entry.items() if k != "trace"} for entry in both] == plain


def test_the_first_four_answers_are_watched(traced, monkeypatch):
    """The display changes with every answer, and is cleared at the end."""
    seen, options = [], []

    class Screen(contextlib.nullcontext):
        def __init__(self, **given):
            options.append(given)
            super().__init__(self)

        def update(self, shown, refresh):
            assert refresh
            seen.append(shown)

    monkeypatch.setattr(generate, "live", lambda _, shown, requests, now: (list(shown), len(requests), len(now)))
    monkeypatch.setattr(generate, "Live", Screen)
    prompts = ["one", "two", "three", "two", "one"]
    traced("--prompt", *prompts, "--to", "image", "--watch", "--steps", "2")
    assert len(seen) > 4 and all(one == (prompts[:4], 4, 4) for one in seen)
    assert options == [{"console": generate.console, "auto_refresh": False, "transient": True}]


def test_watching_shows_text_pictures_and_sound(traced, monkeypatch):
    screen = Console(force_terminal=True, width=100, record=True, color_system="truecolor", legacy_windows=False)
    monkeypatch.setattr("trimask.scripts.generate.console", screen)
    for words in (
        ["--prompt", "1+", "--to", "text"],
        ["--prompt", "one", "--to", "image"],
        ["--prompt", "one", "--to", "audio"],
    ):
        traced(*words, "--watch", "--steps", "2")
        shown = screen.export_text()
        assert "░" in shown and "0 evaluations" in shown and "1 evaluations" in shown


def test_what_is_known_of_a_text_has_the_colour_of_its_confidence_and_the_rest_is_grey(loaded):
    codes = np.array([*loaded.tokenizers.text.encode("1+"), -1])
    shown = _live_text(loaded.tokenizers, codes, np.array([0.0, 1.0, 0.5]))
    assert shown.plain == "1+░"
    assert [str(span.style) for span in shown.spans] == [colour(0.0), colour(1.0), "grey50"]


def test_a_text_in_order_shows_when_each_token_was_revealed_and_the_later_the_darker(loaded):
    codes = np.array([*loaded.tokenizers.text.encode("1<"), loaded.vocabulary.eos_code])
    assert len(codes) == 3
    shown = text_in_order(loaded.tokenizers, codes, np.array([2, 4, 4]))
    first, second = (
        f'<span title="step {n}" style="background: rgba(23, 105, 255, 0.{s}0)">' for n, s in ((2, 3), (4, 5))
    )
    assert f">{first}1<sub>2</sub></span>{second}&lt;<sub>4</sub></span></div>" in shown
    assert text_in_order(loaded.tokenizers, codes, np.zeros(3, int)).endswith('">1&lt;</div>')


def test_a_page_shows_every_step(traced, tmp_path, capsys):
    (entry,) = traced("--prompt", "one", "--to", "audio", "--trace", "--steps", "3")
    trace = tmp_path / "out" / entry["trace"]
    inspect([str(trace)])
    assert f"page: {trace.with_suffix('.html')}" in capsys.readouterr().out
    page = trace.with_suffix(".html").read_text()
    assert page.count("<script>") == 1 and '"confidence"' in page and "</html>" in page


def test_what_a_user_wrote_is_data_on_the_page(tmp_path):
    head = {"prompt": "</script><b>", "task": "text", "to": "text", "shape": [1], "start": [None], "pieces": [None]}
    event = {"step": 1, "position": 0, "token": 3, "piece": "</script>\u2028", "confidence": 0.5}
    (tmp_path / "t.jsonl").write_text(json.dumps(head) + "\n" + json.dumps(event, ensure_ascii=False) + "\n")
    page = trace_page(tmp_path / "t.jsonl").read_text()
    assert page.count("</script>") == 1 and "<b>" not in page


HEAD = '{"prompt": "x", "task": "text", "to": "text", "shape": [2], "start": [null, null], "pieces": [null, "x"]}\n'
EVENT = '{"step": 1, "piece": "x", "position": %s, "token": 3, "confidence": 0.5}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "contains no trace"),
        ("{", "line 1: not strict JSON"),
        ("[]", "line 1: not a line of a trace: .*must be an object, got \\[\\]"),
        ('{"prompt": "x"}', r"required field is missing @ \$\.pieces"),
        ("\xff", "not UTF-8 text"),
        (HEAD.replace("[null, null]", "[null]"), "1 codes but 2 pieces"),
        (f"{HEAD}{EVENT % 1}", None),
        (f"{HEAD}{EVENT % 2}", "line 2: not a line of a trace: position 2 or step"),
        (f"{HEAD}{EVENT % -1}", "line 2: not a line of a trace: position -1 or step"),
        (f"{HEAD}{EVENT % '1.0'}", r"must be a whole number, got 1\.0 @ \$\.position"),
    ],
)
def test_another_file_is_refused(tmp_path, text, reason):
    (tmp_path / "t.jsonl").write_text(text, encoding="latin-1")
    if reason is None:
        assert len(read_trace(tmp_path / "t.jsonl")) == 2
        return
    with pytest.raises(ValueError, match=reason):
        inspect([str(tmp_path / "t.jsonl")])
