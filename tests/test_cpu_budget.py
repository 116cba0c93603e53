"""The CPU time of the tests includes every process, and CI fails if it exceeds the budget."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

BUSY = "import time\nwhile time.process_time() < 0.7: pass"


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """Two tests; one starts a command that uses 0.7 s, and the suite may use 0.1 s."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {Path(__file__).parent}\ntestpaths = .\ncpu_budget_s = 0.1\n"
    )
    (folder / "conftest.py").write_text("pytest_plugins = ['cpu_budget']\n")
    (folder / "test_some.py").write_text(
        "import subprocess, sys\n"
        "def test_nothing(): pass\n"
        f"def test_busy(): subprocess.run([sys.executable, '-c', {BUSY!r}], check=True)\n"
    )
    return folder


def run(suite, *options, ci):
    """Exit status of pytest, what it printed, and the CPU time that the kernel counted."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("CI", "PYTEST", "COV"))}
    environment = others | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"CI": "true"} if ci else {})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_workers_and_commands_count_and_too_much_fails_ci(suite):
    status, printed, used = run(suite, "-p", "xdist", "-n", "1", ci=True)
    assert status == 1 and "2 passed" in printed
    said = float(re.search(r"CPU time: (.*) s of 0.1 allowed: too much\n", printed)[1])
    # Only the end of the process is not counted; the command took 0.7 s.
    assert used - 0.3 < said < used + 0.1


@pytest.mark.parametrize(
    ("ci", "options"), [(False, ()), (True, ("-k", "nothing")), (True, ("test_some.py::test_nothing",))]
)
def test_outside_of_ci_and_of_some_tests_too_much_is_only_said(suite, ci, options):
    status, printed, _ = run(suite, *options, ci=ci)
    assert status == 0 and "s of 0.1 allowed: too much; a run of all tests with CI=true would fail" in printed


def test_a_run_within_its_budget_passes(suite):
    status, printed, _ = run(suite, "-o", "cpu_budget_s=99", ci=True)
    assert status == 0 and re.search(r"CPU time: .* s of 99 allowed\n", printed)
