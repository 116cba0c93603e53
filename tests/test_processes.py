"""Several processes, as on several hosts: they take the same steps as one, stop together, and resume as one."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.mesh import MeshConfig, local_rows
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.run import processes as our_processes
from trimask.diffusion.run.checkpoint import Checkpoints, Retention
from trimask.diffusion.run.divergence import first_non_finite
from trimask.diffusion.run.folder import checkpoint_steps, read_intact_lines
from trimask.diffusion.run.links import SILENCE_S
from trimask.diffusion.run.processes import _GIVEN, ending_together, join, require_agreement, wait_for_all
from trimask.diffusion.run.step_loop import Interrupted, LoopConfig
from trimask.diffusion.transformer import TransformerConfig

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
    optimizer=OptimizerConfig(horizon_tokens=1500, warmup_tokens=100),
    batch=BatchConfig(tokens=112, weights={"spoken": 0.0, "sums": 0.0}),
    loop=LoopConfig(log_every=1, checkpoint_every=4, sample_every=1),
)
SOON_S = 15.0
"""Time in seconds in which all processes must end after one is killed; on an idle machine it takes one second."""
SCRIPT = """
    import sys
    from trimask.diffusion.run.processes import join
    join()
    from tests import test_processes
    getattr(test_processes, sys.argv[1])(*sys.argv[2:])
"""
KILLED = """
    import os, signal, sys, time
    from trimask.diffusion.run.processes import join
    join()
    print("here")  # stays in a buffer
    if os.environ["JAX_PROCESS_ID"] == sys.argv[1]:
        time.sleep(2)  # until the others are here, too
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
LOST = r"process {} of {}: another process has ended or does not answer \(.*\); .* resumes from the newest checkpoint"


def train_as_told(folder: str, data: str, stop: str, fsdp: str, init_from: str | None = None) -> None:
    """Trains, and sends a process a signal at a step: "SIGTERM@8" the last process, "SIGTERM@8@0" the first."""
    own = local_rows(10, MeshConfig(fsdp=2).over(jax.devices()))  # filled up to 12
    if jax.process_count() == 2:
        assert np.flatnonzero(own).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]][jax.process_index()]
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=int(fsdp)))
    name, step, who = [*stop.split("@"), "", ""][:3]
    try:
        loaded = recorded_training(
            Path(folder), Path(data), config, name, int(step or 0), init_from, int(who or jax.process_count() - 1)
        )
    except Interrupted as stopped:
        print("stopped at", stopped.step, flush=True)
        raise
    bits = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(loaded.parameters))
    print("ended with", zlib.crc32(bits), flush=True)


def train_until_stopped(*told: str) -> None:
    """Trains, and ends the process as a command does."""
    try:
        with ending_together():
            train_as_told(*told)
    except Interrupted as stopped:
        raise SystemExit(stopped.exit_status) from stopped


def train_and_meet_faults(folder: str, data: str, alone: str) -> None:
    """In one of two processes: resumes a run, trains another one, and then ends with a fault.

    The same processes do all of this, because starting them takes most of the time.
    """
    with ending_together():
        with pytest.raises(Interrupted):
            train_as_told(f"{folder}/run", data, "SIGTERM@8", "2")
        train_as_told(f"{folder}/both", data, "", "2", alone)
        meet_faults(f"{folder}/faults")


def recorded_training(folder: Path, data: Path, config: TrainConfig, name="", stop=0, init_from=None, who=0):
    """Trains, records which rows the devices of this process were given, and stops where told."""
    plain = Pretraining.step

    def step(self, state, batch):
        number = int(state.step.addressable_data(0))
        rows = {zlib.crc32(row.tobytes()) for s in batch.tokens.addressable_shards for row in np.asarray(s.data)}
        with (folder.parent / f"{folder.name}.seen").open("a") as file:
            file.write(f"{json.dumps([number, jax.process_index(), sorted(rows)])}\n")
        if name and number + 1 == stop and jax.process_index() == who:
            while name == "SIGKILL" and not checkpoint_steps(folder):
                time.sleep(0.01)  # it is saved meanwhile, by both
            os.kill(os.getpid(), getattr(signal, name))
        return plain(self, state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "step", step)
        return train(folder, data, config, init_from=init_from and Path(init_from))


def processes(number: int, devices: int, *words: str, script: str = SCRIPT) -> list[tuple[int, str, str]]:
    """Status, output and errors of several processes, with several devices each, that call a function of this file.

    If one of them is killed, the others end soon.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    shared = {**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *words],
            cwd=Path(__file__).parents[1],
            env=shared | {"JAX_PROCESS_ID": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(number)
    ]
    end = time.monotonic() + 120
    while any(process.poll() is None for process in started):
        if any(process.returncode == -signal.SIGKILL for process in started):
            end = min(end, time.monotonic() + SOON_S)
        if time.monotonic() > end:
            for process in started:
                process.kill()
            raise AssertionError([process.communicate() for process in started])
        time.sleep(0.02)
    return [(process.returncode, *process.communicate()) for process in started]


def told_the_loss(errors: str, number: int, count: int) -> bool:
    """Whether a process reported in one line that another one has ended, and nothing else."""
    _, *lines = errors.splitlines()  # it waited for the others
    return len(lines) == 1 and re.fullmatch(LOST.format(number, count), lines[0]) is not None


def losses(folder: Path) -> list[tuple[int, float]]:
    return [
        (line["step"], pytest.approx(line["loss"], rel=1e-5)) for line in read_intact_lines(folder / "metrics.jsonl")
    ]


def rows_seen(folder: Path) -> dict[int, set[int]]:
    """Step → the rows it was trained on; each process may have taken a step once."""
    seen: dict[int, set[int]] = {}
    lines = [json.loads(line) for line in (folder.parent / f"{folder.name}.seen").read_text().splitlines()]
    assert len({(step, process) for step, process, _ in lines}) == len(lines)
    for step, _, rows in lines:
        seen.setdefault(step, set()).update(rows)
    return seen


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory) -> Path:
    """The folder of a run on one device."""
    folder = tmp_path_factory.mktemp("processes") / "alone"
    recorded_training(folder, prepared.folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def run(prepared, alone) -> Path:
    """The folder of a run on one device until step 5."""
    folder = alone.parent / "run"
    with pytest.raises(Interrupted):
        recorded_training(folder, prepared.folder, CONFIG, "SIGTERM", 5)
    return folder


@pytest.fixture(scope="module")
def killed(prepared, alone) -> list[tuple[int, str, str]]:
    """Two processes of 2 devices each, of which the first is killed in step 6; a checkpoint is of step 4."""
    folder = alone.parent / "both"
    ends = processes(2, 2, "train_until_stopped", str(folder), str(prepared.folder), "SIGKILL@6@0", "2", str(alone))
    assert checkpoint_steps(folder) == [4], ends
    return ends


@pytest.fixture(scope="module")
def two(prepared, alone, run, killed) -> list[tuple[int, str, str]]:
    """Two processes of 2 devices each, which resume the run until step 8, then train `both`, and meet faults."""
    return processes(2, 2, "train_and_meet_faults", str(run.parent), str(prepared.folder), str(alone))


def test_a_run_goes_over_devices_and_processes_with_nothing_twice_and_nothing_skipped(prepared, alone, run, two):
    """1 device → 2 processes of 2 devices each → 1; the same rows and losses as on one device all along."""
    for _, output, errors in two:
        assert "stopped at 8\n" in output, errors
    assert checkpoint_steps(run)[-1] == 8
    recorded_training(run, prepared.folder, CONFIG)

    assert losses(run) == losses(alone) and len(losses(alone)) > 10
    assert rows_seen(run) == rows_seen(alone)


def test_the_first_process_is_killed_while_both_train(killed):
    (status, *_), (second, _, errors) = killed
    assert (status, second) == (-signal.SIGKILL, 1) and told_the_loss(errors, 1, 2), errors


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed_while_the_others_wait_for_nothing(victim):
    """No exchange fails: the others only notice that the link has ended."""
    count = 2 + victim
    for number, (status, output, errors) in enumerate(processes(count, 1, str(victim), script=KILLED)):
        if number != victim:
            assert (status, output) == (1, "here\n") and told_the_loss(errors, number, count), errors


def test_processes_start_from_the_weights_of_a_run_and_end_with_the_same_bits(prepared, alone, two):
    """Killed in between, they resume from their checkpoint."""
    one, both = alone.parent / "one", alone.parent / "both"
    first, second = (re.findall("ended with .*", output) for _, output, _ in two)
    assert first == second and len(first) == 1
    recorded_training(one, prepared.folder, CONFIG, init_from=alone)
    assert losses(both) == losses(one)


def meet_faults(folder: str) -> None:
    """Faults that only the second of two processes meets."""
    second = jax.process_index() == 1
    split = NamedSharding(jax.make_mesh((4,), ("devices",)), PartitionSpec("devices"))
    x = jax.make_array_from_callback((4,), split, lambda part: np.array([0, 1, np.nan, 3], np.float32)[part])
    print("not finite:", first_non_finite({"x": x}))
    with Checkpoints(Path(folder), Retention()) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": x + step}, notes={}, metrics={})
        checkpoints.wait()
        wait_for_all("saved")
        if second:
            for path in (Path(folder) / "checkpoints/2/state").rglob("d/*"):
                path.write_bytes(bytes(path.stat().st_size))
        wait_for_all("damaged")
        print("restored:", checkpoints.restore_newest({"x": x}, set_aside=True).step)
    print("set aside:", [path.name for path in Path(folder, "checkpoints").glob("damaged-*")])
    with pytest.raises(ValueError, match="share their folders; this one differs in") as refusal:
        require_agreement({"same": "a", "folder": f"of {jax.process_index()}"})
    print("refused:", refusal.value, flush=True)
    if second:
        raise jax.errors.JaxRuntimeError("INTERNAL: cuDNN: no execution plan")
    wait_for_all("the second is here")


def test_processes_agree_on_faults_and_end_together(two):
    first, second = two
    for process, finite, number in ((first, None, 0), (second, "x is not finite", 1)):
        assert f"not finite: {finite}\n" in process[1], process[1:]
        assert "restored: 1\nset aside: ['damaged-2']\n" in process[1], process[1:]
        assert process[1].endswith(f"this one differs in folder: of {number}\n"), process[1]
    assert (first[0], second[0]) == (1, 1)
    assert "Traceback" in second[2] and "process 1 of 2: INTERNAL: cuDNN: no execution plan" in second[2], second[2]
    assert "process 0 of 2: another process has ended" in first[2], first[2]


@pytest.mark.parametrize(
    "given",
    [
        {"JAX_NUM_PROCESSES": "2"},
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost:0"},
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost:99999"},
    ],
)
def test_half_of_an_address_is_refused(given, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"number of this one \(from 0\) must all be set; got JAX_COORDINATOR_ADDRESS"):
        join()


@pytest.fixture
def unlinked(monkeypatch):
    """Undoes joining after one test: a process that has joined ends itself at the next error."""
    monkeypatch.setattr(our_processes, "_links", None)


@pytest.mark.parametrize("host", ["127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])])
def test_a_taken_port_is_refused(host, unlinked, monkeypatch):
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        numbers = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}
        for name, value in numbers.items():
            monkeypatch.setenv(f"JAX_{name}", value)
        with pytest.raises(ValueError, match=f"cannot listen at port {port} of JAX_COORDINATOR_ADDRESS: .*in use"):
            join()


SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GIVEN = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        (GIVEN | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, ("node3:61447", 2, 1, [0])),
        (MPI, ("10.0.0.1:61441", 3, 2, [1])),
        ({"on a TPU VM": "with the driver of TPUs"}, ("tpu:8476", 4, 3, None)),
        (GIVEN, ("host:1234", 4, 1, None)),
    ],
)
def test_other_processes_are_looked_for_where_there_are_some(environment, found, unlinked, monkeypatch, capsys):
    for name in (*_GIVEN, *SLURM, *MPI):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    is_tpu_vm = "on a TPU VM" in environment
    monkeypatch.setattr(our_processes, "find_spec", lambda name: name if is_tpu_vm and name == "libtpu" else None)
    if is_tpu_vm:
        monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/vfio")
        monkeypatch.setattr(our_processes, "_detected", lambda: found)
    linked, called = [], []
    monkeypatch.setattr(our_processes, "Links", lambda count, number, lost: (count, number))
    monkeypatch.setattr(our_processes, "_linked", lambda *where: linked.append(where) or ("ours", "bound"))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **how: called.append((where, how)))
    join()
    if found is None:
        assert linked == called == []
        return
    address, *numbers, devices = found
    assert linked == [(tuple(numbers), address)]
    ((where, how),) = called
    assert where == ("ours", *numbers, devices)
    assert how["coordinator_bind_address"] == "bound" and how["cluster_detection_method"] == "deactivate"
    assert how["heartbeat_timeout_seconds"] >= 3 * SILENCE_S  # links are first to miss a process
    said = "process 1 of 4 waits for the others at host:1234\n" if environment is GIVEN else ""
    assert capsys.readouterr().err == said


def test_a_launcher_that_does_not_say_who_is_there_is_refused(unlinked, monkeypatch):
    for name in (*_GIVEN, *SLURM, *MPI):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="a launcher started this process but does not give its number"):
        join()
