"""A small world to break: sources of every kind, and a folder of every kind made from them."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from breaking.running import call
from PIL import Image

_WORDS = ("one", "two", "three")
_DATA = """prepare {data} --images drawn={sources}/drawn --audio spoken={sources}/spoken
    --text prose={sources}/prose.txt --prompts asked={sources}/asked.jsonl
    --text-vocabulary 264 --max-text-tokens 24 --splits.validation 0.2
    --image.codebook-size 8 --audio.codebook-size 6 --audio.num-mels 8 --shard-records 8 --workers 1"""
_MODEL = """--model.num-layers 1 --model.width 16 --model.num-heads 2 --model.mlp-width 16 --batch.tokens 64
    --batch.weights prose 0 spoken 0"""
_TRAIN = f"""train {{run}} --data {{data}} {_MODEL} --optimizer.horizon-tokens 200 --optimizer.warmup-tokens 60
    --loop.log-every 1 --loop.checkpoint-every 2 --loop.keep-last 3"""
_POLICY = """train-policy {policy} --run {run} --dataset asked --max-problems 4 --problems-per-step 2
    --grpo.updates 1 --grpo.group 2"""


@dataclass(frozen=True)
class Command:
    """A call that works."""

    words: str
    """The command line, with the names of folders in braces."""

    def argv(self, folders: dict[str, Path]) -> list[str]:
        """Arguments of the command, with the paths of these folders."""
        return [word.format(**folders) for word in self.words.split()]


COMMANDS = {
    "prepare": Command(_DATA),
    "train": Command(_TRAIN),
    "train-policy": Command(_POLICY),
    "generate text": Command("generate {run} --prompt one --to text --num 2"),
    "generate image": Command("generate {run} --prompt one --to image --trace --steps 3"),
    "evaluate": Command("evaluate {run} --max-examples 2 --bound-samples 1"),
    "study": Command("study mask-variance {study} --run {run} --draws 2 --workers 0"),
}
"""Name → the command that makes a folder of the world, in the order in which they are run."""


def folders_in(root: Path) -> dict[str, Path]:
    """Name → path of the folders of a world."""
    return {name: root / name for name in ("sources", "data", "run", "half", "policy", "study")}


def make_sources(folder: Path) -> None:
    """Writes twelve pictures, twelve sounds, prose, and prompts with responses."""
    rng = np.random.default_rng(0)
    for name, end in (("drawn", "png"), ("spoken", "wav")):
        (folder / name).mkdir(parents=True)
        lines = []
        for number in range(12):
            path = folder / name / f"{number}.{end}"
            if end == "png":
                Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(path)
            else:
                soundfile.write(path, rng.uniform(-0.5, 0.5, 1200), 8000)
            lines.append(json.dumps({"file_name": path.name, "text": _WORDS[number % 3], "label": number % 3}))
        (folder / name / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    prose = (f"once {word}, then {word} again: {n}" for n, word in enumerate(_WORDS * 8))
    (folder / "prose.txt").write_text("\n\n".join(prose) + "\n")
    asked = ({"prompt": f"{n} + {n} = ", "response": f"{2 * n}"} for n in range(12))
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))


def make_world(
    root: Path, names: Iterable[str] = tuple(COMMANDS), report: Callable[[str], None] = lambda _: None
) -> dict[str, Path]:
    """Runs these commands and returns name → path of the folders that exist then.

    Raises RuntimeError, with its output, if a command fails.
    """
    folders = folders_in(root)
    make_sources(folders["sources"])
    for name in names:
        command = COMMANDS[name]
        report(name)
        done = call(command.argv(folders), root)
        if done.status:
            raise RuntimeError(f"{name} fails without any damage:\n{done.out}\n{done.err}")
    if folders["run"].exists():
        _make_half(folders["run"], folders["half"])
    return {name: folder for name, folder in folders.items() if folder.exists()}


def _make_half(run: Path, half: Path) -> None:
    """Copies a run without its newest checkpoint, as if it had been killed before that."""
    shutil.copytree(run, half)
    shutil.rmtree(max((half / "checkpoints").iterdir(), key=lambda path: int(path.name)))


def copied(folders: dict[str, Path], root: Path, *names: str) -> dict[str, Path]:
    """Folders of the world, of which the named ones are copied below `root`, where they may be changed."""
    fresh = folders_in(root)
    for name in names:
        shutil.copytree(folders[name], fresh[name], symlinks=True)
    return {**folders, **{name: fresh[name] for name in names}}


def can_run(words: str, folders: Iterable[str]) -> bool:
    """Whether all folders that a command line names are among `folders`, or are new."""
    return set(re.findall(r"{(\w+)}", words)) <= {*folders, "new", "out"}
