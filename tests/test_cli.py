"""The command line: help, suggestions, and errors as one block."""

import importlib
import io
import os
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimask.scripts import cli
from trimask.scripts.benchmark import BENCHMARKS

ROOT = Path(__file__).parents[1]
TRIMASK = [sys.executable, "-m", "trimask.scripts.cli"]


@pytest.fixture
def command(monkeypatch):
    """Replaces `trimask train` by a function of the test, and leaves the allocator of this process unchanged."""

    def install(body):
        monkeypatch.setattr(cli, "settle_process", lambda: None)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=body))

    monkeypatch.delenv("TRIMASK_DEBUG", raising=False)
    return install


def fails_with(error: BaseException):
    def body(argv):
        print("begun")
        raise error

    return body


def trimask_train(body: str, **streams) -> subprocess.Popen:
    """A process of `trimask train` that runs `body` in place of the training, with buffered output."""
    code = (
        "import sys, types; from trimask.scripts import cli\n"
        f"def body(argv): {body}\n"
        "sys.modules['trimask.scripts.train'] = types.SimpleNamespace(main=body)\n"
        "sys.exit(cli.main(['train']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, **streams)


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", r"\u4e03 -> x-..."), ("cp1252", r"\u4e03 -> ×·…"), ("utf-8", "七 → ×·…")]
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_terminal_that_lacks_a_character_gets_it_in_ascii(command, monkeypatch, encoding, expected, stream):
    written = io.BytesIO()
    monkeypatch.setattr(sys, stream, io.TextIOWrapper(written, encoding=encoding))
    command(lambda argv: print("七 → ×·…", file=getattr(sys, stream)))
    assert cli.main(["train"]) == 0
    getattr(sys, stream).flush()
    assert written.getvalue().decode(encoding) == f"{expected}\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_its_example(argv, capsys):
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    for name, listed in cli.COMMANDS.items():
        assert f"\n  {name:12}  {listed.summary}\n" in out  # one under the other
        assert listed.example in out
        assert listed.example.startswith(f"trimask {name}")
    assert err == ""


def test_help_takes_less_than_a_second():
    def seconds():
        start = time.perf_counter()
        subprocess.run([*TRIMASK, "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1  # 0.1 s on a quiet machine


def test_version_is_that_of_the_installed_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trimask {version('trimask')}\n"


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("evalute", "evaluate"), ("gen", "generate")])
def test_a_mistyped_command_gets_a_suggestion(typed, meant, capsys):
    assert cli.main([typed]) == 2
    out, err = capsys.readouterr()
    assert err == f"trimask: error: no command {typed!r}; did you mean `trimask {meant}`?\n"
    assert out == ""


def test_an_unknown_command_gets_the_list(capsys):
    assert cli.main(["xyzzy"]) == 2
    err = capsys.readouterr().err
    assert [name for name in cli.COMMANDS if name not in err] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_has_the_flags_of_its_example(name, capsys, monkeypatch):
    monkeypatch.setattr(cli, "settle_process", lambda: None)
    with pytest.raises(SystemExit) as exit:
        cli.main([name, *_positionals_before_flags(name), "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert f"trimask {name}" in out
    flags = [word for word in shlex.split(cli.COMMANDS[name].example) if word.startswith("--")]
    assert [flag for flag in flags if flag not in out] == []
    first_line, *_ = importlib.import_module(cli.COMMANDS[name].module).__doc__.splitlines()
    assert name == "benchmark" or first_line in " ".join(out.split())  # of that, its example shows one


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_help_of_a_benchmark_says_what_it_is(name, capsys):
    module = importlib.import_module(BENCHMARKS[name])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert module.__doc__.splitlines()[0] in words and words.startswith(f"usage: trimask benchmark {name} ")


def test_a_mistyped_flag_gets_a_suggestion(capsys, monkeypatch):
    monkeypatch.setattr(cli, "settle_process", lambda: None)
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", "runs/tiny", "--promt", "seven"])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert "--promt" in err
    assert "--prompt" in err


def test_a_command_gets_the_arguments_after_its_name(command):
    seen = []
    command(seen.extend)
    assert cli.main(["train", "tiny", "--steps", "3"]) == 0
    assert seen == ["tiny", "--steps", "3"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("side must be a multiple of 4, got 7"), "side must be a multiple of 4, got 7"),
        (
            FileNotFoundError(2, "No such file or directory", "runs/none"),
            "runs/none: No such file or directory",
        ),
        (FileNotFoundError("runs/none: not a run"), "runs/none: not a run"),
        (ModuleNotFoundError("install trimask[speech]"), "install trimask[speech]"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_refusal_is_one_block_on_stderr_with_status_2(error, message, command, capsys):
    command(fails_with(error))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr() == ("begun\n", f"trimask train: error: {message}\n")


def test_debug_shows_the_traceback_of_a_refusal(command, monkeypatch):
    command(fails_with(ValueError("why")))
    monkeypatch.setenv("TRIMASK_DEBUG", "1")
    with pytest.raises(ValueError, match="why"):
        cli.main(["train"])


def test_a_bug_keeps_its_traceback(command):
    command(fails_with(TypeError("a bug")))
    with pytest.raises(TypeError):
        cli.main(["train"])


@pytest.mark.parametrize(("said", "shown"), [((), "interrupted"), (("saved at step 7",), "saved at step 7")])
def test_ctrl_c_ends_quietly_with_status_130(said, shown, command, capsys):
    command(fails_with(KeyboardInterrupt(*said)))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == f"trimask train: {shown}\n"


def test_a_signal_obeyed_in_ones_own_time_keeps_its_status(command, capsys):
    class Stopped(KeyboardInterrupt):
        exit_status = 143

    command(fails_with(Stopped("saved at step 7")))
    assert cli.main(["train"]) == 143
    assert capsys.readouterr().err == "trimask train: saved at step 7\n"


def test_what_was_printed_before_an_error_stays_before_it():
    process = trimask_train("print('begun'); raise ValueError('why')", stderr=subprocess.STDOUT)
    assert process.communicate()[0] == "begun\ntrimask train: error: why\n"


@pytest.mark.parametrize("size", [10, 100_000])  # below and above what stdout holds back
def test_a_reader_that_leaves_early_is_no_error(size):
    process = trimask_train(f"print('x' * {size})", stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_the_allocator_is_settled_unless_the_user_settled_it(monkeypatch):
    asked = []
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=lambda *setting: asked.append(setting)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    cli.settle_process()
    assert asked == [] and os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    for name in ("MALLOC_ARENA_MAX", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name)
    cli.settle_process()
    assert asked == [(-4, 0), (-1, -1), (-2, 256 << 20), (-8, 1)] and os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"


def test_the_command_line_runs_as_a_script_too():
    process = subprocess.run([sys.executable, "scripts/cli.py", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert "did you mean `trimask train`?" in process.stderr


def _positionals_before_flags(name: str) -> list[str]:
    """The example's words up to its first flag: with a preset first, the help is that of the preset."""
    words = shlex.split(cli.COMMANDS[name].example)[2:]
    return words[: next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError) as error:
        (tmp_path / "out").mkdir()
    assert cli._message(error.value) == f"{tmp_path / 'out'}: exists and is not a folder"


@pytest.mark.parametrize(
    ("words", "redirected", "status", "said"),
    [
        ("--help", ">&-", 0, ""),
        ("plan tiny", "<&- >&- 2>&-", 0, ""),
        ("plan tiny --mfu 2", "2>&-", 2, ""),
        ("--version", ">/dev/full", 1, "trimask: error: the output could not be written: "),
        ("plan tiny", ">/dev/full", 2, "trimask plan: error: "),
    ],
)
def test_closed_and_full_streams_are_no_traceback(words, redirected, status, said):
    call = f"{shlex.join(TRIMASK)} {words} {redirected}"
    process = subprocess.run(["sh", "-c", call], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (
        status,
        f"{said}[Errno 28] No space left on device\n" if said else "",
    )


def test_a_reader_of_rich_output_that_leaves_early_is_no_error(command, monkeypatch):
    def body(_):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - as Rich does

    kept = []
    command(body)
    monkeypatch.setattr(cli, "_discard_output", lambda: kept.append("discarded"))
    assert (cli.main(["train"]), kept) == (141, ["discarded"])
    command(lambda _: sys.exit(3))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    assert stop.value.code == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            MemoryError("Unable to allocate 1 TiB"),
            "trimask train: error: not enough memory: Unable to allocate 1 TiB\n",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: out of it\nat"),
            "trimask train: error: not enough memory: RESOURCE_EXHAUSTED: out of it\n",
        ),
    ],
)
def test_memory_that_does_not_suffice_is_one_line_with_status_1(error, said, command, capsys):
    def body(_):
        raise error

    command(body)
    assert (cli.main(["train"]), capsys.readouterr().err) == (1, said)
