"""trimask generate: write, draw or speak with a trained run.

Everything is computed before anything is written, as `answers.py` says.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.live import Live

from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.sampling.generation_config import GenerationConfig, is_policy, require_used
from trimask.diffusion.sampling.generator import Answer, Generator, repeats
from trimask.diffusion.sampling.learned import describe_policy
from trimask.diffusion.sampling.prompts import Prompts
from trimask.scripts import cli
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.console import console, joined, parse, progress_report, say
from trimask.scripts.inputs import medium_reader, read_mask, read_prompts, spliced
from trimask.scripts.output.answers import Answered, read_index, write_answers
from trimask.scripts.output.media_files import require_mp4
from trimask.scripts.output.presentation import frame_of
from trimask.scripts.output.trajectory import live, trace_lines
from trimask.tokenizers.codec import SoundCodec
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Seed, Size
from trimask.tokenizers.vocabulary import TEXT

_ANYTHING = "unconditional"
"""What answers to an empty prompt are called."""
_WATCHED = 4
"""Answers shown at a time."""
_SHORT = ("image", "audio")
"""Modalities that have a flag of their own."""
_LISTS = ("--prompt", "--infill", "--image", "--audio", "--given")


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """One kind of input: prompts, infills, or files of one modality."""

    run: tyro.conf.Positional[Path]
    """Run folder that `trimask train` wrote."""
    prompt: tuple[str, ...] = ()
    """Texts: what to draw or say, or with --to text how the text begins. An empty one draws or says anything, as
    guidance imagines it."""
    prompts: str | None = None
    """File of more prompts, one per line; - reads them from standard input."""
    infill: tuple[str, ...] = ()
    """Texts with holes, as in "47+__=85": _ is one token, [MASK:n] are n, \\_ is an underscore."""
    image: tuple[Path, ...] = ()
    """Pictures to describe; short for --given image=FILE."""
    audio: tuple[Path, ...] = ()
    """Sounds to transcribe; short for --given audio=FILE."""
    given: tuple[str, ...] = ()
    """MODALITY=FILE: files of any modality of the run, to describe."""
    inpaint: Path | None = None
    """With --image and --to image: a mask, a picture of the same size that is bright where each of them is to be drawn
    anew: white, or any colour whose grey is 128 or more; what is darker or transparent stays as it is."""
    span: tuple[NonNegative, NonNegative] | None = None
    """With --audio and --to audio: from which to which second each of them is to be spoken anew. A --prompt may say
    what a restored picture or sound is of; without one the model finds a description, too."""
    to: str | None = None
    """Modality to make: text, image, audio, or what else the run has. None: text, for all but prompts, which have to
    say."""
    num: Size = 1
    """Answers to each input."""
    seed: Seed = 0
    """The same seed gives the same answers, whatever else is asked."""
    like: str | None = None
    """Dataset whose shapes and buffers the answers have. None: the first that fits."""
    length: Size | None = None
    """Tokens to write after a prompt, at most; more than the model's texts have, if you like. None: as many."""
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
    limits: WorkLimits = WorkLimits()
    """What it may take."""
    sampling: tyro.conf.OmitArgPrefixes[GenerationConfig] = GenerationConfig()
    """How. What is not given here is as the run was configured for what is asked, whatever default is shown."""
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()

    def __post_init__(self):
        super().__post_init__()
        if self.animate == "mp4":
            require_mp4()
        given = [f"--{kind}" for kind in ("prompt", "infill") if getattr(self, kind)]
        given += [f"--{medium}" if medium in _SHORT else f"--given {medium}" for medium in self.files]
        if self.inpaint is not None or self.span is not None:
            self._require_a_medium_to_restore(given)
            return
        if self.prompts is not None and "--prompt" not in given:
            given.insert(0, "--prompts")
        if len(given) != 1:
            kinds = "--prompt (or --prompts), --infill, --image, --audio or --given MODALITY=FILE"
            raise ValueError(f"give one kind of input, {kinds}; got {' and '.join(given) or 'none'}")
        if self.to is None and given[0].startswith("--prompt"):
            raise ValueError("a prompt needs --to: text, image, audio, or another modality of the run")
        if self.length is not None and not (self.to == TEXT and given[0].startswith("--prompt")):
            raise ValueError("--length is of texts that a prompt begins: --prompt … --to text")
        if self.to not in (None, TEXT) and given[0] == "--infill":
            raise ValueError(f"--infill makes text, got --to {self.to}")

    def _require_a_medium_to_restore(self, given: list[str]) -> None:
        medium, flag = ("image", "--inpaint") if self.inpaint is not None else ("audio", "--span")
        others = set(given) - {f"--{medium}", "--prompt"}
        is_ordered = self.span is None or self.span[0] < self.span[1]
        if (self.inpaint is None) == (self.span is None) or f"--{medium}" not in given or others or self.prompts:
            raise ValueError(
                f"{flag} is of --{medium}, with a --prompt or without; got {' and '.join(given) or 'none'}"
            )
        if self.to != medium or len(self.prompt) > 1 or not is_ordered:
            raise ValueError(
                f"{flag} needs --to {medium}, one --prompt at most, and a span that ends after it begins; got "
                f"--to {self.to}, {len(self.prompt)} prompts, span {self.span}"
            )

    @property
    def files(self) -> dict[str, list[Path]]:
        """Modality → the files of it that are given."""
        files = {medium: list(getattr(self, medium)) for medium in _SHORT if getattr(self, medium)}
        for word in self.given:
            medium, equals, path = word.partition("=")
            if not (medium.isidentifier() and equals and path):
                raise ValueError(f"--given is MODALITY=FILE, as in image=seven.png; got {word!r}")
            files.setdefault(medium, []).append(Path(path))
        return files

    @property
    def target(self) -> str:
        """The modality that is made."""
        return self.to or TEXT


@dataclass(frozen=True)
class Question:
    """One input, as the user gave it, and what the model is asked."""

    prompt: str
    example: Example
    title: str
    """What the files are named after."""
    keep: Callable[[np.ndarray], np.ndarray] = lambda media: media
    """Puts back what was given of a restored medium."""


def run(loaded: LoadedRun, arguments: Arguments, out: Path) -> None:
    """Asks, writes and prints."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; it must be a folder, or a name for a new one")
    if arguments.to != TEXT and "" in arguments.prompt and not loaded.description.train.masking.drop_probability:
        raise ValueError("an empty prompt needs a run that was trained to go without: its drop_probability is 0")
    read_index(out)  # what cannot be added to is refused before anything is computed
    prompts = prompts_of(loaded, arguments.like)
    questions = [q for q in ask(arguments, prompts) for _ in range(arguments.num)]
    config = settings(arguments, loaded, questions[0].example)
    requests = [question.example for question in questions]
    generator = Generator(loaded.denoise, loaded.vocabulary)
    loaded.require_room(arguments.limits, *generator.largest_batch(requests))
    if arguments.watch or arguments.trace or arguments.animate:
        paths = _watched(generator, loaded, questions, config, arguments)
    else:
        with progress_report() as report:
            answers = generator.generate(requests, config, arguments.seed, partial(report, "answers"))
        paths = [[answer] for answer in answers]
    outputs = _outputs(loaded, arguments, config, prompts, questions, paths)
    write_answers(out, outputs, loaded.tokenizers)
    for question, output in zip(questions, outputs, strict=True):
        if output.entry["to"] == TEXT:
            say(f"{question.prompt} → {output.media}")
    noun = "answer" if len(outputs) == 1 else "answers"
    say(f"{len(outputs)} {noun} in {out}")


def prompts_of(loaded: LoadedRun, like: str | None = None) -> Prompts:
    """What the run's model can be asked."""
    return Prompts(loaded.tokenizers, loaded.description.layouts, like)


def ask(arguments: Arguments, prompts: Prompts) -> list[Question]:
    """The questions, in the order of the input; files are read here."""
    if arguments.infill:
        return [Question(pattern, prompts.infill(pattern), pattern) for pattern in arguments.infill]
    if arguments.inpaint is not None or arguments.span is not None:
        return _to_restore(arguments, prompts)
    for medium, paths in arguments.files.items():
        prompts.task(medium, arguments.target)
        read = medium_reader(medium, prompts)
        return [Question(str(path), prompts.from_medium(medium, read(path)), path.stem) for path in paths]
    assert arguments.to is not None
    texts = [*arguments.prompt, *(() if arguments.prompts is None else read_prompts(arguments.prompts))]
    if arguments.to == TEXT:
        return [Question(text, prompts.complete(text, arguments.length), text) for text in texts]
    return [Question(text, prompts.from_text(text, arguments.to), text or _ANYTHING) for text in texts]


def _to_restore(arguments: Arguments, prompts: Prompts) -> list[Question]:
    """Pictures with a region, or sounds with a span, to be made anew."""
    prompt = arguments.prompt[0] if arguments.prompt else None
    shape = prompts.media_shape(arguments.target)
    read = medium_reader(arguments.target, prompts)
    is_hole, layout = np.zeros(shape, bool), prompts.layout(prompts.task(arguments.target, TEXT))
    if arguments.span is not None:
        codec = prompts.tokenizers.codec("audio")
        if not isinstance(codec, SoundCodec):
            raise ValueError(f"--span counts seconds; the codec for audio, {codec.kind}, has no sample rate")
        seconds = np.arange(len(is_hole)) / codec.sample_rate_hz
        is_hole |= (seconds >= arguments.span[0]) & (seconds < arguments.span[1])
    questions = []
    for path in arguments.files[arguments.target]:
        content = read(path)
        if arguments.inpaint is not None:
            is_hole = read_mask(arguments.inpaint, path, shape[:2], layout.is_cropped)
        example = prompts.restored(arguments.target, content, is_hole, prompt)
        questions.append(Question(str(path), example, path.stem, partial(spliced, content, is_hole)))
    return questions


def settings(arguments: Arguments, loaded: LoadedRun, example: Example) -> GenerationConfig:
    """The arguments' way to sample, refused where a part of it cannot have an effect."""
    default, config = loaded.generation(arguments.target), arguments.sampling
    require_used(config, default)
    if not any(segment.is_condition and (segment.codes >= 0).any() for segment in example.segments):
        if config.guidance not in (0.0, default.guidance):
            raise ValueError("guidance needs a condition to follow; a text alone, or an empty prompt, has none")
        config = dataclasses.replace(config, guidance=0.0)
    return config


def _outputs(
    loaded: LoadedRun,
    arguments: Arguments,
    config: GenerationConfig,
    prompts: Prompts,
    questions: Sequence[Question],
    paths: Sequence[list[Answer]],
) -> list[Answered]:
    """Answers, the ends of paths, with what the index says of them."""
    outputs = []
    numbers = repeats([question.example for question in questions])
    for number, question, path in zip(numbers, questions, paths, strict=True):
        answer = path[-1]
        media = question.keep(prompts.decode(question.example, answer.example))
        to = answer.example.segments[-1].modality
        entry = {
            "prompt": question.prompt,
            "task": answer.example.task,
            "to": to,
            "number": number,
            "seed": arguments.seed,
            "step": loaded.step,
            "settings": configuration.to_dict(config),
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


def _watched(
    generator: Generator,
    loaded: LoadedRun,
    questions: Sequence[Question],
    config: GenerationConfig,
    arguments: Arguments,
) -> list[list[Answer]]:
    """The states of every request on its way, shown while they come if that is asked for."""
    requests = [question.example for question in questions]
    paths: list[list[Answer]] = [[] for _ in requests]
    shown = [question.prompt for question in questions][:_WATCHED]
    with Live(console=console, auto_refresh=False, transient=True) if arguments.watch else nullcontext() as screen:
        for number, answer in generator.watch(requests, config, arguments.seed):
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
    sampling = loaded.generation(parsed.target)
    if is_policy(parsed.sampling.strategy):
        sampling = dataclasses.replace(sampling, block_length=describe_policy(parsed.sampling.strategy).block_length)
    default = dataclasses.replace(parsed, sampling=sampling)
    parsed = parse(Arguments, words, "generate", __doc__ or "", default)
    run(loaded, parsed, parsed.out or parsed.run / "generated")


if __name__ == "__main__":
    sys.exit(cli.main(["generate", *sys.argv[1:]]))
