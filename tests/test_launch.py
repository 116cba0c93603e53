"""Launch files, run by shells with stand-ins for the tools of a cluster."""

import os
import subprocess
from pathlib import Path

import yaml

from trimask.configs.presets import PRESETS

LAUNCH = Path(__file__).parents[1] / "launch"


def run_with(tmp_path: Path, script: str, tools: dict[str, int], *arguments: str, status: int = 0) -> list[str]:
    """Calls of the stand-ins, one line each, and whether compiled programs are kept; each exits with a given status."""
    for tool, exit_status in tools.items():
        stand_in = tmp_path / tool
        stand_in.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "${{JAX_COMPILATION_CACHE_DIR+caching }}$*" >> {tmp_path}/calls\n'
            f"exit {exit_status}\n"
        )
        stand_in.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    assert subprocess.run(["bash", str(LAUNCH / script), *arguments], check=False, env=env).returncode == status
    return (tmp_path / "calls").read_text().splitlines()


def test_slurm_starts_a_process_for_each_gpu_and_warns_them(tmp_path):
    (call,) = run_with(tmp_path, "slurm.sbatch", {"srun": 0}, "runs/x", "--data", "data/y")
    assert call == "caching --kill-on-bad-exit=1 trimask train runs/x --data data/y"
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"] and options["signal"] == "TERM@120"
    assert "requeue" in options


def test_a_job_whose_time_is_up_is_put_back_into_the_queue(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    start, put_back = run_with(tmp_path, "slurm.sbatch", {"srun": 143, "scontrol": 0}, "runs/x", status=143)
    assert put_back == "caching requeue 7"
    (tmp_path / "calls").unlink()
    assert run_with(tmp_path, "slurm.sbatch", {"srun": 2, "scontrol": 0}, "runs/x", status=2) == [start]


def test_a_tpu_vm_gets_the_checkout_and_the_words_as_they_are(tmp_path):
    calls = run_with(tmp_path, "tpu_vm.sh", {"git": 0, "gcloud": 0}, "pod", "zone-a", "runs/x", "--data", "my data")
    pack, copy, start = calls
    assert pack == "archive --output /tmp/trimask.tar HEAD" and copy.endswith("/tmp/trimask.tar pod:")
    assert all("--worker all --zone zone-a" in call for call in (copy, start))
    assert "make setup EXTRAS=tpu" in start
    assert start.endswith(r"JAX_COMPILATION_CACHE_DIR=compiled .venv/bin/trimask train runs/x --data my\ data ")


def test_a_jobset_tells_every_pod_who_it_is():
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    told = {entry["name"]: entry for entry in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert told["JAX_COMPILATION_CACHE_DIR"]["value"].startswith(container["volumeMounts"][0]["mountPath"])
    assert told["JAX_NUM_PROCESSES"]["value"] == str(spec["completions"])
    assert "job-completion-index" in told["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert told["JAX_COORDINATOR_ADDRESS"]["value"].startswith("trimask-train-0-0.trimask:")
    assert container["command"][:2] == ["trimask", "train"] and container["command"][-1] in PRESETS
