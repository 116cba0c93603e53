"""Bad calls, drawn from the --help of every command: each flag with wrong or extreme values.

A value outside the range that the help shows must be refused by an error that names the flag. Any other value may be
accepted or refused, but always with a message, within the limits of time and memory, and a refusal leaves no files.
"""

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from breaking.judging import faults_of, listing
from breaking.running import call
from breaking.world import COMMANDS, can_run

CALL_LIMIT_S = 30.0
"""Time in seconds after which a call is sent SIGTERM."""
_SMALL = "--base.model.num-layers 1 --base.model.width 16 --base.model.num-heads 2 --base.batch.tokens 64"
BASES = {
    **{name: COMMANDS[name].words for name in ("prepare", "train", "train-policy", "generate text", "evaluate")},
    "prepare again": COMMANDS["prepare"].words,
    "plan": "plan tiny --devices 2",
    "inspect": "inspect {data}",
    "study mask-variance": COMMANDS["study"].words,
    "study lr-transfer": f"study lr-transfer {{out}} --data {{data}} {_SMALL} --workers 0 --widths 16 --depths 1 "
    "--log2-learning-rates -8 --kinds completed_p --base.optimizer.horizon-tokens 120 --base.optimizer.warmup-tokens 0",
    "benchmark loss": "benchmark loss {out} --tokens 32 --width 16 --vocabularies 64 --repeats 1",
    "benchmark attention": "benchmark attention {out} --tokens 32 --lengths 16 --examples 1 --heads 2 --kv-heads 2 "
    "--head-size 8 --repeats 1",
    "benchmark checkpoint": "benchmark checkpoint {out} --sizes 64x1 --vocabulary 64 --repeats 1",
    "benchmark train": "benchmark train {out} --sizes 64x1 --vocabularies 64 --rows 2 --length 16 --repeats 1",
    "benchmark rollout": "benchmark rollout {out} --size 64x1 --vocabulary 16 --episodes 2 --prompt 4 --length 4 "
    "--repeats 1",
    "benchmark data": "benchmark data {out} --data {data} --batches 2 --tokens 64 --workers 0",
}
"""Name → a call that works, to which one bad value is added."""
_NEW = {"prepare": "data", "train": "run", "train-policy": "policy", "study mask-variance": "study"}
"""Base → the folder that it writes, which does not exist yet."""
_NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1.9",
    "1" + 18 * "0",
    "1" + 400 * "0",
    "1e400",
    "",
    "wörd",
    "0x10",
    "None",
    "true",
]
_WORDS = [
    "",
    "nan",
    "-1",
    "wörd",
    "../../x",
    "/dev/null",
    "/",
    "\x1b[31mred",
    "[bold]x[/bold]",
    "a" * 5000,
    "a=b",
    "x:y",
    ".",
]
_FLAG = re.compile(r"^[\s│]*(--[\w.-]+)(?:, (--[\w.-]+))? ?(.*?)[\s│]*$")
_INTERVAL = re.compile(r"(INT|FLOAT) ?(?:([\[(])([^,\]]+(?:,\d{3})*), ([^\])]+)([\])])|([≥>])([-\d.,e]+))?")


@dataclass(frozen=True)
class Flag:
    """A flag as its command's help shows it."""

    name: str
    kind: str
    """Metavar of the flag, such as INT [1, 8]."""

    @property
    def is_number(self) -> bool:
        """Whether the flag takes only numbers."""
        return "INT" in self.kind or "FLOAT" in self.kind

    @property
    def ends(self) -> tuple[float, float] | None:
        """Smallest and largest number that the flag takes; None if the help shows no range."""
        found = _INTERVAL.search(self.kind)
        if found is None or not (found[3] or found[7]):
            return None
        if found[7]:
            return _read(found[7]), float("inf")
        return _read(found[3]), _read(found[4])

    def values(self) -> list[str]:
        """Values to try, wrong ones and the ends of the range."""
        if not self.is_number:
            return _WORDS if "STR" in self.kind or "PATH" in self.kind else ["", "nan", "wörd"]
        if self.ends is None:
            return _NUMBERS
        smallest, largest = self.ends
        step = 1 if "INT" in self.kind else 0.5
        at_ends = [
            f"{end:.17g}" if "FLOAT" in self.kind else f"{int(end)}"
            for end in (smallest - step, largest, largest + step)
            if abs(end) < 1e300
        ]
        return [*_NUMBERS, *at_ends]

    def must_refuse(self, value: str) -> bool:
        """Whether the help does not allow the value."""
        if not self.is_number:
            return (
                self.kind.startswith("{")
                and self.kind.endswith("}")
                and value not in self.kind.strip("{}").split(",")
                and "STR" not in self.kind
            )
        if value == "None" and "None" in self.kind:
            return False
        if "[STR" in self.kind:
            return True  # pairs of a name and a number
        if value == "" and self.kind.startswith("["):
            return True
        try:
            number = float(value) if "FLOAT" in self.kind else float(int(value))
        except (ValueError, OverflowError):
            return True
        if number != number or abs(number) == float("inf"):
            return True
        return self.ends is not None and not self.ends[0] <= number <= self.ends[1]


def _read(text: str) -> float:
    return float(text.replace(",", ""))


@dataclass(frozen=True)
class Call:
    """A base with a bad value of one flag."""

    base: str
    """Name of the base in `BASES`."""
    words: tuple[str, ...]
    """The flag and its value, as words of the command line."""
    must_refuse: bool
    """Whether the command must refuse the value."""

    def __str__(self) -> str:
        return f"{self.base}: {' '.join(word if len(word) < 40 else word[:20] + '…' for word in self.words)!r}"


def bases(folders: dict[str, Path]) -> list[str]:
    """Names of the bases whose folders exist."""
    return [base for base, words in BASES.items() if can_run(words, {*folders, _NEW.get(base, "new")})]


def flags_of(base: str, root: Path) -> list[Flag]:
    """Flags of a base's command, read from its --help."""
    name, *rest = BASES[base].split()
    words = [name, rest[0]] if name in ("study", "benchmark") else [name]
    done = call([*words, "--help"], root, environment={"COLUMNS": "160"})
    flags = []
    for line in done.out.splitlines():
        found = _FLAG.match(line)
        if found and found[1] != "--help":
            flags += [Flag(name, found[3] if not found[2] else "BOOL") for name in (found[1], found[2]) if name]
    if len(flags) < 1:
        raise RuntimeError(f"no flags in the help of {base}:\n{done.out}\n{done.err}")
    return flags


def draw(flags: dict[str, list[Flag]], rng: random.Random) -> Iterator[Call]:
    """Endless stream of calls, in which every flag of every command is equally likely."""
    pairs = [(base, flag) for base, of_base in flags.items() for flag in of_base if flag.kind != "BOOL"]
    while True:
        base, flag = rng.choice(pairs)
        value = rng.choice(flag.values())
        words = (f"{flag.name}={value}",) if value.startswith("-") else (flag.name, value)
        if "[STR" in flag.kind and flag.is_number:
            words = (flag.name, rng.choice(["text", "image", "drawn", "query", "nobody"]), value)
        yield Call(base, words, flag.must_refuse(value) and not ("[STR" in flag.kind and _is_allowed(flag, value)))


def _is_allowed(flag: Flag, value: str) -> bool:
    """Whether a flag that takes pairs of a name and a number allows this number."""
    return not Flag(flag.name, flag.kind.replace("[STR ", "").replace("...]", "")).must_refuse(value)


def judged(case: Call, folders: dict[str, Path], scratch: Path) -> list[str]:
    """Tries a call and returns its faults."""
    paths = {**folders, "out": scratch / "out"}
    if case.base in _NEW:
        paths[_NEW[case.base]] = scratch / "new"
    elif case.base == "prepare again":
        paths["data"] = scratch / "data"
        shutil.copytree(folders["data"], paths["data"])
    elif case.base in ("generate text", "evaluate"):
        paths["run"] = scratch / "run"
        shutil.copytree(folders["run"], paths["run"])
    before = listing(scratch)
    argv = [word.format(**paths) for word in BASES[case.base].split()]
    done = call([*argv, *case.words], scratch, limit_s=CALL_LIMIT_S)
    faults = faults_of(done, may_be_late=not case.must_refuse)
    if done.status == 0 and case.must_refuse:
        faults.append("accepts a value that its help does not allow")
    if done.status == 2 and listing(scratch) != before:
        new = sorted(set(listing(scratch)) ^ set(before))[:3]
        faults.append(f"was refused and left {', '.join(new)}")
    flag = case.words[0].partition("=")[0]
    if case.must_refuse and done.status == 2 and flag.lstrip("-") not in done.err.replace("│", "").replace("\n", ""):
        faults.append(f"does not name {flag}: {done.err.strip()[:200]}")
    return faults
