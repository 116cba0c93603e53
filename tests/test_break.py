"""`make break`: one of its cases, and the functions that judge outcomes."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from breaking.calls import Flag
from breaking.damage import DAMAGES
from breaking.judging import faults_of
from breaking.running import Outcome

ROOT = Path(__file__).parents[1]


def test_a_damaged_file_is_judged_without_a_fault(tmp_path):
    # This seed's first damaged file once had a fault; `make break` draws other seeds and kinds.
    command = [sys.executable, "-m", "breaking", "--quick", "--seed", "133344", "--jobs", "1", "--only", "files:0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "files: 1 cases, 0 with a fault" in done.stdout


@pytest.mark.parametrize("way", list(DAMAGES))
def test_every_way_of_damaging_a_file_changes_it(tmp_path, way):
    folder = tmp_path / "case-0" / "in"
    folder.mkdir(parents=True)
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(name.encode() * 400)
    DAMAGES[way](folder / "a.bin", random.Random(1))
    path = folder / "a.bin"
    is_same = path.is_file() and not path.is_symlink() and path.read_bytes() == b"a.bin" * 400
    assert not is_same


@pytest.mark.parametrize(
    ("done", "fault"),
    [
        (Outcome(0, "fine", "", 1.0), None),
        (Outcome(2, "", "trimask: error: no", 1.0), None),
        (Outcome(2, "", "Traceback (most recent call last)\nValueError: x", 1.0), "traceback: ValueError: x"),
        (Outcome(-6, "", "F0000 stack", 1.0), "status -6: F0000 stack"),
        (Outcome(2, "", " ", 1.0), "status 2 without a message"),
        (Outcome(0, "a\x1b[31m", "", 1.0), "control characters on the terminal"),
        (Outcome(0, "", "", 1.0, left_running=("worker",)), "left running: worker"),
        (Outcome(-15, "half", "", 1.0, is_late=True), "not done in time: half"),
        (Outcome(-9, "", "", 1.0, fault="eats the machine"), "eats the machine"),
    ],
)
def test_faults_of_an_outcome_are_named(done, fault):
    assert faults_of(done) == ([] if fault is None else [fault])
    if done.is_late:
        assert faults_of(done, may_be_late=True) == []


@pytest.mark.parametrize(
    ("kind", "refused", "taken"),
    [
        ("INT [1, 16,777,216]", ["0", "16777217", "nan", "1.5", "", "x", "1" + 400 * "0"], ["1", "16777216"]),
        ("{None}|FLOAT (0, 86,400]", ["-0.5", "1e400", "inf"], ["None", "86400"]),
        ("FLOAT≥0", ["-1", "nan"], ["0", "1e300"]),
        ("{a,b}", ["c", ""], ["a"]),
        ("{None}|STR", [], ["", "nan"]),
    ],
)
def test_values_that_a_flag_must_refuse_are_read_from_the_help(kind, refused, taken):
    flag = Flag("--x", kind)
    assert [value for value in refused if not flag.must_refuse(value)] == []
    assert [value for value in taken if flag.must_refuse(value)] == []
