"""Several processes, as on several hosts: they take the steps of one, stop together, and go on as one."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.loop import LoopConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.processes import join
from trimask.diffusion.run_folder import checkpoint_steps, read_lines
from trimask.diffusion.train import TrainConfig, train
from trimask.diffusion.transformer import TransformerConfig

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
    optimizer=OptimizerConfig(horizon_tokens=1000, warmup_tokens=100),
    batch=BatchConfig(tokens=112, weights={"spoken": 0.0, "sums": 0.0}),
    loop=LoopConfig(log_every=1, checkpoint_every=100),
)
SCRIPT = """
    import dataclasses, os, pathlib, signal, sys, threading, time, zlib
    from trimask.diffusion.processes import join, losing_none
    join()
    import jax, numpy as np
    from tests.test_processes import CONFIG
    from trimask.diffusion.mesh import MeshConfig, own_rows
    from trimask.diffusion.loop import Interrupted
    from trimask.diffusion.run_folder import read_lines
    from trimask.diffusion.train import train

    folder, data, what = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
    assert jax.process_count() == 2 and len(jax.devices()) == 4
    own = own_rows(10, MeshConfig(fsdp=2).over(jax.devices()))  # filled up to 12
    assert np.flatnonzero(own).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]][jax.process_index()]

    def leave():
        while len(read_lines(folder / "metrics.jsonl")) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, what))

    if jax.process_index() == 1 and what != "stay":
        threading.Thread(target=leave, daemon=True).start()
    try:
        with losing_none():
            loaded = train(folder, data, dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2)))
    except Interrupted as stopped:
        print("stopped at", stopped.step, flush=True)
        raise SystemExit(stopped.exit_status)
    print(zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(loaded.parameters))))
"""


def two_processes(folder: Path, data: Path, what: str) -> list[tuple[int, str, str]]:
    """Status, output and errors of two processes of two devices each that train one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    shared = {**os.environ, "XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(data), what]
    processes = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env={**shared, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    return [(process.wait(120), *process.communicate()) for process in processes]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line["loss"], rel=1e-5)) for line in read_lines(folder / "metrics.jsonl")]


def test_a_run_goes_from_one_process_to_two_and_back_with_nothing_twice_and_nothing_skipped(prepared, tmp_path):
    data = prepared.folder
    train(tmp_path / "alone", data, CONFIG)
    alone = losses(tmp_path / "alone")

    first, second = two_processes(tmp_path / "both", data, "SIGTERM")
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    (step,) = checkpoint_steps(tmp_path / "both")
    said = {output.strip().rpartition("\n")[2] for _, output, _ in (first, second)}
    assert said == {f"stopped at {step}"} and 3 <= step < len(alone)

    train(tmp_path / "both", data, CONFIG)
    assert losses(tmp_path / "both") == alone


def test_processes_end_with_the_same_bits(prepared, tmp_path):
    first, second = two_processes(tmp_path / "both", prepared.folder, "stay")
    assert first[0] == second[0] == 0 and first[1].split()[-1] == second[1].split()[-1], first[2] + second[2]


def test_a_process_whose_peer_is_gone_ends_with_a_message(prepared, tmp_path):
    first, second = two_processes(tmp_path / "both", prepared.folder, "SIGKILL")
    assert (first[0], second[0]) == (1, -9)
    assert "another process is gone, or does not answer" in first[2], first[2]


@pytest.mark.parametrize("given", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}])
def test_half_of_an_address_is_refused(given, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="number of this one, from 0, are all needed; got JAX_COORDINATOR_ADDRESS"):
        join()
