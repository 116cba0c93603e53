"""A third modality takes a codec, a reader, a line in one table and entries in two; all commands support it."""

import json

import melody
import numpy as np
import pytest
from PIL import Image

import trimask
from trimask.diffusion.data.modalities import MODALITIES, modality
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.evaluation.exam import choose_judges, score_value
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples
from trimask.diffusion.evaluation.judges import DEFAULT_JUDGES
from trimask.diffusion.evaluation.results import Evaluation
from trimask.diffusion.pretraining.trained_model import load
from trimask.scripts import evaluate, generate, inspection, prepare, questions, train
from trimask.scripts.output.presentation import PRESENTATIONS, presentation_of
from trimask.tokenizers import codec
from trimask.tokenizers.storage import configuration

SHAPE = (5, 2)


@pytest.fixture(scope="module")
def with_melodies():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codec.CODECS, "melody", ("melody", "MelodyCodec"))
        patch.setitem(MODALITIES, "melody", melody.MODALITY)
        patch.setitem(PRESENTATIONS, "melody", melody.OUTPUT)
        yield


@pytest.fixture(scope="module")
def tunes(tmp_path_factory):
    """Forty tunes that rise or fall, with their captions."""
    folder = tmp_path_factory.mktemp("melodies") / "tunes"
    folder.mkdir()
    lines = []
    for number in range(40):
        steps = np.linspace(0.1, 0.9, SHAPE[0])[:: 1 if number % 2 else -1]
        melody.write(folder / f"{number}.tune", np.stack([steps, steps**2], axis=1), None)
        lines.append(json.dumps({"file_name": f"{number}.tune", "text": "up" if number % 2 else "down"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(with_melodies, tunes, tmp_path_factory):
    """Prepared data, and a run that was trained on them and wrote samples."""
    folder = tmp_path_factory.mktemp("run")
    prepare.main([str(folder / "data"), "--media", f"melody:songs={tunes}", "--melody.notes", "9"])
    small = ["--model.num-layers", "1", "--model.width", "16", "--model.num-heads", "2", "--model.mlp-width", "16"]
    often = ["--loop.sample-every", "4", "--optimizer.horizon-tokens", "1000", "--batch.tokens", "256"]
    often += ["--optimizer.warmup-tokens", "100"]
    train.main([str(folder / "run"), "--data", str(folder / "data"), *small, *often])
    return folder / "run"


def test_it_is_prepared_from_a_folder_with_flags_of_its_codec(run):
    prepared = Prepared(run.parent / "data")
    dataset = prepared.dataset("songs")
    assert (dataset.medium, dataset.source.kind, dataset.layout.shapes["melody"]) == ("melody", "melody", list(SHAPE))
    assert prepared.tokenizers.vocabulary.codebook_sizes["melody"] == (9, 9)
    assert prepared.config.codecs["melody"] == melody.MelodyConfig(notes=9)


def test_it_is_sampled_in_training(run):
    samples = sorted(path.name for path in (run / "samples").glob("step-000004-songs-*.tune"))
    assert samples[0] == "step-000004-songs-0.tune"
    assert np.loadtxt(run / "samples" / samples[0]).shape == SHAPE


def test_it_is_made_watched_and_animated(run):
    generate.main([str(run), "--prompt", "up", "--to", "melody", "--steps", "2", "--animate", "gif", "--watch"])
    made = run / "generated" / "up.tune"
    assert np.loadtxt(made).shape == SHAPE
    with Image.open(made.with_suffix(".gif")) as animation:
        assert animation.n_frames == 3


def test_it_is_made_from_python_and_drawn_in_a_notebook(run, tunes):
    model = trimask.load(run)
    answer = model.generate("up", to="melody", steps=2)
    assert answer.content.shape == SHAPE and answer.steps.max() == 2
    assert answer._repr_png_().startswith(b"\x89PNG") and answer._repr_html_() is None
    with pytest.raises(AttributeError, match=r"an answer in melody has \.content, and no \.image"):
        _ = answer.image
    (read,) = model.generate(given={"melody": [tunes / "3.tune"]}, steps=2)
    assert (read.modality, read.prompt) == ("text", str(tunes / "3.tune"))


def test_a_file_of_it_is_read_to_be_described(run, tunes):
    arguments = generate.Arguments(run=run, given=(f"melody={tunes / '3.tune'}",))
    (question,) = questions.ask(arguments, questions.prompts_of(load(run)))
    given, asked = question.example.segments
    assert (question.title, given.modality, asked.modality) == ("3", "melody", "text")
    np.testing.assert_array_equal(given.codes, (9 * np.loadtxt(tunes / "3.tune")).astype(int))


def test_it_is_evaluated_and_what_cannot_be_judged_is_a_note(run, capsys):
    evaluate.main([str(run), "--bound-samples", "1", "--max-examples", "3"])
    found = configuration.load(run / "evaluation.json", Evaluation)
    assert {score.task for score in found.scores} == {"melody_to_text"}
    assert {bound.modality for bound in found.bounds} == {"melody", "text"}
    note = "text_to_melody on songs test is not judged: there are no features of melody"
    assert [line.partition(";")[0] for line in found.notes] == [note]
    assert note in capsys.readouterr().out


def test_a_modality_may_have_judges_of_its_own(run, monkeypatch):
    monkeypatch.setitem(DEFAULT_JUDGES, "melody", ("melody:rises",))
    prepared = Prepared(run.parent / "data")
    part, real = HeldOutExamples(prepared, "songs", "test", None), TrainingExamples(prepared, "songs", 10)
    (judge,) = choose_judges(prepared.manifest.vocabulary.tasks["text_to_melody"], part, real, {})
    score = score_value(judge("tunes", [e.media["melody"] for e in part.raw], [e.media for e in part.raw]))
    assert (judge.name, score) == (
        "melody:rises",
        1.0,
    )


def test_it_is_inspected(run, capsys):
    inspection.main([str(run.parent / "data")])
    inspection.main([str(run)])
    assert "melody 1" in capsys.readouterr().out


def test_every_modality_is_in_both_tables_and_has_a_codec():
    kinds = {codec.importlib.import_module(module).__dict__[name].modality for module, name in codec.CODECS.values()}
    tables = {
        "tokenizers/codec.py": kinds - {"text"},
        "diffusion/data/modalities.py": MODALITIES.keys(),
        "scripts/output/presentation.py": PRESENTATIONS.keys(),
    }
    every = set().union(*tables.values())
    assert {file: every - names for file, names in tables.items() if every - names} == {}, "tables that lack modalities"


def test_what_is_missing_is_named():
    with pytest.raises(
        ValueError, match=r"no modality 'smell' in diffusion/data/modalities.py; there are image, audio"
    ):
        modality("smell")
    with pytest.raises(
        ValueError, match=r"no modality 'smell' in scripts/output/presentation.py; there are image, audio"
    ):
        presentation_of("smell")


def test_a_folder_of_no_modality_and_a_file_of_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--media takes MODALITY:\[NAME=\]FOLDER, with modality one of image, audio"):
        prepare.main([str(tmp_path), "--media", "smell:roses"])
    with pytest.raises(ValueError, match="`given` is MODALITY=FILE"):
        generate.Arguments(run=tmp_path, given=("seven.png",))
