"""One training as a trial whose model is judged: held-out bounds that no noise schedule enters, and judged samples.

The bound is the any-order bound by counts (`likelihood.py`), in bits per token of each task on the validation split, so
trainings with different masks, schedules and weights can be compared. Samples are judged as `trimask evaluate` judges
them, once for every named way to sample.
"""

import math
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from trimask.diffusion.cost import count_parameters
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.evaluation.evaluate import bound_of, measured_bits
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.exam import ALL_TASKS, Exam, choose_judges
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples
from trimask.diffusion.evaluation.judges import NamedJudge
from trimask.diffusion.pretraining.description import RunDescription, TrainConfig, load_description
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.run.divergence import Diverged
from trimask.diffusion.run.progress import without_bars
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.tokenizers.vocabulary import Task

_ROWS = 128
"""Number of rows of a batch of evaluation."""


@dataclass(frozen=True, kw_only=True)
class JudgedTraining:
    """One training, and how its model is judged; stored in trials.jsonl."""

    train: TrainConfig
    samplings: dict[str, dict[str, GenerationConfig]]
    """Name of a way to sample → settings by modality. Modalities without settings are not sampled."""
    examples: int
    """Number of validation examples of each dataset."""
    draws: int
    """Number of random masks per example, for the bounds."""


@dataclass(frozen=True)
class Judged:
    """Result of a `JudgedTraining`; stored in trials.jsonl."""

    bits: dict[str, float]
    """Task → bits per token of its targets on the validation split, a bound; infinite if training diverged."""
    judged: dict[str, dict[str, float]]
    """Name of a way to sample → "TASK JUDGE" → score; no scores if training diverged."""
    epochs: dict[str, float]
    """Dataset → number of passes over its training examples."""
    steps: int
    batch_tokens: float
    """Mean number of non-padding tokens per step."""
    num_parameters: int
    seconds: float
    """Duration of training and evaluation, compilation included."""


def judged_training(trial: JudgedTraining, data: Path) -> Judged:
    """Trains and judges one configuration; the run's folder is deleted.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    start = time.perf_counter()
    quiet = LoopConfig(log_every=1000, checkpoint_every=1 << 24, sample_every=0)
    with tempfile.TemporaryDirectory(prefix="trimask-trial-") as folder, without_bars():
        try:
            loaded = train(Path(folder) / "run", data, replace(trial.train, loop=quiet))
        except Diverged:
            return _diverged(trial, load_description(Path(folder) / "run"), data, time.perf_counter() - start)
        bits, judged = {}, {name: dict[str, float]() for name in trial.samplings}
        config = EvaluateConfig(bound_samples=trial.draws, rows=_ROWS)
        for task, held_out, training, judges in _questions(data, trial.examples):
            bits[task.name] = bound_of([measured_bits(loaded, task, held_out, config)], None, task.name).bits_per_token
            if not math.isfinite(bits[task.name]):  # the last step's update may be what diverged
                return _diverged(trial, loaded.description, data, time.perf_counter() - start)
            for name, settings in trial.samplings.items():
                if task.target in settings and judges:
                    exam = Exam(loaded, task, held_out, training, judges)
                    answers = exam.answers(loaded.generator(rows=_ROWS), settings[task.target], seed=0)
                    judged[name] |= {f"{task.name} {score.judge}": score.value for score in exam.grade(answers)[0]}
        description = loaded.description
        return Judged(
            bits=bits,
            judged=judged,
            epochs=description.epochs,
            steps=loaded.step,
            batch_tokens=description.batch_tokens,
            num_parameters=loaded.num_parameters,
            seconds=time.perf_counter() - start,
        )


def _diverged(trial: JudgedTraining, description: RunDescription, data: Path, seconds: float) -> Judged:
    """Result of a training that diverged: infinite bounds, and no scores."""
    return Judged(
        bits={task.name: math.inf for task, *_ in _questions(data, trial.examples)},
        judged={name: {} for name in trial.samplings},
        epochs=description.epochs,
        steps=description.num_steps,
        batch_tokens=description.batch_tokens,
        num_parameters=count_parameters(trial.train.model, description.vocabulary).total,
        seconds=seconds,
    )


_Question = tuple[Task, HeldOutExamples, TrainingExamples, list[NamedJudge]]


@lru_cache(maxsize=2)
def _questions(data: Path, examples: int) -> list[_Question]:
    """Every task of every dataset, its validation examples, and its judges, which are fitted once per process."""
    prepared, questions = Prepared(data), list[_Question]()
    for name, manifest in prepared.manifest.datasets.items():
        training = TrainingExamples(prepared, name, EvaluateConfig().fit_examples)
        held_out = HeldOutExamples(prepared, name, VALIDATION, examples)
        for task in manifest.tasks(prepared.tokenizers.vocabulary):
            judges = choose_judges(task, held_out, training, {ALL_TASKS: ("label", "frechet")})
            questions.append((task, held_out, training, judges))
    return questions
