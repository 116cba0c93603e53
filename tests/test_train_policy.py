"""Training a policy: it learns what pays, goes on where it stopped, and is the same on many devices."""

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

from trimask.diffusion.loop import LoopConfig
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.sampling.requests import Generator
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.problems import Problem, ProblemSet
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.train import PolicyTrainConfig, PolicyTraining, train_policy

LENGTH = 4
SURE = np.zeros((8, VOCABULARY.size), np.float32)
SURE[2 : 2 + LENGTH, fakes.TEXT_IDS.start + 1] = 9.0


def knowing():
    """Denoiser of rows whose answer is 1 everywhere, and knows it from the start."""
    return Partial(_denoise, jnp.asarray(SURE))


def _denoise(table, sequence, positions=None, cache=None):
    return fakes.fake(table)(sequence, positions, cache)


def right(problems, answers):
    """The share of places that hold a 1; what was not revealed does not."""
    return np.array([(answer.segments[0].codes == 1).mean() for answer in answers])


PROBLEMS = ProblemSet("ones", VOCABULARY, [Problem(text_request([-1] * LENGTH), {})] * 64, right)
CONFIG = PolicyTrainConfig(
    policy=dataclasses.replace(SMALL, mlp_width=16),
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
    one, other = (GenerationConfig(strategy=str(folder)).chosen.parameters for folder in (trained, tmp_path / "p"))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, other))


def test_another_training_is_refused_in_a_folder_that_holds_one(trained):
    other = dataclasses.replace(CONFIG, reward=RewardConfig(alpha=1.0))
    with pytest.raises(ValueError, match=r"another configuration.*reward.alpha: 2.0 → 1.0"):
        train_policy(trained, other, PROBLEMS, knowing(), "ones, of a model that knows")


def test_experts_join_every_group():
    config = dataclasses.replace(CONFIG, experts=(0.5, 0.99), expert_block=2)
    training = PolicyTraining(config, PROBLEMS, knowing())
    state, metrics = training.step(training.init(), training.batch(0))
    # Of two blocks, each revealed at once: (4 − 2 + 1)/4 squared.
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
    assert jax.tree.all(jax.tree.map(jnp.array_equal, start.parameters, how.chosen.parameters))
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
        from trimask.diffusion.mesh import rows_on_all_devices
        from trimask.sampling_rl.train import PolicyTraining

        assert len(jax.devices()) == 8 and len(rows_on_all_devices(jax.numpy.arange(16)).sharding.device_set) == 8
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
