"""trimask benchmark sample: measures tokens/s and ms/evaluation of the sampler by size, length, block, rows and cache.

The network has random weights and a vocabulary of text, and prompts are random tokens, since the speed of a sampler
does not depend on its text. With --llada and --fast-dllm, checkouts of these repositories, their own `generate` runs
right after ours with the same weights and prompts, in a Python that has PyTorch and transformers (--python), and the
generated tokens are compared. For rows that differ, the generation is repeated up to the first token that differs:
`parted at` is the smallest difference of two probabilities that decided a choice up to there, the largest of all rows
that differ. If it is small, rounding explains the difference.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float

from trimask.diffusion.cost import evaluation_bytes
from trimask.diffusion.denoiser import Cache
from trimask.diffusion.run.children import require_program
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.sampling import sampler
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.state import Rules, State, Strategy, initial_state
from trimask.diffusion.transformer import Transformer, TransformerConfig, num_parameters
from trimask.scripts import cli
from trimask.scripts.benchmark import denoise_with, parse_size, run_peer, write_results
from trimask.scripts.console import parse, tracked
from trimask.tokenizers.sequence import TokenRows as Rows
from trimask.tokenizers.storage.ranges import Checked, Size
from trimask.tokenizers.vocabulary import TEXT, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Sizes and settings for which the sampler is timed."""

    out: tyro.conf.Positional[Path]
    """Folder for sample.json and sample.md."""
    sizes: tuple[str, ...] = ("256x4", "512x8")
    """Sizes of networks to time, WIDTHxLAYERS, with heads of width 64."""
    vocabulary: Size = 32_768
    """Number of text tokens of the vocabulary."""
    rows: tuple[Size, ...] = (1, 8)
    """Numbers of prompts at a time."""
    prompt: Size = 64
    """Length of a prompt in tokens."""
    lengths: tuple[Size, ...] = (64, 256)
    """Numbers of tokens to generate after each prompt."""
    blocks: tuple[Size, ...] = (32, 64)
    """Block lengths in tokens."""
    per_evaluation: Size = 2
    """Number of tokens revealed per evaluation."""
    caches: tuple[Literal["none", "prefix", "dual"], ...] = ("none", "prefix", "dual")
    """Caches of keys and values to time: none, of the tokens before the block, or of all outside the block."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and of the computation."""
    repeats: Size = 3
    """Number of timed generations of each case, after one that compiles; their median is reported."""
    llada: Path | None = None
    """Checkout of github.com/ML-GSAI/LLaDA to compare with. None: no comparison. Fast-dLLM is needed too, since it has
    the network's code."""
    fast_dllm: Path | None = None
    """Checkout of github.com/NVlabs/Fast-dLLM to compare with. None: no comparison."""
    python: Path = Path(sys.executable)
    """Python with PyTorch and transformers, for the comparison."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""

    def __post_init__(self):
        super().__post_init__()
        require_program(self.python, "--python")
        if not all((self.sizes, self.rows, self.lengths, self.blocks, self.caches)):
            raise ValueError(
                f"--sizes, --rows, --lengths, --blocks and --caches need at least one value each; got {self}"
            )
        for length, block in product(self.lengths, self.blocks):
            if length % block or block % self.per_evaluation:
                raise ValueError(
                    "--lengths must be multiples of --blocks, and these of --per-evaluation, as in LLaDA; "
                    f"got {length} tokens in blocks of {block}, {self.per_evaluation} per evaluation"
                )
        for size in self.sizes:
            parse_size(size)
        if self.llada is not None and self.fast_dllm is None:
            raise ValueError("--llada needs --fast-dllm, too, which has the network's code")


@dataclass(frozen=True)
class Case:
    """Result of one case: a line of the table."""

    code: str
    size: str
    parameters: int
    length: int
    block: int
    rows: int
    cache: str
    seconds: float
    """Median time of a generation."""
    tokens_per_second: float
    evaluations: int
    """Number of function evaluations of a row."""
    milliseconds_per_evaluation: float
    speedup: float | None = None
    """Time of this code over that of ours; None for ours."""
    same_tokens: float | None = None
    """Share of the generated tokens that equal ours; None for ours."""
    parted_at: float | None = None
    """Smallest difference of probabilities that decided a choice before rows differ; None if no row differs."""

    @property
    def setting(self) -> "Setting":
        """Setting of the case; other code is compared with our case of the same setting."""
        return self.length, self.block, self.rows, self.cache


Setting = tuple[int, int, int, str]
"""Tokens to generate, block length, rows and cache."""


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, one network after the other, writes and prints the results, and returns them.

    Raises an error if the memory is too small.
    """
    cases: list[Case] = []
    rows, length = max(arguments.rows), arguments.prompt + max(arguments.lengths)
    for size in arguments.sizes:
        needed = evaluation_bytes(_config(arguments, size), Vocabulary(text_size=arguments.vocabulary), rows, length)
        what = f"{size} on {rows:,} rows of {length:,} tokens, of {arguments.vocabulary:,} ids,"
        arguments.limits.require_memory(needed, what, jax.local_devices()[:1])
    for size in tracked(arguments.sizes, "networks"):
        cases += _cases_of_size(arguments, size)
    write_results(arguments.out, "sample", arguments, cases, _COLUMNS, _cells(cases))
    return cases


def _cases_of_size(arguments: Arguments, size: str) -> list[Case]:
    """All cases of one network, by our code and by others'."""
    vocabulary, config = Vocabulary(text_size=arguments.vocabulary), _config(arguments, size)
    model = Transformer(config, vocabulary, key=jax.random.key(0))
    # Larger logits, so that rounding does not decide which token is the most confident.
    model.unembedding[...] = model.unembedding[...] * config.width**0.5
    graph, parameters = nnx.split(model)
    parameters = jax.tree.map(lambda x: x.astype(arguments.dtype), parameters)
    denoise = Partial(partial(denoise_with, graph), parameters)
    text = vocabulary.text_range
    shape_of_prompts = (max(arguments.rows), arguments.prompt)
    prompts = np.random.default_rng(0).integers(text.start, text.stop, shape_of_prompts).astype(np.int32)
    cases: dict[Setting, Case] = {}
    ours: dict[Setting, OurGeneration] = {}
    for setting in product(arguments.lengths, arguments.blocks, arguments.rows, arguments.caches):
        length, block, rows, cache = setting
        state = _start(prompts[:rows], length, vocabulary)
        steps = length // arguments.per_evaluation
        generation = GenerationConfig(steps=steps, block_length=block, cache=cache, temperature=0.0)
        final, seconds = _timed(denoise, generation, vocabulary, state, arguments.repeats)
        count, evaluations = rows * length, int(final.nfe.max())
        numbers = (seconds, count / seconds, evaluations, 1000 * seconds / evaluations)
        cases[setting] = Case("trimask", size, num_parameters(parameters), *setting, *numbers)
        rules, tokens = generation.rules(vocabulary), np.asarray(final.sequence.tokens)
        ours[setting] = OurGeneration(denoise, generation.strategy_function, rules, state, tokens)
    others = [] if arguments.fast_dllm is None else _others(arguments, config, vocabulary, model, prompts, cases, ours)
    return [*cases.values(), *others]


def _config(arguments: Arguments, size: str) -> TransformerConfig:
    """Network of LLaDA's architecture and the given size."""
    width, layers = parse_size(size)
    return TransformerConfig(
        width=width,
        num_layers=layers,
        num_heads=width // 64,
        qk_norm=False,
        place_embedding=False,
        norm_epsilon=1e-5,
        compute_dtype=arguments.dtype,
    )


@dataclass(frozen=True)
class OurGeneration:
    """One generation by our code, and all that is needed to repeat it."""

    denoise: Partial
    strategy: Strategy
    rules: Rules
    state: State
    """State before the first step."""
    tokens: np.ndarray
    """Tokens of the rows at the end."""

    def parted_at(self, theirs: np.ndarray) -> float:
        """Smallest lead of a choice (`_step`) up to the first token that differs; the largest over rows that differ."""
        differing = np.flatnonzero((self.tokens != theirs).any(axis=1))
        closest = np.full(len(theirs), np.inf)
        state, cache, has_parted = self.state, None, np.zeros(len(theirs), bool)
        while not has_parted[differing].all():
            state, cache, lead = _step(self.denoise, self.strategy, self.rules, state, cache)
            closest = np.where(has_parted, closest, np.minimum(closest, lead))
            is_known = ~np.asarray(state.is_masked)
            has_parted |= (is_known & (np.asarray(state.sequence.tokens) != theirs)).any(axis=1)
            if self.rules.cache == "none" or not np.asarray(state.is_open).any():
                cache = None
        return float(closest[differing].max())


@jax.jit
def _step(denoise, strategy, rules, state, cache) -> tuple[State, Cache, Float[Array, " batch"]]:
    """One step of a deterministic generation, and the smallest lead that decided a choice of the step.

    A lead is a difference of probabilities: of a revealed token and the second most probable one at its position, or of
    the least confident revealed position and the most confident one that was not revealed.
    """
    if cache is None:
        state = sampler.enter_blocks(state, rules)
    seen, new_cache = sampler.observe(state.keys, denoise, state, rules, cache)
    choice, _ = strategy(state.keys, seen, None)
    revealed = choice.reveal & seen.candidates
    last = jnp.min(jnp.where(revealed, seen.confidence, jnp.inf), axis=-1)
    first = jnp.max(jnp.where(seen.candidates & ~revealed, seen.confidence, -jnp.inf), axis=-1)
    lead = jnp.minimum(last - first, jnp.min(jnp.where(revealed, seen.margin, jnp.inf), axis=-1))
    return sampler.reveal(state, seen, choice, rules), new_cache if cache is None else cache, lead


def _start(prompts: np.ndarray, generated: int, vocabulary: Vocabulary) -> State:
    """Rows of a prompt and masks, all of text and without boundary tokens, as LLaDA has them."""
    tokens = np.concatenate([prompts, np.full((len(prompts), generated), vocabulary.mask_id, np.int32)], axis=1)
    rows = Rows(
        tokens=jnp.asarray(tokens),
        modality=jnp.full(tokens.shape, vocabulary.number_of(TEXT)),
        coordinates=jnp.zeros((*tokens.shape, 2), jnp.int32),
        segment=jnp.ones(tokens.shape, jnp.int32),
        is_condition=jnp.asarray(tokens != vocabulary.mask_id),
    )
    return initial_state(rows, jax.random.split(jax.random.key(0), len(tokens)), vocabulary.mask_id)


@jax.jit
def _sample(denoise, strategy, rules, state):
    return sampler.sample(denoise, strategy, rules, state)[0]


def _timed(denoise, config: GenerationConfig, vocabulary: Vocabulary, state, repeats: int) -> tuple[State, float]:
    """Final state of a generation, and its median duration over `repeats` repetitions after one that compiles."""
    rules, seconds = config.rules(vocabulary), []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        final = jax.block_until_ready(_sample(denoise, config.strategy_function, rules, state))
        seconds.append(time.perf_counter() - begin)
    return final, median(seconds[1:])


def _others(
    arguments: Arguments,
    config: TransformerConfig,
    vocabulary: Vocabulary,
    model: Transformer,
    prompts: np.ndarray,
    cases: Mapping[Setting, Case],
    ours: Mapping[Setting, OurGeneration],
) -> list[Case]:
    """The same cases by the code of the other repositories, compared with ours."""
    by_others = [("Fast-dLLM", setting) for setting in cases]
    if arguments.llada is not None:
        by_others = [*(("LLaDA", setting) for setting in cases if setting[-1] == "none"), *by_others]
    spec = {
        "checkouts": {"LLaDA": str(arguments.llada), "Fast-dLLM": str(arguments.fast_dllm)},
        "width": config.width,
        "heads": config.num_heads,
        "layers": config.num_layers,
        "mlp_width": config.size_of_mlp,
        "vocabulary": vocabulary.size,
        "rotary_base": config.rotary_base,
        "norm_epsilon": config.norm_epsilon,
        "dtype": arguments.dtype,
        "mask_id": vocabulary.mask_id,
        "longest": arguments.prompt + max(arguments.lengths),
        "repeats": arguments.repeats,
        "prompts": prompts.tolist(),
        "cases": [
            {"code": code, "length": length, "block": block, "rows": rows, "cache": cache}
            | {"steps": length // arguments.per_evaluation}
            for code, (length, block, rows, cache) in by_others
        ],
    }
    printed = run_peer(arguments.python, "llada_generate.py", spec, _llada_weights(model))
    return [
        _compared(code, cases[setting], ours[setting], result)
        for (code, setting), result in zip(by_others, printed, strict=True)
    ]


def _compared(code: str, case: Case, ours: OurGeneration, result: dict[str, Any]) -> Case:
    seconds, tokens = median(result["seconds"]), np.array(result["tokens"])
    same = float((tokens == ours.tokens)[:, -case.length :].mean())
    return dataclasses.replace(
        case,
        code=code,
        seconds=seconds,
        tokens_per_second=case.tokens_per_second * case.seconds / seconds,
        milliseconds_per_evaluation=case.milliseconds_per_evaluation * seconds / case.seconds,
        speedup=seconds / case.seconds,
        same_tokens=same,
        parted_at=None if same == 1 else ours.parted_at(tokens),
    )


def _llada_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Weights of the network with the names and the layout of LLaDA's network."""

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
        of_block = {
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
        weights |= {f"blocks.{number}.{name}.weight": weight for name, weight in of_block.items()}
    return {f"model.transformer.{name}": weight for name, weight in weights.items()}


_COLUMNS = ["code", "size", "parameters", "length", "block", "rows", "cache", "NFE"]
_COLUMNS += ["tokens/s", "ms/NFE", "ours faster", "same tokens", "parted at"]


def _cells(cases: Sequence[Case]) -> list[list[str]]:
    rows = []
    for case in sorted(cases, key=lambda c: (c.parameters, c.setting, c.code != "trimask")):
        rows.append(
            [
                *(case.code, case.size, f"{case.parameters:,}", str(case.length), str(case.block), str(case.rows)),
                *(case.cache, str(case.evaluations), f"{case.tokens_per_second:,.1f}"),
                f"{case.milliseconds_per_evaluation:,.1f}",
                "" if case.speedup is None else f"×{case.speedup:.2f}",
                "" if case.same_tokens is None else f"{case.same_tokens:.1%}",
                "" if case.parted_at is None else f"{case.parted_at:.1e}",
            ]
        )
    return rows


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask benchmark sample` with these arguments."""
    run(parse(Arguments, list(arguments), "benchmark sample", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "sample", *sys.argv[1:]]))
