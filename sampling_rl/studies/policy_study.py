"""Trains unmasking policies under many settings and compares each with the heuristics: evidence for learned unmasking.

Parts of the study, each with several seeds; an initial policy imitates thresholds, and GRPO goes on from it:

    alphas     the weight of speed in the reward (α), in blocks and without, from an initial policy
    scratch    random initialisation: in blocks; without blocks; without blocks, with an expert in every group
    inputs     inputs of the policy, without blocks, from an initial policy
    laws       the law dpls in place of bernoulli, without blocks, from an initial policy
    rewards    the additive reward in place of the multiplicative one, without blocks, from random initialisation
    imitation  imitation alone, without blocks, of as many episodes as an initial policy and GRPO use together

OUT/policies holds a folder for each policy; a complete one is not trained again. Each worker process trains an initial
policy and all policies that start from it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.run.folder import checkpoint_steps
from trimask.diffusion.run.progress import without_bars
from trimask.diffusion.sampling.policy import PolicyConfig
from trimask.diffusion.studies.claims import Findings
from trimask.diffusion.studies.final import FinalResult
from trimask.diffusion.studies.findings import grouped
from trimask.diffusion.studies.trials import Trials, open_run
from trimask.sampling_rl.problem_sets import from_prepared
from trimask.sampling_rl.studies import unmasking
from trimask.sampling_rl.studies.unmasking import UnmaskingStudy
from trimask.sampling_rl.train_policy import PolicyTrainConfig, problems_summary, train_policy
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, PositiveInt, Size
from trimask.tokenizers.vocabulary import TEXT

Part = Literal["alphas", "scratch", "inputs", "laws", "rewards", "imitation"]


@dataclass(frozen=True, kw_only=True)
class PolicyStudy(Checked):
    """Model, problems and training settings that the study of policies compares."""

    run: str = "runs/cups"
    """Run folder of the model."""
    dataset: str | None = None
    """Dataset with the problems. None: the only one."""
    parts: tuple[Part, ...] = get_args(Part)
    """Parts of the study to run: what is varied among the policies."""
    alphas: tuple[NonNegative, ...] = (1.0, 0.3, 3.0)
    """Values of the reward's α to compare; the first one is used in all other parts."""
    inputs: tuple[Literal["top", "margin", "entropy", "hidden"], ...] = ("top", "margin", "entropy", "hidden")
    """Inputs of the policy to compare, each in place of the confidence."""
    seeds: Size = 5
    """Number of seeds of every training; with fewer than five no claim is shown."""
    first_seed: NonNegativeInt = 0
    """First seed of the trainings; another one tries the claims again by other seeds."""
    imitated: PositiveInt = 1600
    """Number of problems of a training of an initial policy, which imitates thresholds."""
    problems: PositiveInt = 2000
    """Number of problems of a training that starts from an initial policy."""
    scratch: PositiveInt = 3200
    """Number of problems of a training from random initialisation."""
    blocks: PolicyTrainConfig
    """Configuration of trainings in blocks."""
    full: PolicyTrainConfig
    """Configuration of trainings without blocks."""
    steered: PolicyTrainConfig
    """Configuration of trainings without blocks, with experts."""
    imitation: PolicyTrainConfig
    """Configuration of imitation without blocks; initial policies in blocks use the generation settings of `blocks`."""
    measure: UnmaskingStudy = UnmaskingStudy()
    """Settings of the comparison with heuristics; its run, dataset and policies are replaced by those of this study."""

    def __post_init__(self):
        super().__post_init__()
        if not self.parts or not self.alphas:
            raise ValueError(f"there must be parts and alphas; got {self.parts} and {self.alphas}")

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def imitated_alone(self) -> int:
        """Number of problems of imitation alone, with as many episodes as an initial policy and GRPO use together."""
        return self.imitated + self.problems * self.full.grpo.group // len(self.imitation.experts)


class PolicyTrial(NamedTuple):
    """Training of one policy."""

    name: str
    """Name of the policy's folder."""
    config: PolicyTrainConfig
    problems: int
    """Number of problems to train on."""


def policy_trials(config: PolicyStudy, folder: Path, hidden_size: int) -> Iterator[PolicyTrial]:
    """All trainings of the study, each after the one that it is initialised from; `folder` holds the policies' folders.

    `hidden_size` is the width of the model, for policies whose input is its hidden states.
    """
    for seed in config.all_seeds:
        for part in config.parts:
            yield from _trials_of_part(part, config, folder, hidden_size, seed)


def _trials_of_part(
    part: Part, config: PolicyStudy, folder: Path, hidden_size: int, seed: int
) -> Iterator[PolicyTrial]:
    blocks, full, steered, imitation = (
        replace(base, seed=seed, reward=replace(base.reward, alpha=config.alphas[0]))
        for base in (config.blocks, config.full, config.steered, config.imitation)
    )

    def after_imitation(
        start: str, imitation: PolicyTrainConfig, then: Mapping[str, PolicyTrainConfig]
    ) -> Iterator[PolicyTrial]:
        yield PolicyTrial(f"imitated-{start}-s{seed}", imitation, config.imitated)
        for name, training in then.items():
            init_from = str(folder / f"imitated-{start}-s{seed}")
            yield PolicyTrial(f"{name}-s{seed}", replace(training, init_from=init_from), config.problems)

    def with_policy(name: str, policy: PolicyConfig) -> Iterator[PolicyTrial]:
        yield from after_imitation(name, replace(imitation, policy=policy), {name: replace(full, policy=policy)})

    if part == "alphas":
        in_blocks = replace(imitation, generation=blocks.generation)
        for name, base, start in (("full", full, imitation), ("blocks", blocks, in_blocks)):
            rewards = [replace(base.reward, alpha=alpha) for alpha in config.alphas]
            yield from after_imitation(
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
    """Groups of trainings: each a policy with random initialisation, followed by those that are initialised from it."""

    def first(trial: PolicyTrial) -> str:
        return Path(trial.config.init_from).name if trial.config.init_from else trial.name

    return list(grouped(planned, first).values())


def train_chain(run: str, data: Path, dataset: str | None, folder: Path, chain: Sequence[PolicyTrial]) -> None:
    """Trains the policies of a chain one after another, except those that are complete."""
    loaded, prepared = open_run(run, data)
    for trial in chain:
        problems = from_prepared(prepared, dataset, TEXT, TRAIN, max_examples=trial.problems)
        summary = problems_summary(run, loaded.step, problems)
        train_policy(folder / trial.name, trial.config, problems, loaded.denoise, summary)
        jax.clear_caches()  # compiled programs take memory maps, whose number per process is limited


def _train_chain_quietly(*arguments: Any) -> None:
    """`train_chain` without progress bars, which would overwrite each other in several processes."""
    with without_bars():
        train_chain(*arguments)


def study(config: PolicyStudy, trials: Trials) -> Findings:
    """Trains the policies, compares them with heuristics as the study `unmasking` does, and returns its report.

    Claims are made on policies of the first α that start from an initial policy, in blocks and without.
    """
    loaded, _ = open_run(config.run, trials.data)
    folder = trials.folder / "policies"
    planned = list(policy_trials(config, folder, loaded.description.train.model.width))
    if trials.may_add:
        _train_all(config, folder, planned, trials)
    _require_trained(folder, planned)
    main = [f"{how}-a{config.alphas[0]:g}-s{seed}" for how in ("blocks", "full") for seed in config.all_seeds]
    return unmasking.study(_comparison(config, folder, planned), trials, [str(folder / name) for name in main])


def rule(config: PolicyStudy) -> str:
    """The rule by which settings are chosen on the validation split."""
    return unmasking.rule(config.measure)


def final(config: PolicyStudy, trials: Trials) -> FinalResult:
    """Scores the settings that the rule chooses on the test splits, as the study `unmasking` does; trains nothing."""
    loaded, _ = open_run(config.run, trials.data)
    folder = trials.folder / "policies"
    planned = list(policy_trials(config, folder, loaded.description.train.model.width))
    _require_trained(folder, planned)
    return unmasking.final(_comparison(config, folder, planned), trials)


def _require_trained(folder: Path, planned: Sequence[PolicyTrial]) -> None:
    """Raises ValueError if a policy has no checkpoint."""
    missing = [trial.name for trial in planned if not checkpoint_steps(folder / trial.name)]
    if missing:
        raise ValueError(
            f"{folder.parent} holds no complete study: {len(missing)} of {len(planned)} policies are not trained, such "
            f"as {missing[0]}. The same command without --final and --show trains them"
        )


def _comparison(config: PolicyStudy, folder: Path, planned: Sequence[PolicyTrial]) -> UnmaskingStudy:
    """Configuration of the comparison of the trained policies with heuristics."""
    policies = tuple(str(folder / trial.name) for trial in planned)
    return replace(config.measure, run=config.run, dataset=config.dataset, policies=policies)


def _train_all(config: PolicyStudy, folder: Path, planned: Sequence[PolicyTrial], trials: Trials) -> None:
    """Trains the policies that are not complete, in the worker processes."""
    work = [(config.run, trials.data, config.dataset, folder, chain) for chain in chains(planned)]
    train = _train_chain_quietly if trials.workers else train_chain
    trials.report("policies", 0, len(planned))
    done = 0
    for number, _ in trials.run_unordered(train, work):
        done += len(work[number][-1])
        trials.report("policies", done, len(planned))
