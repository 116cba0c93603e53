"""trimask plan: what a preset needs on so many devices, in closed form: memory, communication, time.

Everything is computed by the formulas of diffusion/cost.py from the shapes alone, at a utilisation that you state.
--check compiles the step for as many simulated devices, without allocating anything, and puts XLA's own plan of memory
and communication beside it. It is a plan for a CPU, where bfloat16 is computed in float32, and remat is undone unless
blocks are scanned; so check small shapes in float32. CPUs also exchange more than accelerators, see cost.py: what is
sent is compared with the closed form for CPUs. Peaks, memories and links of devices are their vendors' numbers; on
more than eight devices everything is counted at the speed of the links between hosts, as if no axis of the mesh stayed
within one.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from trimask.configs.presets import PRESETS, Experiment, preset
from trimask.diffusion.cost import StepOnMesh, count_parameters, flops_per_token
from trimask.diffusion.mesh import ROW_AXES, MeshConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import cli
from trimask.scripts.collectives import sent_bytes
from trimask.scripts.console import console, parse, say, table
from trimask.tokenizers.sequence import TokenRows as Rows
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, Size, real, whole
from trimask.tokenizers.vocabulary import Vocabulary

DeviceKind = Literal["tpu-v5e", "tpu-v5p", "tpu-v6e", "h100", "h200"]


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    peak_flops: float
    """Per second, in bfloat16."""
    memory_bytes: float
    link: float
    """Bytes per second that it sends to its neighbours."""
    far_link: float
    """The same where there are more than eight of them."""


DEVICES: dict[DeviceKind, Device] = {
    "tpu-v5e": Device(197e12, 16e9, 200e9, 200e9),
    "tpu-v5p": Device(459e12, 95e9, 600e9, 600e9),
    "tpu-v6e": Device(918e12, 32e9, 448e9, 448e9),
    "h100": Device(989e12, 80e9, 450e9, 50e9),
    "h200": Device(989e12, 141e9, 450e9, 50e9),
}


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """What is planned."""

    preset: tyro.conf.Positional[str]
    """Named experiment."""
    devices: Annotated[int, whole(1, 1 << 20)] = 8
    """Number of accelerators."""
    device_kind: DeviceKind = "h100"
    """Kind of accelerator."""
    row_length: Size = 2048
    """Tokens of a row."""
    mfu: Annotated[float, real(above=0, most=1)] = 0.4
    """Share of the peak that is reached, of what has to be computed."""
    model: TransformerConfig
    """The network; the preset's unless given."""
    mesh: MeshConfig
    """How the devices share the work."""
    batch_tokens: PositiveInt
    """Tokens of a step, on all devices."""
    accumulate: Size
    """Micro-batches of a step."""
    horizon_tokens: PositiveInt
    """Tokens of the whole training."""
    check: bool = False
    """Ask XLA, too."""

    def __post_init__(self):
        super().__post_init__()
        if self.check and self.model.attention == "kernel":
            raise ValueError(
                "--check compiles for CPUs, which have no kernel for attention; got --model.attention kernel"
            )


def run(arguments: Arguments) -> dict[str, float]:
    """Prints the plan; returns its numbers."""
    experiment, device = preset(arguments.preset), DEVICES[arguments.device_kind]
    platform = "tpu" if arguments.device_kind.startswith("tpu") else "gpu"
    data, fsdp, tensor = arguments.mesh.sizes(arguments.devices)
    vocabulary, config = experiment.vocabulary, replace(experiment.train, model=arguments.model)
    step = StepOnMesh(
        arguments.model,
        vocabulary,
        data,
        fsdp,
        tensor,
        arguments.row_length,
        arguments.accumulate,
        platform,
        config.loss,
    )
    shapes = Pretraining(config, vocabulary).abstract().parameters
    per_device = arguments.batch_tokens / (data * fsdp * arguments.accumulate * arguments.row_length)
    rows = max(1, round(per_device))
    if abs(rows - per_device) > 1e-6 * rows:
        say(f"Note: {per_device:.3g} rows for each device and micro-batch; planned with {rows}.")
    if arguments.model.width % (fsdp * tensor):
        say(
            f"Note: width {arguments.model.width} is no multiple of fsdp × tensor, {fsdp * tensor}: some matrices stay "
            "whole on every device, and less is sent than said here."
        )
    memory, count = step.memory(shapes, rows), count_parameters(arguments.model, vocabulary)
    flops = flops_per_token(arguments.model, vocabulary, arguments.row_length)
    step_tokens = rows * data * fsdp * arguments.accumulate * arguments.row_length
    compute = step_tokens * flops / (arguments.devices * device.peak_flops * arguments.mfu)
    sent = step.communication(rows) * arguments.accumulate
    link = device.link if arguments.devices <= 8 else device.far_link
    seconds = arguments.horizon_tokens / step_tokens * compute
    found = {
        "parameters": count.total,
        "state": memory.state,
        "memory": memory.total,
        "rest": memory.total - memory.state,
        "sent": sent,
        "max_rows": step.max_rows(shapes, device.memory_bytes),
        "step_seconds": compute,
        "days": seconds / 86_400,
    }
    room = found["max_rows"]
    table_rows = [
        ["parameters", f"{count.total:,}: blocks {count.blocks:,}, embeddings {count.embeddings:,}"],
        ["training FLOPs of a token", f"{flops / 1e9:,.2f} G"],
        ["mesh", f"data {data} × fsdp {fsdp} × tensor {tensor}"],
        [
            "a step",
            f"{step_tokens:,} tokens: {rows} rows of {arguments.row_length:,} per device × {arguments.accumulate}",
        ],
        ["memory of a device", f"{_gb(memory.total)} of {_gb(device.memory_bytes)}"],
        ["  state (exact)", _gb(memory.state)],
        ["  activations, loss, gradients", _gb(memory.activations)],
        ["  copies of weights", _gb(memory.weights)],
        ["most rows per device", f"{room:,}" if room else "none: not even one row has room"],
        [
            "sent by a device in a step",
            f"{_gb(sent)}: {sent / link:.3g} s at {link / 1e9:,.0f} GB/s, if nothing overlaps",
        ],
        ["computing a step", f"{compute:.3g} s at {arguments.mfu:.0%} of {device.peak_flops / 1e12:,.0f} TFLOP/s"],
        ["tokens/s", f"{step_tokens / compute:,.0f}"],
        ["the horizon", f"{arguments.horizon_tokens:,} tokens: {arguments.horizon_tokens / step_tokens:,.0f} steps"],
        ["  takes", f"{seconds / 86_400:,.2f} days, {seconds / 3600 * arguments.devices:,.0f} device-hours"],
    ]
    title = f"{arguments.preset} on {arguments.devices} {arguments.device_kind}: closed form"
    console.print(table(title, ["", ""], table_rows))
    if arguments.check:
        found["cpu_sent"] = replace(step, platform="cpu").communication(rows) * arguments.accumulate
        found |= _checked(arguments, config, vocabulary, rows, found)
    return found


def _checked(
    arguments: Arguments, config: TrainConfig, vocabulary: Vocabulary, rows: int, planned: dict[str, float]
) -> dict[str, float]:
    """XLA's plan beside ours."""
    compiled: Any = _compiled(config, vocabulary, arguments, rows)
    analysis = compiled.memory_analysis()
    theirs = {"state": analysis.argument_size_in_bytes, "rest": analysis.temp_size_in_bytes}
    if arguments.model.blocks == "unrolled" and arguments.accumulate == 1:
        theirs["cpu_sent"] = sent_bytes(compiled.as_text(), arguments.devices)
    lines = []
    for name, number in theirs.items():
        ratio = f"{planned[name] / number:.2f}" if number else ""
        lines.append([_LINES[name], _gb(planned[name]), _gb(number), ratio])
    devices = f"{arguments.devices} simulated devices"
    console.print(table(f"compiled for {devices}", ["a device", "closed form", "XLA", "ratio"], lines))
    return {f"xla_{name}": number for name, number in theirs.items()}


_LINES = {"state": "state", "rest": "all else in memory", "cpu_sent": "sent in a step, by CPUs"}


def _compiled(config: TrainConfig, vocabulary: Vocabulary, arguments: Arguments, rows: int) -> jax.stages.Compiled:
    """The step for simulated devices."""
    mesh = arguments.mesh.over(jax.devices("cpu")[: arguments.devices])
    pretraining = Pretraining(replace(config, accumulate=arguments.accumulate), vocabulary, mesh=mesh)
    total = rows * mesh.shape["data"] * mesh.shape["fsdp"] * arguments.accumulate
    sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES))

    def described(dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((total, arguments.row_length, *rest), dtype, sharding=sharding)

    numbers = described(jnp.int32)
    batch = Rows(numbers, numbers, described(jnp.int32, 2), numbers, described(jnp.bool_))
    return pretraining.compiled(pretraining.abstract(), batch)


def _gb(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e7 else f"{number / 1e6:,.2f} MB"


def main(arguments: Sequence[str]) -> dict[str, float]:
    """Entry point of the command; returns the numbers of the plan."""
    words = list(arguments)
    name = next((word for word in words if word in PRESETS), None)
    if name is None and words and not words[0].startswith("-"):
        preset(words[0])  # says which there are
    parsed = parse(Arguments, words, "plan", __doc__ or "", _defaults(preset(name)))
    if parsed.check:
        jax.config.update("jax_num_cpu_devices", parsed.devices)
    return run(parsed)


def _defaults(experiment: Experiment) -> Arguments:
    train = experiment.train
    return Arguments(
        preset=tyro.MISSING,
        model=train.model,
        mesh=train.mesh,
        batch_tokens=train.batch.tokens,
        accumulate=train.accumulate,
        horizon_tokens=train.optimizer.horizon_tokens,
    )


if __name__ == "__main__":
    sys.exit(cli.main(["plan", *sys.argv[1:]]))
