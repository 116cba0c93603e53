"""Estimates how likely given answers are under a model: `trimask evaluate RUN --likelihood FILE`.

Each line of FILE is an example as JSON: one answer or several choices, and at most one given text or medium.

    {"text": "47+38=85"}                                           a text
    {"prompt": "47+38=", "text": "85"}                             continuation of a text
    {"image": "seven.png", "text": "a handwritten seven"}          text for a medium of any modality
    {"prompt": "seven", "audio": "seven.wav"}                      medium for a text
    {"prompt": "47+38=", "choices": ["85", "75"], "answer": 0}     several choices; `answer`, the right one, is optional

Media are paths inside the folder of FILE. In a line with a medium and with text or choices, the text is the answer. The
end of a text (EOS) is part of the answer if the model's texts have one. Results depend on the seed and the line alone.
Choices are compared with the same random masks; `is_close` marks a choice whose lead may be due to chance.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from trimask.diffusion.evaluation.intervals import mean_and_half_width, ratio_and_half_width, wilson_interval
from trimask.diffusion.evaluation.likelihood import content_seed, estimates_of_bits, num_asked
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
    """One line of the file, as examples."""

    entry: dict[str, Any]
    """The line's JSON object."""
    examples: list[Example]
    """One example per choice, or the only one."""

    @property
    def mask_seed(self) -> int:
        """Seed of the random masks; derived from what choices have in common, so that it is equal for all of them."""
        (*given, asked) = self.examples[0].segments
        if "choices" in self.entry:
            asked = dataclasses.replace(asked, codes=asked.codes[: asked.num_given])
        return content_seed([*given, asked])


class LikelihoodSettings(NamedTuple):
    """Settings of the estimates."""

    draws: int
    """Number of random masks per estimate."""
    rows: int
    """Number of rows evaluated at once."""
    seed: int


def run(loaded: LoadedRun, path: Path, out: Path, settings: LikelihoodSettings) -> None:
    """Scores every line of `path`, writes the lines with their scores to `out`, and prints a summary."""
    lines = read(path, Prompts(loaded.tokenizers, loaded.description.layouts))
    examples = [example for line in lines for example in line.examples]
    with progress_report() as report:
        estimates = estimates_of_bits(
            jax.random.key(settings.seed),
            examples,
            loaded.denoise,
            loaded.vocabulary,
            num_draws=settings.draws,
            rows=settings.rows,
            seeds=[line.mask_seed for line in lines for _ in line.examples],
            report=partial(report, "likelihood"),
        )
    entries, done = [], 0
    for line in lines:
        of_line = estimates[:, done : done + len(line.examples)]
        done += len(line.examples)
        tokens = [num_asked(example, loaded.vocabulary) for example in line.examples]
        entries.append(line.entry | _scores(of_line, tokens, "choices" in line.entry))
    write_text(out, "".join(map(json_line, entries)))
    _print(entries, out)


def read(path: Path, prompts: Prompts) -> list[AnswerLine]:
    """Reads all lines of a file. Raises ValueError that names the line if one is not such an example."""
    lines = []
    for number, entry in read_json_lines(path):
        try:
            lines.append(_line(entry, path.parent, prompts))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path}: contains no lines to score")
    return lines


def _line(entry: Any, folder: Path, prompts: Prompts) -> AnswerLine:
    known = _KEYS | set(prompts.tokenizers.codecs)
    if not isinstance(entry, dict) or not set(entry) <= known:
        raise ValueError(
            f"an example is an object with some of {', '.join(sorted(known))}; got {configuration.short_json(entry)}"
        )
    media = [medium for medium in prompts.tokenizers.codecs if medium in entry]
    if len(media) > 1 or ("text" in entry) + ("choices" in entry) + bool(media and "prompt" in entry) != 1:
        raise ValueError("an example must have exactly one answer: text, choices, or a medium with a prompt")
    if "answer" in entry and "choices" not in entry:
        raise ValueError("answer is the index of the right choice, but the example has no choices")
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
        raise ValueError(f"answer must be the index of a choice, 0 to {len(choices) - 1}, got {right!r}")
    return AnswerLine(entry, [prompts.with_answer(given | contents, TEXT, choice) for choice in choices])


def _scores(estimates: Float[np.ndarray, "repeats choices"], tokens: list[int], is_choice: bool) -> dict[str, Any]:
    """Scores of a line: bits, half the width of their 95 % interval, and number of tokens; lists of these for choices.

    For choices also `chosen`, the index of the most likely one, and `is_close`, whether its lead over another choice
    is within the 95 % interval of their difference, which is estimated with the same random masks.
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
        rows.append(["undecided choices; increase --draws", f"{sum(close)}", str(len(close))])
    if rows:
        console.print(table("Likelihood (bound)", ["", "with 95 % over examples", "examples"], rows))
    say(f"Scores of {len(entries)} lines: {out}")
