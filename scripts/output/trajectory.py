"""Shows the generation of an answer step by step: as JSON lines (a trace), as an HTML page, and live on the terminal.

The first line of a trace holds the request and the codes that were known at the start. Each other line is an event:

    {"step": 3, "position": 5, "token": 41, "piece": "8", "confidence": 0.97}     revealed in step 3
    {"step": 4, "position": 5, "token": null, "piece": null, "confidence": null}  masked again

Positions are indices of the generated medium's codes in row-major order. Pieces are the texts of tokens; they are null
for media other than texts.
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
    """Every other line of a trace: a token that is revealed, or masked again (null)."""

    step: int
    position: int
    token: int | None
    piece: str | None
    confidence: float | None


def trace_lines(tokenizers: MediaTokenizers, prompt: str, path: Sequence[Answer]) -> str:
    """Trace of one request as the text of its file."""
    return "".join(map(json_line, trace_of(tokenizers, prompt, path)))


def trace_of(tokenizers: MediaTokenizers, prompt: str, path: Sequence[Answer]) -> list[dict[str, Any]]:
    """Trace of one request, from its states before the first step and after every step."""
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
        codes, confidence = _codes(answer.example), code_confidences(path[0].example, answer)
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


def code_confidences(request: Example, answer: Answer) -> np.ndarray:
    """Confidence of each code of the generated medium: its probability when it was revealed; given: 1; masked: 0."""
    # A condition that is masked, for guidance, is not generated.
    is_asked = [(segment.codes.reshape(-1) < 0) & (not segment.is_condition) for segment in request.segments]
    of_last_segment = answer.log_probs[sum(of_segment.sum() for of_segment in is_asked[:-1]) :]
    confidences = np.ones(len(is_asked[-1]))
    confidences[is_asked[-1]] = np.exp(of_last_segment)
    return confidences


def trace_page(path: Path) -> Path:
    """Writes an HTML page of a trace beside it, and returns its path. Raises ValueError if it is not a trace."""
    out = path.with_suffix(".html")
    write_page(out, read_trace(path))
    return out


def write_page(path: Path, trace: Sequence[dict[str, Any]]) -> None:
    """Writes the HTML page of a trace."""
    import jinja2  # generation imports this module and makes no page

    head, *events = trace
    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(_TEMPLATE.parent))
    write_text(path, environment.get_template(_TEMPLATE.name).render(head=head, events=events))


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Lines of a trace. Raises ValueError if the file is not a trace."""
    lines: list[dict[str, Any]] = []
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}: not a line of a trace"
        if not lines:
            start = configuration.from_dict(line, _Start, where)
            if len(start.start) != len(start.pieces):
                raise ValueError(f"{where}: {len(start.start)} codes but {len(start.pieces)} pieces")
        else:
            event = configuration.from_dict(line, _Event, where)
            if not 0 <= event.position < len(lines[0]["start"]) or event.step < 1:
                raise ValueError(f"{where}: position {event.position} or step {event.step} is out of range")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: contains no trace")
    return lines


def live(tokenizers: MediaTokenizers, prompts: Sequence[str], asked: Sequence[Example], now: Sequence[Answer]) -> Group:
    """Shows answers that are being generated: tokens coloured by confidence, pictures as far as they are known."""
    parts = []
    for prompt, request, answer in zip(prompts, asked, now, strict=True):
        segment = answer.example.segments[-1]
        title = Text(f"{prompt}  ", style="bold") + Text(f"{answer.nfe} evaluations", style="dim")
        confidence = code_confidences(request, answer)
        if segment.modality == TEXT:
            shown = _live_text(tokenizers, segment.codes, confidence)
        else:
            known = confidence.reshape(segment.codes.shape)
            shown = presentation_of(segment.modality).live(segment.codes, known, tokenizers.codec(segment.modality))
        parts += [title, shown, Text()]
    return Group(*parts)


def _live_text(tokenizers: MediaTokenizers, codes: np.ndarray, confidence: np.ndarray) -> Text:
    text = Text()
    for code, value in zip(codes, confidence, strict=True):
        if code < 0:
            text.append("░", style="grey50")
        else:
            text.append(_piece(tokenizers, TEXT, code) or "", style=colour(value))
    return text


def text_in_order(
    tokenizers: MediaTokenizers, codes: Int[np.ndarray, " length"], steps: Int[np.ndarray, " length"]
) -> str:
    """HTML of a text, with each token marked by the number of the step that revealed it, darker for later steps.

    Tokens of step 0, the given ones, are not marked. EOS is left out.
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
    """Text of a token; empty for EOS, None if it is unknown or not of a text."""
    if modality != TEXT or code < 0:
        return None
    return "" if code == tokenizers.vocabulary.eos_code else tokenizers.text.decode(np.array([code]))
