"""Problem sets from prepared data and from files in GSM8K's format, graded by the judges of evaluation.

    problems_of(loaded, task="text")                       questions of a run's own data
    from_prepared(prepared, "addition", "text", "test")    questions of `trimask evaluate`
    gsm8k(path, prompts)                                   word problems whose answer is a number

Tokens that were never revealed (code −1) are left out of a text, and the rest is judged; a picture or sound with such a
token has the grade 0. To grade otherwise, use `dataclasses.replace(problems, grade=…)`.
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
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.evaluation.evaluate import prepared_of, require_same_tokenizers
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.exam import choose_judges, question, reference
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples, evenly_spaced
from trimask.diffusion.evaluation.judges import Judge, NamedJudge, final_number, number_of
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.progress import Report, silent
from trimask.diffusion.sampling.prompts import Prompts
from trimask.sampling_rl.problems import Grade, Problem, ProblemSet
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.vocabulary import TEXT, Task

_LINES = 1024
"""Number of lines of a file that are read at a time."""


def problems_of(
    loaded: LoadedRun,
    *,
    data: str | Path | None = None,
    dataset: str | None = None,
    task: str = TEXT,
    split: str = TRAIN,
    max_problems: int | None = None,
    judge: str | Judge | None = None,
    report: Report = silent,
) -> ProblemSet:
    """Problems for a run from a folder of prepared data; None: the data that the run was trained on.

    The other arguments are those of `from_prepared`. Raises FileNotFoundError if there are no prepared data, ValueError
    if their tokenizers differ from those of the run, and an error if shards are damaged.
    """
    prepared = prepared_of(loaded, None if data is None else Path(data))
    require_same_tokenizers(loaded, prepared)
    prepared.require_verified(report)
    return from_prepared(prepared, dataset, task, split, max_examples=max_problems, judge=judge)


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
    """Problems of a task, from a split of a dataset (None: the only dataset that has the task), graded by a judge.

    `max_examples` problems are taken, evenly spread over the split; None: all. `length` is the number of tokens of a
    text's answer; None: the length with which the data were prepared. `judge` is a name that `trimask evaluate --judge`
    takes, or a function of that kind; None: the one that a puzzle names, else the task's default judge.

    Raises ValueError if the dataset, task or split does not exist, if there is nothing to ask or to judge, or if the
    length cannot be chosen.
    """
    dataset = dataset_with(prepared, task, dataset)
    manifest = prepared.dataset(dataset)
    tasks = _tasks(prepared, manifest)
    for what, name, known in (("task", task, list(tasks)), ("split", split, list(manifest.splits))):
        if name not in known:
            raise ValueError(f"{prepared.folder}: {dataset} has no {what} {name!r}, only {', '.join(known)}")
    chosen_task, part = tasks[task], HeldOutExamples(prepared, dataset, split, max_examples)
    if chosen_task.condition is None and not all(record["num_given"] for record in part.records):
        raise ValueError(f"{prepared.folder}: {dataset} has texts without a question, to which no answer is right")
    if length is not None and (chosen_task.condition is not None or length < 1):
        raise ValueError(f"the length of answers, at least 1, can be chosen of texts; got {length} of {task}")
    return ProblemSet(
        name=f"{dataset} {task} {split}",
        vocabulary=prepared.tokenizers.vocabulary,
        problems=[
            Problem(_with_answer_length(question(chosen_task, record), length), reference(chosen_task, example))
            for record, example in zip(part.records, part.raw, strict=True)
        ],
        grade=grade_by(_named_judge(prepared, part, chosen_task, judge), prepared.tokenizers),
    )


def _tasks(prepared: Prepared, manifest: DatasetManifest) -> dict[str, Task]:
    return {task.name: task for task in manifest.tasks(prepared.tokenizers.vocabulary)}


def dataset_with(prepared: Prepared, task: str, named: str | None) -> str:
    """The named dataset; None: the only one that has a task. Raises ValueError if none or several have it."""
    if named is not None:
        return named
    tasks = {name: _tasks(prepared, manifest) for name, manifest in prepared.manifest.datasets.items()}
    names = [name for name in tasks if task in tasks[name]]
    if not names:
        known = ", ".join(dict.fromkeys(name for own in tasks.values() for name in own))
        raise ValueError(f"{prepared.folder}: no dataset has a task {task!r}, only {known}")
    if len(names) > 1:
        raise ValueError(f"{prepared.folder}: several datasets have the task {task}; name one: {', '.join(names)}")
    return names[0]


def _named_judge(prepared: Prepared, part: HeldOutExamples, task: Task, judge: str | Judge | None) -> NamedJudge:
    """The judge with its name. Raises ValueError if there are too few examples for the default one."""
    if judge is not None and not isinstance(judge, str):
        return NamedJudge(getattr(judge, "__name__", "of yours"), judge, None, None)
    name = judge or _judge_of_puzzles(prepared.dataset(part.dataset))
    real = TrainingExamples(prepared, part.dataset, EvaluateConfig.fit_examples)
    judges = choose_judges(task, part, real, {} if name is None else {task.name: [name]})
    if not judges:
        raise ValueError(
            f"{prepared.folder}: {part.dataset} has too few examples to judge {task.name} by default; name a judge"
        )
    (chosen,) = judges
    return chosen


def gsm8k(
    path: Path,
    prompts: Prompts,
    *,
    template: str = "{question}",
    length: int | None = None,
    max_examples: int | None = None,
) -> ProblemSet:
    """Word problems from JSON lines with a `question` and an `answer` that ends in #### and a number.

    The prompt is the template with the question in it; `length` is the number of tokens of an answer, as in
    `Prompts.complete`. An answer is right if its number is that of the reference (`judges.number_of`).

    Raises ValueError if the template has no {question}, and BadRecord for a line that is not such a problem.
    """
    if "{question}" not in template:
        raise ValueError(f"the template must contain {{question}}, got {template!r}")
    records = [
        record for block in blocks_of_text_file(path, "line", _LINES) for record in records_of_block(block, "line")
    ]
    problems = []
    for record in (records[number] for number in evenly_spaced(len(records), max_examples)):
        try:
            fields = Fields.of_json(record.text)
            asked, answer = (fields.text(name) for name in ("question", "answer"))
            if number_of(answer) is None:
                raise ValueError(f'"answer" must end in #### and a number, got {answer[-40:]!r}')
            prompt = template.replace("{question}", asked)
            problems.append(Problem(prompts.complete(prompt, length), {TEXT: answer, "prompt": prompt}))
        except ValueError as error:
            raise BadRecord(str(path), record.line, str(error)) from error
    judge = NamedJudge("final_number", final_number, True, None)
    return ProblemSet(path.stem, prompts.tokenizers.vocabulary, problems, grade_by(judge, prompts.tokenizers))


def _with_answer_length(request: Example, length: int | None) -> Example:
    """The request of a text, with `length` masked tokens after the given ones; None leaves it as it is."""
    if length is None:
        return request
    (segment,) = request.segments
    given = segment.codes[segment.codes >= 0]
    codes = np.concatenate([given, np.full(length, -1, segment.codes.dtype)])
    return replace(request, segments=(replace(segment, codes=codes),))


def grade_by(judge: NamedJudge, tokenizers: MediaTokenizers) -> Grade:
    """Grade that is a judge's score of each answer.

    Raises ValueError if lower scores are better. The grade raises it if scores are not in [0, 1], one per answer.
    """
    if judge.higher_is_better is False:
        raise ValueError(f"judge {judge.name} cannot grade answers: its lower scores are better")

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
    """Codes of the generated medium; of a text, those of the asked positions that were revealed."""
    target = answer.segments[-1]
    if target.modality != TEXT:
        return target.codes
    asked = target.codes[problem.request.segments[-1].codes < 0]
    return asked[asked >= 0]


def _scores(judge: NamedJudge, task: str, media: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """Score of each medium, in [0, 1]. Raises ValueError if the judge gives no such scores."""
    verdict = judge(task, media, references)
    if isinstance(verdict, float):
        raise ValueError(f"judge {judge.name} cannot grade answers: it gives one score for all of them")
    scores = verdict.totals / verdict.counts
    if not (0 <= scores.min() <= scores.max() <= 1):
        raise ValueError(f"judge {judge.name} must give scores in [0, 1], got {scores.min():g} to {scores.max():g}")
    return scores


def _judge_of_puzzles(manifest: DatasetManifest) -> str | None:
    source = manifest.source
    return puzzles.PUZZLE_CONFIGS[source.where[0]].judge if source.kind == "puzzles" else None
