"""Evaluation: bits of any row, judges by task, any prepared folder, the same numbers from the same seed."""

import dataclasses
import json

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.diffusion.evaluation import evaluate as evaluation
from trimask.diffusion.evaluation.evaluate import _beyond_training, evaluate
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.exam import Exam
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples, evenly_spaced
from trimask.diffusion.evaluation.likelihood import num_asked, target_bits
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Answer
from trimask.scripts import evaluate as command
from trimask.scripts.console import parse
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import Vocabulary

CONFIG = EvaluateConfig(max_examples=5, bound_samples=2, rows=4)


@pytest.fixture(scope="module")
def loaded(loaded) -> LoadedRun:
    """The trained model, with fewer sampling steps."""
    generation = {name: GenerationConfig(steps=2) for name in ("text", "image", "audio")}
    train = dataclasses.replace(loaded.description.train, generation=generation)
    return dataclasses.replace(loaded, description=dataclasses.replace(loaded.description, train=train), step=1)


@pytest.fixture(scope="module")
def texts(prepared, tmp_path_factory) -> Prepared:
    """Paragraphs of many lengths, and questions with answers; both have held-out examples."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text("\n\n".join("é" + "ab" * (number % 9) for number in range(60)))
    lines = [json.dumps({"prompt": f"{number}?", "response": f"is {number} so"}) for number in range(60)]
    (folder / "asked.jsonl").write_text("\n".join(lines))
    config = PrepareConfig(
        sources={
            "plain": SourceConfig(kind="text", where=(str(folder / "plain.txt"),)),
            "asked": SourceConfig(kind="prompts", where=(str(folder / "asked.jsonl"),)),
        },
        tokenizers=str(prepared.folder),
        max_text_tokens=15,
        splits=SplitConfig(test=0.3),
    )
    return prepare(folder / "out", config)


@pytest.fixture(scope="module")
def result(loaded, prepared):
    return evaluate(loaded, prepared, CONFIG)


def test_answers_that_are_training_items_are_counted(loaded, prepared):
    task = loaded.vocabulary.tasks["text_to_image"]
    held_out, training = HeldOutExamples(prepared, "drawn", "test", None), TrainingExamples(prepared, "drawn", 10)
    known = [record["image"] for record in prepared.examples("drawn", "train")]
    new = (known[0] + 1) % 12
    grids = {codes.tobytes() for codes in known}
    assert new.tobytes() not in grids
    examples = [Example(task.name, (Segment("image", codes),)) for codes in (known[0], new, known[1], known[0])]
    found = Exam(loaded, task, held_out, training, []).memorisation(
        [Answer(one, 1, np.zeros(0), np.zeros(0, int)) for one in examples]
    )
    assert (found.generated, found.copied, found.distinct) == (4, 0.75, 3)
    real = [record["image"].tobytes() for record in held_out.records]
    assert (found.real, found.real_distinct) == (len(real), len(set(real)))
    assert found.real_copied == np.mean([codes in grids for codes in real])
    assert (found.dataset, found.task, found.split) == ("drawn", "text_to_image", "test")


# Bits


def _bits(loaded, examples, **options):
    options = {"num_draws": 3} | options
    return target_bits(jax.random.key(0), examples, loaded.denoise, loaded.vocabulary, **options)


def _plain(loaded, texts, dataset="plain"):
    task = loaded.vocabulary.tasks["text"]
    return [Example.of_task(task, record, record["num_given"]) for record in texts.examples(dataset, "test")]


def test_padding_and_neighbours_never_change_bits(loaded, texts):
    examples = sorted(_plain(loaded, texts), key=lambda example: example.length)
    assert examples[0].length < 10 < examples[-1].length
    together = _bits(loaded, examples)
    alone = _bits(loaded, examples[:1])  # a row of its own length
    assert alone[0] == pytest.approx(together[0], rel=1e-5)  # sums of floats in another order


def test_the_number_of_rows_never_changes_bits(loaded, texts):
    examples = _plain(loaded, texts)
    np.testing.assert_allclose(_bits(loaded, examples, rows=2), _bits(loaded, examples, rows=7), rtol=1e-5)


def test_bits_of_a_model_that_knows_nothing_are_those_of_the_ids_a_token_may_be():
    vocabulary = Vocabulary(text_size=7)
    examples = [
        Example.of_task(vocabulary.tasks["text"], {"text": np.arange(n) % 7}, given) for n, given in [(3, 0), (6, 4)]
    ]

    ignorant = fakes.fake(jnp.zeros(vocabulary.size))
    bits = target_bits(jax.random.key(0), examples, jax.tree_util.Partial(ignorant), vocabulary, num_draws=2000)
    assert [num_asked(example, vocabulary) for example in examples] == [3, 2]
    np.testing.assert_allclose(bits, np.log2(8) * np.array([3, 2]), rtol=1e-5)  # n/l times l tokens, in every draw


def test_bits_per_token_and_character_are_quotients_of_sums(loaded, texts, monkeypatch):
    def counted(key, examples, *_, **__):
        return np.array([2.0 + num_asked(example, loaded.vocabulary) ** 2 for example in examples])

    monkeypatch.setattr(evaluation, "target_bits", counted)
    result, _ = evaluate(loaded, texts, dataclasses.replace(CONFIG, max_examples=None))
    tokens = np.array([len(record["text"]) for record in texts.examples("plain", "test")], float)
    bits = 2 + tokens**2
    (bound,) = [b for b in result.bounds if b.dataset == "plain"]
    value = bits.sum() / tokens.sum()
    residual = bits - value * tokens
    half = 1.96 * np.sqrt(len(bits) * residual.var(ddof=1)) / tokens.sum()
    assert (bound.bits_per_token, bound.half_width) == pytest.approx((value, half))
    characters = sum(len(example.media["text"]) for example in texts.raw("plain", "test"))
    assert bound.bits_per_character == pytest.approx(bits.sum() / characters, rel=0.05)  # a cut é is two


def test_bits_of_a_modality_are_those_of_all_its_directions(result):
    bounds = result[0].bounds
    (text,) = [b for b in bounds if b.task is None and b.modality == "text"]
    directions = [b for b in bounds if b.task in ("text", "image_to_text", "audio_to_text")]
    assert text.examples == sum(b.examples for b in directions) == 15
    low, high = min(b.bits_per_token for b in directions), max(b.bits_per_token for b in directions)
    assert low < text.bits_per_token < high
    assert [b.modality for b in bounds if b.task is None] == ["text", "audio", "image"]
    assert all((b.bits_per_character is None) == (b.modality != "text") for b in bounds)


# Scores


def test_the_same_seed_gives_the_same_file_and_another_does_not(loaded, prepared, result, tmp_path):
    for number, seed in enumerate((0, 0, 1)):
        command.run(loaded, prepared.folder, dataclasses.replace(CONFIG, seed=seed), tmp_path / f"{number}.json")
    first, again, other = ((tmp_path / f"{number}.json").read_bytes() for number in range(3))
    assert first == again != other
    assert not (loaded.folder / "evaluation.json").exists()


def test_usual_judges_are_equality_of_texts_and_labels_of_media(result):
    judges = {score.task: (score.judge, score.is_share, score.examples) for score in result[0].scores}
    assert judges == {
        **{task: ("exact_match", True, 5) for task in ("text", "image_to_text", "audio_to_text")},
        **{task: ("label", True, 5) for task in ("text_to_image", "text_to_audio")},
    }


def test_judges_are_chosen_by_task_and_for_all_that_they_fit(loaded, prepared):
    judges = {"all": ("frechet", "exact_match"), "text": ("word_error_rate",)}
    result, samples = evaluate(loaded, prepared, dataclasses.replace(CONFIG, judges=judges))
    named = {(score.task, score.judge) for score in result.scores}
    assert named == {
        *((task, "frechet") for task in ("text_to_image", "text_to_audio")),
        *((task, "exact_match") for task in ("text", "image_to_text", "audio_to_text")),
        ("text", "word_error_rate"),
    }
    frechet = [score for score in result.scores if score.judge == "frechet"]
    assert all(s.interval is None and not s.is_share and s.value > 0 and s.on_real > 0 for s in frechet)
    assert {sample.task for sample in samples if sample.is_right is None} == {"text_to_image", "text_to_audio"}


def test_a_judge_of_ones_own_sees_answers_without_their_questions(loaded, texts, tmp_path, monkeypatch):
    (tmp_path / "own_judge_of_answers.py").write_text(
        "seen = []\n"
        "def judge(media, references):\n"
        "    seen.extend(zip(media, references))\n"
        "    return [0.25] * len(media)\n"
    )
    monkeypatch.chdir(tmp_path)
    judges = {"text": ("own_judge_of_answers:judge",)}
    result, samples = evaluate(loaded, texts, dataclasses.replace(CONFIG, judges=judges))
    (score,) = result.scores
    assert (score.dataset, score.value, score.interval) == ("asked", 0.25, (0.25, 0.25))
    import own_judge_of_answers

    for (answer, reference), whole, right in zip(
        own_judge_of_answers.seen, samples[0].media, samples[0].references, strict=True
    ):
        assert whole == reference["prompt"] + answer and reference["prompt"] not in answer
        assert right == reference["prompt"] + reference["text"]
        assert reference["prompt"].endswith("?") and reference["text"].startswith("is ")


def test_raw_media_of_plain_text_are_not_read(loaded, texts, monkeypatch):
    original = Prepared.raw

    def raw(self, dataset, split):
        assert dataset != "plain"
        return original(self, dataset, split)

    monkeypatch.setattr(Prepared, "raw", raw)
    reports: dict[str, list[tuple[int, int]]] = {}
    generators, bounds = [], []
    made = LoadedRun.generator
    monkeypatch.setattr(LoadedRun, "generator", lambda run, **how: generators.append(how) or made(run, **how))
    monkeypatch.setattr(evaluation, "target_bits", lambda *of, **how: bounds.append(how) or target_bits(*of, **how))
    result, _ = evaluate(loaded, texts, CONFIG, lambda what, *counts: reports.setdefault(what, []).append(counts))
    assert {score.dataset for score in result.scores} == {"asked"}
    assert {bound.dataset for bound in result.bounds} == {"plain", "asked", None}
    assert generators == [{"rows": 4}]
    assert [(how["num_draws"], how["rows"]) for how in bounds] == [(2, 4)] * 2
    assert reports.keys() == {"bits of text on test", "text on test"}
    assert reports["text on test"][-1] == (5, 5) and reports["bits of text on test"].count((5, 5)) == 2


def test_a_prompt_that_was_asked_is_not_asked_again(loaded, prepared):
    config = dataclasses.replace(CONFIG, splits=("validation", "test"))
    result, _ = evaluate(loaded, prepared, config)
    splits = {score.task: [] for score in result.scores}
    for score in result.scores:
        splits[score.task].append(score.split)
    assert splits["text_to_image"] == ["validation"]  # the same three words
    assert splits["image_to_text"] == ["validation", "test"]


def test_examples_are_spread_over_a_split():
    assert evenly_spaced(7, None) == evenly_spaced(7, 9) == list(range(7))
    assert evenly_spaced(12, 5) == [0, 2, 4, 7, 9]


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": ("test", "tset")}, "no split 'tset', only train, validation, test"),
        ({"judges": {"text_to_smell": ("label",)}}, "unknown task 'text_to_smell'; there are text, "),
        ({"judges": {"text": ("label",)}}, "judge label judges media, not text"),
    ],
)
def test_what_is_not_there_is_refused(loaded, prepared, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(loaded, prepared, dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("name", ["max_examples", "bound_samples", "fit_examples", "rows"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EvaluateConfig(**{name: 0})


def _without(prepared, split):
    """The prepared folder without one of its splits."""
    other = Prepared(prepared.folder)
    datasets = {
        name: dataclasses.replace(d, splits={s: n for s, n in d.splits.items() if s != split})
        for name, d in prepared.manifest.datasets.items()
    }
    assert other.reports  # which are compared with the manifest when they are read
    other.manifest = dataclasses.replace(other.manifest, datasets=datasets)
    return other


def test_a_folder_without_a_training_split_cannot_fit_a_judge(loaded, prepared):
    without = _without(prepared, "train")
    with pytest.raises(ValueError, match="drawn has no split 'train' to fit a judge on, only validation, test"):
        evaluate(loaded, without, dataclasses.replace(CONFIG, judges={"text_to_image": ("label",)}))
    result, _ = evaluate(loaded, without, CONFIG)  # where none is named, media are not judged
    assert {score.judge for score in result.scores} == {"exact_match"}


def test_a_folder_without_test_splits_is_told_how_to_name_others(loaded, prepared):
    with pytest.raises(ValueError, match="no split's name begins with test; --splits names others: train, validation"):
        evaluate(loaded, _without(prepared, "test"), CONFIG)


def test_a_folder_of_other_tokenizers_is_refused_even_where_ids_agree(loaded, prepared):
    fitted = TextTokenizer.fit(["other words than those of the data"], prepared.tokenizers.text.size)
    other = dataclasses.replace(loaded, tokenizers=dataclasses.replace(loaded.tokenizers, text=fitted))
    assert other.tokenizers.vocabulary == loaded.vocabulary
    with pytest.raises(ValueError, match=r"tokenizers of text are not the run's; .* --tokenizers "):
        evaluate(other, prepared, CONFIG)


def test_a_folder_that_was_not_prepared_is_told_how(loaded, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=rf"not a folder of prepared data; make one with `trimask prepare .* --tokenizers {loaded.folder}",
    ):
        command.run(loaded, tmp_path, CONFIG)


def test_what_is_larger_than_anything_trained_on_is_noted(loaded, prepared):
    layouts = loaded.description.layouts
    assert evaluate(loaded, prepared, CONFIG)[0].notes == []
    small = {
        name: dataclasses.replace(layout, shapes={m: [1] * len(s) for m, s in layout.shapes.items()})
        for name, layout in layouts.items()
    }
    other = dataclasses.replace(loaded, description=dataclasses.replace(loaded.description, layouts=small))
    notes = evaluate(other, prepared, CONFIG)[0].notes
    assert "drawn has image of 2×3 codes, and the model was trained on 1×1 at most" in notes
    wide = {
        "drawn": dataclasses.replace(layouts["drawn"], shapes={"text": [99], "image": [1, 9]}),
        "tall": dataclasses.replace(layouts["drawn"], shapes={"text": [99], "image": [9, 1]}),
    }
    assert list(_beyond_training("drawn", layouts["drawn"], wide.values())) == []


def test_judges_are_given_on_the_command_line():
    line = "run --judge text=a:b --judge mine:own --judge text=word_error_rate --seed 3"
    config = parse(command.Arguments, line.split(), "evaluate", "").resolved()
    assert config == EvaluateConfig(seed=3, judges={"text": ("a:b", "word_error_rate"), "all": ("mine:own",)})
