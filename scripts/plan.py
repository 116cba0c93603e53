"""trimask plan: computes the memory, communication and time that training a preset needs on a number of devices.

The numbers follow from the shapes by the closed formulas of diffusion/cost.py, at an assumed utilisation (--mfu).

--check also compiles the training step for as many simulated devices, without allocating its arrays, and shows XLA's
numbers of memory and communication beside the formulas'. XLA then plans for CPUs, where bfloat16 is computed in float32
and rematerialisation is undone unless blocks are scanned; so check small shapes in float32. CPUs also exchange more
than accelerators (see cost.py), so the bytes sent are compared with the formula for CPUs.

Peak speed, memory and links of devices are their vendors' numbers. On more than eight devices all communication is
assumed to have the speed of the links between hosts, as if no axis of the mesh stayed within one host.
"""

import sys
from collections.abc import Iterator, Sequence
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
    """Speed and memory of one accelerator."""

    peak_flops: float
    """Peak FLOP/s in bfloat16."""
    memory_bytes: float
    link: float
    """Bytes per second that it can send to others on its host."""
    far_link: float
    """Bytes per second that it can send to other hosts; used for more than eight devices."""


DEVICES: dict[DeviceKind, Device] = {
    "tpu-v5e": Device(197e12, 16e9, 200e9, 200e9),
    "tpu-v5p": Device(459e12, 95e9, 600e9, 600e9),
    "tpu-v6e": Device(918e12, 32e9, 448e9, 448e9),
    "h100": Device(989e12, 80e9, 450e9, 50e9),
    "h200": Device(989e12, 141e9, 450e9, 50e9),
}


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Preset, devices and sizes to plan for."""

    preset: tyro.conf.Positional[str]
    """Name of the experiment, a preset of `trimask train`; its values are the defaults of the sizes below."""
    devices: Annotated[int, whole(1, 1 << 20)] = 8
    """Number of accelerators that train together."""
    device_kind: DeviceKind = "h100"
    """Kind of accelerator, which determines speed, memory and links."""
    row_length: Size = 2048
    """Length of a row in tokens."""
    mfu: Annotated[float, real(above=0, most=1)] = 0.4
    """Model FLOPs utilisation: assumed share of the device's peak speed, in (0, 1]."""
    model: TransformerConfig
    """Shape and options of the network to train."""
    mesh: MeshConfig
    """Division of the work among the devices."""
    batch_tokens: PositiveInt
    """Number of tokens of a training step, over all devices."""
    accumulate: Size
    """Number of micro-batches of a training step."""
    horizon_tokens: PositiveInt
    """Number of tokens of the whole training."""
    check: bool = False
    """Also compile the step for simulated devices, and compare the plan with XLA's numbers."""

    def __post_init__(self):
        super().__post_init__()
        if self.check and self.model.attention == "kernel":
            raise ValueError(
                "--check compiles for CPUs, which have no attention kernel; use --model.attention plain, got kernel"
            )


def run(arguments: Arguments) -> dict[str, float]:
    """Prints the plan; returns its numbers by name, in bytes, seconds and days."""
    plan = TrainingPlan.of(arguments)
    for note in plan.notes():
        say(f"Note: {note}")
    title = f"{arguments.preset} on {arguments.devices} {arguments.device_kind}: closed form"
    console.print(table(title, ["", ""], plan.table_rows()))
    numbers = plan.numbers()
    if arguments.check:
        numbers["cpu_sent"] = replace(plan.step, platform="cpu").communication(plan.rows) * arguments.accumulate
        numbers |= _checked(plan, numbers)
    return numbers


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Costs of training an experiment with given arguments."""

    arguments: Arguments
    config: TrainConfig
    vocabulary: Vocabulary
    step: StepOnMesh
    shapes: Any
    """Shapes and types of the parameters, a tree."""
    wanted_rows: float
    """Rows per device and micro-batch that make the batch; perhaps no whole number."""

    @classmethod
    def of(cls, arguments: Arguments) -> "TrainingPlan":
        """TrainingPlan for the arguments."""
        experiment = preset(arguments.preset)
        vocabulary, config = experiment.vocabulary, replace(experiment.train, model=arguments.model)
        data, fsdp, tensor = arguments.mesh.sizes(arguments.devices)
        platform = "tpu" if arguments.device_kind.startswith("tpu") else "gpu"
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
        return cls(
            arguments=arguments,
            config=config,
            vocabulary=vocabulary,
            step=step,
            shapes=Pretraining(config, vocabulary).abstract().parameters,
            wanted_rows=arguments.batch_tokens / (data * fsdp * arguments.accumulate * arguments.row_length),
        )

    @property
    def device(self) -> Device:
        """Kind of the devices."""
        return DEVICES[self.arguments.device_kind]

    @property
    def rows(self) -> int:
        """Rows per device and micro-batch, at least 1."""
        return max(1, round(self.wanted_rows))

    @property
    def step_tokens(self) -> int:
        """Tokens of a training step, over all devices."""
        rows = self.rows * self.step.data * self.step.fsdp * self.arguments.accumulate
        return rows * self.arguments.row_length

    @property
    def flops_per_token(self) -> float:
        """FLOPs that training needs per token."""
        return flops_per_token(self.arguments.model, self.vocabulary, self.arguments.row_length)

    @property
    def step_seconds(self) -> float:
        """Duration of the computation of a step."""
        speed = self.arguments.devices * self.device.peak_flops * self.arguments.mfu
        return self.step_tokens * self.flops_per_token / speed

    @property
    def total_seconds(self) -> float:
        """Duration of the computation of the whole training."""
        return self.arguments.horizon_tokens / self.step_tokens * self.step_seconds

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends per step."""
        return self.step.communication(self.rows) * self.arguments.accumulate

    def notes(self) -> Iterator[str]:
        """Notes on where the plan differs from the arguments, or from what the formulas assume."""
        if abs(self.rows - self.wanted_rows) > 1e-6 * self.rows:
            yield f"{self.wanted_rows:.3g} rows for each device and micro-batch; planned with {self.rows}."
        shards = self.step.fsdp * self.step.tensor
        if self.arguments.model.width % shards:
            yield (
                f"width {self.arguments.model.width} is not a multiple of fsdp × tensor, {shards}: some matrices stay "
                "whole on every device, and less is sent than shown here."
            )

    def numbers(self) -> dict[str, float]:
        """Numbers of the plan by name; memory and bytes sent are per device."""
        memory = self.step.memory(self.shapes, self.rows)
        return {
            "parameters": count_parameters(self.arguments.model, self.vocabulary).total,
            "state": memory.state,
            "memory": memory.total,
            "rest": memory.total - memory.state,
            "sent": self.sent_bytes,
            "max_rows": self.step.max_rows(self.shapes, self.device.memory_bytes),
            "step_seconds": self.step_seconds,
            "days": self.total_seconds / 86_400,
        }

    def table_rows(self) -> list[list[str]]:
        """Rows of the table that shows the plan."""
        arguments, device, step = self.arguments, self.device, self.step
        memory, count = step.memory(self.shapes, self.rows), count_parameters(arguments.model, self.vocabulary)
        link = device.link if arguments.devices <= 8 else device.far_link
        most_rows = step.max_rows(self.shapes, device.memory_bytes)
        per_step = f"{self.rows} rows of {arguments.row_length:,} per device × {arguments.accumulate}"
        steps = arguments.horizon_tokens / self.step_tokens
        hours = self.total_seconds / 3600 * arguments.devices
        sending = f"{self.sent_bytes / link:.3g} s at {link / 1e9:,.0f} GB/s, if nothing overlaps"
        return [
            ["parameters", f"{count.total:,}: blocks {count.blocks:,}, embeddings {count.embeddings:,}"],
            ["training FLOPs of a token", f"{self.flops_per_token / 1e9:,.2f} G"],
            ["mesh", f"data {step.data} × fsdp {step.fsdp} × tensor {step.tensor}"],
            ["a step", f"{self.step_tokens:,} tokens: {per_step}"],
            ["memory of a device", f"{_gb(memory.total)} of {_gb(device.memory_bytes)}"],
            ["  state (exact)", _gb(memory.state)],
            ["  activations, loss, gradients", _gb(memory.activations)],
            ["  copies of weights", _gb(memory.weights)],
            ["most rows per device", f"{most_rows:,}" if most_rows else "none: not even one row fits"],
            ["sent by a device in a step", f"{_gb(self.sent_bytes)}: {sending}"],
            [
                "computing a step",
                f"{self.step_seconds:.3g} s at {arguments.mfu:.0%} of {device.peak_flops / 1e12:,.0f} TFLOP/s",
            ],
            ["tokens/s", f"{self.step_tokens / self.step_seconds:,.0f}"],
            ["the horizon", f"{arguments.horizon_tokens:,} tokens: {steps:,.0f} steps"],
            ["  takes", f"{self.total_seconds / 86_400:,.2f} days, {hours:,.0f} device-hours"],
        ]


def _checked(plan: TrainingPlan, planned: dict[str, float]) -> dict[str, float]:
    """Prints XLA's numbers for the compiled step beside the planned ones, and returns them."""
    arguments = plan.arguments
    compiled: Any = _compiled(plan.config, plan.vocabulary, arguments, plan.rows)
    analysis = compiled.memory_analysis()
    by_xla = {"state": analysis.argument_size_in_bytes, "rest": analysis.temp_size_in_bytes}
    if arguments.model.blocks == "unrolled" and arguments.accumulate == 1:
        by_xla["cpu_sent"] = sent_bytes(compiled.as_text(), arguments.devices)
    lines = []
    for name, number in by_xla.items():
        ratio = f"{planned[name] / number:.2f}" if number else ""
        lines.append([_LINES[name], _gb(planned[name]), _gb(number), ratio])
    devices = f"{arguments.devices} simulated devices"
    console.print(table(f"compiled for {devices}", ["a device", "closed form", "XLA", "ratio"], lines))
    return {f"xla_{name}": number for name, number in by_xla.items()}


_LINES = {"state": "state", "rest": "all else in memory", "cpu_sent": "sent in a step, by CPUs"}


def _compiled(config: TrainConfig, vocabulary: Vocabulary, arguments: Arguments, rows: int) -> jax.stages.Compiled:
    """The training step, compiled for simulated devices."""
    mesh = arguments.mesh.over(jax.devices("cpu")[: arguments.devices])
    config = replace(config, accumulate=arguments.accumulate)
    pretraining = Pretraining(config, vocabulary, mean_targets={}, mesh=mesh)  # numbers that are not compiled in
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
    """Runs `trimask plan` with these arguments; returns the numbers of the plan."""
    words = list(arguments)
    name = next((word for word in words if word in PRESETS), None)
    if name is None and words and not words[0].startswith("-"):
        preset(words[0])  # raises ValueError that lists the presets
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
