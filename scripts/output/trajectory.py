"""The way to an answer: as JSON lines, as a page with a slider, and live on the terminal.

The first line of a trace says what was asked and what was known at the start. Each other is an event:

    {"step": 3, "position": 5, "token": 41, "piece": "8", "confidence": 0.97}     revealed in step 3
    {"step": 4, "position": 5, "token": null, "piece": null, "confidence": null}  masked again

Positions count the codes of what is made, in reading order; pieces are texts' only.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Group
from rich.text import Text

from trimask.diffusion.run.folder import json_line
from trimask.diffusion.sampling.generator import Answer
from trimask.scripts.output.presentation import presentation_of
from trimask.scripts.output.terminal import colour
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.json_text import read_json_lines
from trimask.tokenizers.vocabulary import TEXT

_TEMPLATE = Path(__file__).with_name("trajectory.html.jinja")


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The first line of a trace."""

    prompt: str
    task: str
    to: str
    shape: list[int]
    start: list[int | None]
    pieces: list[str | None]


@dataclass(frozen=True, kw_only=True)
class _Event:
    """Every other line."""

    step: int
    position: int
    token: int | None
    piece: str | None
    confidence: float | None


def trace_lines(tokenizers: MediaTokenizers, prompt: str, path: Sequence[Answer]) -> str:
    """The trace of one request as the text of its file."""
    return "".join(map(json_line, trace_of(tokenizers, prompt, path)))


def trace_of(tokenizers: MediaTokenizers, prompt: str, path: Sequence[Answer]) -> list[dict[str, Any]]:
    """The trace of one request: its states before the first step and after every step."""
    target = path[0].example.segments[-1]
    start = target.codes.reshape(-1)
    head = {
        "prompt": prompt,
        "task": path[0].example.task,
        "to": target.modality,
        "shape": list(target.codes.shape),
        "start": [None if code < 0 else int(code) for code in start],
        "pieces": [_piece(tokenizers, target.modality, code) for code in start],
    }
    return [head, *_events(tokenizers, path)]


def _events(tokenizers: MediaTokenizers, path: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    before, modality = _codes(path[0].example), path[0].example.segments[-1].modality
    for step, answer in enumerate(path[1:], 1):
        codes, confidence = _codes(answer.example), confidences(path[0].example, answer)
        for position in np.flatnonzero(codes != before).tolist():
            is_known = codes[position] >= 0
            yield {
                "step": step,
                "position": position,
                "token": int(codes[position]) if is_known else None,
                "piece": _piece(tokenizers, modality, codes[position]),
                "confidence": round(float(confidence[position]), 6) if is_known else None,
            }
        before = codes


def confidences(asked: Example, answer: Answer) -> np.ndarray:
    """Of every code of what is made: its probability when it was revealed, 1 where it was given, 0 where masked."""
    # A hidden condition is not asked for.
    holes = [(segment.codes.reshape(-1) < 0) & (not segment.is_condition) for segment in asked.segments]
    own = answer.log_probs[sum(hole.sum() for hole in holes[:-1]) :]
    result = np.ones(len(holes[-1]))
    result[holes[-1]] = np.exp(own)
    return result


def trace_page(path: Path) -> Path:
    """Makes a page of a trace, beside it."""
    out = path.with_suffix(".html")
    write_page(out, read_trace(path))
    return out


def write_page(path: Path, trace: Sequence[dict[str, Any]]) -> None:
    """Writes the page of a trace."""
    import jinja2  # generation imports this module and makes no page

    head, *events = trace
    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(_TEMPLATE.parent))
    write_text(path, environment.get_template(_TEMPLATE.name).render(head=head, events=events))


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The lines of a trace, refused unless they are one."""
    lines: list[dict[str, Any]] = []
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}: not of a trace"
        if not lines:
            about = configuration.from_dict(line, _Start, where)
            if len(about.start) != len(about.pieces):
                raise ValueError(f"{where}: {len(about.start)} codes and {len(about.pieces)} pieces")
        else:
            event = configuration.from_dict(line, _Event, where)
            if not 0 <= event.position < len(lines[0]["start"]) or event.step < 1:
                raise ValueError(f"{where}: there is no position {event.position} in step {event.step}")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: holds no trace")
    return lines


def live(tokenizers: MediaTokenizers, prompts: Sequence[str], asked: Sequence[Example], now: Sequence[Answer]) -> Group:
    """What a terminal shows of answers on their way: tokens by their confidence, pictures as they are known."""
    parts = []
    for prompt, request, answer in zip(prompts, asked, now, strict=True):
        segment = answer.example.segments[-1]
        title = Text(f"{prompt}  ", style="bold") + Text(f"{answer.nfe} evaluations", style="dim")
        confidence = confidences(request, answer)
        if segment.modality == TEXT:
            shown = _live_text(tokenizers, segment.codes, confidence)
        else:
            known = confidence.reshape(segment.codes.shape)
            shown = presentation_of(segment.modality).live(segment.codes, known, tokenizers.codec(segment.modality))
        parts += [title, shown, Text()]
    return Group(*parts)


def _live_text(tokenizers: MediaTokenizers, codes: np.ndarray, confidence: np.ndarray) -> Text:
    text = Text()
    for code, sure in zip(codes, confidence, strict=True):
        if code < 0:
            text.append("░", style="grey50")
        else:
            text.append(_piece(tokenizers, TEXT, code) or "", style=colour(sure))
    return text


def text_in_order(
    tokenizers: MediaTokenizers, codes: Int[np.ndarray, " length"], steps: Int[np.ndarray, " length"]
) -> str:
    """HTML of a text in which each token has the number of the step that revealed it, the later the darker behind it.

    Tokens of step 0 were given. EOS is left out.
    """
    spans = []
    for code, step in zip(codes, steps, strict=True):
        piece = html.escape(_piece(tokenizers, TEXT, code) or "")
        if step == 0 or not piece:
            spans.append(piece)
            continue
        shade = f"background: rgba(23, 105, 255, {0.1 + 0.4 * step / steps.max():.2f})"
        spans.append(f'<span title="step {step}" style="{shade}">{piece}<sub>{step}</sub></span>')
    return f'<div style="font: 1.1em monospace; white-space: pre-wrap">{"".join(spans)}</div>'


def _codes(example: Example) -> np.ndarray:
    return example.segments[-1].codes.reshape(-1)


def _piece(tokenizers: MediaTokenizers, modality: str, code: int) -> str | None:
    """What a text's token reads; empty for EOS."""
    if modality != TEXT or code < 0:
        return None
    return "" if code == tokenizers.vocabulary.eos_code else tokenizers.text.decode(np.array([code]))
