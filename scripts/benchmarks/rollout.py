"""trimask benchmark rollout: measures episodes/s and evaluations/s of an unmasking policy on many rows at once.

A policy with random weights plays episodes on a network with random weights, without blocks: in one loop on the device
(`rollout`, which GRPO uses), in the vector environment, in Gymnasium's SyncVectorEnv of single environments and, in a
Python that has PyTorch (--python), in a simple loop over networks of the same sizes.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.tree_util import Partial

from trimask.diffusion.cost import evaluation_bytes
from trimask.diffusion.run.children import require_program
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.sampling.actions import draw_action
from trimask.diffusion.sampling.learned import LearnedStrategy
from trimask.diffusion.sampling.policy import PolicyConfig, new_policy_parameters, policy_logits
from trimask.diffusion.sampling.state import Rules
from trimask.diffusion.transformer import Transformer, TransformerConfig
from trimask.sampling_rl.environment import UnmaskingEnv, UnmaskingVectorEnv
from trimask.sampling_rl.episode_batch import UnmaskingConfig
from trimask.sampling_rl.problems import Problem, ProblemSet
from trimask.sampling_rl.rollout import Recorder, problem_rows, rollout
from trimask.scripts import cli
from trimask.scripts.benchmark import denoise_with, parse_size, run_peer, write_results
from trimask.scripts.console import parse, tracked
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.storage.ranges import Checked, Size
from trimask.tokenizers.vocabulary import Vocabulary

_COLUMNS = ["code", "episodes/s", "evaluations/s", "evaluations per episode", "ours faster"]


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Sizes for which episodes are timed."""

    out: tyro.conf.Positional[Path]
    """Folder for rollout.json and rollout.md."""
    size: str = "128x4"
    """Size of the network, WIDTHxLAYERS, with heads of width 64."""
    vocabulary: Size = 512
    """Number of text tokens of the vocabulary."""
    episodes: Size = 64
    """Number of environments, and of rows of a rollout."""
    prompt: Size = 16
    """Length of a prompt in tokens."""
    length: Size = 32
    """Number of tokens to reveal in an episode."""
    repeats: Size = 3
    """Number of timed repetitions of each case, after one that compiles; their median is reported."""
    python: Path | None = None
    """Python with PyTorch, in which a loop is timed for comparison. None: no comparison."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""

    def __post_init__(self):
        super().__post_init__()
        if self.python is not None:
            require_program(self.python, "--python")
        parse_size(self.size)


@dataclass(frozen=True)
class Case:
    """Result of one case: a line of the table."""

    code: str
    episodes_per_second: float
    evaluations_per_second: float
    evaluations_per_episode: float
    speedup: float | None = None
    """Evaluations per second of our rollout over those of this code; None for our rollout."""


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints the results, and returns them. Raises an error if the memory is too small."""
    setting = _Setting(arguments)
    plays: dict[str, Callable[[int], tuple[int, int]]] = {
        "rollout": setting.in_one_loop,
        "vector environment": partial(setting.in_environments, setting.vector()),
        "SyncVectorEnv": partial(setting.in_environments, setting.synchronous()),
    }
    cases: list[Case] = []
    for code, play in tracked(plays.items(), "codes"):
        cases.append(_case(code, [_timed(play, n) for n in range(1 + arguments.repeats)][1:]))
    if arguments.python is not None:
        cases.append(_case("PyTorch", setting.in_torch(arguments.python)))
    ours = cases[0].evaluations_per_second
    cases[1:] = [dataclasses.replace(case, speedup=ours / case.evaluations_per_second) for case in cases[1:]]
    cells = []
    for case in cases:
        rates = [f"{case.episodes_per_second:,.1f}", f"{case.evaluations_per_second:,.1f}"]
        faster = "" if case.speedup is None else f"×{case.speedup:.2f}"
        cells.append([case.code, *rates, f"{case.evaluations_per_episode:.1f}", faster])
    write_results(arguments.out, "rollout", arguments, cases, _COLUMNS, cells)
    return cases


def _timed(play: Callable[[int], tuple[int, int]], number: int) -> tuple[float, int, int]:
    """Duration in seconds, number of episodes and number of evaluations of one repetition."""
    start = time.perf_counter()
    episodes, evaluations = play(number)
    return time.perf_counter() - start, episodes, evaluations


def _case(code: str, timed: Sequence[tuple[float, int, int]]) -> Case:
    per_second = median(episodes / seconds for seconds, episodes, _ in timed)
    evaluations = median(evaluations / seconds for seconds, _, evaluations in timed)
    return Case(code, per_second, evaluations, median(e / episodes for _, episodes, e in timed))


class _Setting:
    """Network, policy and problems that all codes share."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        width, layers = parse_size(arguments.size)
        self.vocabulary = Vocabulary(text_size=arguments.vocabulary)
        self.network = TransformerConfig(width=width, num_layers=layers, num_heads=width // 64)
        length = arguments.prompt + arguments.length
        needed = evaluation_bytes(self.network, self.vocabulary, arguments.episodes, length)
        needed += 16 * arguments.episodes * arguments.length**2  # recorded steps
        what = f"{arguments.episodes:,} episodes of {length:,} tokens, of {arguments.vocabulary:,} ids,"
        arguments.limits.require_memory(needed, what, jax.local_devices()[:1])
        graph, parameters = nnx.split(Transformer(self.network, self.vocabulary, key=jax.random.key(0)))
        self.denoise = Partial(partial(denoise_with, graph), parameters)
        self.policy = PolicyConfig()
        self.parameters = new_policy_parameters(self.policy, jax.random.key(1), arguments.length)
        rng = np.random.default_rng(0)
        self.prompts = rng.integers(0, arguments.vocabulary, (arguments.episodes, arguments.prompt))
        masks = np.full(arguments.length, -1)
        requests = [Example("text", (Segment("text", np.concatenate([p, masks])),)) for p in self.prompts]
        grade = lambda problems, answers: np.ones(len(answers))  # noqa: E731
        self.problems = ProblemSet("random", self.vocabulary, [Problem(request, {}) for request in requests], grade)
        self.rows = jax.device_put(problem_rows(self.problems.problems, self.vocabulary))
        self.config = UnmaskingConfig(stop_at_eos=False)

    def in_one_loop(self, number: int) -> tuple[int, int]:
        """Plays all episodes by `rollout`; returns the numbers of episodes and evaluations."""
        strategy = LearnedStrategy(self.policy, self.parameters)
        rules = Rules(mask_id=self.vocabulary.mask_id, gives_up_after=self.arguments.length)
        parts, length = (None, Recorder(self.policy, strategy), rules), self.arguments.length
        key = jax.random.key(number)
        final, _ = jax.block_until_ready(
            rollout(self.vocabulary, self.denoise, parts, self.rows, key, asked=length, steps=length)
        )
        return len(final.nfe), int(final.nfe.sum())

    def vector(self) -> UnmaskingVectorEnv:
        """Vector environment of trimask, with all problems."""
        return UnmaskingVectorEnv(self.problems, self.denoise, num_envs=self.arguments.episodes, config=self.config)

    def synchronous(self) -> gymnasium.vector.SyncVectorEnv:
        """Gymnasium's vector environment of our single environments."""
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        make = partial(UnmaskingEnv, self.problems, self.denoise, config=self.config)
        return gymnasium.vector.SyncVectorEnv([make] * self.arguments.episodes, autoreset_mode=mode)

    def in_environments(self, environments: Any, number: int) -> tuple[int, int]:
        """Takes as many steps as an episode may have; returns the numbers of finished episodes and evaluations."""
        shown, _ = environments.reset(seed=number)
        ended = evaluations = 0
        for step in range(self.arguments.length):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(number), step), self.arguments.episodes)
            actions = np.asarray(_act(self.policy, self.parameters, keys, shown))
            shown, _, terminated, *_ = environments.step(actions)
            ended += int(terminated.sum())
            evaluations += self.arguments.episodes
        return max(ended, 1), evaluations

    def in_torch(self, python: Path) -> list[tuple[float, int, int]]:
        """Plays all episodes in PyTorch; returns duration, episodes and evaluations of each repetition."""
        spec = {
            "vocabulary": self.vocabulary.size,
            "width": self.network.width,
            "heads": self.network.num_heads,
            "layers": self.network.num_layers,
            "mlp_width": self.network.size_of_mlp,
            "policy_width": self.policy.width,
            "policy_heads": self.policy.num_heads,
            "policy_mlp_width": self.policy.mlp_width,
            "mask_id": self.vocabulary.mask_id,
            "length": self.arguments.length,
            "repeats": self.arguments.repeats,
            "prompts": (self.prompts + self.vocabulary.text_range.start).tolist(),
        }
        (printed,) = run_peer(python, "torch_rollout.py", spec)
        return [(seconds, self.arguments.episodes, evaluations) for seconds, evaluations in printed["results"]]


@partial(jax.jit, static_argnums=0)
def _act(policy: PolicyConfig, parameters, keys, shown):
    """Actions of the policy for observations of environments."""
    confidence = jnp.asarray(shown["confidence"])[..., None].astype(policy.input_dtype)
    is_masked, is_asked = (jnp.asarray(shown[name]).astype(bool) for name in ("is_masked", "is_asked"))
    steps = jnp.round(jnp.asarray(shown["progress"])[:, 0] * is_asked.sum(axis=-1)).astype(jnp.int32)
    logits = policy_logits(policy, parameters, confidence, is_masked, is_asked, steps)
    return draw_action(policy.law, keys, logits, is_masked).astype(jnp.int8)


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask benchmark rollout` with these arguments."""
    run(parse(Arguments, list(arguments), "benchmark rollout", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "rollout", *sys.argv[1:]]))
