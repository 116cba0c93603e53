"""trimask benchmark train: times a training step for several sizes of the network and of the joint vocabulary.

Half of the tokens of a row are text, a quarter pictures and a quarter sounds, and so are the ids. The whole step is
timed: masks, loss, gradients, clipping, AdamW and weight average. Right after, for comparison, MD4's own code (--md4)
takes steps of the same sizes, and so does, in a Python that has PyTorch (--python), a model like ours, with the logits
of all positions and with those of masked positions alone, eager and compiled. FLOP/s and utilisation count the
operations that are necessary, as in diffusion/cost.py.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from trimask.diffusion.attention import kernel_for
from trimask.diffusion.cost import StepOnMesh, count_parameters, flops_per_token
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.run.children import require_program
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import cli
from trimask.scripts.benchmark import parse_size, run_peer, write_results
from trimask.scripts.benchmarks.timing import temporary_bytes
from trimask.scripts.console import parse, tracked
from trimask.tokenizers.sequence import TokenRows as Rows
from trimask.tokenizers.storage.ranges import Checked, Positive, Size, whole
from trimask.tokenizers.vocabulary import Vocabulary

_WARMUP = 2
"""Number of steps before those that are timed."""
_WAYS: dict[str, dict[str, Any]] = {
    "remat": {"remat": "block"},
    "scanned": {"blocks": "scanned"},
    "scanned, remat": {"blocks": "scanned", "remat": "block"},
    "kernel": {"attention": "kernel"},
}
"""Name of a way to compute the blocks → fields of `TransformerConfig`."""
_COLUMNS = ["network", "code", "ms", "ours faster", "GFLOP/s", "MFU", "MiB", "compile s"]


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Sizes and settings for which a training step is timed."""

    out: tyro.conf.Positional[Path]
    """Folder for train.json and train.md."""
    sizes: tuple[str, ...] = ("128x4", "384x6")
    """Sizes of networks to time, WIDTHxLAYERS, with heads of width 64."""
    vocabularies: tuple[Annotated[int, whole(64, 1 << 24)], ...] = (1024, 16_384, 65_536)
    """Sizes of the vocabulary to time: numbers of ids of all modalities together."""
    rows: Size = 8
    """Number of rows of a batch."""
    length: Size = 256
    """Length of a row in tokens; a multiple of 4."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of the operands of matrix products."""
    repeats: Size = 10
    """Number of timed steps of each case, after two that are not timed; their median is reported."""
    ways: tuple[Literal["remat", "scanned", "scanned, remat", "kernel"], ...] = ()
    """Other ways to compute the blocks, to compare with the default: rematerialised, scanned over layers, both, or with
    the device's attention kernel."""
    python: Path | None = None
    """Python with PyTorch, in which a similar model is timed for comparison. None: no comparison."""
    compiled: bool = True
    """Also time PyTorch's steps compiled."""
    md4: Path | None = None
    """Checkout of github.com/google-deepmind/md4, whose own step is timed for comparison. None: no comparison."""
    md4_python: Path | None = None
    """Python for MD4, with jax, flax, optax, distrax, clu, grain, matplotlib and seaborn."""
    peak_tflops: Positive | None = None
    """Peak speed of the device in TFLOP/s, for the utilisation (MFU), such as 989 for an H100 in bfloat16. None: no
    utilisation."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""

    def __post_init__(self):
        super().__post_init__()
        if self.python is not None:
            require_program(self.python, "--python")
        if self.md4_python is not None:
            require_program(self.md4_python, "--md4-python")
        if not self.sizes or not self.vocabularies:
            raise ValueError(f"--sizes and --vocabularies need at least one value each; got {self}")
        if self.length % 4:
            raise ValueError(f"the length of a row must be a multiple of 4, got {self.length}")
        if (self.md4 is None) != (self.md4_python is None):
            raise ValueError(f"--md4 and --md4-python must be given together; got {self.md4} and {self.md4_python}")
        for size in self.sizes:
            parse_size(size)


@dataclass(frozen=True)
class Case:
    """Result of one case: a line of the table."""

    size: str
    parameters: int
    vocabulary: int
    code: str
    seconds: float
    """Median time of a step."""
    tokens_per_second: float
    flops_per_second: float
    """Necessary operations over time."""
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    """Memory that XLA allocates beside parameters, optimizer state and batch. None: not known."""
    speedup: float | None = None
    """Time of this code over that of ours; None for ours."""


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints the results, and returns them. Raises an error if the memory is too small."""
    kernel = kernel_for(jax.default_backend(), arguments.dtype, arguments.length, arguments.length, 64)
    if "kernel" in arguments.ways and kernel == "plain":
        raise ValueError(
            f"--ways kernel: attention in {arguments.dtype} over {arguments.length} positions has no kernel on "
            f"{jax.default_backend()}"
        )
    cases: list[Case] = []
    pairs = list(product(arguments.sizes, arguments.vocabularies))
    for size, ids in pairs:
        step = StepOnMesh(_network(arguments, size), _vocabulary(ids), 1, 1, 1, arguments.length)
        what = f"a step of {size} with {ids:,} ids on {arguments.rows:,} rows of {arguments.length:,} tokens"
        arguments.limits.require_memory(step.estimate(arguments.rows).total, what, jax.local_devices()[:1])
    for size, vocabulary in tracked(pairs, "sizes and vocabularies"):
        cases += _cases(arguments, size, vocabulary)
    write_results(arguments.out, "train", arguments, cases, _COLUMNS, [_cells(arguments, case) for case in cases])
    return cases


def _cells(arguments: Arguments, case: Case) -> list[str]:
    peak = arguments.peak_tflops
    return [
        f"{case.size}, {case.vocabulary:,} ids",
        case.code,
        f"{1000 * case.seconds:,.0f}",
        "" if case.speedup is None else f"×{case.speedup:.2f}",
        f"{case.flops_per_second / 1e9:,.0f}",
        "" if peak is None else f"{case.flops_per_second / (peak * 1e12):.1%}",
        "" if case.temporary_bytes is None else f"{case.temporary_bytes / 2**20:,.0f}",
        "" if case.compile_seconds is None else f"{case.compile_seconds:.1f}",
    ]


def _cases(arguments: Arguments, size: str, ids: int) -> list[Case]:
    vocabulary, model = _vocabulary(ids), _network(arguments, size)
    tokens = arguments.rows * arguments.length
    # Number of ids that a position may take, the mean over the tokens of a row.
    mean_ids = (vocabulary.text_size + 1) / 2 + ids // 4 / 4 + ids // 8 / 4
    flops = tokens * flops_per_token(model, vocabulary, arguments.length, ids=mean_ids)
    batch = _batch(vocabulary, arguments)
    common: dict[str, Any] = {
        "size": size,
        "parameters": count_parameters(model, vocabulary).total,
        "vocabulary": vocabulary.size,
    }

    def case(code: str, seconds: float, **rest: Any) -> Case:
        rates: dict[str, Any] = {"tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds}
        return Case(code=code, seconds=seconds, **common, **rates, **rest)

    def timed(model: TransformerConfig) -> dict[str, Any]:
        names = ("seconds", "compile_seconds", "temporary_bytes")
        times = _time_our_step(TrainConfig(model=model), vocabulary, batch, arguments.repeats)
        return dict(zip(names, times, strict=True))

    ours = case("trimask", **timed(model))
    others = [(f"trimask, {way}", timed(replace(model, **_WAYS[way]))) for way in arguments.ways]
    others += [(code, {"seconds": median(s)}) for code, s in _other_codes(arguments, model, vocabulary, batch)]
    return [ours, *(case(code, speedup=times["seconds"] / ours.seconds, **times) for code, times in others)]


def _network(arguments: Arguments, size: str) -> TransformerConfig:
    width, layers = parse_size(size)
    return TransformerConfig(width=width, num_layers=layers, num_heads=width // 64, compute_dtype=arguments.dtype)


def _vocabulary(ids: int) -> Vocabulary:
    return Vocabulary(text_size=ids // 2, codebook_sizes={"image": (ids // 4,), "audio": (ids // 8, ids // 8)})


def _batch(vocabulary: Vocabulary, arguments: Arguments) -> Rows:
    """Rows of random tokens: half text, then a quarter picture, then a quarter sound in two codebooks."""
    rng, length = np.random.default_rng(0), arguments.length
    text, image, *books = vocabulary.ranges[1:]
    parts = [text] * (length // 2) + [image] * (length // 4) + [books[n % 2] for n in range(length // 4)]
    shape_of_rows = (arguments.rows, length)
    start, stop = (np.array([getattr(part, name) for part in parts]) for name in ("start", "stop"))
    modality = np.array([vocabulary.modalities.index(part.modality) for part in parts], np.int32)
    coordinates = np.zeros((*shape_of_rows, 2), np.int32)
    coordinates[:, 3 * length // 4 :, 1] = np.arange(length // 4) % 2
    return Rows(
        tokens=rng.integers(start, stop, shape_of_rows).astype(np.int32),
        modality=np.broadcast_to(modality, shape_of_rows).copy(),
        coordinates=coordinates,
        segment=np.ones(shape_of_rows, np.int32),
        is_condition=np.zeros(shape_of_rows, bool),
    )


def _time_our_step(
    config: TrainConfig, vocabulary: Vocabulary, batch: Rows, repeats: int
) -> tuple[float, float, int | None]:
    """Median time of our step, time of compiling it, and memory beside its arguments and results."""
    counts = np.bincount(batch.modality.reshape(-1), minlength=len(vocabulary.modalities)).astype(float)
    mean_targets = dict(zip(vocabulary.modalities[1:], counts[1:].tolist(), strict=True))
    pretraining = Pretraining(config, vocabulary, mean_targets=mean_targets)
    state, batch = pretraining.init(), jax.device_put(batch)
    begin = time.perf_counter()
    compiled = pretraining.compiled(state, batch)
    compile_seconds = time.perf_counter() - begin
    seconds = []
    for _ in range(_WARMUP + repeats):
        begin = time.perf_counter()
        state, metrics = compiled(pretraining.hyperparameters, pretraining.loss_scale, pretraining.key, state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    return median(seconds[_WARMUP:]), compile_seconds, temporary_bytes(compiled)


def _other_codes(
    arguments: Arguments, model: TransformerConfig, vocabulary: Vocabulary, batch: Rows
) -> Iterator[tuple[str, list[float]]]:
    """Name of each other code, and the duration of each of its steps."""
    spec = {
        "vocabulary": vocabulary.size,
        "width": model.width,
        "heads": model.num_heads,
        "layers": model.num_layers,
        "mlp_width": model.size_of_mlp,
        "mask_id": vocabulary.mask_id,
        "length": arguments.length,
        "tokens": batch.tokens.tolist(),
        "md4": str(arguments.md4),
        "dtype": arguments.dtype,
        "compiled": arguments.compiled,
        "warmup": _WARMUP,
        "repeats": arguments.repeats,
    }
    for python, script in ((arguments.md4_python, "md4_train.py"), (arguments.python, "torch_train.py")):
        if python is not None:
            for found in run_peer(python, script, spec):
                yield found["code"], found["seconds"]


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask benchmark train` with these arguments."""
    run(parse(Arguments, list(arguments), "benchmark train", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "train", *sys.argv[1:]]))
