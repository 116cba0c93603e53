"""Folders that earlier code wrote open and resume with the same results; see `written/write.py`."""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv

from trimask.diffusion.evaluation.results import Evaluation
from trimask.diffusion.pretraining.description import RULES, load_description
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.run.folder import read_intact_lines
from trimask.diffusion.sampling.learned import open_policy
from trimask.diffusion.studies import learning_rate_transfer
from trimask.diffusion.studies.learning_rate_transfer import LearningRateTransfer
from trimask.diffusion.studies.trainings import Outcome
from trimask.diffusion.studies.trials import Trials, rules_of
from trimask.sampling_rl.train_policy import PolicyTrainConfig
from trimask.scripts import evaluate, generate, study, train_policy
from trimask.scripts.output.answers import read_index
from trimask.scripts.output.trajectory import trace_page
from trimask.tokenizers.storage import configuration

HERE = Path(__file__).parent / "written"
ARCHIVES = sorted(HERE.glob("*.tar.xz"), key=lambda path: path.name.partition(".")[0])
FORMER = pytest.mark.parametrize("written", ARCHIVES[:1], indirect=True, ids=["first"])
NEWEST = pytest.mark.parametrize("written", ARCHIVES[-1:], indirect=True, ids=["newest"])


def identities(folder: Path):
    spec = importlib.util.spec_from_file_location("write", HERE / "write.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.identities(folder)


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def written(request, tmp_path_factory):
    """An archive's folders; the paths in their files are relative to the folder that holds them."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(request.param) as tar:
        tar.extractall(folder, filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def expected(written):
    return json.loads((written / "expected.json").read_text())


@pytest.fixture(scope="module")
def rules(written):
    return load_description(written / "run").rules


def test_there_is_an_archive_and_each_is_small():
    assert ARCHIVES and all(path.stat().st_size < 1_000_000 for path in ARCHIVES)


@pytest.fixture(scope="module")
def has_former_policy(written):
    """Whether the archive's policy has the former network, which is the one kind of folder that is refused."""
    return json.loads((written / "policy" / "policy.json").read_text()).get("rules", 1) < 2


def test_everything_is_known_again(written, expected, rules, has_former_policy):
    """Fingerprints, examples, batches, masks, keys, weights and losses; masks are drawn by the rules of today."""
    found = identities(written)
    different = {name for name in expected if found[name] != expected[name]}
    assert different == ({"policy"} if has_former_policy else set()) | ({"masks"} if rules != RULES else set())


def test_a_policy_with_the_former_network_is_refused_and_no_other(written, has_former_policy, tmp_path):
    """In the same words by what uses a policy and by what would continue its training; the folder stays as it is."""
    if not has_former_policy:
        open_policy("policy")
        return
    kept = {path: path.read_bytes() for path in (written / "policy").glob("*.json*")}
    uses = ["run", "--prompt", "the cat", "--to", "text", "--out", str(tmp_path), "--strategy", "./policy"]
    trains = ["policy", "--run", "run", "--dataset", "sums", "--generation.block-length", "2"]
    for command, words in ((generate, uses), (train_policy, trains)):
        with pytest.raises(ValueError, match=r"^policy holds a policy of rules 1, .*; only policies of rules 2 can be"):
            command.main(words)
    assert kept and {path: path.read_bytes() for path in kept} == kept


def resumed(written, name):
    """A copy of the run, continued from its first checkpoint."""
    run = written / name
    shutil.copytree(written / "run", run)
    shutil.rmtree(run / "checkpoints" / "9")
    train(run, written / "data", load_description(run).train)
    return run


def test_a_run_resumes_with_the_losses_it_had_and_twice_to_the_same_bits(written, expected, rules):
    """Within 1e-3: last bits belong to the processor, and Adam enlarges them. A run of former rules is refused."""
    if rules != RULES:
        with pytest.raises(ValueError, match=f"holds a run of rules {rules}, .* --init-from"):
            resumed(written, "once")
        return
    runs = [resumed(written, name) for name in ("once", "again")]
    lines = [read_intact_lines(run / "metrics.jsonl") for run in runs]
    losses = [[line["loss"] for line in of_run] for of_run in lines]
    assert losses[0] == losses[1] and [line["step"] for line in lines[0]] == list(range(1, 10))
    np.testing.assert_allclose(losses[0], expected["losses"], atol=1e-3)
    about = [(run / "checkpoints" / "9" / "about" / "metadata").read_text() for run in runs]
    assert json.loads(about[0])["arrays"] == json.loads(about[1])["arrays"]  # checksums of all leaves


def test_a_study_is_shown_without_a_new_trial(written, expected, monkeypatch):
    monkeypatch.setattr(Trials, "run_unordered", lambda _, __, work: iter(work and pytest.fail("trained again")))
    before = (written / "study" / "trials.jsonl").read_bytes()
    config = configuration.load(written / "study" / "config.json", LearningRateTransfer)
    with Trials(written / "study", written / "data", 0, lambda *_: None) as runner:
        text = learning_rate_transfer.study(config, runner)
    page = (written / "study" / "README.md").read_text()
    assert text in page and (written / "study" / "trials.jsonl").read_bytes() == before
    assert {line["key"] for line in read_intact_lines(written / "study" / "trials.jsonl")} == set(expected["trials"])
    study.main(["lr-transfer", "study", "--data", "data", "--workers", "0", "--show"])
    assert (written / "study" / "README.md").read_text() == page


def test_a_study_goes_on_only_by_the_rules_that_it_began_with(written, monkeypatch):
    folder = written / "longer"
    shutil.copytree(written / "study", folder)
    config = configuration.load(folder / "config.json", LearningRateTransfer)
    config = dataclasses.replace(config, log2_learning_rates=(*config.log2_learning_rates, -6))
    added = []

    def trained(_, function, work):
        added.extend(config.optimizer.learning_rate for config, _ in work)
        return iter([(0, Outcome(1.0, 1.0, [[1.0, 1.0, 1.0]], 1, 1.0, 1, 0.0))])

    monkeypatch.setattr(Trials, "run_unordered", trained)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    with Trials(folder, written / "data", 0, lambda *_: None) as runner:
        if rules_of(folder) == RULES:
            learning_rate_transfer.study(config, runner)
            assert added == [2**-6]
            return
        with pytest.raises(ValueError, match=f"holds a study of rules 1 .* this code follows rules {RULES}"):
            learning_rate_transfer.study(config, runner)
    assert not added and {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == before


@FORMER
def test_a_run_of_former_rules_is_sampled_from_evaluated_and_started_from(written, tmp_path):
    generate.main(["run", "--prompt", "dark", "--to", "image", "--out", str(tmp_path / "answers")])
    assert [entry["to"] for entry in read_index(tmp_path / "answers")] == ["image"]
    limits = ["--max-examples", "2", "--bound-samples", "1", "--splits", "validation"]
    evaluate.main(["run", *limits, "--out", str(tmp_path / "evaluation.json")])
    assert configuration.load(tmp_path / "evaluation.json", Evaluation).bounds
    old = load_description(Path("run"))
    optimizer = dataclasses.replace(old.train.optimizer, horizon_tokens=300)
    config = dataclasses.replace(old.train, optimizer=optimizer)
    new = train(tmp_path / "new", written / "data", config, init_from=written / "run").description
    assert (new.rules, new.init_step, new.num_steps) == (RULES, 9, 1)


def test_the_configuration_of_a_policy_an_evaluation_and_answers_open(written):
    assert configuration.load(written / "policy" / "config.json", PolicyTrainConfig).problems_per_step == 2
    assert configuration.load(written / "run" / "evaluation.json", Evaluation).step == 9
    index = read_index(written / "generated")
    assert [entry["to"] for entry in index] == ["text", "image", "audio"]
    assert trace_page(written / "generated" / index[0]["trace"]).is_file()


@NEWEST
def test_an_environment_of_a_run_is_built_again_in_spawned_processes(written):
    """Gymnasium's AsyncVectorEnv pickles the environment; it then does what the vector environment does."""
    asked = {"run": "run", "dataset": "sums", "split": "test", "max_problems": 2}
    together = gymnasium.make_vec("trimask/Unmasking-v0", 2, **asked)
    env = gymnasium.make("trimask/Unmasking-v0", **asked)
    mode = together.metadata["autoreset_mode"]
    paths = []
    with contextlib.closing(AsyncVectorEnv([lambda: env] * 2, context="spawn", autoreset_mode=mode)) as apart:
        assert (apart.observation_space, apart.action_space) == (together.observation_space, together.action_space)
        for envs in (together, apart):
            first = envs.reset(seed=3)
            paths.append([first, *(envs.step(np.full(envs.action_space.shape, bit, np.int8)) for bit in (0, 1))])
    assert data_equivalence(*paths, exact=False)  # rows of another batch are summed in another order
    assert paths[1][-1][2].all() and paths[1][-1][-1]["final_info"]["nfe"].tolist() == [2, 2]


@NEWEST
def test_one_answer_takes_two_programs(written, tmp_path):
    """Every further program delays the first answer, by compiling or by reading the cache."""
    code = (
        "import sys, jax; from trimask.scripts import generate\n"
        "seen = []\n"
        "jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))\n"
        "generate.main(sys.argv[1:])\n"
        "print('programs:', seen.count('/jax/core/compile/backend_compile_duration'))"
    )
    words = ["run", "--prompt", "one", "--to", "image", "--out", str(tmp_path)]
    process = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert process.stdout.endswith("programs: 2\n")
