"""trimask generate: write, draw or speak with a trained run.

Everything is computed before anything is written, as `answers.py` says.
"""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.live import Live

from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.sampling.generator import Answer
from trimask.scripts import cli
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.console import console, joined, parse, progress_report, say
from trimask.scripts.output.answers import Answered, read_index, write_answers
from trimask.scripts.output.media_files import require_mp4
from trimask.scripts.output.presentation import frame_of
from trimask.scripts.output.trajectory import live, trace_lines
from trimask.scripts.questions import Asked, Query, query_of, usual_sampling
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import NonNegativeInt
from trimask.tokenizers.vocabulary import TEXT

_WATCHED = 4
"""Answers shown at a time."""
_LISTS = ("--prompt", "--infill", "--image", "--audio", "--given")


@dataclass(frozen=True, kw_only=True)
class Arguments(Asked):
    """One kind of input: prompts, infills, or files of one modality."""

    run: tyro.conf.Positional[Path]
    """Run folder that `trimask train` wrote."""
    animate: Literal["gif", "mp4"] | None = None
    """Also write an animation of each answer as it becomes known; MP4 needs the extra `video`."""
    watch: bool = False
    """Show on the terminal how answers become known, four at most."""
    trace: bool = False
    """Also write when each token was revealed, and how sure it was, for `trimask inspect` to make a page of."""
    log_probs: bool = False
    """Also put the log-probability of each token when it was revealed, in nats, into the index."""
    checkpoint: NonNegativeInt | Literal["best"] | None = None
    """Step of the checkpoint, or the best by the run's best_metric. None: the newest."""
    out: Path | None = None
    """Folder to write to. None: generated/ in the run folder."""
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()

    def __post_init__(self):
        super().__post_init__()
        if self.animate == "mp4":
            require_mp4()


def run(loaded: LoadedRun, arguments: Arguments, out: Path) -> None:
    """Asks, writes and prints."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; it must be a folder, or a name for a new one")
    read_index(out)  # what cannot be added to is refused before anything is computed
    query = query_of(loaded, arguments)
    if arguments.watch or arguments.trace or arguments.animate:
        paths = _watched(query, loaded, arguments.watch)
    else:
        with progress_report() as report:
            paths = [[answer] for answer in query.answers(report)]
    outputs = _outputs(loaded, arguments, query, paths)
    write_answers(out, outputs, loaded.tokenizers)
    for question, output in zip(query.questions, outputs, strict=True):
        if output.entry["to"] == TEXT:
            say(f"{question.prompt} → {output.media}")
    noun = "answer" if len(outputs) == 1 else "answers"
    say(f"{len(outputs)} {noun} in {out}")


def _outputs(
    loaded: LoadedRun, arguments: Arguments, query: Query, paths: Sequence[Sequence[Answer]]
) -> list[Answered]:
    """Answers, the ends of paths, with what the index says of them."""
    outputs = []
    for number, question, path in zip(query.numbers, query.questions, paths, strict=True):
        answer = path[-1]
        media = query.media(question, answer)
        to = answer.example.segments[-1].modality
        entry = {
            "prompt": question.prompt,
            "task": answer.example.task,
            "to": to,
            "number": number,
            "seed": arguments.seed,
            "step": loaded.step,
            "settings": configuration.to_dict(query.config),
            "nfe": answer.nfe,
        }
        if to == TEXT:
            entry["text"] = media
        if arguments.log_probs:
            entry["log_probs"] = [round(float(value), 6) for value in answer.log_probs]
        frames = [frame_of(loaded.tokenizers, state.example) for state in (path if arguments.animate else ())]
        trace = trace_lines(loaded.tokenizers, question.prompt, path) if arguments.trace else None
        outputs.append(Answered(question.title, entry, media, arguments.animate, frames, trace))
    return outputs


def _watched(query: Query, loaded: LoadedRun, is_shown: bool) -> list[list[Answer]]:
    """The states of every question on its way, shown while they come if that is asked for."""
    requests = query.requests
    paths: list[list[Answer]] = [[] for _ in requests]
    shown = [question.prompt for question in query.questions][:_WATCHED]
    with Live(console=console, auto_refresh=False, transient=True) if is_shown else nullcontext() as screen:
        for number, answer in query.watch():
            paths[number].append(answer)
            if screen is not None and number < _WATCHED and all(paths[:_WATCHED]):
                now = [path[-1] for path in paths[:_WATCHED]]
                screen.update(live(loaded.tokenizers, shown, requests[:_WATCHED], now), refresh=True)
    return paths


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    words = joined(list(arguments), *_LISTS)
    parsed: Arguments = parse(Arguments, words, "generate", __doc__ or "")
    loaded = load(parsed.run, parsed.checkpoint)
    # Once more, with the run's own way to sample where nothing is said, and the blocks of a policy.
    usual = usual_sampling(loaded, parsed.target, parsed.sampling.strategy)
    default = dataclasses.replace(parsed, sampling=usual)
    parsed = parse(Arguments, words, "generate", __doc__ or "", default)
    run(loaded, parsed, parsed.out or parsed.run / "generated")


if __name__ == "__main__":
    sys.exit(cli.main(["generate", *sys.argv[1:]]))
