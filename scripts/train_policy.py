"""trimask train-policy: learn which tokens to unmask when, on a model that stays as it is; the same command resumes.

The policy is then a strategy: `trimask generate RUN --strategy policies/fast`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.policies import POLICIES
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.evaluation.evaluate import require_same_tokenizers
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.transformer import num_parameters
from trimask.sampling_rl.problem_sets import from_prepared
from trimask.sampling_rl.train_policy import PolicyTrainConfig, train_policy, trained_on
from trimask.scripts import cli
from trimask.scripts.console import option, parse, progress_report, say
from trimask.tokenizers.storage.ranges import Checked, NonNegativeInt, PositiveInt
from trimask.tokenizers.vocabulary import TEXT


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Where to, for which model, on which problems, and how."""

    policy: tyro.conf.Positional[Path]
    """Folder to write: policy.json, config.json, checkpoints/, metrics.jsonl."""
    run: Path
    """Run folder of the model."""
    data: Path | None = None
    """Folder that `trimask prepare` wrote, whose questions are the problems. None: what the run was trained on."""
    dataset: str | None = None
    """Dataset with the questions. None: the only one."""
    task: str = TEXT
    """What is asked, as text (a prompt's response), text_to_image or audio_to_text."""
    split: str = TRAIN
    """Split with the questions."""
    max_problems: PositiveInt | None = None
    """At most so many of them. None: all."""
    judge: str | None = None
    """Who says what is right, as of `trimask evaluate`: final_number, or module:function. None: the task's usual."""
    checkpoint: NonNegativeInt | None = None
    """Step of the model. None: its newest."""
    preset: str | None = None
    """Named settings whose values are the defaults."""
    config: Annotated[PolicyTrainConfig, tyro.conf.arg(name="")]


def run(arguments: Arguments) -> None:
    """Trains and says where the policy is."""
    loaded = load(arguments.run, arguments.checkpoint)
    prepared = Prepared(arguments.data or Path(loaded.description.data))
    require_same_tokenizers(loaded, prepared)
    with progress_report() as report:
        prepared.require_verified(report)
    problems = from_prepared(
        prepared,
        arguments.dataset,
        arguments.task,
        arguments.split,
        max_examples=arguments.max_problems,
        judge=arguments.judge,
    )
    config = arguments.config
    longest = max(problem.request.length for problem in problems.problems)
    loaded.require_room(config.loop.limits, config.problems_per_step * config.episodes_of_group, longest)
    about = trained_on(str(arguments.run), loaded.step, problems)
    policy = train_policy(arguments.policy, arguments.config, problems, loaded.denoise, about)
    size = f"{num_parameters(policy.parameters):,} parameters"
    say(f"A policy of {size}: {arguments.policy}")


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    name = option(list(arguments), "--preset")
    if name is not None and name not in POLICIES:
        raise ValueError(f"no preset {name!r}; there are {', '.join(POLICIES)}")
    config = POLICIES[name]() if name else PolicyTrainConfig()
    default = Arguments(policy=tyro.MISSING, run=tyro.MISSING, preset=name, config=config)
    listed = "\n".join(f"  {preset:8} {make.__doc__}" for preset, make in POLICIES.items())
    description = f"{__doc__}\n\nWhat --preset can name; its values are the defaults shown below:\n{listed}"
    run(parse(Arguments, list(arguments), "train-policy", description, default))


if __name__ == "__main__":
    sys.exit(cli.main(["train-policy", *sys.argv[1:]]))
