"""`make mutate`: the mutants it draws, and a small project whose mutants have every possible verdict."""

import ast
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import __main__ as command
from mutation import copies
from mutation.copies import Copy, Limits, PytestRun, Verdict, files_of, judge, make_copy, rooms_of
from mutation.mutants import changes, draw_mutants, mutant_of, statements
from mutation.plugin import CONTEXT
from mutation.recording import Recording, record_coverage, state_digest
from mutation.results import Result, disproved, equivalents, read_results, result_of, stale_equivalents

ROOT = Path(__file__).parents[1]

MUTANTS = {
    "a < b <= c": {"a <= b <= c", "a < b < c"},
    "a + b * c": {"a - b * c", "a + b / c"},
    "(a + b) * c": {"(a - b) * c", "(a + b) / c"},
    "[-a, ~b]": {"[a, ~b]", "[-a, b]"},
    "a and b or c": {"(a or b) or c", "(a and b) and c"},
    "not (a is b)": {"a is b", "not a is not b"},
    "{'α': 0, 'β': 1.5, 'γ': True}": {
        "{'α': 1, 'β': 1.5, 'γ': True}",
        "{'α': 0, 'β': 3.0, 'γ': True}",
        "{'α': 0, 'β': 1.5, 'γ': False}",
    },
    "a if b else c": {"c if b else a"},
    "a[b:c]": {"a[b + 1:c]", "a[b:c - 1]"},
    "[a for a in b if a]": {"[a for a in b if not a]"},
    "f(a, b, c=d)": {"f(b, a, c=d)", "f(a, b)"},
    "zip(a, b[c:], strict=True)": {"zip(b[c:], a, strict=True)", "zip(a, b[c + 1:], strict=True)"},
    "f(a, strict=True)": {"f(a)", "f(a, strict=False)"},
    "a.open(encoding='utf-8', mode=b)": {"a.open(encoding='utf-8')"},
    "m.max(a, b)": {"m.min(a, b)"},
    "m.log(a)": {"a"},
    "sorted(a, key=b)": {"list(a)", "sorted(a)"},
    "f'{a + b:{c}} is {d}'": {"f'{a - b:{c}} is {d}'"},
    "(f'{a} is '\n    f'{b + c}')": {"f'{a} is {b - c}'"},
}


def mutants_of(statement) -> set[str]:
    """Texts of all mutants of a statement, as Python writes them."""
    found = [mutant_of(statement, change) for change in changes(statement.node)]
    return {ast.unparse(ast.parse(mutant.text)) for mutant in found if mutant}


@pytest.mark.parametrize("expression", MUTANTS)
def test_an_expression_has_the_mutants_of_its_kind(expression):
    [statement] = statements("f.py", f"x = {expression}\n")
    assert mutants_of(statement) == {ast.unparse(ast.parse(f"x = {text}")) for text in MUTANTS[expression]}


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("f(a)", {"pass"}),
        ("a += b", {"pass", "a -= b"}),
        ("a.b = c", {"pass"}),
        ("assert a", {"pass"}),
        ("raise ValueError(f'{a + 1} is wrong')", {"pass"}),
        ("if not a: pass", {"if a: pass"}),
        ("while a: break", {"while a: continue"}),
        ("def f(a=1): return b, c", {"def f(a=2): return b, c", "def f(a=1): return c, b"}),
        ("def f(): return a", {"def f(): return None"}),
        ("def f(): return None", set()),
    ],
)
def test_a_statement_has_the_mutants_of_its_kind(source, texts):
    found = set().union(*(mutants_of(statement) for statement in statements("f.py", source)))
    assert found == {ast.unparse(ast.parse(text)) for text in texts}


def test_statements_without_effect_have_no_mutant():
    source = (
        '"""Text."""\nimport a\nfrom b import c\nFill = Literal[1, 2]\nx: Literal[1]\n'
        "class P(Protocol):\n    y: int = 1\n"
        "def f(x: Literal[1]) -> Literal[2]:\n    ...\n"
        "if __name__ == '__main__':\n    f(1)\n"
    )
    assert statements("f.py", source) == []


def test_a_statement_has_the_lines_of_its_header_and_whether_it_runs_at_import():
    source = (
        "A = 1\nclass B:\n    c: int = 2\n    def d(self, e=3):\n"
        "        if (e >\n            4):\n            return f(\n                5)\n"
    )
    found = [(s.function, s.lines, s.runs_at_import) for s in statements("f.py", source)]
    assert found == [
        ("", range(1, 2), True),
        ("B", range(3, 4), True),
        ("B", range(4, 5), True),
        ("B.d", range(5, 7), False),
        ("B.d", range(7, 9), False),
    ]


def test_the_draw_depends_on_the_seed_alone():
    sources = {f"{name}.py": "a = b + 1\nc = d < 2\nif e: f(3)\n" for name in "xyz"}
    backwards = dict(reversed(sources.items()))
    first = [mutant.key for mutant in draw_mutants(sources, 5)]
    assert first == [mutant.key for mutant in draw_mutants(backwards, 5)]
    assert first != [mutant.key for mutant in draw_mutants(sources, 6)]
    assert len(set(first)) == 12  # every statement once


def test_an_equivalent_is_recognised_when_lines_move_and_missed_when_its_own_change():
    [mutant] = draw_mutants({"f.py": "def g():\n    return a < b\n"}, 0)
    text = (
        '[[equivalent]]\nfile="f.py"\nfunction="g"\nbefore="return a < b"\nafter="return a <= b"\nreason="a is never b"'
    )
    assert equivalents(text) == {mutant.identity: "a is never b"}
    [moved] = draw_mutants({"f.py": "import c\n\n\ndef g():\n    return a < b\n"}, 0)
    assert moved.identity == mutant.identity
    assert stale_equivalents(equivalents(text), {"f.py": moved.statement.source}) == []
    assert stale_equivalents(equivalents(text), {"f.py": "def g():\n    return b < a\n"}) == [mutant.identity]


def test_every_known_equivalent_quotes_a_line_of_the_sources():
    known = equivalents((ROOT / command.EQUIVALENTS).read_text())
    assert stale_equivalents(known, {file: (ROOT / file).read_text() for file, *_ in known}) == []
    assert [one for one, reason in known.items() if not reason] == []


def test_the_state_digest_changes_with_sources_and_tests_but_not_with_this_tool_or_texts(tmp_path):
    def state(**changed: str) -> str:
        files = {"diffusion/x.py": "1", "tests/test_x.py": "2", "tests/mutation/y.py": "3", "README.md": "4"} | changed
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return state_digest(tmp_path, files)

    assert state() == state(**{"tests/mutation/y.py": "30", "README.md": "40"})
    changed = ("diffusion/x.py", "tests/test_x.py", "tests/pictures/x.png")
    assert len({state(), *(state(**{name: "50"}) for name in changed)}) == 4


def test_a_copy_contains_a_mutant_within_a_context_and_python_never_reuses_an_older_module(tmp_path):
    """Python reuses a cached module if the time and the size of its file are the same."""
    [mutant] = draw_mutants({"f.py": "a = b + c\n"}, 0)
    copy, path = Copy(tmp_path, tmp_path), tmp_path / "tree/f.py"
    path.parent.mkdir()
    times = []
    for _ in range(2):
        with copy.holding(mutant):
            assert path.read_text() == "a = b - c\n"
            times.append(int(path.stat().st_mtime))
        assert path.read_text() == "a = b + c\n"
        times.append(int(path.stat().st_mtime))
    assert len(set(times)) == 4


def test_python_imports_the_copy_although_the_project_is_installed(tmp_path):
    """Its rooms are those beside the copy of trimask/, which is the first on the path of every process."""
    modules = [next((ROOT / room).glob("*.py")) for room in rooms_of(ROOT).values()]
    files = ["pyproject.toml", "trimask/__init__.py", *(str(path.relative_to(ROOT)) for path in modules)]
    copy = make_copy(ROOT, files, tmp_path / "copy", tmp_path / "compiled")
    assert [link.name for link in copy.site.iterdir() if link.is_symlink()] == ["trimask"]
    (copy.tree / "trimask/__init__.py").write_text("")
    with pytest.raises(subprocess.CalledProcessError):
        python = [sys.executable, "-c", "import trimask.tokenizers"]
        subprocess.run(python, cwd=copy.tree, env=copy.environment(), check=True, capture_output=True)


def watched(status=0, ended=(), failed=(), running="") -> PytestRun:
    return PytestRun(set(ended), dict.fromkeys(failed, "AssertionError: "), running, status)


@pytest.mark.parametrize(
    ("processes", "status", "test", "tests_run"),
    [
        ([watched(0, "abc")], "survived", "", 3),
        ([watched(1, "ab", failed="b")], "caught", "b", 2),
        ([watched(None, "a", running="b"), watched(0, "c")], "timed out", "b", 2),
        ([watched(None, "a", running="b"), watched(1, "c", failed="c")], "caught", "c", 2),
        ([watched(None, "a", running="b"), watched(None, running="c")], "timed out", "b", 1),
        ([watched(None, "", running="")], "timed out", "importing", 0),
        ([watched(-signal.SIGKILL, "a", running="b"), watched(0, "c")], "timed out", "b", 2),
        ([watched(-signal.SIGSEGV, "a", running="b")], "caught", "b", 1),
        ([watched(2)], "caught", "importing", 0),
    ],
)
def test_a_mutant_is_caught_by_a_test_that_fails_and_not_by_one_that_hangs(
    processes, status, test, tests_run, tmp_path, monkeypatch
):
    (tmp_path / "log").write_text("")
    left = iter(processes)
    monkeypatch.setattr(copies, "run_tests", lambda *_: next(left))
    verdict = judge(Copy(tmp_path, tmp_path), list("abc"), Limits(seconds={}, patience=1, cap=60))
    assert (verdict.status, verdict.test, verdict.tests_run) == (status, test, tests_run)
    assert list(left) == []


def test_a_mutant_survives_if_its_tests_do_not_fail_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "run_tests", lambda *_: watched(None, "a", running="b"))
    verdict = judge(Copy(tmp_path, tmp_path), list("abc"), Limits(seconds={}, patience=1, cap=0))
    assert (verdict.status, verdict.why) == ("survived", "not all of 3 tests ran in 0 s")


def test_a_test_that_fails_on_the_original_code_catches_no_mutant():
    [mutant] = draw_mutants({"f.py": "a = b < c\n"}, 0)
    results = [result_of(mutant, Verdict("caught", test)) for test in ("sound", "flaky")]
    assert [result.status for result in disproved(results, {"flaky"})] == ["caught", "survived"]


PROJECT = {
    "pyproject.toml": (
        '[tool.setuptools.package-dir]\n"toy.rooms" = "rooms"\n'
        '[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\ntestpaths = ["tests"]\n'
    ),
    ".gitignore": ".mutation/\n",
    "rooms/sums.py": (
        "import time\n\nIS_ON = True\n\n"
        "def checked(a, b):\n    return a + b\n\n"
        "def barely_checked(a, b):\n    return a < b\n\n"
        "def forever(n, step):\n    while n:\n        time.sleep(step)\n        n -= step\n\n"
        "def elsewhere(a, b):\n    return a - b\n\n"
        "def unused(a, b):\n    return a * b\n\n"
        "def shared(a, b):\n    return a / b\n\n"
        "def compiled(a, b):\n    return a // b\n"
    ),
    "tests/test_sums.py": (
        "import functools, subprocess, sys\nimport pytest\nfrom toy.rooms import sums\n\n"
        "@pytest.fixture(scope='module')\ndef half():\n    return sums.shared(1, 2)\n\n"
        "def test_first(half):\n    pass\n\n"
        "def test_second(half):\n    assert half == 0.5\n\n"
        "def test_sum():\n    assert sums.checked(2, 3) == 5\n\n"
        "def test_less():\n    assert sums.barely_checked(1, 2)\n\n"
        "def test_end():\n    assert sums.forever(0.02, 0.01) is None\n\n"
        "def test_process():\n    code = 'from toy.rooms import sums; print(sums.elsewhere(5, 2))'\n"
        "    assert subprocess.check_output([sys.executable, '-c', code], text=True) == '3\\n'\n\n"
        "@functools.cache\ndef made():\n    return sums.compiled(9, 2)\n\n"
        "def test_third():\n    made()\n\ndef test_third_again():\n    assert made() == 4\n"
    ),
    "tests/test_use.py": (
        "from toy.rooms import sums\n\ndef test_use():\n    assert sums.checked(1, sums.IS_ON) == 2\n"
    ),
    "tests/test_defaults.py": "def test_definitions():\n    pass\n",
    "tests/mutation/equivalents.toml": (
        '[[equivalent]]\nfile = "rooms/sums.py"\nfunction = "forever"\n'
        'before = "time.sleep(step)"\nafter = "pass"\nreason = "it only takes less time"\n'
    ),
}
EXPECTED = {
    "": ("caught", "test_use"),
    "checked": ("caught", "test_sum"),
    "barely_checked": ("survived", ""),
    "forever": ("timed out", "test_end"),
    "elsewhere": ("caught", "test_process"),
    "unused": ("not executed", ""),
    "shared": ("caught", "test_second"),
    "compiled": ("caught", "test_third_again"),
}
ARGUMENTS = command.Arguments(number=9, seed=3, jobs=1, patience_s=3)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project of nine statements, after the command has tested a mutant of each."""
    root = tmp_path_factory.mktemp("project")
    for name, text in PROJECT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # pytest starts in an eighth of the time
        patch.setenv(CONTEXT, "tests/test_mutate.py")  # as when these tests are recorded themselves
        assert command.main(ARGUMENTS, root) == 1
    return root


def results(project: Path) -> list[Result]:
    [path] = (project / ".mutation").glob("*.jsonl")
    return list(read_results(path).values())


def test_caught_survived_hanging_and_unexecuted_mutants_are_distinguished(project):
    """Mutants reach tests that start processes; what a shared fixture executes counts for all tests that use it.

    What one test has made is tested by another, which does not execute it again.
    """
    found = {result.function: (result.status, result.test.split("::")[-1]) for result in results(project)}
    assert found == EXPECTED


def test_the_working_tree_does_not_change(project):
    assert {name: (project / name).read_text() for name in PROJECT} == PROJECT


def test_tests_that_read_definitions_are_chosen_for_statements_that_run_at_import(project):
    [recorded] = (path.parent for path in (project / ".mutation").glob("*/events"))
    recording, reader = Recording(recorded), "tests/test_defaults.py::test_definitions"
    read = {s.function for s in statements("rooms/sums.py", PROJECT["rooms/sums.py"]) if reader in recording.choose(s)}
    assert read == {""}


def test_the_timeout_of_a_test_includes_the_fixtures_of_its_file(tmp_path):
    limits = Limits(seconds={"a.py::first": 20.0, "a.py::second": 1.0, "b.py::other": 2.0}, patience=5, cap=60)
    assert [limits.timeout_s(test) for test in ("a.py::second", "b.py::other", "c.py::new")] == [
        5 + 10 + 63,
        5 + 20 + 6,
        5,
    ]


def test_the_same_command_continues_where_it_was_stopped(project, monkeypatch):
    [path] = (project / ".mutation").glob("*.jsonl")
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    judged = []
    monkeypatch.setattr(command, "judge", lambda *_: judged.append(1) or Verdict("survived"))
    command.main(ARGUMENTS, project)
    assert len(judged) == 1 and len(results(project)) == 8
    path.write_text(whole)


def test_a_recording_continues_where_it_was_stopped(project, tmp_path, monkeypatch):
    [recorded] = (path.parent for path in (project / ".mutation").glob("*/events"))
    stopped = shutil.copytree(recorded, tmp_path / "again.partial")
    (stopped / "coverage").rename(stopped / "coverage.earlier")
    lines = (stopped / "events").read_text().splitlines(keepends=True)
    (stopped / "events").write_text("".join(line for line in lines if '::test_sum"' not in line) + '{"event": "st')
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    copy = make_copy(project, files_of(project), tmp_path / "copy", tmp_path / "compiled")
    again = record_coverage(copy, tmp_path / "again", 1, lambda done, total: None)
    assert "1 passed" in (again.folder / "log").read_text()
    for statement in statements("rooms/sums.py", PROJECT["rooms/sums.py"]):
        assert set(again.choose(statement)) == set(Recording(recorded).choose(statement))


def test_equivalents_count_neither_as_caught_nor_as_survived(project, capsys):
    command.main(ARGUMENTS, project)
    out = capsys.readouterr().out
    assert "62.5%" in out  # 5 of 8, with a ninth that is equivalent
