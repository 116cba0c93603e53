"""Problem sets: the truth is right, what differs is wrong, and what was never revealed is judged without it."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers import puzzles
from trimask.diffusion.data.readers.puzzles import Addition, Sudoku
from trimask.diffusion.data.records import BadRecord
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.sampling.prompts import Prompts
from trimask.sampling_rl.problem_sets import from_prepared, gsm8k

BUFFER = 30


@pytest.fixture(scope="module")
def puzzled(tmp_path_factory):
    """A few puzzles, prepared."""
    small = {
        "addition": Addition(train=2, validation=1, test=4),
        "sudoku": Sudoku(train=1, validation=1, test=1, held_out=(1, 3)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puzzles, "PUZZLE_CONFIGS", small)
        sources = {name: SourceConfig(kind="puzzles", where=(name,)) for name in small}
        config = PrepareConfig(sources=sources, text_vocabulary=256, response_tokens=BUFFER, workers=1)
        yield prepare(tmp_path_factory.mktemp("puzzled"), config)


def answered(tokenizers, problem, text):
    """The problem with this text as its answer, then EOS; _ is a token that was never revealed."""
    (segment,) = problem.request.segments
    codes, asked = segment.codes.copy(), np.flatnonzero(segment.codes < 0)
    codes[asked] = tokenizers.vocabulary.eos_code
    codes[asked[: len(text)]] = np.where([c == "_" for c in text], -1, tokenizers.text.encode(text))
    return dataclasses.replace(problem.request, segments=(dataclasses.replace(segment, codes=codes),))


def graded(tokenizers, problems, texts):
    """Grades of these texts as answers to the first problems."""
    asked = problems.problems[: len(texts)]
    return problems.grade(asked, [answered(tokenizers, *pair) for pair in zip(asked, texts, strict=True)]).tolist()


# Prepared data


@pytest.mark.parametrize("dataset", ["addition", "sudoku"])
def test_a_split_is_asked_and_its_true_answers_are_right(puzzled, dataset):
    problems = from_prepared(puzzled, dataset, "text", "test")
    puzzle = puzzles.PUZZLE_CONFIGS[dataset].puzzles()["test"]
    assert [dict(p.reference) for p in problems.problems] == [{"text": p.response, "prompt": p.prompt} for p in puzzle]
    assert problems.length == BUFFER and problems.vocabulary == puzzled.tokenizers.vocabulary
    truth = [p.reference["text"] for p in problems.problems]
    assert graded(puzzled.tokenizers, problems, truth) == [1.0] * len(truth)
    assert graded(puzzled.tokenizers, problems, [*truth[1:], truth[0]]) == [0.0] * len(truth)


def test_without_a_name_the_dataset_is_the_only_one_with_the_task(puzzled, prepared):
    assert from_prepared(prepared, None, "text", "test").name == "sums text test"
    assert from_prepared(prepared, None, "audio_to_text", "train").name == "spoken audio_to_text train"
    with pytest.raises(ValueError, match="several datasets have the task text; name one: addition, sudoku"):
        from_prepared(puzzled, None, "text", "test")
    with pytest.raises(
        ValueError,
        match="no dataset has a task 'poem', only text_to_image, image_to_text,",
    ):
        from_prepared(prepared, None, "poem", "test")


def test_additions_are_graded_by_what_they_come_to(puzzled):
    problems = from_prepared(puzzled, "addition", "text", "test")
    steps, _, total = problems.problems[0].reference["text"].rpartition(" ")
    for text, right in [
        (f"{steps} {total}", 1),
        (f"1 2 3 {total}", 1),
        (total, 1),
        (f"{steps} {total}0", 0),
        (f"{steps}", 0),
        (f"{steps} {total} ", 0),
        ("", 0),
    ]:
        assert graded(puzzled.tokenizers, problems, [text]) == [right]
    exact = from_prepared(puzzled, "addition", "text", "test", judge="exact_match")
    assert graded(puzzled.tokenizers, exact, [f"{steps} {total}"]) == [1]
    assert graded(puzzled.tokenizers, exact, [total]) == [0]


@given(st.data(), st.integers(0, 5))
def test_what_was_never_revealed_is_left_out_of_a_text(puzzled, data, hidden_eos):
    problems = from_prepared(puzzled, "addition", "text", "test")
    truth = problems.problems[0].reference["text"]
    is_hidden = data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth)))
    shown = "".join("_" if hidden else c for c, hidden in zip(truth, is_hidden, strict=True)) + "_" * hidden_eos
    right = shown.replace("_", "").split(" ")[-1] == truth.split(" ")[-1]
    assert graded(puzzled.tokenizers, problems, [shown]) == [float(right)]


def test_some_are_spread_evenly(puzzled):
    every, some = (from_prepared(puzzled, "addition", "text", "test", max_examples=n).problems for n in (None, 2))
    assert [problem.reference for problem in some] == [every[number].reference for number in (0, 2)]


def test_pictures_are_graded_by_their_usual_judge_and_worth_nothing_if_a_code_is_missing(prepared):
    problems = from_prepared(prepared, "drawn", "text_to_image", "test")
    records = list(prepared.examples("drawn", "test"))
    answers = [_drawn(problem, record["image"]) for problem, record in zip(problems.problems, records, strict=True)]
    grades = problems.grade(problems.problems, answers)
    assert set(grades) == {0.0, 1.0}  # what is drawn is noise
    right = int(grades.argmax())
    damaged = records[right]["image"].copy()
    damaged[0, 0] = -1
    answers[right] = _drawn(problems.problems[right], damaged)
    grades[right] = 0
    np.testing.assert_array_equal(problems.grade(problems.problems, answers), grades)
    assert problems.grade(problems.problems[:1], [_drawn(problems.problems[0], -np.ones_like(damaged))]) == [0.0]


def _drawn(problem, codes):
    *given, target = problem.request.segments
    return dataclasses.replace(problem.request, segments=(*given, dataclasses.replace(target, codes=codes)))


def test_a_judge_may_be_a_function_that_sees_media_and_references(prepared):
    seen = []

    def judge(media, references):
        seen.extend(zip(media, references, strict=True))
        return [0.25 * number for number in range(len(media))]

    problems = from_prepared(prepared, "drawn", "text_to_image", "test", max_examples=3, judge=judge)
    records = [prepared.examples("drawn", "test")[number] for number in (0, 4, 8)]
    answers = [_drawn(problem, record["image"]) for problem, record in zip(problems.problems, records, strict=True)]
    assert problems.grade(problems.problems, answers).tolist() == [0, 0.25, 0.5]
    raw = list(prepared.raw("drawn", "test"))
    for number, (medium, reference) in zip((0, 4, 8), seen, strict=True):
        np.testing.assert_array_equal(medium, prepared.tokenizers.decode("image", [records[number // 4]["image"]])[0])
        np.testing.assert_array_equal(reference["image"], raw[number].media["image"])


def test_what_cannot_be_asked_or_graded_is_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="sums has no task 'text_to_image', only text"):
        from_prepared(prepared, "sums", "text_to_image", "test")
    with pytest.raises(ValueError, match="sums has no split 'exam', only train, validation, test"):
        from_prepared(prepared, "sums", "text", "exam")
    with pytest.raises(ValueError, match="drawn has too few examples to judge text_to_image by default; name a judge"):
        from_prepared(prepared, "drawn", "text_to_image", "test", max_examples=2)
    with pytest.raises(ValueError, match="frechet cannot grade answers: its lower scores are better"):
        from_prepared(prepared, "drawn", "text_to_image", "test", judge="frechet")
    (tmp_path / "prose.txt").write_text("one two\n\n" * 20)
    config = PrepareConfig(
        sources={"prose": SourceConfig(kind="text", where=(str(tmp_path / "prose.txt"),))}, text_vocabulary=256
    )
    with pytest.raises(ValueError, match="prose has texts without a question"):
        from_prepared(prepare(tmp_path / "data", config), "prose", "text", "train")


@pytest.mark.parametrize(
    ("found", "reason"),
    [(0.5, "one score for all"), ([1.5], r"scores in \[0, 1\], got 1.5 to 1.5"), ([-0.5], "got -0.5 to -0.5")],
)
def test_scores_that_are_no_grades_are_refused(puzzled, found, reason):
    problems = from_prepared(puzzled, "addition", "text", "test", judge=lambda *_: found)
    with pytest.raises(ValueError, match=reason):
        graded(puzzled.tokenizers, problems, ["3"])


# GSM8K


@pytest.fixture(scope="module")
def prompts(puzzled):
    """Prompts for texts of up to 160 characters, of which the answer has 60."""
    layout = Layout(shapes={"text": [160]}, fill="answer", answer_length=60)
    return Prompts(puzzled.tokenizers, {"asked": layout})


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def word_problem(answer, question="How many?"):
    return {"question": question, "answer": f"It is <<1+1=2>>2.\n#### {answer}"}


def test_word_problems_are_asked_by_a_template(prompts, tmp_path):
    path = written(tmp_path / "some.jsonl", *(word_problem(n, f"What is {n}?") for n in range(5)))
    problems = gsm8k(path, prompts, template="Q: {question}\nA:", length=7, max_examples=2)
    assert (problems.name, len(problems.problems), problems.length) == ("some", 2, 7)
    for problem, number in zip(problems.problems, (0, 2), strict=True):
        codes = problem.request.segments[0].codes
        assert prompts.tokenizers.decode("text", [codes[:-7]]) == [f"Q: What is {number}?\nA:"]
        assert dict(problem.reference) == {**_reference(number), "prompt": f"Q: What is {number}?\nA:"}
    assert gsm8k(path, prompts).length == 60
    with pytest.raises(ValueError, match=r"must contain \{question\}, got 'Q:'"):
        gsm8k(path, prompts, template="Q:")


def _reference(number):
    return {"text": word_problem(number)["answer"]}


@settings(max_examples=40)
@given(
    st.integers(-(10**6), 10**6),
    st.sampled_from(["{}", "{:,}", "{}.0", "{:,}.00"]),
    st.sampled_from(["", "$"]),
    st.sampled_from(
        ["#### {}", "#### {}\nThat is all 3.", "so <answer>{}</answer>", "#### 7 <answer> {} eggs</answer>."]
    ),
    st.integers(-1, 1),
)
def test_an_answer_is_right_if_it_comes_to_the_number(
    prompts, tmp_path_factory, number, shape, unit, statement, difference
):
    path = written(tmp_path_factory.mktemp("gsm8k") / "x.jsonl", word_problem(f"{number:,}"))
    problems = gsm8k(path, prompts)
    text = statement.format(unit + shape.format(number + difference))
    assert graded(prompts.tokenizers, problems, [text]) == [float(difference == 0)]


def test_answers_that_come_to_no_number_are_wrong(prompts, tmp_path):
    problems = gsm8k(written(tmp_path / "x.jsonl", word_problem(72)), prompts)
    for text in (
        "",
        "72",
        "#### ",
        "#### many",
        "#### 72 or 73",
        "<answer>72",
        "<answer></answer> 72",
        "___",
        "#### __",
    ):
        assert graded(prompts.tokenizers, problems, [text]) == [0.0]
    assert graded(prompts.tokenizers, problems, ["__#__### 7_2"]) == [1.0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not strict JSON: expected a key"),
        ("[1]", "must be a JSON object"),
        ({"question": "How many?"}, 'needs a "answer"'),
        ({"question": " ", "answer": "#### 1"}, '"question" is empty'),
        ({"question": "How many?", "answer": "It is 7."}, "must end in #### and a number, got 'It is 7.'"),
        (word_problem(1, "How many? " * 20), "at most 100 fit"),
    ],
)
def test_bad_lines_are_named(prompts, tmp_path, line, reason):
    path = written(tmp_path / "x.jsonl", word_problem(1), "", line)
    with pytest.raises(BadRecord) as caught:
        gsm8k(path, prompts)
    assert (caught.value.file, caught.value.line) == (str(path), 3)
    assert reason in str(caught.value)


def test_a_file_without_problems_and_one_that_is_not_there_are_refused(prompts, tmp_path):
    with pytest.raises(ValueError, match="x has no problems"):
        gsm8k(written(tmp_path / "x.jsonl"), prompts)
    with pytest.raises(FileNotFoundError, match="no such file"):
        gsm8k(tmp_path / "y.jsonl", prompts)
