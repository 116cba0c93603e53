"""trimask evaluate: scores a model on held-out data: bits per token, and generated answers by independent judges."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trimask.diffusion.data.verification import BackgroundVerification
from trimask.diffusion.evaluation.evaluate import evaluate, prepared_of
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.exam import ALL_TASKS
from trimask.diffusion.evaluation.results import Bound, Evaluation, Samples, Score
from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.scripts import cli, evaluate_likelihood
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.console import console, parse, progress_report, say, table
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import require_replaceable
from trimask.tokenizers.storage.ranges import Checked, NonNegativeInt, Size


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Model, data and judges of an evaluation."""

    run: tyro.conf.Positional[Path]
    """Run folder that `trimask train` wrote."""
    data: Path | None = None
    """Folder of prepared data with held-out splits, made with the run's tokenizers. None: the data that the run was
    trained on."""
    checkpoint: NonNegativeInt | Literal["best"] | None = None
    """Step of the checkpoint, or "best" for the best one by the run's best_metric. None: the newest."""
    out: Path | None = None
    """File for the results. None: evaluation.json in the run folder, or likelihood.jsonl there."""
    judge: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Judge of the generated answers: NAME for all tasks, or TASK=NAME for one task; may be given several times. Names
    are exact_match, final_answer, final_number, word_error_rate, label, frechet, frechet@MODULE:FUNCTION for your own
    features, and MODULE:FUNCTION for your own judge: judge(media, references) -> scores."""
    likelihood: Path | None = None
    """File of JSON lines to score instead of generating answers: the likelihood of each answer, or which of several
    choices is the most likely."""
    draws: Size = 16
    """Number of random masks in each of the eight estimates of a likelihood."""
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluateConfig)
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()

    def resolved(self) -> EvaluateConfig:
        """The configuration with the judges of --judge added."""
        judges = dict(self.config.judges)
        for given in self.judge:
            task, equals, name = given.partition("=")
            if not equals:
                task, name = ALL_TASKS, given
            judges[task] = (*judges.get(task, ()), name)
        return dataclasses.replace(self.config, judges=judges)


def run(
    loaded: LoadedRun, data: Path | None, config: EvaluateConfig, out: Path | None = None
) -> tuple[Evaluation, list[Samples]]:
    """Evaluates with a progress bar, writes the results (None: to evaluation.json of the run) and prints tables.

    Raises FileNotFoundError if there are no prepared data.
    """
    prepared = prepared_of(loaded, data)
    out = out or loaded.folder / "evaluation.json"
    require_replaceable(out)
    verification = BackgroundVerification(prepared.paths, prepared.is_one_to_one)
    verification.start()
    with progress_report() as report:
        result, samples = evaluate(loaded, prepared, config, report)
    verification.require_undamaged(wait=True)
    configuration.save(out, result)
    print_evaluation(result)
    return result, samples


def print_evaluation(result: Evaluation) -> None:
    """Prints tables of scores, bits per token and memorisation, and notes."""
    rows = [
        [
            *(s.task.replace("_", " "), f"{s.dataset} {s.split}", s.judge.replace("_", " "), shown_score(s, s.value)),
            "" if s.interval is None else " – ".join(shown_score(s, end) for end in s.interval),
            *("" if s.on_real is None else shown_score(s, s.on_real), f"{s.mean_nfe:.1f}", str(s.examples)),
        ]
        for s in result.scores
    ]
    columns = ["task", "held out", "judge", "score", "95 % over examples", "real media", "NFE", "examples"]
    if rows:
        console.print(table(f"Scores at step {result.step:,}", columns, rows))
    rows = [
        [
            *((b.task or f"all {b.modality}").replace("_", " "), f"{b.dataset or ''} {b.split}", shown_bits(b)),
            *("" if b.bits_per_character is None else f"{b.bits_per_character:.3f}", str(b.examples)),
        ]
        for b in result.bounds
    ]
    columns = ["task", "held out", "bits ± 95 % over examples", "per character", "examples"]
    console.print(table("Bits per token", columns, rows))
    rows = [
        [
            *(m.task.replace("_", " "), f"{m.dataset} {m.split}", f"{m.copied:.1%}", f"{m.distinct} of {m.generated}"),
            *(f"{m.real_copied:.1%}", f"{m.real_distinct} of {m.real}"),
        ]
        for m in result.memorisation
    ]
    columns = ["task", "held out", "copies of training items", "distinct", "real: copies", "real: distinct"]
    if rows:
        console.print(table("Memorisation", columns, rows))
    for note in result.notes:
        say(f"Note: {note}")


def shown_score(score: Score, value: float) -> str:
    """A value of the score's judge as text: in per cent if it is a share."""
    return f"{value:.1%}" if score.is_share else f"{value:.4g}"


def shown_bits(bound: Bound) -> str:
    """Bits per token ± half the width of their 95 % interval, as text."""
    half_width = "" if bound.half_width is None else f" ± {bound.half_width:.3f}"
    return f"{bound.bits_per_token:.3f}{half_width}"


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask evaluate` with these arguments."""
    parsed: Arguments = parse(Arguments, list(arguments), "evaluate", __doc__ or "")
    config = parsed.resolved()
    loaded = load(parsed.run, parsed.checkpoint)
    if parsed.likelihood is not None:
        out = parsed.out or loaded.folder / "likelihood.jsonl"
        settings = evaluate_likelihood.LikelihoodSettings(parsed.draws, config.rows, config.seed)
        evaluate_likelihood.run(loaded, parsed.likelihood, out, settings)
        return
    run(loaded, parsed.data, config, parsed.out)


if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
