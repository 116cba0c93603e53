"""trimask benchmark: how fast it is here, in tables and JSON.

    trimask benchmark sample OUT     tokens/s and time per evaluation of the sampler, by size, rows, length and cache

A network with random weights, one text vocabulary, and prompts of random tokens: how fast a sampler is does not depend
on what it says. With --llada and --fast-dllm, folders of these repositories, their own `generate` runs right after
ours with the same weights and prompts, in a Python that has PyTorch and transformers (--python), and the tokens
are compared.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.tree_util import Partial

from trimask.diffusion.sampling import loop
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.sampling.state import State, start
from trimask.diffusion.transformer import Transformer, TransformerConfig, num_parameters
from trimask.scripts import cli
from trimask.scripts.console import console, parse, progress_report, table
from trimask.tokenizers.sequence import Sequence as Rows
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

_TORCH = Path(__file__).with_name("llada_generate.py")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is timed."""

    what: tyro.conf.Positional[Literal["sample"]]
    """The sampler."""
    out: tyro.conf.Positional[Path]
    """Folder for sample.json and sample.md."""
    sizes: tuple[str, ...] = ("256x4", "512x8")
    """Networks, WIDTHxLAYERS, with heads of 64."""
    vocabulary: int = 32_768
    """Text tokens."""
    rows: tuple[int, ...] = (1, 8)
    """Prompts at a time."""
    prompt: int = 64
    """Tokens of a prompt."""
    generated: int = 64
    """Tokens to make of each."""
    block: int = 32
    """Tokens of a block."""
    steps: int = 32
    """Evaluations of a row."""
    caches: tuple[Literal["none", "prefix", "dual"], ...] = ("none", "prefix", "dual")
    """What a block keeps."""
    repeats: int = 3
    """Of each case, after one that compiles; the median counts."""
    llada: Path | None = None
    """Checkout of github.com/ML-GSAI/LLaDA to compare with; needs --fast-dllm, which has the network's code."""
    fast_dllm: Path | None = None
    """Checkout of github.com/NVlabs/Fast-dLLM to compare with."""
    python: Path = Path(sys.executable)
    """Python with torch and transformers."""

    def __post_init__(self):
        numbers = (self.vocabulary, *self.rows, self.prompt, self.generated, self.block, self.steps, self.repeats)
        if min(numbers) < 1 or not self.rows:
            raise ValueError(f"all numbers must be at least 1, got {self}")
        if self.generated % self.block or self.steps % (self.generated // self.block):
            raise ValueError(
                "blocks must fill the generated tokens and share the steps evenly, as LLaDA asks; "
                f"got {self.generated} tokens in blocks of {self.block} and {self.steps} steps"
            )
        for size in self.sizes:
            shape(size)
        if self.llada is not None and self.fast_dllm is None:
            raise ValueError("--llada needs --fast-dllm too: the network's code is there")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    code: str
    size: str
    parameters: int
    rows: int
    cache: str
    seconds: float
    """Median of the repeats."""
    tokens_per_second: float
    evaluations: int
    """Of a row."""
    milliseconds_per_evaluation: float
    speedup: float | None = None
    """Of ours against this one; None for ours."""
    same_tokens: float | None = None
    """Share of the generated tokens that are ours."""


def shape(size: str) -> tuple[int, int]:
    """Width and layers of WIDTHxLAYERS."""
    width, _, layers = size.partition("x")
    if not (width.isdecimal() and layers.isdecimal() and int(width) and not int(width) % 64 and int(layers)):
        raise ValueError(f"a size is WIDTHxLAYERS with a width that 64 divides, as 512x8; got {size!r}")
    return int(width), int(layers)


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, one network after the other, writes and prints them."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    with progress_report() as report:
        for number, size in enumerate(arguments.sizes):
            report("networks", number, len(arguments.sizes))
            cases += _network(arguments, size)
        report("networks", len(arguments.sizes), len(arguments.sizes))
    machine = f"{platform.machine()}, {jax.default_backend()}, {jax.device_count()} device(s), jax {jax.__version__}"
    content = {"machine": machine, "arguments": json.loads(json.dumps(asdict(arguments), default=str))}
    content["cases"] = [asdict(case) for case in cases]
    (arguments.out / "sample.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    columns, rows = _cells(cases)
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    (arguments.out / "sample.md").write_text("\n".join([machine, "", *lines, ""]), encoding="utf-8")
    console.print(table("Sampling", columns, rows))
    return cases


def _network(arguments: Arguments, size: str) -> list[Case]:
    width, layers = shape(size)
    vocabulary = Vocabulary(text_size=arguments.vocabulary)
    config = TransformerConfig(
        width=width,
        num_layers=layers,
        num_heads=width // 64,
        qk_norm=False,
        place_embedding=False,
        norm_epsilon=1e-5,
    )
    model = Transformer(config, vocabulary, key=jax.random.key(0))
    # Logits that differ much, so that rounding does not decide which token is the most confident.
    model.unembedding[...] = model.unembedding[...] * width**0.5
    graph, parameters = nnx.split(model)
    denoise = Partial(partial(_denoise, graph), parameters)
    text = vocabulary.ranges[1]
    shape_of_prompts = (max(arguments.rows), arguments.prompt)
    prompts = np.random.default_rng(0).integers(text.start, text.stop, shape_of_prompts).astype(np.int32)
    ours: dict[tuple[int, str], tuple[Case, np.ndarray]] = {}
    for rows in arguments.rows:
        for cache in arguments.caches:
            state = _start(prompts[:rows], arguments.generated, vocabulary)
            how = GenerationConfig(steps=arguments.steps, block_length=arguments.block, cache=cache, temperature=0.0)
            final, seconds = _timed(denoise, how, vocabulary, state, arguments.repeats)
            count, evaluations = rows * arguments.generated, int(final.nfe.max())
            numbers = (seconds, count / seconds, evaluations, 1000 * seconds / evaluations)
            case = Case("trimask", size, num_parameters(parameters), rows, cache, *numbers)
            ours[rows, cache] = case, np.asarray(final.sequence.tokens)
    cases = [case for case, _ in ours.values()]
    if arguments.fast_dllm is not None:
        cases += _others(arguments, config, vocabulary, model, prompts, ours)
    return cases


def _denoise(graph, parameters, sequence, positions=None, cache=None):
    return nnx.merge(graph, parameters)(sequence, positions, cache)


def _start(prompts: np.ndarray, generated: int, vocabulary: Vocabulary) -> State:
    """Rows of a prompt and masks, all of them text: what LLaDA has, without boundary tokens."""
    tokens = np.concatenate([prompts, np.full((len(prompts), generated), vocabulary.mask_id, np.int32)], axis=1)
    rows = Rows(
        tokens=jnp.asarray(tokens),
        modality=jnp.full(tokens.shape, vocabulary.number_of(TEXT)),
        place=jnp.zeros((*tokens.shape, 2), jnp.int32),
        segment=jnp.ones(tokens.shape, jnp.int32),
        is_condition=jnp.asarray(tokens != vocabulary.mask_id),
    )
    return start(rows, jax.random.split(jax.random.key(0), len(tokens)), vocabulary.mask_id)


@jax.jit
def _sample(denoise, strategy, rules, state):
    return loop.sample(denoise, strategy, rules, state)[0]


def _timed(denoise, how: GenerationConfig, vocabulary: Vocabulary, state, repeats: int) -> tuple[State, float]:
    """The end and the median of so many repeats."""
    rules, seconds = how.rules(vocabulary), []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        final = jax.block_until_ready(_sample(denoise, how.chosen, rules, state))
        seconds.append(time.perf_counter() - begin)
    return final, median(seconds[1:])


def _others(
    arguments: Arguments, config: TransformerConfig, vocabulary: Vocabulary, model, prompts, ours
) -> list[Case]:
    """The same by the other repositories' code, compared with ours."""
    names = {"llada": "none"} if arguments.llada is not None else {}
    names |= {f"fast_dllm_{cache}": cache for cache in arguments.caches}
    spec = {
        "checkouts": {"llada": str(arguments.llada), "fast_dllm": str(arguments.fast_dllm)},
        "width": config.width,
        "heads": config.num_heads,
        "layers": config.num_layers,
        "mlp_width": config.size_of_mlp,
        "vocabulary": vocabulary.size,
        "rotary_base": config.rotary_base,
        "norm_epsilon": config.norm_epsilon,
        "mask_id": vocabulary.mask_id,
        **{name: getattr(arguments, name) for name in ("prompt", "generated", "block", "steps", "rows", "repeats")},
        "prompts": prompts.tolist(),
        "cases": list(names),
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        weights: dict[str, Any] = _llada_weights(model)
        np.savez(Path(folder) / "weights.npz", **weights)
        command = [str(arguments.python), str(_TORCH), f"{folder}/spec.json", f"{folder}/weights.npz"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed:\n{done.stderr.strip()[-2000:]}")
    cases = []
    for line in filter(lambda line: line.startswith('{"case"'), done.stdout.splitlines()):
        found = json.loads(line)
        rows, cache, seconds = found["rows"], names[found["case"]], median(found["seconds"])
        case, tokens = ours[rows, cache]
        same = float((np.array(found["tokens"]) == tokens)[:, arguments.prompt :].mean())
        rate, count = case.seconds / seconds, rows * arguments.generated
        code = "LLaDA" if found["case"] == "llada" else "Fast-dLLM"
        per_evaluation = 1000 * seconds / case.evaluations
        numbers = (seconds, count / seconds, case.evaluations, per_evaluation, 1 / rate, same)
        cases.append(Case(code, case.size, case.parameters, rows, cache, *numbers))
    return cases


def _llada_weights(model: Transformer) -> dict[str, np.ndarray]:
    """The weights under the names, and in the layout, of LLaDA's network."""

    def matrix(weight: Any, rows: int) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(weight[...]).reshape(rows, -1).T)

    width = model.config.width
    weights = {
        "wte.weight": np.asarray(model.embedding[...]),
        "ln_f.weight": np.asarray(model.final_norm.scale[...]),
        "ff_out.weight": matrix(model.unembedding, width),
    }
    for number, block in enumerate(model.blocks):
        attention, mlp = cast(Any, block.attention), block.mlp
        own = {
            "q_proj": matrix(attention.query, width),
            "k_proj": matrix(attention.key, width),
            "v_proj": matrix(attention.value, width),
            "attn_out": matrix(attention.out, attention.out.shape[0] * attention.out.shape[1]),
            "ff_proj": matrix(mlp.gate, width),
            "up_proj": matrix(mlp.up, width),
            "ff_out": matrix(mlp.down, mlp.down.shape[0]),
            "attn_norm": np.asarray(block.attention_norm.scale[...]),
            "ff_norm": np.asarray(block.mlp_norm.scale[...]),
        }
        weights |= {f"blocks.{number}.{name}.weight": weight for name, weight in own.items()}
    return {f"model.transformer.{name}": weight for name, weight in weights.items()}


def _cells(cases: Sequence[Case]) -> tuple[list[str], list[list[str]]]:
    columns = [
        "code",
        "size",
        "parameters",
        "rows",
        "cache",
        "tokens/s",
        "ms/evaluation",
        "ours is faster by",
        "same tokens",
    ]
    rows = []
    for case in sorted(cases, key=lambda c: (c.parameters, c.rows, c.cache, c.code != "trimask")):
        own = [case.code, case.size, f"{case.parameters:,}", str(case.rows), case.cache]
        own += [f"{case.tokens_per_second:,.1f}", f"{case.milliseconds_per_evaluation:,.1f}"]
        own.append("" if case.speedup is None else f"×{case.speedup:.2f}")
        rows.append([*own, "" if case.same_tokens is None else f"{case.same_tokens:.1%}"])
    return columns, rows


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    run(parse(Arguments, list(arguments), "benchmark", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", *sys.argv[1:]]))
