"""Training of policies by the dozen, each measured beside the heuristics: the evidence for learned unmasking.

What is varied, each with several seeds:

    alphas     how much speed is worth (α), in blocks and without, from a start that imitates thresholds
    scratch    no start: in blocks; without them; without them and with an expert in every group
    inputs     what the policy sees, without blocks
    laws       dpls in place of bernoulli, without blocks
    rewards    the additive reward in place of the multiplicative one, without blocks
    imitation  nothing but imitation, without blocks, of as many episodes as a start and GRPO have together

OUT/policies holds a folder for each; one that is complete is not trained again. Each worker process trains a start and
what goes on from there.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.evaluation.evaluate import require_same_tokenizers
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.sampling.policy import PolicyConfig
from trimask.diffusion.studies.trials import Trials
from trimask.sampling_rl.problem_sets import from_prepared
from trimask.sampling_rl.studies import unmasking
from trimask.sampling_rl.studies.unmasking import UnmaskingStudy
from trimask.sampling_rl.train_policy import PolicyTrainConfig, train_policy, trained_on
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Size
from trimask.tokenizers.vocabulary import TEXT

Part = Literal["alphas", "scratch", "inputs", "laws", "rewards", "imitation"]


@dataclass(frozen=True, kw_only=True)
class PolicyStudy(Checked):
    """What is trained, on what, and how it is measured."""

    run: str = "runs/cups"
    """Run folder of the model."""
    dataset: str | None = None
    """Dataset with the problems. None: the only one."""
    parts: tuple[Part, ...] = get_args(Part)
    """What is varied."""
    alphas: tuple[NonNegative, ...] = (1.0, 0.3, 3.0)
    """Of the reward; the first is that of all other parts."""
    inputs: tuple[Literal["top", "margin", "entropy", "hidden"], ...] = ("top", "margin", "entropy", "hidden")
    """What a policy sees in place of the confidence, each by itself."""
    seeds: Size = 3
    """Of every training."""
    imitated: PositiveInt = 1600
    """Problems on which thresholds are imitated."""
    problems: PositiveInt = 2000
    """Problems of a training from there."""
    scratch: PositiveInt = 3200
    """Problems of a training without a start."""
    blocks: PolicyTrainConfig
    """In blocks."""
    full: PolicyTrainConfig
    """Without blocks."""
    steered: PolicyTrainConfig
    """Without blocks, with experts."""
    imitation: PolicyTrainConfig
    """Imitation without blocks; in blocks it has those of `blocks`."""
    measure: UnmaskingStudy = UnmaskingStudy()
    """How; run, dataset and policies are those of this study."""

    def __post_init__(self):
        super().__post_init__()
        if not self.parts or not self.alphas:
            raise ValueError(f"there must be parts and alphas; got {self.parts} and {self.alphas}")

    @property
    def imitated_alone(self) -> int:
        """Problems of imitation alone: as many episodes as `imitated` and then `problems` make."""
        return self.imitated + self.problems * self.full.grpo.group // len(self.imitation.experts)


class PolicyTrial(NamedTuple):
    """One policy."""

    name: str
    config: PolicyTrainConfig
    problems: int


def trainings(config: PolicyStudy, folder: Path, hidden_size: int) -> Iterator[PolicyTrial]:
    """All of them, each after the one it starts from; their folders are in `folder`.

    `hidden_size` is that of the model, for policies that see its hidden states.
    """
    for seed in range(config.seeds):
        for part in config.parts:
            yield from _of_part(part, config, folder, hidden_size, seed)


def _of_part(part: Part, config: PolicyStudy, folder: Path, hidden_size: int, seed: int) -> Iterator[PolicyTrial]:
    blocks, full, steered, imitation = (
        replace(base, seed=seed, reward=replace(base.reward, alpha=config.alphas[0]))
        for base in (config.blocks, config.full, config.steered, config.imitation)
    )

    def started(
        start: str, imitation: PolicyTrainConfig, then: Mapping[str, PolicyTrainConfig]
    ) -> Iterator[PolicyTrial]:
        yield PolicyTrial(f"imitated-{start}-s{seed}", imitation, config.imitated)
        for name, training in then.items():
            init_from = str(folder / f"imitated-{start}-s{seed}")
            yield PolicyTrial(f"{name}-s{seed}", replace(training, init_from=init_from), config.problems)

    def with_policy(name: str, policy: PolicyConfig) -> Iterator[PolicyTrial]:
        yield from started(name, replace(imitation, policy=policy), {name: replace(full, policy=policy)})

    if part == "alphas":
        in_blocks = replace(imitation, generation=blocks.generation)
        for name, base, start in (("full", full, imitation), ("blocks", blocks, in_blocks)):
            rewards = [replace(base.reward, alpha=alpha) for alpha in config.alphas]
            yield from started(
                name, start, {f"{name}-a{reward.alpha:g}": replace(base, reward=reward) for reward in rewards}
            )
    elif part == "scratch":
        for name, base in (("full", full), ("steered", steered), ("blocks", blocks)):
            yield PolicyTrial(f"scratch-{name}-s{seed}", base, config.scratch)
    elif part == "inputs":
        for name in config.inputs:
            size = hidden_size if name == "hidden" else None
            yield from with_policy(f"full-{name}", replace(full.policy, inputs=(name,), hidden_size=size))
    elif part == "laws":
        yield from with_policy("full-dpls", replace(full.policy, law="dpls"))
    elif part == "rewards":
        additive = replace(full, reward=replace(full.reward, kind="additive"))
        yield PolicyTrial(f"scratch-additive-s{seed}", additive, config.scratch)
    elif part == "imitation":
        yield PolicyTrial(f"imitated-alone-s{seed}", imitation, config.imitated_alone)


def chains(planned: Iterable[PolicyTrial]) -> list[list[PolicyTrial]]:
    """Each a policy that starts from nothing, and those that start from it."""
    found: dict[str, list[PolicyTrial]] = {}
    for training in planned:
        start = training.config.init_from
        found.setdefault(Path(start).name if start else training.name, []).append(training)
    return list(found.values())


def train_chain(run: str, data: Path, dataset: str | None, folder: Path, chain: Sequence[PolicyTrial]) -> None:
    """Trains what is not there yet, one after another."""
    loaded, prepared = load(Path(run)), Prepared(data)
    for training in chain:
        problems = from_prepared(prepared, dataset, TEXT, TRAIN, max_examples=training.problems)
        about = trained_on(run, loaded.step, problems)
        train_policy(folder / training.name, training.config, problems, loaded.denoise, about)
        jax.clear_caches()  # of all trainings they would be more than a process can map


def _train_chain_quietly(*arguments: Any) -> None:
    """The same without a progress bar: in several processes they would be written over each other."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        train_chain(*arguments)


def study(config: PolicyStudy, trials: Trials) -> str:
    """Trains what is not there, measures everything as the study `unmasking` does; returns the text."""
    loaded, folder, prepared = load(Path(config.run)), trials.folder / "policies", Prepared(trials.data)
    require_same_tokenizers(loaded, prepared)
    planned = list(trainings(config, folder, loaded.description.train.model.width))
    work = [(config.run, trials.data, config.dataset, folder, chain) for chain in chains(planned)]
    train = _train_chain_quietly if trials.workers else train_chain
    trials.report("policies", 0, len(planned))
    done = 0
    for number, _ in trials.shared(train, work):
        done += len(work[number][-1])
        trials.report("policies", done, len(planned))
    policies = tuple(str(folder / training.name) for training in planned)
    beside_heuristics = replace(config.measure, run=config.run, dataset=config.dataset, policies=policies)
    return unmasking.study(beside_heuristics, trials)
