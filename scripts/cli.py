"""`trimask <command>`: finds the command, prepares the process, and reports errors without a traceback.

The module of a command is imported only when the command is called, so that `trimask --help` is instant.
"""

import atexit
import codecs
import difflib
import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

_ASCII = {
    "→": "->",
    "−": "-",
    "×": "x",
    "·": "-",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "–": "-",
    "±": "+-",
    "█": "#",
    "░": ".",
}
"""Character of our output → its replacement on terminals whose encoding lacks it."""


class Command(NamedTuple):
    """A command of `trimask`."""

    module: str
    """Name of its module, which has `main(argv: Sequence[str]) -> None`."""
    summary: str
    """Line of `trimask --help`."""
    example: str
    """A call of the command for `trimask --help`; tests compare its flags with the command's own help."""


COMMANDS = {
    "demo": Command(
        "trimask.scripts.demo",
        "prepare data, train, evaluate and write a report, in minutes",
        "trimask demo",
    ),
    "prepare": Command(
        "trimask.scripts.prepare",
        "turn your files, or the embedded datasets, into tokens for training",
        "trimask prepare data/tiny --preset tiny",
    ),
    "train": Command(
        "trimask.scripts.train",
        "train a model on prepared data; the same command resumes",
        "trimask train runs/tiny --data data/tiny --preset tiny",
    ),
    "evaluate": Command(
        "trimask.scripts.evaluate",
        "score a run on held-out data: bits per token, and generated answers by judges",
        "trimask evaluate runs/tiny",
    ),
    "generate": Command(
        "trimask.scripts.generate",
        "generate texts, pictures or sounds with a trained run",
        'trimask generate runs/tiny --prompt "a handwritten seven" --to image',
    ),
    "train-policy": Command(
        "trimask.scripts.train_policy",
        "train a policy that decides which tokens to unmask when, for a trained run",
        "trimask train-policy policies/start --run runs/cups --preset imitation",
    ),
    "study": Command(
        "trimask.scripts.study",
        "run an experiment: how hyperparameters transfer, how large a batch may be, how to sample",
        "trimask study lr-transfer studies/lr",
    ),
    "plan": Command(
        "trimask.scripts.plan",
        "compute the memory, communication and days that training needs on a number of accelerators",
        "trimask plan trimodal_1b --devices 64 --device-kind h100",
    ),
    "benchmark": Command(
        "trimask.scripts.benchmark",
        "measure the speed of training, the loss, the sampler and rollouts, compared with other code",
        "trimask benchmark sample benchmarks/here",
    ),
    # Not scripts/inspect.py: `python scripts/train.py` puts scripts/ on sys.path before the standard library.
    "inspect": Command(
        "trimask.scripts.inspection",
        "describe prepared data or a run: layouts, reconstruction quality, parameters",
        "trimask inspect data/tiny",
    ),
    "completion": Command(
        "trimask.scripts.completion",
        "print a script for Tab completion in bash, zsh or fish",
        "trimask completion bash",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for the user's mistakes, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    _let_every_terminal_read()
    try:
        try:
            status = _dispatch(arguments)
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):  # so Rich ends
                raise stop.__context__ from None
            raise
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does.
        _discard_output()
        return 141
    except OSError as error:
        _discard_output()
        _report(f"trimask: error: the output could not be written: {_message(error)}")
        return 1


def _open_closed_streams() -> None:
    """Replaces closed standard streams by /dev/null, so that no file that is opened later takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # `open` returns the lowest free descriptor, which is the stream's own: those before it are open by now.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _let_every_terminal_read() -> None:
    """Writes characters that a terminal's encoding lacks in ASCII, so that printing a result never fails."""
    codecs.register_error("trimask", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="trimask")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


def _discard_output() -> None:
    """Discards buffered output, which Python would otherwise fail to write once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"trimask {version('trimask')}")
        return 0
    if name not in COMMANDS:
        _report(f"trimask: error: {_unknown(name)}")
        return 2

    settle_process()
    try:
        _imported(COMMANDS[name].module).main(rest)
    except KeyboardInterrupt as stop:
        _report(f"trimask {name}: {str(stop) or 'interrupted'}")
        # A command that ends by a signal at a time of its choosing gives the signal's status.
        return getattr(stop, "exit_status", 130)
    except BrokenPipeError:
        raise
    except MemoryError as error:
        _report(f"trimask {name}: error: not enough memory: {error}")
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # These errors refuse what a user gave; all others are bugs and keep their traceback.
        if os.environ.get("TRIMASK_DEBUG", "0") != "0":
            raise
        _report(f"trimask {name}: error: {_message(error)}")
        return 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # so XLA says that an array does not fit
            raise
        _report(f"trimask {name}: error: not enough memory: {str(error).splitlines()[0]}")
        return 1
    return 0


def _imported(module: str) -> Any:
    """Imports a command's module, and excludes the objects that its imports create from garbage collection."""
    if module in sys.modules:
        return importlib.import_module(module)
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def settle_process() -> None:
    """Sets what must be set before JAX is imported: glibc's allocator, XLA's C++ logging, and how the process ends.

    XLA logs only what ends the process, since it reports all other errors to Python, too. This hides complaints about
    programs from the compilation cache, which take hints to LLVM (prefer-no-gather) for features that are missing.

    At its end Python would search all objects of JAX for garbage, which takes half a second and frees nothing.

    XLA on CPU takes and frees its temporaries, megabytes each, at every step. glibc returns such blocks to
    the kernel and faults them in again page by page. With all blocks kept in one arena, the system time of a training
    loop fell to a quarter (11.5 to 2.7 s for 40 steps on 2 cores), and its memory grew by 0.4 to 0.8 GB. MALLOC_
    variables in the environment take precedence.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    atexit.register(gc.freeze)
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    # The numbers are malloc.h's: M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never), M_TOP_PAD (bytes), M_ARENA_MAX.
    for option, value in ((-4, 0), (-1, -1), (-2, 256 << 20), (-8, 1)):
        mallopt(option, value)


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    examples = "\n".join(f"  {command.example}" for command in COMMANDS.values())
    return f"""\
Tri-modal masked diffusion: one model that writes, draws and speaks.

usage: trimask <command> [options]

commands:
{listed}

examples:
{examples}

options:
  -h, --help  this text; `trimask <command> --help` lists the options of a command
  --version   the version

TRIMASK_DEBUG=1 in the environment shows the traceback of an error."""


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean `trimask {close[0]}`?" if close else f"commands are {', '.join(COMMANDS)}"
    return f"no command {name!r}; {hint}"


def _message(error: Exception) -> str:
    if isinstance(error, FileExistsError) and error.filename is not None:
        return f"{error.filename}: exists and is not a folder"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _report(text: str) -> None:
    sys.stdout.flush()  # what was printed before stays before
    from trimask.tokenizers.storage.files import printable

    print(printable(text, keep="\n\t"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
