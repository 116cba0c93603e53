"""How likely a model finds given answers: `trimask evaluate RUN --likelihood FILE`.

Each line of FILE is an example as JSON: one answer or several choices, and at most one thing given.

    {"text": "47+38=85"}                                      a text
    {"prompt": "47+38=", "text": "85"}                        how a text goes on
    {"image": "seven.png", "text": "a handwritten seven"}     a description; of audio and all other modalities likewise
    {"prompt": "seven", "audio": "seven.wav"}                 a medium for a text
    {"prompt": "47+38=", "choices": ["85", "75"], "answer": 0}     which of several; `answer` may be missing

Media are paths inside the folder of FILE. A line with a medium, and with text or choices, asks for the text. The
answer's end (EOS) is part of it where the model's texts have one. Bits follow from the seed and the line alone, and
choices are compared by the same draws: `is_close` marks a choice whose lead may be chance.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from trimask.diffusion.evaluation.intervals import ratio_and_half_width, wilson_interval
from trimask.diffusion.evaluation.likelihood import (
    Estimator,
    content_seed,
    estimates_of_bits,
    mean_and_half_width,
    num_asked,
)
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.folder import json_line
from trimask.diffusion.sampling.prompts import Prompts
from trimask.scripts.console import console, progress_report, say, table
from trimask.scripts.inputs import medium_reader
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import existing_path_inside, write_text
from trimask.tokenizers.storage.json_text import read_json_lines
from trimask.tokenizers.vocabulary import TEXT

_KEYS = {"prompt", "text", "choices", "answer"}


@dataclass(frozen=True)
class AnswerLine:
    """One line of the file, read."""

    entry: dict[str, Any]
    examples: list[Example]
    """One per choice."""

    @property
    def draws(self) -> int:
        """By what is drawn: of choices by what they share, so that they differ by themselves alone."""
        (*given, asked) = self.examples[0].segments
        if "choices" in self.entry:
            asked = dataclasses.replace(asked, codes=asked.codes[: asked.num_given])
        return content_seed([*given, asked])


class LikelihoodConfig(NamedTuple):
    """How precisely, and how many rows at a time."""

    estimator: Estimator
    draws: int
    rows: int
    seed: int


def run(loaded: LoadedRun, path: Path, out: Path, how: LikelihoodConfig) -> None:
    """Scores every line, writes them with their bits, and prints what they come to."""
    lines = read(path, Prompts(loaded.tokenizers, loaded.description.layouts))
    examples = [example for line in lines for example in line.examples]
    with progress_report() as report:
        estimates = estimates_of_bits(
            jax.random.key(how.seed),
            examples,
            loaded.denoise,
            loaded.vocabulary,
            loaded.description.train.masking.schedule,
            num_draws=how.draws,
            estimator=how.estimator,
            rows=how.rows,
            seeds=[line.draws for line in lines for _ in line.examples],
            report=partial(report, "likelihood"),
        )
    entries, done = [], 0
    for line in lines:
        own = estimates[:, done : done + len(line.examples)]
        done += len(line.examples)
        tokens = [num_asked(example, loaded.vocabulary) for example in line.examples]
        entries.append(line.entry | _scores(own, tokens, "choices" in line.entry))
    write_text(out, "".join(map(json_line, entries)))
    _print(entries, out)


def read(path: Path, prompts: Prompts) -> list[AnswerLine]:
    """The lines of a file; an error names the line."""
    lines = []
    for number, entry in read_json_lines(path):
        try:
            lines.append(_line(entry, path.parent, prompts))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path}: holds no lines to score")
    return lines


def _line(entry: Any, folder: Path, prompts: Prompts) -> AnswerLine:
    known = _KEYS | set(prompts.tokenizers.codecs)
    if not isinstance(entry, dict) or not set(entry) <= known:
        raise ValueError(f"an example has some of {', '.join(sorted(known))}; got {configuration.short_json(entry)}")
    media = [medium for medium in prompts.tokenizers.codecs if medium in entry]
    if len(media) > 1 or ("text" in entry) + ("choices" in entry) + bool(media and "prompt" in entry) != 1:
        raise ValueError("an example has one answer: text, choices, or a medium for a prompt")
    if "answer" in entry and "choices" not in entry:
        raise ValueError("answer is the number of a choice, and the example has no choices")
    for name in {"prompt", "text", *media} & set(entry):
        if not isinstance(entry[name], str):
            raise ValueError(f"{name} must be a string, got {entry[name]!r}")
    contents = {medium: medium_reader(medium, prompts)(existing_path_inside(folder, entry[medium])) for medium in media}
    given = {TEXT: entry["prompt"]} if "prompt" in entry else {}
    if media and given:
        return AnswerLine(entry, [prompts.with_answer(given, media[0], contents[media[0]])])
    choices = entry.get("choices", [entry.get("text")])
    if not isinstance(choices, list) or len(choices) < 1 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices must be a list of strings, got {choices!r}")
    right = entry.get("answer", 0)
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
        raise ValueError(f"answer must be the number of a choice, 0 to {len(choices) - 1}, got {right!r}")
    return AnswerLine(entry, [prompts.with_answer(given | contents, TEXT, choice) for choice in choices])


def _scores(estimates: Float[np.ndarray, "repeats choices"], tokens: list[int], is_choice: bool) -> dict[str, Any]:
    """What a line gets: bits, half of their 95 % interval and tokens; of choices one per choice, and the likeliest.

    `is_close` says of the likeliest that its lead over the next is within the 95 % interval of their difference, which
    is that of estimates by the same draws.
    """
    bits, half_widths = mean_and_half_width(estimates)
    columns = {"bits": bits.tolist(), "half_width": half_widths.tolist(), "tokens": tokens}
    if not is_choice:
        return {name: column[0] for name, column in columns.items()}
    first, *others = np.argsort(bits, kind="stable")
    lead, half = mean_and_half_width(estimates[:, others] - estimates[:, [first]])
    return columns | {"chosen": int(first), "is_close": bool((lead <= half).any())}


def _print(entries: list[dict[str, Any]], out: Path) -> None:
    rows = []
    answers = [entry for entry in entries if "choices" not in entry]
    if answers:
        bits, tokens = (np.array([float(entry[name]) for entry in answers]) for name in ("bits", "tokens"))
        per_token, half = ratio_and_half_width(bits, tokens)
        shown = f"{per_token:.3f}" if half is None else f"{per_token:.3f} ± {half:.3f}"
        rows.append(["bits per token", shown, str(len(answers))])
        rows.append(["bits per answer", f"{bits.mean():.3f}", str(len(answers))])
    chosen = [entry["chosen"] == entry["answer"] for entry in entries if "answer" in entry and "choices" in entry]
    if chosen:
        low, high = wilson_interval(sum(chosen), len(chosen))
        rows.append(["right choices", f"{np.mean(chosen):.1%} ({low:.1%} – {high:.1%})", str(len(chosen))])
    close = [entry["is_close"] for entry in entries if "choices" in entry]
    if any(close):
        rows.append(["choices too close to tell; more --draws", f"{sum(close)}", str(len(close))])
    if rows:
        console.print(table("Likelihood (bound)", ["", "95 %", "examples"], rows))
    say(f"{len(entries)} lines in {out}")
