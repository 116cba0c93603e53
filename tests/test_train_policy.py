"""Training a policy: rewards rise, interrupted training resumes, and several devices give the same policy."""

import dataclasses
import json
import shutil

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import VOCABULARY, text_request
from jax.tree_util import Partial
from test_mesh import run_on_eight_devices
from test_policy import SMALL

from trimask.diffusion.run.running_mean import Mean
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.sampling.learned import PolicyDescription
from trimask.sampling_rl import train_policy as module
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.problems import Problem, ProblemSet
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.rollout import empty_trajectories
from trimask.sampling_rl.train_policy import PolicyTrainConfig, PolicyTraining, _GradedEpisodes, train_policy
from trimask.tokenizers.storage import configuration

LENGTH = 4
SURE = np.zeros((8, VOCABULARY.size), np.float32)
SURE[2 : 2 + LENGTH, fakes.TEXT_IDS.start + 1] = 9.0


def knowing():
    """Denoiser that predicts code 1 at every position from the start."""
    return Partial(_denoise, jnp.asarray(SURE))


def _denoise(table, sequence, positions=None, cache=None):
    return fakes.fake(table)(sequence, positions, cache)


def right(problems, answers):
    """Grade: the share of positions that hold code 1; unrevealed positions do not."""
    return np.array([(answer.segments[0].codes == 1).mean() for answer in answers])


PROBLEMS = ProblemSet("ones", VOCABULARY, [Problem(text_request([-1] * LENGTH), {})] * 64, right)
CONFIG = PolicyTrainConfig(
    policy=dataclasses.replace(SMALL, mlp_width=16, initial_bias=-2.0),  # slow at first: there is something to learn
    grpo=GRPOConfig(group=4, learning_rate=0.02, warmup=0, chunk=32, weight_decay=0.0),
    reward=RewardConfig(alpha=2.0),
    problems_per_step=4,
    loop=LoopConfig(log_every=1, checkpoint_every=4, keep_best=1, best_metric="cost", spike_factor=None),
)


def lines_of(folder):
    keep = {"reward", "nfe", "accuracy", "loss", "clip_fraction", "entropy", "groups_with_signal", "step"}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name in keep} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies") / "fast"
    train_policy(folder, CONFIG, PROBLEMS, knowing(), "ones, of a model that knows")
    return folder


def test_where_everything_is_known_it_learns_to_reveal_at_once(trained):
    lines = lines_of(trained)
    assert len(lines) == 16
    early, late = (np.mean([line["nfe"] for line in part]) for part in (lines[:3], lines[-3:]))
    assert late < 0.75 * early
    assert np.mean([line["reward"] for line in lines[-3:]]) > np.mean([line["reward"] for line in lines[:3]])
    config = GenerationConfig(strategy=str(trained), temperature=0.0, stop_at_eos=False)
    answers = Generator(knowing(), VOCABULARY).generate([text_request([-1] * LENGTH)] * 32, config, seed=0)
    assert np.mean([answer.nfe for answer in answers]) < early
    assert all((answer.example.segments[0].codes == 1).all() for answer in answers)


def test_interrupted_and_gone_on_it_is_the_same(trained, tmp_path, monkeypatch):
    whole, done = PolicyTraining.step, []

    def failing(self, state, batch):
        if len(done) == 6:
            raise RuntimeError("power cut")
        done.append(0)
        return whole(self, state, batch)

    monkeypatch.setattr(PolicyTraining, "step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train_policy(tmp_path / "p", CONFIG, PROBLEMS, knowing(), "ones, of a model that knows")
    monkeypatch.undo()
    train_policy(tmp_path / "p", CONFIG, PROBLEMS, knowing(), "ones, of a model that knows")
    assert lines_of(tmp_path / "p") == lines_of(trained)
    one, other = (
        GenerationConfig(strategy=str(folder)).strategy_function.parameters for folder in (trained, tmp_path / "p")
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, other))


def test_a_training_that_its_first_step_shows_to_be_impossible_leaves_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, loop=dataclasses.replace(CONFIG.loop, best_metric="bits"))
    with pytest.raises(ValueError, match=r"--loop\.best-metric must be one of .*cost.*; got bits"):
        train_policy(tmp_path / "new", config, PROBLEMS, knowing(), "ones, of a model that knows")
    assert not (tmp_path / "new").exists()


def test_another_training_is_refused_in_a_folder_that_holds_one(trained):
    other = dataclasses.replace(CONFIG, reward=RewardConfig(alpha=1.0))
    with pytest.raises(ValueError, match=r"another configuration.*reward.alpha: 2.0 → 1.0"):
        train_policy(trained, other, PROBLEMS, knowing(), "ones, of a model that knows")


def test_a_training_of_a_policy_of_former_rules_is_not_continued(trained, tmp_path):
    folder = tmp_path / "former@best"  # no checkpoint's name: it is not looked up as a policy's
    shutil.copytree(trained, folder)
    about = configuration.load(folder / "policy.json", PolicyDescription)
    configuration.save(folder / "policy.json", dataclasses.replace(about, rules=1))
    with pytest.raises(ValueError, match=r"holds a policy of rules 1, .* can be used: train it again"):
        train_policy(folder, CONFIG, PROBLEMS, knowing(), "ones, of a model that knows")


@pytest.mark.parametrize(("block", "tokens"), [(None, LENGTH), (2, 2), (8, LENGTH)])
def test_the_initial_bias_is_that_of_its_blocks_or_of_the_whole_answer(block, tokens):
    generation = dataclasses.replace(CONFIG.generation, block_length=block)
    config = dataclasses.replace(CONFIG, policy=SMALL, generation=generation)
    (bias,) = PolicyTraining(config, PROBLEMS, knowing()).init().parameters["output"]["bias"]
    assert float(bias) == pytest.approx(SMALL.bias_of(tokens))


def test_experts_join_every_group():
    config = dataclasses.replace(CONFIG, experts=(0.5, 0.99), expert_block=2)
    training = PolicyTraining(config, PROBLEMS, knowing())
    state, metrics = training.step(training.init(), training.batch(0))
    # Two blocks, each revealed at once, give the reward (4 − 2 + 1)/4 squared.
    assert float(metrics["expert_reward"]) == pytest.approx(9 / 16)
    assert int(state.step) == 1 and np.isfinite(float(metrics["loss"]))


def test_the_best_of_the_experts_is_imitated(tmp_path):
    # One block reveals all at once; thresholds that nothing reaches reveal one by one.
    config = dataclasses.replace(CONFIG, learns_from="experts", experts=(1.0, 0.5), expert_block=LENGTH, epochs=2.0)
    train_policy(tmp_path / "imitated", config, PROBLEMS, knowing(), "ones")
    costs = [json.loads(line)["cost"] for line in (tmp_path / "imitated/metrics.jsonl").read_text().splitlines()]
    assert costs[-1] < 0.2 * costs[0]
    how = GenerationConfig(strategy=str(tmp_path / "imitated"), temperature=0.0)
    answers = Generator(knowing(), VOCABULARY).generate([text_request([-1] * LENGTH)] * 32, how, seed=0)
    assert np.mean([answer.nfe for answer in answers]) < 1.3
    # And is a start.
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "imitated"))
    training = PolicyTraining(config, PROBLEMS, knowing())
    start = training.init()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, start.parameters, how.strategy_function.parameters))
    assert float(training.step(start, training.batch(0))[1]["nfe"]) < 1.3
    other = dataclasses.replace(config, policy=dataclasses.replace(config.policy, law="dpls"))
    with pytest.raises(ValueError, match=r"another kind of policy.*law: bernoulli → dpls"):
        PolicyTraining(other, PROBLEMS, knowing()).init()
    # A training under way does not need it any more.
    train_policy(tmp_path / "further", config, PROBLEMS, knowing(), "ones")
    shutil.rmtree(tmp_path / "imitated")
    train_policy(tmp_path / "further", config, PROBLEMS, knowing(), "ones")


def test_eight_devices_take_the_steps_of_one(trained):
    """Episodes shared out over 8 simulated devices, parameters on all: the same rewards, loss and gradients."""
    result = run_on_eight_devices(
        """
        import json
        import jax
        from test_train_policy import CONFIG, PROBLEMS, knowing
        from trimask.diffusion.mesh import split_rows
        from trimask.sampling_rl.train_policy import PolicyTraining

        assert len(jax.devices()) == 8 and len(split_rows(jax.numpy.arange(16)).sharding.device_set) == 8
        # As weights are that were loaded: of the first device, and to stay there.
        training = PolicyTraining(CONFIG, PROBLEMS, jax.device_put(knowing(), jax.devices()[0]))
        state = training.init()
        for number in range(3):
            state, metrics = training.step(state, training.batch(number))
            print(json.dumps({name: float(value) for name, value in metrics.items()}))
        """
    )
    assert result.returncode == 0, result.stderr
    for line, theirs in zip(map(json.loads, result.stdout.splitlines()), lines_of(trained)[:3], strict=True):
        del theirs["step"]
        assert {name: line[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_every_problem_is_seen_once_an_epoch():
    training = PolicyTraining(dataclasses.replace(CONFIG, epochs=2.0), PROBLEMS, knowing())
    seen = np.concatenate([training.batch(step) for step in range(training.num_steps)])
    assert training.num_steps == 32
    assert sorted(seen[:64]) == sorted(seen[64:]) == list(range(64)) and seen[:64].tolist() != seen[64:].tolist()


def test_an_epoch_may_end_inside_a_batch():
    five = dataclasses.replace(PROBLEMS, problems=PROBLEMS.problems[:5])
    config = dataclasses.replace(CONFIG, problems_per_step=3, epochs=2.0, seed=4)
    training = PolicyTraining(config, five, knowing())
    orders = [np.random.default_rng((4, epoch)).permutation(5) for epoch in (0, 1)]
    seen = np.concatenate([training.batch(step) for step in range(training.num_steps)])
    # Ten places in steps of three are three steps: the last place is left out.
    assert training.num_steps == 3 and seen.tolist() == np.concatenate(orders)[:9].tolist()


def episodes(rewards, right=0.0, nfe=1):
    rewards = np.array(rewards, np.float64)
    number = rewards.size
    steps = empty_trajectories(CONFIG.policy, jnp.ones((number, 8), bool), LENGTH, LENGTH)
    return _GradedEpisodes(steps, np.full(rewards.shape, right), np.full(rewards.shape, nfe), rewards)


@pytest.mark.parametrize(("block", "anywhere"), [(None, True), (2, False)])
def test_experts_act_anywhere_where_the_policy_does(monkeypatch, block, anywhere):
    """Their blocks are no blocks of a policy that sees the whole answer."""
    generation, recorders = dataclasses.replace(CONFIG.generation, block_length=block), []
    config = dataclasses.replace(CONFIG, experts=(0.5, 0.9), expert_block=2, generation=generation)
    training = PolicyTraining(config, PROBLEMS, knowing())
    monkeypatch.setattr(training, "_play", lambda how, *_: recorders.append(how[1]) or episodes([[0.5]]))
    training._play_experts(np.arange(1), jax.random.key(0))
    assert [recorder.acts_anywhere for recorder in recorders] == [anywhere] * 2


def stepped(config, own, experts, monkeypatch):
    """Batch that the update gets, and metrics of a step, with made-up episodes and a made-up update."""
    training = PolicyTraining(config, PROBLEMS, knowing())
    given = []

    def made_up(parameters, state, batch, **rest):
        given.append((batch, rest))
        return parameters, state, {"log_likelihood": Mean(jnp.float32(-6.0), jnp.float32(4.0))}

    monkeypatch.setattr(module, "update", made_up)
    monkeypatch.setattr(training, "_play_policy", lambda *_: own)
    monkeypatch.setattr(training, "_play_experts", lambda *_: experts)
    state = training.init()
    after, metrics = training.step(state, np.arange(len(experts[0].rewards)))
    ((batch, rest),) = given
    assert int(after.step) == 1 and rest["experts"] == len(config.experts) and rest["config"] == config.grpo
    return batch, {name: float(mean) for name, mean in metrics.items()}


def test_own_episodes_and_experts_are_a_group(monkeypatch):
    """Three problems; of the last two all rewards are the same, and there is nothing to learn from them."""
    config = dataclasses.replace(CONFIG, experts=(0.5, 0.99))
    own = episodes([[1.0, 0.0, 0.5], [0.25] * 3, [0.75] * 3], right=0.75, nfe=3)
    experts = [episodes([[0.5], [0.25], [0.75]]), episodes([[0.0], [0.25], [0.75]])]
    batch, metrics = stepped(config, own, experts, monkeypatch)
    # The mean of the first group is 0.4. Advantages in order: the policy's, those of the first expert, of the second.
    np.testing.assert_allclose(batch.advantages, [0.6, -0.4, 0.1, *[0] * 6, 0.1, 0, 0, -0.4, 0, 0], atol=1e-6)
    assert batch.has_signal.tolist() == [True] * 3 + [False] * 6 + [True, False, False] * 2
    assert batch.is_expert.tolist() == [False] * 9 + [True] * 6
    assert len(batch.trajectories.num_steps) == 15
    assert metrics == pytest.approx(
        {
            "reward": 0.5,
            "cost": -0.5,
            "accuracy": 0.75,
            "nfe": 3,
            "groups_with_signal": 1 / 3,
            "expert_reward": 2.5 / 6,
            "log_likelihood": -1.5,
        }
    )


def test_what_is_imitated_is_the_best_episode_of_a_problem_if_it_is_worth_anything(monkeypatch):
    config = dataclasses.replace(CONFIG, learns_from="experts", experts=(0.5, 0.99))
    experts = [episodes([[0.5], [0.0], [-0.25]]), episodes([[0.75], [0.0], [-0.5]])]
    batch, metrics = stepped(config, None, experts, monkeypatch)
    assert batch.advantages.tolist() == [0, 0, 0, 1, 0, 0]
    assert batch.has_signal.tolist() == [False, False, False, True, False, False]
    assert not batch.is_expert.any()
    assert metrics == pytest.approx(
        {"expert_reward": (0.75 - 0.25) / 3, "groups_with_signal": 1 / 3, "log_likelihood": -1.5, "cost": 1.5}
    )


def test_a_line_of_metrics_holds_all_that_a_training_is_watched_by(trained):
    lines = list(map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()))
    of_update = {"loss", "clip_fraction", "kl", "entropy", "log_likelihood", "gradient_norm"}
    of_episodes = {"reward", "cost", "accuracy", "nfe", "groups_with_signal"}
    # No step's advantage may be positive, of which the log-likelihood is.
    names = {"step", "tokens_per_second", "data_wait"} | of_update | of_episodes
    assert all(names - {"log_likelihood"} <= set(line) <= names for line in lines)
    for line in lines:
        assert line["cost"] == -line["reward"] and line["kl"] == 0 and line.get("log_likelihood", -1) < 0
        assert 1 <= line["nfe"] <= LENGTH and 0 < line["accuracy"] <= 1
        assert line["tokens_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["gradient_norm"] > 0


def test_the_loop_is_told_what_a_step_costs_and_holds(tmp_path, monkeypatch):
    told = {}

    def train_loop(step, state, batch, **rest):
        told.update(rest, batch=batch)
        return state

    monkeypatch.setattr(module, "train_loop", train_loop)
    config = dataclasses.replace(CONFIG, experts=(0.5,), problems_per_step=5, seed=3)
    train_policy(tmp_path / "p", config, PROBLEMS, knowing(), "ones")
    # Four episodes of its own and an expert's, of five problems.
    assert told["items"](0) == 5 * (4 + 1) * LENGTH
    assert told["describe"](2) == told["batch"](2).tolist() and len(told["describe"](2)) == 5
    assert (told["num_steps"], told["folder"], told["config"]) == (13, tmp_path / "p", config.loop)
    imitating = dataclasses.replace(config, learns_from="experts", experts=(0.5, 0.9))
    assert imitating.episodes_per_problem == 2 and config.episodes_per_problem == 5


@pytest.mark.parametrize(
    "bad",
    [
        {"experts": (1.5,)},
        {"problems_per_step": 0},
        {"learns_from": "experts"},
        {"generation": GenerationConfig(temperature=1.0)},
        {"generation": GenerationConfig(temperature=0.0, cache="dual", block_length=4)},
    ],
)
def test_impossible_trainings_are_refused(bad):
    with pytest.raises(ValueError, match=r"got|takes experts"):
        PolicyTrainConfig(**bad)
