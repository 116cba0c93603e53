"""Child processes end soon after their command is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimask.diffusion.run.children import require_program, run_watched


def is_running(process):
    """Whether the process exists and is not a zombie."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


POOL = """
    import concurrent.futures, multiprocessing, time
    from trimask.diffusion.run.children import end_with
    if __name__ == "__main__":
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(2, context, end_with, (os.getpid(),))
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""
GRAIN = """
    import time
    import jax
    from trimask.diffusion.run.step_loop import LoopConfig, prefetched
    if __name__ == "__main__":
        for step, process in prefetched(lambda step: os.getpid(), 0, 1000, LoopConfig(workers=2)):
            print(process, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("script", [POOL, GRAIN])
def test_workers_end_with_a_command_that_was_killed(tmp_path, script):
    lines = "\n".join(line[4:] for line in script.splitlines())
    (tmp_path / "command.py").write_text(f"import os, sys\n{lines}")
    with subprocess.Popen([sys.executable, "command.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as command:
        workers = {int(next(command.stdout)) for _ in range(2 if script is GRAIN else 1)}
        assert all(map(is_running, workers))
        os.kill(command.pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while any(map(is_running, workers)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_another_program_ends_with_the_command_that_runs_it(tmp_path):
    child = "import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'there'); time.sleep(60)"
    load = "import sys; from trimask.diffusion.run.children import run_watched"
    script = f"{load}; run_watched([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as command:
        while not (tmp_path / "there").exists():
            time.sleep(0.02)
        program = int((tmp_path / "there").read_text())
        assert is_running(program)
        os.kill(command.pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while is_running(program):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_program_that_ends_has_its_status_and_what_it_said():
    done = run_watched([sys.executable, "-c", "import sys; print('out'); print('no', file=sys.stderr); sys.exit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "no\n")


def test_a_program_that_cannot_be_run_is_refused_with_its_flag(tmp_path):
    (tmp_path / "text").write_text("no program")
    for path in (tmp_path / "none", tmp_path / "text", tmp_path, Path("\x1b[31m")):
        with pytest.raises(ValueError, match=r"--python must be an executable program, got "):
            require_program(path, "--python")
    require_program(Path(sys.executable), "--python")
