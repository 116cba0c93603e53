"""The folder of compiled programs: shared by processes, private to the user, and never the cause of an error."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from trimask.scripts import cli, compile_cache, generate
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.completion import _command_parser
from trimask.scripts.console import parse

PROGRAM = """
import jax
from trimask.scripts.compile_cache import Compiling
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
Compiling().settle()
{then}
value = jax.jit(lambda x: jax.numpy.sin(x) / 3)(2.0)
print(float(value).hex(), events.count("cache_hits"), events.count("cache_misses"))
print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


def start(folder: Path, then: str = "", **environment: str) -> subprocess.Popen:
    """A process that compiles a program, its cache folder in `folder`."""
    without = {name: v for name, v in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then)],
        env={**without, "XDG_CACHE_HOME": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> list[str]:
    """Value, cache hits, cache misses, the folder and its bound; fails if the process printed anything else."""
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    return out.split()


def test_the_next_process_finds_the_program_and_computes_the_same_and_two_at_once_get_along(tmp_path):
    first, second = (end(process) for process in [start(tmp_path), start(tmp_path)])
    value, *_, folder, bound = first
    assert folder == str(tmp_path / "trimask" / "xla") and bound == str(512 << 20)
    assert {path.stat().st_mode & 0o777 for path in (Path(folder), Path(folder).parent)} == {0o700}
    assert first[2] == "1" or second[2] == "1"
    assert end(start(tmp_path))[:3] == [value, "1", "0"] and second[0] == value


def test_a_disk_that_is_full_costs_nothing_and_leaves_nothing_behind(tmp_path):
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    value, *_ = end(start(tmp_path, f"{limited}resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"))
    assert [path.stat().st_size for path in (tmp_path / "trimask" / "xla").glob("*-cache")] == [100]
    assert end(start(tmp_path))[:3] == [value, "0", "1"]
    assert [path.stat().st_size > 100 for path in (tmp_path / "trimask" / "xla").glob("*-cache")] == [True]


def test_a_folder_that_jax_was_told_of_is_left_as_it_is(tmp_path):
    told = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert end(start(tmp_path, **told))[2:] == ["1", str(tmp_path / "mine"), "-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("wanted", "named", "is_of_several", "expected"),
    [
        (False, None, False, {"jax_enable_compilation_cache": False}),
        (False, "mine", False, {"jax_enable_compilation_cache": False}),
        (True, None, True, {}),
        (True, "mine", False, {}),
        (True, "", False, {}),
    ],
)
def test_no_folder_is_made_that_is_not_wanted(tmp_path, monkeypatch, wanted, named, is_of_several, expected):
    settings: dict[str, object] = {}
    config = SimpleNamespace(jax_compilation_cache_dir=named, update=settings.__setitem__)
    distributed = SimpleNamespace(is_initialized=lambda: is_of_several)
    monkeypatch.setattr(compile_cache, "jax", SimpleNamespace(config=config, distributed=distributed))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Compiling(compile_cache=wanted).settle()
    assert settings == expected and list(tmp_path.iterdir()) == []


def test_a_folder_in_which_others_could_put_programs_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compile_cache._own_folder()
    assert folder == tmp_path / "trimask" / "xla"
    for part in (folder, folder.parent):
        for mode in (0o720, 0o702):
            part.chmod(mode)
            assert compile_cache._own_folder() is None
        part.chmod(0o755)
        assert compile_cache._own_folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: os.stat(folder).st_uid + 1)
    assert compile_cache._own_folder() is None


def test_where_no_folder_can_be_made_there_is_none(tmp_path, monkeypatch):
    (tmp_path / "trimask").write_text("a file")
    for place in (str(tmp_path), "/proc", str(tmp_path / "none" / "there")):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert compile_cache._own_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert compile_cache._own_folder() is not None
    monkeypatch.setattr(os, "access", lambda folder, mode: not (folder.name == "xla" and mode == os.W_OK))
    assert compile_cache._own_folder() is None


def test_a_folder_that_cannot_be_locked_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_PATIENCE_S", 0.01)
    with FileLock(tmp_path / ".lockfile"):
        assert not compile_cache._tidied(tmp_path)
    assert compile_cache._tidied(tmp_path)


@pytest.mark.parametrize(("system", "place"), [("linux", ".cache"), ("darwin", "Library/Caches")])
@pytest.mark.parametrize("given", ["", "not/absolute"])
def test_without_xdg_it_is_the_cache_folder_of_the_system(tmp_path, monkeypatch, system, place, given):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    (tmp_path / "Library").mkdir()
    assert compile_cache._own_folder() == tmp_path / place / "trimask" / "xla"


def test_what_was_half_written_goes_and_so_do_the_oldest_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_MOST_PROGRAMS", 2)
    for second, name in enumerate(("b", "c", "a")):
        (tmp_path / f"{name}-cache").write_text(name)
        (tmp_path / f"{name}-atime").write_text(name)
        os.utime(tmp_path / f"{name}-atime", (second, second))
    (tmp_path / "half-cache").write_text("")
    (tmp_path / "gone-atime").write_text("")
    assert compile_cache._tidied(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {".lockfile"} == {"a-atime", "a-cache", "c-atime", "c-cache"}


def test_the_flag_is_settled_with_the_arguments(monkeypatch):
    settled = []
    monkeypatch.setattr(Compiling, "settle", lambda self: settled.append(self.compile_cache))
    words = ["run", "--prompt", "seven", "--to", "image"]
    for given in ([], ["--no-compile-cache"]):
        parse(generate.Arguments, [*words, *given], "generate", "")
    assert settled == [True, False]


def test_commands_that_keep_programs_have_the_flag():
    """Commands that measure compiling, or give their processes a cache of their own, do not have it."""
    others = ("study", "benchmark", "completion")
    modules = {name: command.module for name, command in cli.COMMANDS.items() if name not in others}
    flags = {
        name: {f for a in _command_parser(module, [])._actions for f in a.option_strings}
        for name, module in modules.items()
    }
    assert {name for name, words in flags.items() if "--no-compile-cache" in words} == {
        "demo", "evaluate", "generate", "train", "train-policy",
    }  # fmt: skip
