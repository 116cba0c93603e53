"""Runs the many short trainings that studies of hyperparameters compare, and remembers their outcomes.

A trial is a training configuration, or anything else that is measured. Its outcome is usually that of `trainings.py`.
Each outcome is a line of trials.jsonl in the study's folder, with its configuration, the number of the rules that it
follows (`RULES`), the commit that measured it, the seconds since the call's line before or its beginning, and a key: a
digest of the measuring function's name, the configuration, the fingerprint of the data and the rules, as the line
itself states them. A study that is called again skips the trials that the file holds. Parameters are not kept. The key
does not identify the code: after a change of the model, use a new folder. Lines without `rules` follow rules 1. A study
of other rules than this code's is shown from what its file holds, and no trial is added to it.

Trials record validation only; `final.py` scores the test split.

On a CPU each worker process computes in one thread: two threads hardly speed up networks of this size, whereas two
processes do twice the work. Compiling takes longer than most of the trainings, so worker processes share a compilation
cache, and trials that share a compiled program are spread out as far as possible, so that different programs are
compiled at the same time. On an accelerator, trials run one after another in this process.
"""

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION, is_test
from trimask.diffusion.evaluation.evaluate import require_same_tokenizers
from trimask.diffusion.pretraining.description import RULES, TrainConfig
from trimask.diffusion.pretraining.train_run import git_commit
from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.run.checkpoint import Checkpoints
from trimask.diffusion.run.children import end_with
from trimask.diffusion.run.folder import json_line, locked, read_intact_lines, writing
from trimask.diffusion.run.limits import require_room_for_workers
from trimask.diffusion.run.progress import Report
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.studies.trainings import Outcome, held_out_batches, outcome_of, program_of, with_learning_rate
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import append_text, write_text
from trimask.tokenizers.storage.formats import added_field

_Measured = TypeVar("_Measured")

_LOOP_IN_KEYS = {
    **{"log_every": 10, "checkpoint_every": 500, "keep_last": 2, "keep_every": None, "keep_best": 0},
    **{"best_metric": "loss", "sample_every": 0, "spike_factor": 10.0, "prefetch": 4, "workers": 0},
}
"""Replaces the loop configuration in keys of trainings, because it does not affect outcomes: the defaults of the first
version, so that keys stay the same."""

_BEFORE_RULES = 1
"""Rules of a line without `rules`, and of a study whose code recorded no trials."""


@dataclass(frozen=True, kw_only=True)
class ModelTrial:
    """The trained model that a trial measures; part of the trial's line in trials.jsonl."""

    run: str
    """Run folder of the model."""
    model_step: int
    """Step of the model's checkpoint."""
    model_digest: str = added_field(as_before="")
    """Digest of the arrays of this checkpoint (`weights_digest`); empty in trials of rules 1."""


def of_model(run: str, step: int) -> dict[str, Any]:
    """Fields of `ModelTrial` for the checkpoint of a step in a run folder."""
    return {"run": run, "model_step": step, "model_digest": weights_digest(Path(run), step)}


class Trials:
    """Runs the trials of a study, unless its folder holds their outcomes; a context manager that owns the workers."""

    def __init__(self, folder: Path, data: Path, workers: int | None, report: Report, *, adds: bool = True):
        """`workers` is the number of worker processes; 0: this process runs the trials. None: one worker per core on a
        CPU, 0 on an accelerator. `adds` is False if recorded trials are all that may be used.

        Raises ValueError if it is negative, or positive on an accelerator.
        """
        require_room_for_workers(workers or 0, "workers")
        if workers is None:
            workers = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 0
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if workers and jax.default_backend() != "cpu":
            raise ValueError(
                f"worker processes compute on the CPU; on this {jax.default_backend()} workers must be 0, got {workers}"
            )
        self.folder, self.data, self.workers, self.report, self.adds = folder, data, workers, report, adds
        self.prepared = Prepared(data)
        self.fingerprint = self.prepared.fingerprint

    def __enter__(self) -> "Trials":
        self._last_recorded = time.perf_counter()
        self._pool: ProcessPoolExecutor | None = None
        if self.workers:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), end_with, (os.getpid(),))
        self._compiled = tempfile.TemporaryDirectory(prefix="trimask-compiled-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._compiled.cleanup()

    @property
    def may_add(self) -> bool:
        """Whether trials that are missing are run and recorded: not if only recorded ones may be used, nor in a folder
        of other rules."""
        return self.adds and rules_of(self.folder) == RULES

    def require_validation(self) -> None:
        """Raises ValueError if a dataset has no validation split, before anything is trained."""
        missing = [name for name, one in self.prepared.manifest.datasets.items() if VALIDATION not in one.splits]
        if missing:
            raise ValueError(
                f"{self.data}: {', '.join(missing)} has no validation split, on which models are compared; prepare "
                "more records, or a larger --splits.validation"
            )

    def outcomes(self, configs: Sequence[TrainConfig], what: str = "trials") -> list[Outcome]:
        """Outcome of each training. Raises ValueError before training if there is too little held-out data."""
        for config in configs[:1]:
            held_out_batches(Prepared(self.data), config.batch)  # raises now what it would raise after a training
        return self.measurements(configs, outcome_of, Outcome, what)

    def measurements(
        self,
        configs: Sequence[Any],
        measure: Callable[[Any, Path], Any],
        kind: type[_Measured],
        what: str = "trials",
    ) -> list[_Measured]:
        """Results of `measure(config, data)`, of dataclass `kind`, for every configuration; recorded ones are reused.

        Configurations are dataclasses: of trainings, or of anything else that the result depends on. The name of the
        function `measure` is part of the key of a recorded result. `what` labels the progress reports.

        Raises ValueError if trials.jsonl holds a line that is not such a result, if a result is missing and none may be
        added, or if one to be added is of test data; and ChildProcessError if a worker process is killed.
        """
        if not configs:
            return []
        identities = [_identity(config) for config in configs]
        path = self.folder / "trials.jsonl"
        with locked(self.folder):
            lines = read_intact_lines(path)
            results = self._recorded(lines, measure.__name__, type(configs[0]), kind)
            missing = {name: config for name, config in zip(identities, configs, strict=True) if name not in results}
            done, total = len(set(identities)) - len(missing), len(set(identities))
            if missing:
                self._require_may_add(missing, total)
            if missing and path.exists():
                with writing(self.folder):
                    write_text(path, "".join(map(json_line, lines)))  # without a last line that a crash cut short
            self.report(what, done, total)
            commit = git_commit() if missing else None
            for name, result in self._run(missing, measure):
                results[name] = result
                config_dict = configuration.to_dict(missing[name])
                key = self._key(measure.__name__, config_dict, type(missing[name]), RULES)
                line = {"key": key, "rules": RULES, "commit": commit, "seconds": self._seconds_since_last()}
                line |= {"outcome": configuration.to_dict(result), "config": config_dict}
                with writing(self.folder):
                    append_text(path, json_line(line))
                done += 1
                self.report(what, done, total)
        return [results[name] for name in identities]

    def _seconds_since_last(self) -> float:
        """Seconds since this was called last, or since the trials were entered."""
        before, self._last_recorded = self._last_recorded, time.perf_counter()
        return round(self._last_recorded - before, 1)

    def unrecorded(
        self, configs: Sequence[Any], measure: Callable[[Any, Path], _Measured], what: str
    ) -> list[_Measured]:
        """Results of `measure(config, data)` for every configuration, of which no file is written.

        `what` labels the progress reports.
        """
        results = dict[int, _Measured]()
        self.report(what, 0, len(configs))
        for number, result in self.run_unordered(measure, [(config, self.data) for config in configs]):
            results[number] = result
            self.report(what, len(results), len(configs))
        return [results[number] for number in range(len(configs))]

    def _require_may_add(self, missing: Mapping[str, Any], total: int) -> None:
        """Raises ValueError if trials may not be added to the folder, or if one is of test data."""
        require_these_rules(self.folder)
        if not self.adds:
            raise ValueError(
                f"{self.folder} holds no complete study: {len(missing)} of {total} trials are missing. The same "
                "command without --final and --show runs them"
            )
        for config in missing.values():
            if is_test(getattr(config, "split", VALIDATION)):
                raise ValueError(
                    f"trials record validation only, got split {config.split!r}; choose another split, and score the "
                    "test split by --final once the study is complete"
                )

    def _recorded(
        self, lines: Sequence[Any], measure: str, config_type: type, kind: type[_Measured]
    ) -> dict[str, _Measured]:
        """Identity of a configuration → its recorded result by the function named `measure` on this data.

        Raises ValueError for a line whose outcome is not of dataclass `kind`.
        """
        results = {}
        for number, line in enumerate(lines, 1):
            where = f"{self.folder / 'trials.jsonl'}, line {number}"
            try:
                outcome = configuration.from_dict(line.get("outcome"), kind, where)
            except ValueError as error:
                raise ValueError(
                    f"{where}: not an outcome of this study ({error}); choose another folder, or remove the line"
                ) from error
            config_dict, rules = line.get("config"), line.get("rules", _BEFORE_RULES)
            if isinstance(config_dict, dict) and line.get("key") == self._key(measure, config_dict, config_type, rules):
                results[_identity(configuration.from_dict(config_dict, config_type, where))] = outcome
        return results

    def _key(self, measure: str, config_dict: Mapping[str, Any], config_type: type, rules: Any) -> str:
        """Digest of the measuring function's name, a configuration with its fields in the given order, the data, and
        the rules if they are not the first."""
        if config_type is TrainConfig:
            config_dict = {**config_dict, "loop": _LOOP_IN_KEYS}
        identified = [measure, config_dict, self.fingerprint] + ([] if rules == _BEFORE_RULES else [rules])
        return hashlib.sha256(json.dumps(identified).encode()).hexdigest()[:16]

    def _run(self, missing: Mapping[str, Any], measure: Callable[[Any, Path], Any]) -> Iterator[tuple[str, Any]]:
        """Identity and result of each configuration, in the order in which they finish."""
        order = _interleaved(missing) if self._pool is not None else list(missing)
        for number, result in self.run_unordered(measure, [(missing[key], self.data) for key in order]):
            yield order[number], result

    def run_unordered(self, function: Callable[..., Any], work: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Index in `work` and result of the function for each tuple of arguments, in the order in which they finish."""
        if self._pool is None:
            yield from ((number, function(*arguments)) for number, arguments in enumerate(work))
            return
        with _worker_environment(self._compiled.name):
            futures = {self._pool.submit(function, *arguments): number for number, arguments in enumerate(work)}
            # A process starts when there is work for it, so all have started by now.
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    f"a worker process was killed, perhaps because memory ran out; finished results are kept in "
                    f"{self.folder}, and the same command goes on from there"
                ) from error


def rules_of(folder: Path) -> Any:
    """Number of the rules of the trials in a study's folder; `RULES` if it holds none yet.

    If trials of several rules are there, those of the first that are not `RULES`. Earlier code left some studies with a
    page and no trials, which are of rules 1.
    """
    rules = [line.get("rules", _BEFORE_RULES) for line in read_intact_lines(folder / "trials.jsonl")]
    if not rules and (folder / "README.md").exists():
        return _BEFORE_RULES
    return next((other for other in rules if other != RULES), RULES)


def recorded_seconds(folder: Path) -> float | None:
    """Duration of all trials in a study's folder, also of calls that ended early; None if lines do not say it."""
    lines = read_intact_lines(folder / "trials.jsonl")
    seconds = [line["seconds"] for line in lines if isinstance(line.get("seconds"), float)]
    return sum(seconds) if seconds and len(seconds) == len(lines) else None


def require_these_rules(folder: Path) -> None:
    """Raises ValueError if a study's folder holds trials of other rules than this code's."""
    rules = rules_of(folder)
    if rules != RULES:
        raise ValueError(
            f"{folder} holds a study of rules {rules} of the objective, to which nothing is added, since this code "
            f"follows rules {RULES}; choose another folder. Its page is {folder / 'README.md'}; --show draws it again"
        )


def _identity(config: Any) -> str:
    """Text that is equal for configurations whose results are equal: their JSON, trainings without their loop.

    A model is identified by the digest of its weights, wherever its folder is.
    """
    if isinstance(config, TrainConfig):
        config = replace(config, loop=LoopConfig())
    elif isinstance(config, ModelTrial) and config.model_digest:
        config = replace(config, run="")
    return json.dumps(configuration.to_dict(config), sort_keys=True)


def _interleaved(configs: Mapping[str, Any]) -> list[str]:
    """Keys of the configurations: the first training of every compiled program, then the second of every one, …"""
    counts: Counter[str] = Counter()
    rounds = []
    for key, config in configs.items():
        program = program_of(config) if isinstance(config, TrainConfig) else key
        rounds.append((counts[program], key))
        counts[program] += 1
    return [key for _, key in sorted(rounds, key=lambda pair: pair[0])]


@contextmanager
def _worker_environment(compiled: str) -> Iterator[None]:
    """Makes processes that start within use one thread of the CPU, and the folder `compiled` as compilation cache."""
    before = dict(os.environ)
    single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{before.get('XLA_FLAGS', '')} {single}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@lru_cache(maxsize=1024)
def weights_digest(folder: Path, step: int) -> str:
    """Digest of a checkpoint's arrays, so that results are not reused after the folder's model was trained again."""
    with Checkpoints(folder) as checkpoints:
        return checkpoints.digest(step)


def open_run(run: str, data: Path) -> tuple[LoadedRun, Prepared]:
    """Loads a run and opens prepared data. Raises ValueError if their tokenizers differ."""
    loaded, prepared = load(Path(run)), Prepared(data)
    require_same_tokenizers(loaded, prepared)
    return loaded, prepared


AT_EDGE = " (at the edge of the grid: the best one may lie beyond)"
"""Note for a learning rate that is the smallest or the largest of its grid."""


def with_tuned_learning_rate(
    base: TrainConfig, log2_rates: Sequence[float], seeds: int, trials: Trials
) -> tuple[TrainConfig, bool]:
    """The base with the learning rate of lowest mean loss over `seeds` seeds, and whether it is at the grid's edge."""
    rates = sorted(log2_rates)
    configs = [
        replace(with_learning_rate(base, 2.0**rate), seed=base.seed + 100 + seed)
        for rate in rates
        for seed in range(seeds)
    ]
    losses = [outcome.loss for outcome in trials.outcomes(configs, "tuning the learning rate")]
    best = int(np.argmin(np.reshape(losses, (-1, seeds)).mean(axis=1)))
    return with_learning_rate(base, 2.0 ** rates[best]), best in (0, len(rates) - 1)


def require_some(**values: Sequence[Any]) -> None:
    """Raises ValueError that names a list that is empty."""
    for name, value in values.items():
        if not value:
            raise ValueError(f"{name} must name at least one, got none")


def require_at_least(least: int, **values: int) -> None:
    """Raises ValueError that names a value that is less than `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
