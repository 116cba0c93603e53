"""The training loop: interrupted, killed, out of space or diverged, it loses nothing and reports what it did."""

import io
import json
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from trimask.diffusion.run import step_loop
from trimask.diffusion.run.divergence import Diverged
from trimask.diffusion.run.folder import NotWritten, checkpoint_steps
from trimask.diffusion.run.running_mean import Mean
from trimask.diffusion.run.step_loop import Interrupted, LoopConfig, train_loop

CONFIG = LoopConfig(log_every=2, checkpoint_every=4)


class Killed(BaseException):
    """Simulates the death of the process: nothing is saved after it."""


@jax.jit
def step(state, batch):
    return {"x": state["x"] + 1, "big": state["big"]}, {"loss": Mean(batch["x"], jnp.ones(()))}


def start(size: int = 3):
    return {"x": jnp.zeros(()), "big": jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)}


def number(index):
    return {"x": np.asarray(index, np.float32)}


def run(folder: Path, num_steps: int, config: LoopConfig = CONFIG, batch=number, state=None, step=step, **options):
    options = {"items": lambda _: 1, "describe": lambda index: {"ids": [[f"example {index}"]]}, **options}
    state = start() if state is None else state
    return train_loop(step, state, batch, num_steps=num_steps, folder=folder, config=config, **options)


def lines(folder: Path) -> list[tuple[int, float]]:
    content = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, content)]


def at(moment: int, act):
    """A step function that calls `act` before step number `moment`."""

    def acting(state, batch):
        if int(batch["x"]) + 1 == moment:
            act()
        return step(state, batch)

    return acting


def kill():
    raise Killed


@contextmanager
def no_file_larger_than(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_are_means_and_a_torn_one_is_repaired(tmp_path):
    run(tmp_path, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert float(run(tmp_path, 5)["x"]) == 5
    assert lines(tmp_path) == [(2, 0.5), (4, 2.5), (5, 4.0)]


def test_every_step_is_logged_once_however_often_the_run_is_killed(tmp_path):
    config = LoopConfig(log_every=1, checkpoint_every=4)
    for moment in (2, 6, 7, 11):
        with pytest.raises(Killed):
            run(tmp_path, 13, config, step=at(moment, kill))
    assert float(run(tmp_path, 13, config)["x"]) == 13
    assert lines(tmp_path) == [(number + 1, float(number)) for number in range(13)]


def test_samples_of_a_step_whose_checkpoint_was_lost_come_again(tmp_path):
    sampled = []

    def sample(_, done):
        sampled.append(done)
        if sampled == [4]:
            raise Killed

    config = LoopConfig(checkpoint_every=4, sample_every=4)
    with pytest.raises(Killed):
        run(tmp_path, 9, config, sample=sample)
    run(tmp_path, 9, config, sample=sample)
    assert sampled == [4, 4, 8]


@pytest.mark.parametrize(("number_of", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_it_names(number_of, status, tmp_path):
    with pytest.raises(Interrupted, match=r"stopped at step 3, saved in .*; the same command resumes") as caught:
        run(tmp_path, 9, step=at(3, lambda: signal.raise_signal(number_of)))
    assert caught.value.exit_status == status
    assert checkpoint_steps(tmp_path) == [3]


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    def impatient():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 20, step=at(6, impatient))
    assert checkpoint_steps(tmp_path) == [4]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_samples_are_drawn_saves_that_step(tmp_path):
    def sample(_, done):
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped at step 2"):
        run(tmp_path, 9, LoopConfig(sample_every=1), sample=sample)
    assert checkpoint_steps(tmp_path) == [2]


def test_a_signal_at_the_last_step_is_not_forgotten(tmp_path):
    with pytest.raises(Interrupted, match="stopped at step 3"):
        run(tmp_path, 3, step=at(3, lambda: signal.raise_signal(signal.SIGTERM)))
    assert checkpoint_steps(tmp_path) == [3]


def test_a_terminated_command_says_so_in_its_last_line_and_status(tmp_path):
    code = (
        "import os, signal, sys, types, pathlib, jax.numpy as jnp, numpy as np\n"
        "from trimask.diffusion.run.step_loop import LoopConfig, train_loop\n"
        "from trimask.diffusion.run.running_mean import Mean\n"
        "from trimask.scripts import cli\n"
        "def step(state, batch):\n"
        "    if batch == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return state, {'loss': Mean(jnp.ones(()), jnp.ones(()))}\n"
        "def body(argv):\n"
        "    train_loop(step, {'x': jnp.zeros(())}, lambda index: index, num_steps=9, folder=pathlib.Path('run'),\n"
        "        config=LoopConfig(), items=lambda step: 1)\n"
        "sys.modules['trimask.scripts.train'] = types.SimpleNamespace(main=body)\n"
        "sys.exit(cli.main(['train']))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 143, process.stderr
    assert process.stderr == "trimask train: stopped at step 4, saved in run; the same command resumes\n"
    assert checkpoint_steps(tmp_path / "run") == [4]


def test_a_full_disk_is_explained_and_the_same_command_goes_on_after_it(tmp_path, capfd):
    big = start(100_000)
    run(tmp_path, 4, state=big)
    refused = pytest.raises(NotWritten, match=f"{tmp_path}: could not be written: File too large.*of step 4, is unt")
    with no_file_larger_than(100_000), refused:
        run(tmp_path, 20, state=big)
    assert "Traceback" not in capfd.readouterr().err
    assert checkpoint_steps(tmp_path)[-1] == 4
    assert float(run(tmp_path, 20, state=big)["x"]) == 20
    assert [done for done, _ in lines(tmp_path)] == list(range(2, 21, 2))


def test_a_full_disk_that_only_stops_the_metrics_is_explained_too(tmp_path):
    refused = pytest.raises(NotWritten, match=r"could not be written: File too large. The same command resumes")
    with no_file_larger_than(4000), refused:
        run(tmp_path, 1000, LoopConfig(log_every=1))
    run(tmp_path, 60, LoopConfig(log_every=1))
    assert lines(tmp_path) == [(number + 1, float(number)) for number in range(60)]


def test_another_process_in_the_folder_is_refused(tmp_path):
    code = (
        "import sys, pathlib\nfrom trimask.diffusion.run.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print(end='held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as process:
        process.stdout.read(4)
        with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
            run(tmp_path, 3)
        process.kill()
    run(tmp_path, 3)


def spoiled(*, at: int, value: float):
    """Batches of ones, except one."""
    return lambda index: {"x": np.asarray(value if index + 1 == at else 1, np.float32)}


def test_a_loss_that_is_not_finite_stops_at_its_own_step_and_names_its_batch(tmp_path):
    refused = pytest.raises(Diverged, match=r"stopped at step 7: loss is nan; the last good checkpoint is of step 4")
    with refused:
        run(tmp_path, 20, batch=spoiled(at=7, value=np.nan))
    content = json.loads((tmp_path / "diverged-step-7.json").read_text())
    assert content["batch"] == {"ids": [["example 6"]]}
    assert checkpoint_steps(tmp_path) == [4] and lines(tmp_path)[-1][0] == 6


def test_a_state_that_is_not_finite_is_not_saved_even_where_the_loss_is(tmp_path):
    def overflowing(state, batch):
        state, metrics = step(state, batch)
        return {**state, "big": state["big"] * 1e30}, metrics

    with pytest.raises(Diverged, match="stopped at step 4: big is not finite; there is no checkpoint yet"):
        run(tmp_path, 9, step=overflowing)
    assert checkpoint_steps(tmp_path) == []


def test_a_spike_stops_a_resumed_run_where_it_stops_an_uninterrupted_one(tmp_path):
    def batch(index):  # the mean falls, and with it the limit; the spike is between those of 50 and of 60 steps
        loss = 1 / (1 + index / 10) if index != 61 else 2.0
        return {"x": np.asarray(loss, np.float32)}

    reports = []
    for stops in ([80], [58, 80]):
        folder = tmp_path / str(len(stops))
        with pytest.raises(Diverged, match="spike-factor"):
            for stop in stops:
                run(folder, stop, LoopConfig(spike_factor=5.5), batch=batch)
        reports.append(json.loads((folder / "diverged-step-62.json").read_text()))
    assert reports[0]["recent_mean"] == reports[1]["recent_mean"]
    assert float(run(folder, 80, LoopConfig(spike_factor=None), batch=batch)["x"]) == 80


@pytest.mark.parametrize("keep_best", [0, 1])
def test_a_metric_to_find_the_best_by_has_to_exist(tmp_path, keep_best):
    with pytest.raises(ValueError, match="best-metric must be one of loss; got bits"):
        run(tmp_path, 3, LoopConfig(keep_best=keep_best, best_metric="bits"))


@pytest.mark.parametrize(
    ("field", "value"), [("keep_last", 0), ("keep_every", 0), ("keep_best", -1), ("spike_factor", 1.0)]
)
def test_numbers_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must"):
        LoopConfig(**{field: value})


def test_the_bar_shows_steps_loss_and_rate():
    bar = step_loop._ProgressBar(10, 3)
    screen = io.StringIO()
    paper = Console(file=screen, width=120, force_terminal=False, color_system=None)
    paper.print(bar.bar.get_renderable())
    bar(7, {"loss": 1.2345, "tokens_per_second": 6789.4})
    paper.print(bar.bar.get_renderable())
    before, after = (re.sub(r"[━╸╺]+", "…", line).split() for line in screen.getvalue().splitlines())
    assert before[:5] == ["train", "…", "3/10", "steps", "compiling"] and before[-2:] == ["left", "-:--:--"]
    with bar:
        assert bar.bar.live.is_started
    assert not bar.bar.live.is_started
    assert after[:9] == ["train", "…", "7/10", "steps", "loss", "1.234", "·", "6,789", "tokens/s"]


def test_as_many_batches_are_ahead_as_the_configuration_says(monkeypatch):
    asked = []
    for name in ("MultiprocessingOptions", "ReadOptions"):
        kind = getattr(grain, name)
        monkeypatch.setattr(grain, name, lambda *of, kind=kind, **how: asked.append(how) or kind(*of, **how))
    step_loop.prefetched(abs, 0, 9, LoopConfig(workers=0, prefetch=5))
    step_loop.prefetched(abs, 0, 9, LoopConfig(workers=3, prefetch=5))
    in_thread, of_processes, in_process = asked
    assert in_thread == {"num_threads": 1, "prefetch_buffer_size": 5}
    assert of_processes == {"num_workers": 3, "per_worker_buffer_size": 2} and in_process == {"num_threads": 1}
