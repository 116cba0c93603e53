"""The whole story in seconds: prepare, train a few steps, evaluate, and the report of it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from trimask.configs.presets import PRESETS, Experiment
from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.results import Evaluation, Samples
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.prompts import Prompts
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import demo
from trimask.scripts.output import report
from trimask.scripts.output.plots import training_seconds
from trimask.scripts.output.report import write_report


@pytest.fixture(scope="module")
def experiment(prepared) -> Experiment:
    """One step on the synthetic sources."""
    return Experiment(
        prepare=prepared.config,
        train=TrainConfig(
            model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
            batch=BatchConfig(tokens=256),
            optimizer=OptimizerConfig(horizon_tokens=256, warmup_tokens=100),
            loop=LoopConfig(log_every=1),
            generation={name: GenerationConfig(steps=2) for name in ("text", "image", "audio")},
        ),
        evaluate=EvaluateConfig(max_examples=5, bound_samples=1),
    )


@pytest.fixture(scope="module")
def story(prepared, experiment, tmp_path_factory):
    """Arguments that the demo gave to `write_report`; the first is the run folder."""
    given = []
    with pytest.MonkeyPatch.context() as patch:

        def write(*arguments):
            given.extend(arguments)
            return write_report(*arguments)

        patch.setattr(demo, "write_report", write)
        demo.run(tmp_path_factory.mktemp("story") / "run", prepared.folder, experiment)
    return given


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_every_file_is_there_and_not_empty(story):
    run = story[0]
    names = ["digits.png", "unmasking.gif", "loss.png", "accuracy.png", "text.txt", "report.html", "evaluation.json"]
    assert [name for name in names if (run / name).stat().st_size == 0] == []
    assert {Image.open(run / name).format for name in names[:4]} == {"PNG", "GIF"}
    assert Image.open(run / "unmasking.gif").n_frames == 3


def test_every_prompt_has_one_spoken_word(story):
    files = sorted((story[0] / "words").iterdir())
    assert [file.name for file in files] == ["one.wav", "three.wav", "two.wav"]
    assert {soundfile.info(file).samplerate for file in files} == {8000}


def test_words_that_would_have_the_same_file_name_have_files_of_their_own(story, tmp_path):
    _, _, samples, loaded, _ = story
    spoken = next(one for one in samples if one.task == "text_to_audio")
    media = [rate * np.sin(np.arange(800, dtype=np.float32)) for rate in (0.2, 0.4, 0.6, 0.8)]
    same = replace(spoken, references=["One!", "One?", "one", "One!"], media=media, is_right=None)
    words = report._write_words(tmp_path, [same], loaded)
    assert [word.file.name for word in words] == ["one.wav", "one-2.wav", "one-3.wav"]
    loudest = [np.abs(soundfile.read(word.file)[0]).max() for word in words]
    assert loudest == pytest.approx([0.2, 0.4, 0.6], abs=0.01), "of several answers to a prompt the first"


def test_texts_begin_with_what_was_given(story):
    lines = (story[0] / "text.txt").read_text().splitlines()
    assert "# text · test" in lines and "# image to text · test" in lines
    assert [line.split(" → ")[0] for line in lines if line.startswith("3")] == [f"{n}+{n}=" for n in (32, 34, 36, 39)]


def test_an_answer_stands_beside_what_was_given_and_what_was_right(story, tmp_path):
    run, evaluation, samples, loaded, prepared = story
    sums, said = (next(one for one in samples if one.task == task) for task in ("text", "image_to_text"))
    some = ["32+32=64", "34+34=68", "36+36=72"]
    sums = replace(
        sums, references=some, media=["32+32=64", "34+34=7", "36+36="], is_right=np.array([True, False, False])
    )
    said = replace(said, references=["one", "two"], media=["one", "t"], is_right=None)
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    write_report(tmp_path, evaluation, [sums, said], loaded, prepared)
    assert (tmp_path / "text.txt").read_text().splitlines() == [
        "# text · test",
        "32+32= → 64",
        "34+34= → 7   ✗ 68",
        "36+36= →    ✗ 72",
        "",
        "# image to text · test",
        "[image] → one   real: one",
        "[image] → t   real: two",
    ]


def test_the_page_is_whole_and_needs_nothing_else(story):
    html = (story[0] / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert "http://" not in html and "https://" not in html
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert [source for source in sources if not source.startswith("data:")] == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert sum(tag == "audio" for tag, _ in page.tags) == 3


def test_the_page_shows_every_number(story):
    _, evaluation, _, loaded, _ = story
    text = Page((loaded.folder / "report.html").read_text()).text
    assert len(evaluation.scores) == 5
    for a in evaluation.scores:
        assert f"{a.value:.1%}" in text and "{:.1%}–{:.1%}".format(*a.interval) in text
    for b in evaluation.bounds:
        assert f"{b.bits_per_token:.3f} ± {b.half_width:.3f}" in text
    assert "Memorisation" in text and "model.width" in text


def test_a_prompt_that_is_markup_is_shown_as_text(story, tmp_path):
    run, evaluation, samples, loaded, prepared = story
    prompt = "<script>alert(1)</script>"
    spoken = next(sample for sample in samples if sample.task == "text_to_audio")
    hostile = replace(spoken, references=[prompt] * len(spoken.references))
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    html = write_report(tmp_path, evaluation, [hostile], loaded, prepared).read_text()
    assert "<script" not in html
    assert prompt in Page(html).text


def test_a_model_of_text_alone_has_a_report_too(story, tmp_path):
    run, _, samples, loaded, prepared = story
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    text = next(sample for sample in samples if sample.task == "text")
    html = write_report(tmp_path, Evaluation(step=3), [text], loaded, prepared).read_text()
    assert "It writes" in html and "It draws" not in html and "It speaks" not in html


def test_what_an_earlier_report_spoke_is_replaced(story, tmp_path):
    run, evaluation, samples, loaded, prepared = story
    spoken = next(sample for sample in samples if sample.task == "text_to_audio")
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    write_report(tmp_path, evaluation, [spoken], loaded, prepared)
    (folder,) = {path.parent for path in tmp_path.rglob("*.wav")}
    made = sorted(path.name for path in folder.iterdir())
    (folder / "before.wav").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    write_report(tmp_path, evaluation, [spoken], loaded, prepared)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*made, "notes.txt"])


def test_what_is_unmasked_step_by_step_is_the_first_picture_that_was_right(story, tmp_path, monkeypatch):
    run, _, _, loaded, prepared = story
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    asked, original = [], Prompts.from_text
    monkeypatch.setattr(Prompts, "from_text", lambda self, text, to: asked.append(text) or original(self, text, to))
    black = [np.zeros((4, 6, 1), np.uint8)] * 3
    for is_right, first in (([False, True, True], "two"), ([False] * 3, "one")):
        sample = Samples("text_to_image", "test", ["one", "two", "three"], black, np.array(is_right))
        write_report(tmp_path, Evaluation(step=3), [sample], loaded, prepared)
        assert asked.pop() == first and not asked


def test_a_wrong_picture_is_framed(story, tmp_path):
    run, _, _, loaded, prepared = story
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    black = [np.zeros((4, 6, 1), np.uint8)] * 2

    def red_pixels(is_right):
        sample = Samples("text_to_image", "test", ["one", "two"], black, np.array(is_right))
        write_report(tmp_path, Evaluation(step=3), [sample], loaded, prepared)
        pixels = np.asarray(Image.open(tmp_path / "digits.png").convert("RGB")).astype(int)
        return int((pixels[..., 0] - pixels[..., 1] > 100).sum())

    assert red_pixels([True, True]) == 0
    assert 0 < red_pixels([True, False]) < red_pixels([False, False])


def test_pictures_are_shared_out_among_the_tasks_five_in_a_row(story, tmp_path, monkeypatch):
    """Eight pictures are shown, four of each dataset, with captions in turn, enlarged to 90 pixels; none is wrong."""
    *_, loaded, _ = story
    shown = []
    monkeypatch.setattr(report, "_PICTURES", 8)
    monkeypatch.setattr(report, "_write_unmasking", lambda *_: None)
    monkeypatch.setattr(report, "write_png", lambda path, grid: shown.append((path.name, grid)))
    monkeypatch.setattr(report, "image_grid", lambda *of, **how: (of, how))
    words = ["one"] * 5 + ["two"] * 2
    pictures = [np.full((4, 6, 1), grey, np.uint8) for grey in range(7)]
    sample = Samples("text_to_image", "test", words, pictures, None)
    report._write_drawings(tmp_path, [sample, sample], loaded)
    ((name, ((drawn, captions), how)),) = shown
    assert name == "digits.png" and how == {"columns": 5, "scale": 1}
    assert captions == ["one", "two", "one", "two"] * 2 and drawn[0].shape == (60, 90, 3)
    assert [int(picture[0, 0, 0]) for picture in drawn] == [0, 5, 1, 6] * 2


def test_the_story_told_again_does_not_train_again(story, experiment, prepared, monkeypatch, capsys):
    run, evaluation, samples = story[:3]
    monkeypatch.setattr(demo.evaluate, "run", lambda *_: (evaluation, samples))
    models = [story[3]]
    monkeypatch.setattr(demo, "write_report", lambda *given: models.append(given[3]) or run / "report.html")
    metrics = (run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(
        "trimask.diffusion.pretraining.training_step.Pretraining.step", lambda *_: pytest.fail("it trains")
    )
    demo.run(run, prepared.folder, experiment)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    out = capsys.readouterr().out
    assert f"Report:  {run / 'report.html'}" in out and " train ─" in out
    assert re.search(r"prepare \d+ s · train \d+ s · evaluate \d+ s · report \d+ s · total \d+ s", out)
    for ours, theirs in zip(*(jax.tree.leaves(model.parameters) for model in models), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_story_ends_by_saying_where_to_look(story, experiment, prepared, capsys):
    assert sorted(json.loads((story[0] / "evaluation.json").read_text())) == [
        "bounds",
        "memorisation",
        "scores",
        "step",
    ]
    demo._print_next(story[0], story[0] / "report.html")
    out = capsys.readouterr().out
    assert str(story[0] / "report.html") in out and f"trimask inspect {story[0]}" in out


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"no preset 'tyni'; there are {', '.join(PRESETS)}"):
        demo.main(["--preset", "tyni"])


def test_training_time_is_tokens_over_rate():
    # 10 tokens a step; `tokens` is the mean over a line's steps. 20 tokens at 5/s, then 30 at 15/s.
    lines = [
        {"step": 2, "tokens": 15.0, "tokens_per_second": 5.0},
        {"step": 5, "tokens": 40.0, "tokens_per_second": 15.0},
    ]
    assert training_seconds(lines) == pytest.approx(4 + 2)


@pytest.mark.parametrize(
    "lines",
    [
        "",
        '{"step": "one", "loss": 1.0, "tokens": 5.0, "tokens_per_second": 9.0}\n',
        '{"step": 1, "loss": 1.0, "tokens": "many", "tokens_per_second": 9.0}\n',
        '{"step": 1, "loss": 1.0, "tokens": 5.0, "tokens_per_second": 0.0}\n',
    ],
)
def test_metrics_that_say_nothing_are_no_report(story, tmp_path, lines):
    _, evaluation, samples, loaded, prepared = story
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"metrics.jsonl: none of its [01] lines has the step, loss, tokens and"):
        report.write_report(tmp_path, evaluation, samples, loaded, prepared)
