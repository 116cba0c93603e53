"""Trainings by the hundred: what the studies of hyperparameters are made of.

A trial is a training configuration, and its outcome usually the loss it ends with: the training objective on held-out
batches and masks that are the same for all trials. Outcomes are lines of trials.jsonl in the study's folder, each with
its configuration and a key, the digest of measurement, configuration and data as the line says them; a study that is
called again goes on where it stopped. Nothing else is kept. What the code was is not in the key: after a change of the
model, a study wants a folder of its own.

On a CPU each worker process computes in one thread: networks of this size use two cores no better, and two processes
do twice as much. Compiling takes longer than most trainings, so that what one process compiles the others read, and
trials that are compiled alike come one after the other only where there is nothing else to compile. On an accelerator
this process trains one after the other.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.loss import target_counts
from trimask.diffusion.masking import forward_process
from trimask.diffusion.parametrization import ModuleMultipliers, ParametrizationKind
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import Parameters, Pretraining, TrainState, training_batches
from trimask.diffusion.run.children import end_with
from trimask.diffusion.run.folder import line_of, locked, read_lines, writing
from trimask.diffusion.run.limits import require_room_for_workers
from trimask.diffusion.run.progress import Report
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import num_parameters
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import append_text, write_text

_Measured = TypeVar("_Measured")

_NO_MATTER = {
    **{"log_every": 10, "checkpoint_every": 500, "keep_last": 2, "keep_every": None, "keep_best": 0},
    **{"best_metric": "loss", "sample_every": 0, "spike_factor": 10.0, "prefetch": 4, "workers": 0},
}
"""Stands for the loop in keys of trainings, whose outcome it does not change: the default of the first version."""

_CURVE_POINTS = 20
_HELD_OUT_BATCHES, _HELD_OUT_TOKENS = 8, 4096
_CURVE_BATCHES = 2
"""Held-out batches of a curve's point."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    loss: float
    """The objective on held-out data, of the weight average; infinite where training diverged."""
    last_loss: float
    """The same of the last parameters."""
    curve: list[list[float]]
    """[tokens, mean training loss since the point before, held-out loss of the weight average by a few batches]."""
    steps: int
    batch_tokens: float
    """Non-padding tokens of the mean step."""
    num_parameters: int
    seconds: float
    """Of training and evaluating, compilation included."""


class Trials:
    """Runs trials, or remembers them; a context, at whose end its processes end."""

    def __init__(self, folder: Path, data: Path, workers: int | None, report: Report):
        """`workers` are processes; None: one per core on a CPU, none on an accelerator; 0: this process."""
        require_room_for_workers(workers or 0, "workers")
        if workers is None:
            workers = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 0
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if workers and jax.default_backend() != "cpu":
            raise ValueError(f"processes compute on the CPU; on this {jax.default_backend()} workers must be 0")
        self.folder, self.data, self.workers, self.report = folder, data, workers, report
        self.fingerprint = Prepared(data).fingerprint

    def __enter__(self) -> "Trials":
        self._pool: ProcessPoolExecutor | None = None
        if self.workers:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), end_with, (os.getpid(),))
        self._compiled = tempfile.TemporaryDirectory(prefix="trimask-compiled-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._compiled.cleanup()

    def losses(self, configs: Sequence[TrainConfig], what: str = "trials") -> list[Outcome]:
        """How each training ends."""
        for config in configs[:1]:
            held_out_batches(Prepared(self.data), config.batch)  # says now what would be an error after a training
        return self.measured(configs, outcome_of, Outcome, what)

    def measured(
        self,
        configs: Sequence[Any],
        measure: Callable[[Any, Path], Any],
        kind: type[_Measured],
        what: str = "trials",
    ) -> list[_Measured]:
        """What `measure(config, data)`, a dataclass, says of every configuration; what is known is not run again.

        Configurations are dataclasses, of trainings or of anything else that a measurement depends on.
        """
        if not configs:
            return []
        asked = [_identity(config) for config in configs]
        path = self.folder / "trials.jsonl"
        with locked(self.folder):
            lines = read_lines(path)
            if path.exists():
                with writing(self.folder):
                    write_text(path, "".join(map(line_of, lines)))  # without what a crash tore
            known = self._known(lines, measure.__name__, type(configs[0]), kind)
            left = {name: config for name, config in zip(asked, configs, strict=True) if name not in known}
            done, total = len(set(asked)) - len(left), len(set(asked))
            self.report(what, done, total)
            for name, outcome in self._outcomes(left, measure):
                known[name] = outcome
                said = configuration.to_dict(left[name])
                key = self._key(measure.__name__, said, type(left[name]))
                line = {"key": key, "outcome": configuration.to_dict(outcome), "config": said}
                with writing(self.folder):
                    append_text(path, line_of(line))
                done += 1
                self.report(what, done, total)
        return [known[name] for name in asked]

    def _known(
        self, lines: Sequence[Any], measure: str, config_type: type, kind: type[_Measured]
    ) -> dict[str, _Measured]:
        """Identity of a configuration → its outcome by this measurement on this data. Refuses what is no outcome."""
        known = {}
        for number, line in enumerate(lines, 1):
            where = f"{self.folder / 'trials.jsonl'}, line {number}"
            try:
                outcome = configuration.from_dict(line.get("outcome"), kind, where)
            except ValueError as error:
                raise ValueError(
                    f"{where}: not an outcome of this study ({error}); choose another folder, or remove the line"
                ) from error
            said = line.get("config")
            if isinstance(said, dict) and line.get("key") == self._key(measure, said, config_type):
                known[_identity(configuration.from_dict(said, config_type, where))] = outcome
        return known

    def _key(self, measure: str, said: Mapping[str, Any], config_type: type) -> str:
        """Digest of what a line says: the measurement, the configuration in the line's own order, and the data."""
        if config_type is TrainConfig:
            said = {**said, "loop": _NO_MATTER}
        return hashlib.sha256(json.dumps([measure, said, self.fingerprint]).encode()).hexdigest()[:16]

    def _outcomes(self, left: Mapping[str, Any], measure: Callable[[Any, Path], Any]) -> Iterator[tuple[str, Any]]:
        order = _in_order(left) if self._pool is not None else list(left)
        for number, outcome in self.shared(measure, [(left[key], self.data) for key in order]):
            yield order[number], outcome

    def shared(self, function: Callable[..., Any], work: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """What `function` says of each tuple of arguments, with its number; in processes, as they are done."""
        if self._pool is None:
            yield from ((number, function(*arguments)) for number, arguments in enumerate(work))
            return
        with _one_thread_each(self._compiled.name):
            futures = {self._pool.submit(function, *arguments): number for number, arguments in enumerate(work)}
            # A process starts when there is work for it, so all have started by now.
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    f"a process ended before it was through (memory?); what was finished before is in {self.folder}, "
                    f"and the same command goes on from there"
                ) from error


def _identity(config: Any) -> str:
    """The same for configurations whose outcome is the same."""
    if isinstance(config, TrainConfig):
        config = replace(config, loop=LoopConfig())
    return json.dumps(configuration.to_dict(config), sort_keys=True)


def _in_order(configs: Mapping[str, Any]) -> list[str]:
    """The keys, so that of trainings which compile the same program the first come first."""
    seen: Counter[str] = Counter()
    rounds = []
    for key, config in configs.items():
        program = _program(config) if isinstance(config, TrainConfig) else key
        rounds.append((seen[program], key))
        seen[program] += 1
    return [key for _, key in sorted(rounds, key=lambda pair: pair[0])]


@contextmanager
def _one_thread_each(compiled: str) -> Iterator[None]:
    """Processes that start in here compute in one thread, on the CPU, and share what they compile in a folder."""
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


_opened = lru_cache(maxsize=4)(Prepared)
_compiled: set[Pretraining] = set()


def outcome_of(config: TrainConfig, data: Path) -> Outcome:
    """Trains, and measures the loss at the end; nothing is written."""
    start = time.perf_counter()
    prepared = _opened(data)
    batches = training_batches(prepared, config)
    steps = batches.num_steps(config.optimizer.horizon_tokens)
    batch_tokens = batches.mean_tokens(steps)
    kappa = config.sde.kappa(batch_tokens, config.optimizer.horizon_tokens)
    pretraining = Pretraining(config, prepared.tokenizers.vocabulary, kappa)
    make_room(pretraining)
    held_out = HeldOutLoss(pretraining, prepared, config.batch)
    state, curve = _trained(pretraining, batches, held_out, steps)
    losses = [math.inf, math.inf]
    if math.isfinite(curve[-1][1]):
        losses = [held_out(tree) for tree in (state.average, state.parameters)]
    return Outcome(
        loss=losses[0] if math.isfinite(losses[0]) else math.inf,
        last_loss=losses[1] if math.isfinite(losses[1]) else math.inf,
        curve=curve,
        steps=steps,
        batch_tokens=batch_tokens,
        num_parameters=num_parameters(state.parameters),
        seconds=time.perf_counter() - start,
    )


def make_room(pretraining: Pretraining) -> None:
    """Lets go of what was compiled for others when it is for eight: a process may hold only so much."""
    if pretraining not in _compiled and len(_compiled) >= 8:
        _compiled.clear()
        jax.clear_caches()
    _compiled.add(pretraining)


def _program(config: TrainConfig) -> str:
    """What all configurations have in common that are compiled alike."""
    alike = replace(
        config,
        parametrization=replace(config.parametrization, multipliers=ModuleMultipliers()),
        optimizer=config.optimizer.schedule_alone,
        batch=replace(BatchConfig(), tokens=config.batch.tokens, packed_length=config.batch.packed_length),
        loop=LoopConfig(),
        sde=SDEScaling(),
        seed=0,
    )
    return json.dumps(configuration.to_dict(alike))


def _trained(
    pretraining: Pretraining, batches: Batches, held_out: "HeldOutLoss", steps: int
) -> tuple[TrainState, list[list[float]]]:
    """The state at the end, and the curve of the loss; both end early where the loss is not finite."""
    state = pretraining.init()
    bounds = sorted({round(steps * (number + 1) / _CURVE_POINTS) for number in range(_CURVE_POINTS)} - {0})
    curve: list[list[float]] = []
    step = 0
    for bound in bounds:
        losses = []
        while step < bound:
            state, metrics = pretraining.step(state, batches(step))
            losses.append(metrics["loss"].total)
            step += 1
        training_loss = float(np.mean(jax.device_get(losses)))
        curve.append([float(state.num_tokens), training_loss, held_out(state.average, _CURVE_BATCHES)])
        if not math.isfinite(training_loss):
            break
    return state, curve


def held_out_batches(prepared: Prepared, config: BatchConfig) -> Batches:
    """Those of the validation split, with the mixture of the beginning, whatever the size of a training batch."""
    held_out = replace(config, tokens=_HELD_OUT_TOKENS, final_weights={}, anneal_tokens=None)
    return Batches(prepared, held_out, seed=0, split=VALIDATION)


class HeldOutLoss:
    """The mean objective on the validation split, with batches and masks that are the same for all parameters."""

    def __init__(self, pretraining: Pretraining, prepared: Prepared, config: BatchConfig):
        batches = held_out_batches(prepared, config)
        self.pretraining = pretraining
        self.batches = [jax.device_put(batches(number)) for number in range(_HELD_OUT_BATCHES)]

    def __call__(self, parameters: Parameters, num_batches: int = _HELD_OUT_BATCHES) -> float:
        """Of the first so many batches."""
        asked = enumerate(self.batches[:num_batches])
        return float(np.mean(jax.device_get([_loss(self.pretraining, parameters, batch, n) for n, batch in asked])))


@partial(jax.jit, static_argnums=0)
def _loss(pretraining: Pretraining, parameters: Parameters, batch: Any, number: Any) -> Any:
    noised = forward_process(jax.random.key(number), batch, pretraining.vocabulary, pretraining.config.masking)
    return pretraining.loss(parameters, noised, target_counts(noised, pretraining.vocabulary))[0]


def at_shape(
    config: TrainConfig, kind: ParametrizationKind, width: int | None = None, layers: int | None = None
) -> TrainConfig:
    """The configuration, tuned at its own shape, at another one, transferred by the parametrization `kind`.

    Heads keep their size. Without a width or a number of layers these stay.
    """
    base = config.model
    model = replace(base.at_width(width or base.width), num_layers=layers or base.num_layers)
    parametrization = replace(
        config.parametrization,
        kind=kind,
        base_width=base.width,
        base_layers=base.num_layers,
        base_heads=base.num_heads,
        base_mlp_width=base.size_of_mlp,
    )
    return replace(config, model=model, parametrization=parametrization)


def with_learning_rate(config: TrainConfig, learning_rate: float) -> TrainConfig:
    """The configuration at another learning rate."""
    return replace(config, optimizer=replace(config.optimizer, learning_rate=learning_rate))


AT_EDGE = " (at the edge of the grid: the best one may lie beyond)"


def tuned_on(base: TrainConfig, log2_rates: Sequence[float], seeds: int, trials: Trials) -> tuple[TrainConfig, bool]:
    """The base at the best learning rate of a grid, by the mean of some seeds; and whether that is the grid's edge."""
    rates = sorted(log2_rates)
    configs = [
        replace(with_learning_rate(base, 2.0**rate), seed=base.seed + 100 + seed)
        for rate in rates
        for seed in range(seeds)
    ]
    losses = [outcome.loss for outcome in trials.losses(configs, "tuning the learning rate")]
    best = int(np.argmin(np.reshape(losses, (-1, seeds)).mean(axis=1)))
    return with_learning_rate(base, 2.0 ** rates[best]), best in (0, len(rates) - 1)


def require_at_least(least: int, **values: int) -> None:
    """Refuses values that are too small, by their names."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def tuned_here(config: TrainConfig, data: Path) -> TrainConfig:
    """The configuration as one that was tuned at its own batch and horizon."""
    sde = replace(
        config.sde, base_batch_tokens=mean_tokens(config, data), base_horizon_tokens=config.optimizer.horizon_tokens
    )
    return replace(config, sde=sde)


def mean_tokens(config: TrainConfig, data: Path) -> float:
    """Non-padding tokens of the configuration's mean step."""
    batches = training_batches(_opened(data), config)
    return batches.mean_tokens(batches.num_steps(config.optimizer.horizon_tokens))


def at_batch(config: TrainConfig, batch: int, horizon: int, seed: int) -> TrainConfig:
    """The configuration at another batch, in positions, and horizon, in tokens, transferred by the SDE rule."""
    return replace(
        config,
        batch=replace(config.batch, tokens=batch),
        optimizer=replace(config.optimizer, horizon_tokens=horizon),
        seed=config.seed + seed,
    )
