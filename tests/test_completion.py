"""Tab completion: what bash, zsh and fish offer after the words of a command."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from trimask.configs.policies import POLICIES
from trimask.configs.presets import PRESETS
from trimask.configs.studies import STUDIES
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.scripts import cli, completion
from trimask.scripts.benchmark import BENCHMARKS

PARTS = {"study": STUDIES, "benchmark": BENCHMARKS}
COMMANDS = [[name, *part] for name in cli.COMMANDS for part in ([[p] for p in PARTS[name]] if name in PARTS else [[]])]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs, policies and prepared data, one of which has a blank in its name."""
    root = tmp_path_factory.mktemp("here")
    for run in ("runs/tiny", "runs/tiny/decayed-9", "runs/my own", ".runs/x"):
        (root / run / "checkpoints").mkdir(parents=True)
        (root / run / "config.json").touch()
    for folder in ("runs/empty", "other/far"):
        (root / folder).mkdir(parents=True)
    (root / "note.txt").touch()
    for file in ("data/digits/manifest.json", "data/digits/config.json", "policies/fast/policy.json"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Shell → its script."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(completion.run(shell))
    return folder


def offered(scripts, here, *lines: list[str]) -> list[list[str]]:
    """Completions that bash offers for the last word of each line."""
    asked = "".join(
        "COMP_WORDS=({}); COMP_CWORD={}; _shtab_trimask; printf '%s\\n' \"${{COMPREPLY[@]}}\"; echo ---\n".format(
            " ".join(f"'{word}'" for word in ["trimask", *line]), len(line)
        )
        for line in lines
    )
    script = f"source {scripts / 'bash'}\ncd {here}\n{asked}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return [[word for word in part.split("\n") if word] for part in done.stdout.split("---\n")][:-1]


def test_every_command_has_the_flags_of_its_help(scripts, here, capsys, monkeypatch):
    monkeypatch.setattr(cli, "settle_process", lambda: None)
    found = offered(scripts, here, *([*words, "--"] for words in COMMANDS))
    for words, flags in zip(COMMANDS, found, strict=True):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        # Where a flag begins a line of the help; in its sentences others are named.
        pairs = re.findall(r"^\W*(?:-h, )?(--[a-z][^\s,]*)(?:,\W+(--[a-z][^\s,]*))?", capsys.readouterr().out, re.M)
        helped = {flag for pair in pairs for flag in pair if flag}
        assert helped == set(flags) and len(helped) > 0, words


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([""], list(cli.COMMANDS)),
        (["ev"], ["evaluate"]),
        (["study", ""], list(STUDIES)),
        (["benchmark", ""], list(BENCHMARKS)),
        (["train", "runs/tiny", "--preset", ""], list(PRESETS)),
        (["plan", "trimodal"], [name for name in PRESETS if name.startswith("trimodal")]),
        (["train-policy", "policies/new", "--preset", ""], list(POLICIES)),
        (["study", "sampling", "out", "--preset", ""], ["cpu", "accelerator"]),
        (["generate", "runs/tiny", "--strategy", ""], [*STRATEGIES, "policies"]),
        (["train", "runs/tiny", "--optimizer.schedule", "c"], ["cosine", "constant"]),
        (["evaluate", "runs/tiny", "--checkpoint", ""], ["best"]),
        (["train", "runs/tiny", "--no-r"], ["--no-resume"]),
        (["evaluate", ""], ["runs"]),
        (["evaluate", "runs/"], ["runs/my own", "runs/tiny"]),
        (["evaluate", "runs/t"], ["runs/tiny"]),
        (["train", "runs/tiny", "--tuned-at", "runs/m"], ["runs/my own"]),
        (["study", "unmasking", "out", "--run", "ru"], ["runs"]),
        (["train", "runs/tiny", "--data", "data/"], ["data/digits"]),
        (["train-policy", "policies/"], ["policies/fast"]),
        (["inspect", "n"], ["note.txt"]),
        (["prepare", "new", "--images", "da"], ["data"]),
        (["prepare", "new", "--tokenizers", "runs/m"], ["runs/my own"]),
        (["prepare", "new", "--fields.text", "n"], []),
        (["generate", "runs/tiny", "--strategy", "pol"], ["policies"]),
        (["generate", "runs/tiny", "--strategy", "thr"], ["threshold"]),
        (["train-policy", "p", "--init-from", "policies/"], ["policies/fast"]),
        (["evaluate", "nosuch"], []),
        (["generate", "runs/tiny", "--image", "n"], ["note.txt"]),
        (["generate", "runs/tiny", "--image", "note.txt", "no"], ["note.txt"]),
    ],
    ids=" ".join,
)
def test_bash_offers(scripts, here, line, expected):
    assert offered(scripts, here, line) == [expected]


@pytest.mark.parametrize(
    ("kind", "beginning", "expected"),
    [
        ("run", "./runs/t", ["./runs/tiny"]),
        ("run", ".", [".runs"]),
        ("run", "other/", ["other/far"]),  # none of the kind, so any
        ("run", "runs/tiny/", ["runs/tiny/decayed-9"]),  # it is one itself
        ("run", "runs/my own/", []),
        ("run", '"runs/m', ["runs/my own"]),
        ("run", r"runs/my\ o", ["runs/my own"]),
        ("run", "no/such/", []),
        ("data", "", ["data"]),
        ("made", "", ["data", "runs"]),
        ("policy", "p", ["policies"]),
    ],
)
def test_folders_of_a_kind_and_the_way_to_them(here, monkeypatch, kind, beginning, expected):
    monkeypatch.chdir(here)
    assert completion.folders(kind, beginning) == expected


def test_a_folder_is_found_from_home_and_from_the_root(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert completion.folders("run", "~/runs/t") == ["~/runs/tiny"]
    assert completion.folders("run", f"{here}/runs/t") == completion.folders("run", "$HOME/runs/t")
    assert completion.folders("run", f"{here}/runs/t") == [f"{here}/runs/tiny"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_offers(scripts, here):
    script = f"source {scripts / 'fish'}; cd {here}; complete -C 'trimask train runs/'; complete -C 'trimask stu'"
    done = subprocess.run(["fish", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "runs/my own\tRun folder to write",
        "runs/tiny\tRun folder to write",
        f"study\t{cli.COMMANDS['study'].summary}",
    ]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script_and_finds_folders(scripts, here):
    script = (
        "autoload -Uz compinit && compinit -u -D; "
        f'eval "$(cat {scripts / "zsh"})"; cd {here}; compadd() {{ print -l -- ${{@:3}} }}; '
        "PREFIX=runs/; _trimask_run_dirs; print -l $_comps[trimask]"
    )
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["runs/my own", "runs/tiny", "_shtab_trimask"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_flags_are_explained_by_the_first_sentence_of_their_help(scripts, shell):
    written = (scripts / shell).read_text()
    assert "Learning rate after warmup" in written and "cosine decay to the horizon" not in written
    assert "(default" not in written and "(required" not in written


@pytest.mark.parametrize("shell", ["tcsh", ""])
def test_another_shell_is_refused(shell, capsys):
    with pytest.raises(SystemExit):
        cli.main(["completion", shell])
    assert "bash" in capsys.readouterr().err


def test_nothing_of_the_folder_where_tab_is_pressed_is_imported(scripts, here, tmp_path):
    for name in ("tyro.py", "json.py", "shtab.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "runs").mkdir()
    (tmp_path / "trimask").mkdir()
    (tmp_path / "trimask/__init__.py").touch()
    assert offered(scripts, tmp_path, ["evaluate", "ru"]) == [["runs"]]
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_offered_at_once(here):
    """Nothing heavy is imported when Tab is pressed."""
    code = (
        "import sys; from trimask.scripts import completion; completion.main(['folders', 'run', 'runs/']); "
        "print([name for name in ('jax', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=os.environ, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["runs/my own", "runs/tiny", "[]"]
