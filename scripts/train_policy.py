"""trimask train-policy: trains a policy that decides which tokens to unmask when, for a frozen model.

The same command resumes a training that was stopped. The policy is then used as a strategy, as in
`trimask generate RUN --strategy policies/fast`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.policies import POLICIES
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.transformer import num_parameters
from trimask.sampling_rl.problem_sets import problems_of
from trimask.sampling_rl.train_policy import PolicyTrainConfig, problems_summary, train_policy
from trimask.scripts import cli
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.console import option, parse, progress_report, say
from trimask.tokenizers.storage.ranges import Checked, NonNegativeInt, PositiveInt
from trimask.tokenizers.vocabulary import TEXT


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Folder of the policy, model, problems and configuration of a training."""

    policy: tyro.conf.Positional[Path]
    """Folder of the policy to write: policy.json, config.json, checkpoints/, metrics.jsonl."""
    run: Path
    """Run folder of the frozen model."""
    data: Path | None = None
    """Folder of prepared data with the problems. None: the data that the run was trained on."""
    dataset: str | None = None
    """Dataset with the problems. None: the only one that has the task."""
    task: str = TEXT
    """Task of the problems, such as text (the response to a prompt), text_to_image or audio_to_text."""
    split: str = TRAIN
    """Split with the problems."""
    max_problems: PositiveInt | None = None
    """Largest number of problems. None: all."""
    judge: str | None = None
    """Judge that decides which answers are right: a name that `trimask evaluate` takes, such as final_number, or
    MODULE:FUNCTION. None: the task's default judge."""
    checkpoint: NonNegativeInt | None = None
    """Step of the model's checkpoint. None: the newest."""
    preset: str | None = None
    """Name of a preset whose values are the defaults. None: general defaults."""
    config: Annotated[PolicyTrainConfig, tyro.conf.arg(name="")]
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()


def run(arguments: Arguments) -> None:
    """Trains or resumes a policy, and prints where it is."""
    loaded = load(arguments.run, arguments.checkpoint)
    with progress_report() as report:
        problems = problems_of(
            loaded,
            data=arguments.data,
            dataset=arguments.dataset,
            task=arguments.task,
            split=arguments.split,
            max_problems=arguments.max_problems,
            judge=arguments.judge,
            report=report,
        )
    config = arguments.config
    loaded.require_trained_guidance(arguments.task, config.generation)
    longest = max(problem.request.length for problem in problems.problems)
    loaded.require_room(config.loop.limits, config.problems_per_step * config.episodes_per_problem, longest)
    summary = problems_summary(str(arguments.run), loaded.step, problems)
    policy = train_policy(arguments.policy, arguments.config, problems, loaded.denoise, summary)
    say(f"Policy with {num_parameters(policy.parameters):,} parameters: {arguments.policy}")


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask train-policy` with these arguments."""
    name = option(list(arguments), "--preset")
    if name is not None and name not in POLICIES:
        raise ValueError(f"no preset {name!r}; there are {', '.join(POLICIES)}")
    config = POLICIES[name]() if name else PolicyTrainConfig()
    default = Arguments(policy=tyro.MISSING, run=tyro.MISSING, preset=name, config=config)
    listed = "\n".join(f"  {preset:8} {make.__doc__}" for preset, make in POLICIES.items())
    description = f"{__doc__}\n\nPresets; the values of the chosen one are the defaults below:\n{listed}"
    run(parse(Arguments, list(arguments), "train-policy", description, default))


if __name__ == "__main__":
    sys.exit(cli.main(["train-policy", *sys.argv[1:]]))
