"""trimask benchmark: measures speed on this machine, and writes tables and JSON.

trimask benchmark sample OUT      sampler, compared with the code of LLaDA and Fast-dLLM if you have it
trimask benchmark rollout OUT     episodes of an unmasking policy, compared with environments and a loop in PyTorch
trimask benchmark train OUT       training step for several vocabularies and sizes, compared with other code
trimask benchmark loss OUT        loss and its gradients, with and without an array of logits
trimask benchmark attention OUT   attention and its gradients, by matrix products and by a kernel
trimask benchmark data OUT        preparation of batches by threads and processes
trimask benchmark checkpoint OUT  saving and restoring checkpoints
"""

import importlib
import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from trimask.diffusion.run.children import run_watched
from trimask.diffusion.run.folder import writing
from trimask.diffusion.studies.findings import markdown_table
from trimask.scripts import cli
from trimask.scripts.console import console, say, table
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.json_text import parse_json

BENCHMARKS = {
    name: f"trimask.scripts.benchmarks.{name}"
    for name in ("sample", "rollout", "train", "loss", "attention", "data", "checkpoint")
}
"""Name of a benchmark → its module, which has `main(argv)`."""


def parse_size(size: str) -> tuple[int, int]:
    """Width and number of layers of a size WIDTHxLAYERS.

    Raises ValueError if it is not of this form or the width is not a multiple of 64, the size of a head.
    """
    width, _, layers = size.partition("x")
    if not (width.isdecimal() and layers.isdecimal() and int(width) and not int(width) % 64 and int(layers)):
        raise ValueError(f"a size is WIDTHxLAYERS, such as 512x8, with a width that is a multiple of 64; got {size!r}")
    return int(width), int(layers)


def denoise_with(graph, parameters, sequence, positions=None, cache=None):
    """Denoiser of a network that is split into its graph and parameters (`nnx.split`)."""
    return nnx.merge(graph, parameters)(sequence, positions, cache)


def run_peer(
    python: Path, script: str, spec: dict[str, Any], weights: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Runs a script of `benchmarks/peers` in another Python; returns the JSON objects that it prints, one per line.

    It is called as SCRIPT SPEC.json [WEIGHTS.npz]. Other lines of its output are ignored. Raises ValueError with the
    end of its error output if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "spec.json", json.dumps(spec))
        command = [str(python), str(Path(__file__).parent / "benchmarks" / "peers" / script), f"{folder}/spec.json"]
        if weights is not None:
            command.append(f"{folder}/weights.npz")
            np.savez(command[-1], **weights)
        done = run_watched(command)
    if done.returncode:
        raise ValueError(f"{' '.join(command[:2])} failed:\n{done.stderr.strip()[-2000:]}")
    return [parse_json(line, script) for line in done.stdout.splitlines() if line.startswith('{"')]


def write_results(
    out: Path, name: str, arguments: Any, cases: Sequence[Any], columns: list[str], cells: list[list[str]]
) -> None:
    """Writes OUT/NAME.json with all arguments and cases, and OUT/NAME.md with the table, and prints the table."""
    machine = f"{platform.machine()}, {jax.default_backend()}, {jax.device_count()} device(s), jax {jax.__version__}"
    content = {"machine": machine, "arguments": json.loads(json.dumps(asdict(arguments), default=str))}
    content["cases"] = [asdict(case) for case in cases]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
        write_text(out / f"{name}.md", f"{machine}\n\n{markdown_table(columns, cells)}\n")
    console.print(table(name, columns, cells))


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask benchmark` with these arguments."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        say(f"{__doc__}\nusage: trimask benchmark NAME OUT [options]")
        return
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    importlib.import_module(BENCHMARKS[name]).main(rest)


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", *sys.argv[1:]]))
