"""trimask generate: generates texts, pictures, sounds or other media with a trained model.

All answers are computed before any is written.
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
from trimask.scripts.console import console, parse, progress_report, say
from trimask.scripts.output.answers import Answered, read_index, write_answers
from trimask.scripts.output.media_files import require_mp4
from trimask.scripts.output.presentation import frame_of
from trimask.scripts.output.trajectory import live, trace_lines
from trimask.scripts.questions import Asked, Query, default_sampling, query_of
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import NonNegativeInt
from trimask.tokenizers.vocabulary import TEXT

_WATCHED = 4
"""Largest number of answers that --watch shows at a time."""
_LISTS = ("--prompt", "--infill", "--image", "--audio", "--given")
"""Flags that take several values and may be repeated."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Asked):
    """Model, requests (of one kind: prompts, infills, or files of one modality), output and sampling settings."""

    run: tyro.conf.Positional[Path]
    """Run folder that `trimask train` wrote."""
    animate: Literal["gif", "mp4"] | None = None
    """Format of an animation of the generation of each answer; mp4 needs the extra `video`. None: no animation."""
    watch: bool = False
    """Show on the terminal how the first answers, at most four, are generated."""
    trace: bool = False
    """Also write a trace of each answer: the step and confidence at which each token was revealed. `trimask inspect`
    makes a page of it."""
    log_probs: bool = False
    """Also write to the index the log-probability in nats that each token had when it was revealed."""
    checkpoint: NonNegativeInt | Literal["best"] | None = None
    """Step of the checkpoint, or "best" for the best one by the run's best_metric. None: the newest."""
    out: Path | None = None
    """Folder to write to. None: generated/ in the run folder."""
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()

    def __post_init__(self):
        super().__post_init__()
        if self.animate == "mp4":
            require_mp4()


def run(loaded: LoadedRun, arguments: Arguments, out: Path) -> None:
    """Generates answers, writes them to the folder and prints those that are texts.

    Raises ValueError, before anything is computed, for arguments that the run or the folder do not allow.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; it must be a folder, or a name for a new one")
    read_index(out)  # raises if answers cannot be added to the folder, before anything is computed
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
    """Answers with their entries of the index; `paths` hold the states of each request, ending with the answer."""
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
    """States of every request before and after each step; shown on the terminal while they are computed if wanted."""
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
    """Runs `trimask generate` with these arguments."""
    words = list(arguments)
    parsed: Arguments = parse(Arguments, words, "generate", __doc__ or "", lists=_LISTS)
    loaded = load(parsed.run, parsed.checkpoint)
    # Parsed once more, with the run's own sampling settings, and the blocks of a policy, as defaults.
    default = dataclasses.replace(parsed, sampling=default_sampling(loaded, parsed.target, parsed.sampling.strategy))
    parsed = parse(Arguments, words, "generate", __doc__ or "", default, lists=_LISTS)
    run(loaded, parsed, parsed.out or parsed.run / "generated")


if __name__ == "__main__":
    sys.exit(cli.main(["generate", *sys.argv[1:]]))
