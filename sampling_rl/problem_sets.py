"""Problem sets: questions of prepared data and of files in GSM8K's format, graded by the judges of evaluation.

    from_prepared(prepared, "addition", "text", "test")    what `trimask evaluate` asks
    gsm8k(path, prompts)                                   word problems that come to a number

A token that was never revealed (code -1) is left out of a text, which is judged as it is; a picture or sound that
lacks one is worth nothing. Any other grade: `dataclasses.replace(problems, grade=yours)`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from trimask.diffusion.data.fields import Fields
from trimask.diffusion.data.manifest import DatasetManifest
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.readers import puzzles
from trimask.diffusion.data.readers.lines import blocks_of_text_file, records_of_block
from trimask.diffusion.data.records import BadRecord
from trimask.diffusion.evaluation.evaluate import EvaluateConfig
from trimask.diffusion.evaluation.exam import judges_of, question, reference
from trimask.diffusion.evaluation.held_out import HeldOut, TrainingExamples, spread
from trimask.diffusion.evaluation.judges import Judge, NamedJudge, final_number, number_of
from trimask.diffusion.sampling.prompts import Prompts
from trimask.sampling_rl.problems import Grade, Problem, ProblemSet
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.vocabulary import TEXT

_LINES = 1024
"""Of a file, read as a block."""


def from_prepared(
    prepared: Prepared,
    dataset: str | None,
    task: str,
    split: str,
    *,
    length: int | None = None,
    max_examples: int | None = None,
    judge: str | Judge | None = None,
) -> ProblemSet:
    """What a task asks of a split of a dataset (None: the only one): of all examples, or of some, evenly spread.

    `length` is how many tokens a question may be answered with; None: as many as it was prepared with.
    The judge is a name that `trimask evaluate --judge` takes, or a function of yours of the same kind. None: by which
    a puzzle is right, else the task's usual one.
    """
    names = list(prepared.manifest.datasets)
    if dataset is None and len(names) > 1:
        raise ValueError(f"{prepared.folder} has several datasets; --dataset names one of {', '.join(names)}")
    dataset = dataset or names[0]
    manifest = prepared.dataset(dataset)
    tasks = {known.name: known for known in manifest.tasks(prepared.tokenizers.vocabulary)}
    for what, name, there in (("task", task, list(tasks)), ("split", split, list(manifest.splits))):
        if name not in there:
            raise ValueError(f"{prepared.folder}: {dataset} has no {what} {name!r}, only {', '.join(there)}")
    asked, part = tasks[task], HeldOut(prepared, dataset, split, max_examples)
    if asked.condition is None and not all(record["num_given"] for record in part.records):
        raise ValueError(f"{prepared.folder}: {dataset} has texts without a question, to which no answer is right")
    if length is not None and (asked.condition is not None or length < 1):
        raise ValueError(f"the length of answers, at least 1, can be chosen of texts; got {length} of {task}")
    if judge is None or isinstance(judge, str):
        named = judge or _judge_of_puzzles(manifest)
        real = TrainingExamples(prepared, dataset, EvaluateConfig.fit_examples)
        judges = judges_of(asked, part, real, {} if named is None else {task: [named]})
        if not judges:
            raise ValueError(f"{prepared.folder}: {dataset} has too few examples to judge {task} by; name a judge")
        (chosen,) = judges
    else:
        chosen = NamedJudge(getattr(judge, "__name__", "of yours"), judge, None, None)
    return ProblemSet(
        name=f"{dataset} {task} {split}",
        vocabulary=prepared.tokenizers.vocabulary,
        problems=[
            Problem(_of_length(question(asked, record), length), reference(asked, example))
            for record, example in zip(part.records, part.raw, strict=True)
        ],
        grade=graded_by(chosen, prepared.tokenizers),
    )


def gsm8k(
    path: Path,
    prompts: Prompts,
    *,
    template: str = "{question}",
    length: int | None = None,
    max_examples: int | None = None,
) -> ProblemSet:
    """Word problems of JSON lines with a `question` and an `answer` that ends in #### and a number.

    The template is what the model is given; `length` is how many tokens it may answer with, as of `Prompts.complete`.
    An answer is right if it comes to the same number (`judges.number_of`).
    """
    if "{question}" not in template:
        raise ValueError(f"the template must have a {{question}} in it, got {template!r}")
    records = [
        record for block in blocks_of_text_file(path, "line", _LINES) for record in records_of_block(block, "line")
    ]
    problems = []
    for record in (records[number] for number in spread(len(records), max_examples)):
        try:
            fields = Fields.of_json(record.text)
            asked, answer = (fields.text(name) for name in ("question", "answer"))
            if number_of(answer) is None:
                raise ValueError(f'"answer" must come to a number after ####, got {answer[-40:]!r}')
            prompt = template.replace("{question}", asked)
            problems.append(Problem(prompts.complete(prompt, length), {TEXT: answer, "prompt": prompt}))
        except ValueError as error:
            raise BadRecord(str(path), record.line, str(error)) from error
    judge = NamedJudge("final_number", final_number, True, None)
    return ProblemSet(path.stem, prompts.tokenizers.vocabulary, problems, graded_by(judge, prompts.tokenizers))


def _of_length(request: Example, length: int | None) -> Example:
    """The question with so many tokens to answer it."""
    if length is None:
        return request
    (segment,) = request.segments
    given = segment.codes[segment.codes >= 0]
    codes = np.concatenate([given, np.full(length, -1, segment.codes.dtype)])
    return replace(request, segments=(replace(segment, codes=codes),))


def graded_by(judge: NamedJudge, tokenizers: MediaTokenizers) -> Grade:
    """The grade that is a judge's score of each answer."""
    if judge.higher_is_better is False:
        raise ValueError(f"judge {judge.name} cannot grade answers: the better they are, the lower it is")

    def grade(problems: Sequence[Problem], answers: Sequence[Example]) -> Float[np.ndarray, " answers"]:
        codes = [_asked_codes(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
        grades, judged = np.zeros(len(answers)), [n for n in range(len(answers)) if (codes[n] >= 0).all()]
        if judged:
            (modality,) = {answer.segments[-1].modality for answer in answers}
            media = tokenizers.decode(modality, [codes[n] for n in judged])
            grades[judged] = _scores(judge, answers[0].task, media, [problems[n].reference for n in judged])
        return grades

    return grade


def _asked_codes(problem: Problem, answer: Example) -> np.ndarray:
    """The codes that were asked for; of a text, those that were revealed."""
    target = answer.segments[-1]
    if target.modality != TEXT:
        return target.codes
    asked = target.codes[problem.request.segments[-1].codes < 0]
    return asked[asked >= 0]


def _scores(judge: NamedJudge, what: str, media: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """One per item, in [0, 1]."""
    found = judge(what, media, references)
    if isinstance(found, float):
        raise ValueError(f"judge {judge.name} cannot grade answers: it gives one score for all of them")
    scores = found.totals / found.counts
    if not (0 <= scores.min() <= scores.max() <= 1):
        raise ValueError(f"judge {judge.name} must give scores in [0, 1], got {scores.min():g} to {scores.max():g}")
    return scores


def _judge_of_puzzles(manifest: DatasetManifest) -> str | None:
    source = manifest.source
    return puzzles.PUZZLE_CONFIGS[source.where[0]].judge if source.kind == "puzzles" else None
