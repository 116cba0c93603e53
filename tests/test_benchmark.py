"""`trimask benchmark sample`: its table, and that it compares the same tokens of the same weights."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fakes
import jax
import numpy as np
import pytest
from jax.tree_util import Partial
from madeup import magnitudes

from trimask.diffusion.cost import count_parameters, flops_per_token
from trimask.diffusion.data.batches import Batches
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import TrainState
from trimask.diffusion.run.checkpoint import Retention
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.policy import PolicyConfig
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts.benchmark import BENCHMARKS, main
from trimask.scripts.benchmarks import checkpoint, data, rollout, sample, train
from trimask.scripts.benchmarks.sample import OurGeneration, _start
from trimask.tokenizers.vocabulary import Vocabulary

SMALL = [
    "--sizes",
    "64x1",
    "--vocabulary",
    "50",
    "--prompt",
    "4",
    "--lengths",
    "4",
    "--blocks",
    "2",
    "--per-evaluation",
    "1",
]
QUICK = [*SMALL, "--rows", "2", "--repeats", "1", "--caches", "none", "dual"]

FAKE = '''
"""Stands in for a Python with PyTorch: answers every case with one token, and says what it was given."""
import json, sys
import numpy as np
spec, weights = json.load(open(sys.argv[2])), np.load(sys.argv[3])
print("{'not': 'JSON'} of the code that it runs")
json.dump({"spec": spec, "shapes": {n: weights[n].shape for n in weights}}, open("seen.json", "w"))
for case in spec["cases"]:
    tokens = [prompt + [9] * case["length"] for prompt in spec["prompts"][:case["rows"]]]
    print(json.dumps({"seconds": [4.0, 2.0, 3.0], "tokens": tokens}))
'''


def python_that_runs(text: str, folder: Path) -> str:
    """Executable that replaces another Python: it runs this source text in place of the script it is called with."""
    python, script = folder / "python", folder / "fake.py"
    script.write_text(text)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_every_case_has_its_line_and_numbers_that_fit(tmp_path, monkeypatch):
    rows, timed = [], sample._timed
    monkeypatch.setattr(sample, "_timed", lambda *of: rows.append(len(of[3].step)) or timed(*of))
    main(["sample", str(tmp_path / "out"), *QUICK])
    assert rows == [2, 2]
    cases = json.loads((tmp_path / "out/sample.json").read_text())["cases"]
    assert [(c["rows"], c["cache"]) for c in cases] == [(r, c) for r in (2,) for c in ("none", "dual")]
    for case in cases:
        assert case["evaluations"] == 4 and case["seconds"] > 0
        assert case["tokens_per_second"] == pytest.approx(case["rows"] * 4 / case["seconds"])
    assert (tmp_path / "out/sample.md").read_text().count("| trimask |") == 2


def test_other_code_gets_our_weights_and_prompts_and_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python = python_that_runs(FAKE, tmp_path)
    main(["sample", "out", *QUICK, "--llada", "a", "--fast-dllm", "b", "--python", python])
    cases = json.loads(Path("out/sample.json").read_text())["cases"]
    theirs = [c for c in cases if c["code"] != "trimask"]
    assert [c["code"] for c in theirs] == ["LLaDA"] + ["Fast-dLLM"] * 2
    assert all(np.isfinite(c["parted_at"]) and c["parted_at"] >= 0 for c in theirs)
    assert all(c["seconds"] == 3.0 and 0 <= c["same_tokens"] < 1 for c in theirs)
    assert all(c["tokens_per_second"] == pytest.approx(c["rows"] * 4 / 3.0) for c in theirs)
    assert all(c["milliseconds_per_evaluation"] == pytest.approx(3000 / c["evaluations"]) for c in theirs)
    ours = {(c["rows"], c["cache"]): c["seconds"] for c in cases if c["code"] == "trimask"}
    assert all(c["speedup"] == pytest.approx(3.0 / ours[c["rows"], c["cache"]]) for c in theirs)
    seen = json.loads(Path("seen.json").read_text())
    assert np.shape(seen["spec"]["prompts"]) == (2, 4)
    vocabulary, shapes = seen["spec"]["vocabulary"], seen["shapes"]
    assert shapes["model.transformer.wte.weight"] == [vocabulary, 64]
    assert shapes["model.transformer.ff_out.weight"] == [vocabulary, 64]
    assert shapes["model.transformer.blocks.0.ff_proj.weight"] == [seen["spec"]["mlp_width"], 64]


def test_samples_are_timed_of_what_is_asked_for(tmp_path, monkeypatch):
    """Every case has the first of the same prompts; other code gets them all, and the cases that it can do."""
    asked, told = [], {}

    def timed(denoise, how, vocabulary, state, repeats):
        tokens = np.asarray(state.sequence.tokens)
        asked.append((how.steps, how.block_length, how.cache, how.temperature, tokens, repeats))
        return dataclasses.replace(state, nfe=state.nfe + how.steps), 2.0

    def run_peer(python, script, spec, weights):
        told.update(spec, script=script, spread=weights["model.transformer.ff_out.weight"].std())
        tokens = [[[9] * (3 + case["length"])] * case["rows"] for case in spec["cases"]]
        return [{"seconds": [1.0, 5.0, 4.0], "tokens": of_case} for of_case in tokens]

    monkeypatch.setattr(sample, "_timed", timed)
    monkeypatch.setattr(sample, "run_peer", run_peer)
    monkeypatch.setattr(OurGeneration, "parted_at", lambda ours, tokens: 0.0)
    arguments = sample.Arguments(
        out=tmp_path, sizes=("64x1",), vocabulary=50, rows=(1, 2), prompt=3, lengths=(4, 8), blocks=(4,),
        per_evaluation=2, caches=("none", "dual"), repeats=7, llada=tmp_path / "a", fast_dllm=tmp_path / "b",
    )  # fmt: skip
    ours = [case for case in sample._cases_of_size(arguments, "64x1") if case.code == "trimask"]
    keys = [(length, 4, rows, cache) for length in (4, 8) for rows in (1, 2) for cache in ("none", "dual")]
    assert [case.setting for case in ours] == keys
    prompts = np.array(told["prompts"])
    assert prompts.tolist() == [[47, 36, 30], [17, 19, 6]]
    for (length, block, rows, cache), case, (*how, tokens, repeats) in zip(keys, ours, asked, strict=True):
        assert how == [length // 2, block, cache, 0.0] and repeats == 7
        assert (tokens[:, :3] == prompts[:rows]).all() and (tokens[:, 3:] == told["mask_id"]).all()
        assert tokens.shape == (rows, 3 + length)
        assert (case.seconds, case.tokens_per_second, case.evaluations) == (2.0, rows * length / 2.0, length // 2)
        assert case.milliseconds_per_evaluation == 2000 / (length // 2)
    names = ("length", "block", "rows", "cache")
    theirs = [("LLaDA", key) for key in keys if key[-1] == "none"] + [("Fast-dLLM", key) for key in keys]
    assert told.pop("cases") == [
        {"code": code, **dict(zip(names, key, strict=True)), "steps": key[0] // 2} for code, key in theirs
    ]
    assert told.pop("checkouts") == {"LLaDA": str(tmp_path / "a"), "Fast-dLLM": str(tmp_path / "b")}
    assert told.pop("spread") == pytest.approx(0.99957, rel=1e-4)
    del told["prompts"]
    assert told == {
        "script": "llada_generate.py", "width": 64, "heads": 1, "layers": 1, "mlp_width": 192, "vocabulary": 55,
        "rotary_base": 10000.0, "norm_epsilon": 1e-5, "dtype": "float32", "mask_id": 1, "longest": 11, "repeats": 7,
    }  # fmt: skip


def test_a_row_that_differs_is_followed_to_the_closest_choice_before_it():
    # Three masks after the start of a row; their best tokens have 2, 1.5 and 0.1 more than the next, in logits.
    vocabulary, first = fakes.VOCABULARY, fakes.TEXT_IDS.start
    logits = np.full((4, vocabulary.size), -np.inf, np.float32)
    logits[:, first : first + 2] = [[0.0, 0.0], [2.0, 0.0], [0.1, 0.0], [1.5, 0.0]]
    best = np.exp(logits[:, first]) / np.exp(logits[:, first : first + 2]).sum(-1)
    state = _start(np.full((1, 1), first), 3, vocabulary)
    how = GenerationConfig(steps=3, temperature=0.0)
    tokens = np.full((1, 4), first)
    ours = OurGeneration(Partial(fakes.fake(logits)), how.strategy_function, how.rules(vocabulary), state, tokens)
    # The order is 1, 3, 2; the last step has nothing left to prefer but its own token.
    for place, closest in ((1, best[1] - best[3]), (3, best[1] - best[3]), (2, 2 * best[2] - 1)):
        theirs = tokens.copy()
        theirs[0, place] = first + 1
        assert ours.parted_at(theirs) == pytest.approx(closest, abs=1e-6)


def test_a_row_is_as_close_to_another_choice_as_it_is_alone():
    vocabulary, first = fakes.VOCABULARY, fakes.TEXT_IDS.start
    how, prompts = GenerationConfig(steps=3, temperature=0.0), np.array([[first], [first + 3]])

    def leads(prompts):
        state = _start(prompts, 3, vocabulary)
        return sample._step(fakes.mixing(), how.strategy_function, how.rules(vocabulary), state, None)[2]

    together = leads(prompts)
    np.testing.assert_allclose(together, np.concatenate([leads(prompts[:1]), leads(prompts[1:])]), rtol=1e-5)
    assert together[0] != together[1]


def test_of_several_rows_that_differ_the_largest_distance_counts(monkeypatch):
    """Rows are revealed from left to right; the first leaves our way at its first token, the second at its last."""
    vocabulary, ours = fakes.VOCABULARY, fakes.TEXT_IDS.start
    how, state = GenerationConfig(steps=3, temperature=0.0), _start(np.full((3, 1), ours), 3, vocabulary)
    leads = iter([[0.45, 0.9, 0.0], [0.0, 0.4, 0.0], [0.0, 0.5, 0.0]])

    def step(denoise, strategy, rules, state, cache):
        place = int(state.is_masked.argmax(axis=1)[0])
        tokens = state.sequence.tokens.at[:, place].set(ours)
        sequence = dataclasses.replace(state.sequence, tokens=tokens)
        is_masked = tokens == vocabulary.mask_id
        return dataclasses.replace(state, sequence=sequence, is_masked=is_masked), None, np.array(next(leads))

    monkeypatch.setattr(sample, "_step", step)
    tokens = np.full((3, 4), ours)
    theirs = tokens.copy()
    theirs[[0, 1], [1, 3]] += 1
    generation = OurGeneration(Partial(max), how.strategy_function, how.rules(vocabulary), state, tokens)
    assert generation.parted_at(theirs) == 0.45


ROLLOUT = [
    "--size",
    "64x1",
    "--vocabulary",
    "20",
    "--episodes",
    "3",
    "--prompt",
    "2",
    "--length",
    "4",
    "--repeats",
    "1",
]

FAKE_TORCH = """
import json, sys
spec = json.load(open(sys.argv[2]))
assert len(spec["prompts"]) == 3 and spec["width"] == 64
print(json.dumps({"results": [[2.0, 12]]}))
"""


def test_rollouts_are_compared_by_evaluations_per_second(tmp_path, monkeypatch):
    python, settings = python_that_runs(FAKE_TORCH, tmp_path), []

    class Seen(rollout._Setting):
        def __init__(self, arguments):
            super().__init__(arguments)
            settings.append(self)

    monkeypatch.setattr(rollout, "_Setting", Seen)
    main(["rollout", str(tmp_path / "out"), *ROLLOUT, "--repeats", "1", "--python", python])
    ours, *others = json.loads((tmp_path / "out/rollout.json").read_text())["cases"]
    assert [case["code"] for case in others] == ["vector environment", "SyncVectorEnv", "PyTorch"]
    assert 1 <= ours["evaluations_per_episode"] <= 4 and ours["speedup"] is None
    assert others[-1]["evaluations_per_second"] == 6 and others[-1]["evaluations_per_episode"] == 4
    for case in others:
        assert 1 <= case["evaluations_per_episode"] <= 4
        rates = ours["evaluations_per_second"] / case["evaluations_per_second"]
        assert case["speedup"] == pytest.approx(rates)
    (setting,) = settings
    assert setting.prompts.tolist() == [[17, 12], [10, 5], [6, 0]]
    assert magnitudes(setting.parameters["down"]["kernel"]) == pytest.approx([2380.104], rel=1e-4)
    assert magnitudes(setting.denoise)[0] == pytest.approx(407.943, rel=1e-4)
    vector, synchronous = setting.vector(), setting.synchronous()
    assert vector.num_envs == synchronous.num_envs == 3
    for environment in (vector, *synchronous.envs):
        assert environment.unwrapped.episodes.config == setting.config and not setting.config.stop_at_eos


def test_a_policy_is_given_what_environments_show(monkeypatch):
    """The policy is given the confidence of each position, the masks, what is asked, and the number of steps taken."""

    def policy_logits(policy, parameters, confidence, is_masked, is_asked, steps):
        assert confidence.dtype == "float32" and is_asked.dtype == is_masked.dtype == bool
        return is_asked * (100 * is_masked * confidence[..., 0] + steps[:, None])

    monkeypatch.setattr(rollout, "policy_logits", policy_logits)
    monkeypatch.setattr(rollout, "draw_action", lambda law, keys, logits, is_masked: logits)
    confidence = np.array([[0.25] * 4, [0.5] * 4], np.float32)
    shown = {"confidence": confidence, "is_masked": np.array([[0, 1, 1, 0], [0, 1, 0, 0]], np.int8)}
    shown |= {"is_asked": np.array([[1] * 4, [1, 1, 0, 0]], np.int8), "progress": np.array([[0.75], [1]], np.float32)}
    actions = rollout._act(PolicyConfig(width=24), None, None, shown)
    assert actions.tolist() == [[3, 28, 28, 3], [2, 52, 0, 0]]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_name_the_benchmarks_are_told(arguments, capsys):
    main(arguments)
    printed = capsys.readouterr().out
    assert "usage: trimask benchmark NAME OUT [options]" in printed and all(name in printed for name in BENCHMARKS)


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(ValueError, match="no benchmark 'speed'; there are sample, rollout"):
        main(["speed"])


def test_an_error_of_the_other_python_is_shown(tmp_path):
    python = python_that_runs("raise ImportError('no torch here')", tmp_path)
    with pytest.raises(ValueError, match=r"python .*llada_generate.py failed:[\s\S]*no torch here"):
        main(["sample", str(tmp_path / "out"), *QUICK, "--fast-dllm", "b", "--python", python])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--sizes", "100x2"], "width that is a multiple of 64"),
        (["--lengths", "96"], "96 tokens in blocks of 64"),
        (["--per-evaluation", "3"], "3 per evaluation"),
        (["--blocks"], "at least one value each"),
        (["--llada", "x"], "needs --fast-dllm"),
        (["--rows", "0"], "at least 1"),
    ],
)
def test_impossible_arguments_end_with_a_message(tmp_path, capsys, words, reason):
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "out"), *words])
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_loss_is_timed_beside_arrays_of_logits(tmp_path):
    words = ["--vocabularies", "300", "3000", "--tokens", "64", "--width", "16", "--repeats", "2"]
    main(["loss", str(tmp_path), *words, "--tile-positions", "16", "--tile-ids", "128"])
    cases = json.loads((tmp_path / "loss.json").read_text())["cases"]
    assert [case["code"] for case in cases] == ["tiles", "masked logits", "all logits"] * 2
    ours, masked, everything = (case["timing"]["temporary_bytes"] for case in cases[3:])
    assert ours < masked < everything and cases[4]["memory_ratio"] == pytest.approx(masked / ours)
    seconds = [case["timing"]["seconds"] for case in cases[3:]]
    assert min(seconds) > 0 and cases[5]["speedup"] == pytest.approx(seconds[2] / seconds[0])


def test_a_kernel_is_not_timed_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="attention in float32 over 256 positions has no kernel on cpu"):
        main(["train", str(tmp_path), "--ways", "kernel"])


def test_training_steps_are_timed_beside_other_code(tmp_path):
    """A stand-in for PyTorch is told the same sizes and tokens, and its seconds are compared with ours."""
    python = python_that_runs(
        "import json, sys\nspec = json.load(open(sys.argv[2]))\n"
        "assert (spec['width'], spec['layers'], len(spec['tokens']), len(spec['tokens'][0])) == (64, 1, 2, 16)\n"
        "assert max(map(max, spec['tokens'])) < spec['vocabulary']\n"
        "name = sys.argv[1].rpartition('/')[2] + (' ' + spec['md4'] if 'md4' in sys.argv[1] else '')\n"
        "print(json.dumps({'code': name, 'seconds': [9.0, 8.0, 100.0]}))\n",
        tmp_path,
    )
    words = ["--sizes", "64x1", "--vocabularies", "64", "--rows", "2", "--length", "16", "--repeats", "2"]
    words += ["--ways", "scanned, remat", "--md4", "x", "--md4-python", python, "--python", python]
    main(["train", str(tmp_path), *words, "--peak-tflops", "1"])
    ours, scanned, md4, theirs = json.loads((tmp_path / "train.json").read_text())["cases"]
    assert (ours["code"], theirs["code"], theirs["seconds"]) == ("trimask", "torch_train.py", 9.0)
    assert md4["code"] == "md4_train.py x"
    assert scanned["code"] == "trimask, scanned, remat"
    for other in (scanned, md4, theirs):
        assert other["speedup"] == pytest.approx(other["seconds"] / ours["seconds"])
    assert ours["flops_per_second"] * ours["seconds"] == pytest.approx(theirs["flops_per_second"] * 9.0)
    assert "%" in (tmp_path / "train.md").read_text()


def test_attention_is_timed_by_length(tmp_path):
    words = ["--lengths", "32", "64", "--examples", "2", "--tokens", "64", "--kv-heads", "2", "--repeats", "2"]
    main(["attention", str(tmp_path), *words])
    short, long = json.loads((tmp_path / "attention.json").read_text())["cases"]
    needed = [case["flops_per_second"] * case["timing"]["seconds"] for case in (short, long)]
    assert needed == pytest.approx([3 * 4 * 64 * length * 4 * 64 for length in (32, 64)])


def test_batches_are_timed_in_every_way(prepared, tmp_path, monkeypatch):
    """Preparation by threads and processes is tested with `prefetched`; this checks which of them are timed."""
    asked, made = [], []

    class Seen(Batches):
        def __init__(self, *data, seed, limits):
            super().__init__(*data, seed=seed, limits=limits)
            assert seed == 0 and limits == WorkLimits()

        def __call__(self, step):
            made.append(step)
            return super().__call__(step)

    monkeypatch.setattr(data, "Batches", Seen)

    def in_turn(batch, first, stop, config):
        asked.append(config.workers)
        return ((step, batch(step)) for step in range(first, stop))

    monkeypatch.setattr(data, "prefetched", in_turn)
    words = ["--data", str(prepared.folder), "--tokens", "256", "--workers", "0", "1", "--batches", "3"]
    main(["data", str(tmp_path), *words])
    cases = json.loads((tmp_path / "data.json").read_text())["cases"]
    assert [case["way"] for case in cases[:3]] == ["in turn", "a thread", "1 process"] and asked == [0, 1] * 3
    assert {case["dataset"] for case in cases} == {"drawn", "spoken", "sums"} and len(cases) == 9
    # Before the clock starts, the examples of the first dataset are read once: 20, in batches of 19.
    assert made[:3] == [0, 1, 0]
    for case in cases:
        assert 0 < case["tokens_per_second"] * case["seconds"] <= 256 * case["filled"] * 1.2
        assert (case["filled"] == 1) == (case["dataset"] != "sums")


def test_saving_is_timed_and_leaves_nothing_behind(tmp_path):
    main(["checkpoint", str(tmp_path), "--sizes", "64x1", "--vocabulary", "100", "--repeats", "1"])
    (case,) = json.loads((tmp_path / "checkpoint.json").read_text())["cases"]
    network = TransformerConfig(width=64, num_layers=1, num_heads=1)
    assert case["parameters"] == count_parameters(network, Vocabulary(text_size=100)).total
    assert 16 * case["parameters"] < case["state_bytes"] < 16 * case["parameters"] + 100
    assert 0 < case["held_seconds"] < case["written_seconds"] and case["disk_bytes"] > 0 < case["restored_seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.json", "checkpoint.md"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["loss", "--vocabularies", "300", "2"], "Error parsing --vocabularies: must be at least 3, got 2"),
        (["loss", "--masked", "0"], "Error parsing --masked: must lie in (0, 1], got 0.0"),
        (["loss", "--masked", "0.01", "--tokens", "16"], "--masked 0.01 masks none of the 16 positions"),
        (["loss", "--tile-positions", "0"], "at least 1"),
        (["loss", "--loss.z-loss", "1"], "Unrecognized options: --loss.z-loss"),
        (["train", "--length", "30"], "must be a multiple of 4, got 30"),
        (["train", "--md4", "y"], "--md4 and --md4-python must be given together; got y and None"),
        (["train", "--peak-tflops", "0"], "Error parsing --peak-tflops: must be positive, got 0.0"),
        (["attention", "--heads", "3", "--kv-heads", "2"], "--kv-heads must divide --heads"),
        (["data", "--data", "y", "--tokens", "0"], "Error parsing --tokens: must be at least 1, got 0"),
        (["data", "--data", "y", "--workers"], "--tokens and --workers need at least one number; got (16384,) and ()"),
        (["data", "--data", "y", "--workers", "-1"], "Error parsing --workers: must not be negative, got -1"),
        (["checkpoint", "--sizes", "64"], "such as 512x8, with a width that is a multiple of 64; got '64'"),
        (["rollout", "--size", "64x0"], "a multiple of 64; got '64x0'"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, reason, tmp_path, capsys):
    name, *rest = words
    with pytest.raises(SystemExit):
        main([name, str(tmp_path / "out"), *rest])
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_training_is_timed_of_the_network_that_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        train,
        "_time_our_step",
        lambda config, *rest: asked.append((config.model, *rest)) or (2.0 * len(asked), 3.0, 4),
    )
    arguments = train.Arguments(out=tmp_path, rows=2, length=16, repeats=7, dtype="bfloat16", ways=("scanned, remat",))
    ours, other = train._cases(arguments, "128x3", 64)
    plain = TransformerConfig(width=128, num_layers=3, num_heads=2, compute_dtype="bfloat16")
    assert [model for model, *_ in asked] == [plain, dataclasses.replace(plain, blocks="scanned", remat="block")]
    for _, vocabulary, batch, repeats in asked:
        assert (vocabulary.text_size, vocabulary.codebook_sizes) == (32, {"image": (16,), "audio": (8, 8)})
        assert batch.tokens.shape == (2, 16) and repeats == 7
        assert batch.modality[1].tolist() == [1] * 8 + [2] * 4 + [3] * 4 and not batch.coordinates[..., 0].any()
        assert batch.coordinates[1, :, 1].tolist() == [0] * 12 + [0, 1] * 2
        assert batch.tokens[1].tolist() == [30, 27, 28, 40, 19, 36, 32, 10, 49, 56, 51, 43, 65, 72, 65, 68]
        assert batch.segment.all() and not batch.is_condition.any()
    assert (ours.code, other.code, ours.speedup, other.speedup) == ("trimask", "trimask, scanned, remat", None, 2.0)
    assert (ours.tokens_per_second, other.tokens_per_second) == (16.0, 8.0)
    assert (ours.compile_seconds, ours.temporary_bytes) == (3.0, 4)
    # Half of a row is text (33 ids each), a quarter picture (16) and a quarter sound (8).
    expected = 32 * flops_per_token(plain, asked[0][1], 16, ids=33 / 2 + 16 / 4 + 8 / 4)
    assert ours.flops_per_second == pytest.approx(expected / 2)


def test_a_step_lasts_until_its_results_are_there_and_the_first_two_do_not_count(tmp_path, monkeypatch):
    durations, waited = [5.0, 100.0, 200.0, 1.0, 2.0, 9.0], []
    ticks = iter([1000.0 * n + t for n, duration in enumerate(durations) for t in (0.0, duration)])

    class Steps:
        hyperparameters, loss_scale, key = "hyperparameters", "loss scale", "key"

        def __init__(self, config, vocabulary, mean_targets):
            assert config.model.width == 128 and mean_targets == targets

        def init(self):
            return 0

        def compiled(self, state, batch):
            return lambda hyperparameters, loss_scale, key, state, batch: (state + 1, (hyperparameters, key))

    monkeypatch.setattr(train, "Pretraining", Steps)
    monkeypatch.setattr(train, "temporary_bytes", lambda compiled: 77)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    vocabulary, arguments = (
        Vocabulary(text_size=64, codebook_sizes={"image": (9,), "audio": (8, 8)}),
        train.Arguments(out=tmp_path),
    )
    batch, length, rows = train._batch(vocabulary, arguments), arguments.length, arguments.rows
    targets = {"text": rows * length / 2, "image": rows * length / 4, "audio": rows * length / 4}
    config = TrainConfig(model=TransformerConfig(width=128))
    assert train._time_our_step(config, vocabulary, batch, 3) == (2.0, 5.0, 77)
    assert waited == [(step, ("hyperparameters", "key")) for step in (1, 2, 3, 4, 5)]


def test_a_generation_lasts_until_it_is_there_and_the_first_does_not_count(monkeypatch):
    clock, left, asked = [0.0], [100.0, 1.0, 2.0, 9.0], []
    how, state = GenerationConfig(steps=3, max_nfe=2), _start(np.full((1, 1), 9), 3, fakes.VOCABULARY)

    def arrives(final):
        clock[0] += left.pop(0)
        return final

    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(sample, "_sample", lambda *given: asked.append(given) or state)
    monkeypatch.setattr(jax, "block_until_ready", arrives)
    assert sample._timed("network", how, fakes.VOCABULARY, state, 3) == (state, 2.0)
    assert asked == [("network", how.strategy_function, how.rules(fakes.VOCABULARY), state)] * 4


def test_a_checkpoint_is_timed_until_it_is_back(tmp_path, monkeypatch):
    """To save holds training up for 2 seconds; after 3 more it is written; to be back takes 4 and 5."""
    clock, asked, state = [0.0], [], TrainState({}, {}, (), 7, 8)

    class Slow:
        def __init__(self, run, retention):
            assert run == tmp_path and retention == Retention()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append("closed")

        def save(self, *given, **more):
            asked.append((given, more))
            clock[0] += 2

        def wait(self):
            clock[0] += 3

        def restore(self, *given):
            asked.append(given)
            clock[0] += 4
            return SimpleNamespace(tree="tree")

    def arrives(tree):
        assert tree == "tree"
        clock[0] += 5

    monkeypatch.setattr(checkpoint, "Checkpoints", Slow)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(jax, "block_until_ready", arrives)
    assert checkpoint._seconds(tmp_path, state) == (2.0, 5.0, 9.0)
    assert asked == [((1, state), {"notes": {}, "metrics": {}}), (1, state), "closed"]
