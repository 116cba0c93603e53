"""`import trimask`: answers equal those of `trimask generate`, and notebooks display them."""

import base64
import dataclasses
import json
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import soundfile
from PIL import Image
from test_policy import save_policy

import trimask
from trimask.diffusion.studies import sampling_fronts
from trimask.sampling_rl import environment
from trimask.sampling_rl.episode_batch import UnmaskingConfig
from trimask.scripts import evaluate, generate, train_policy
from trimask.scripts.output.trajectory import read_trace, trace_of


@pytest.fixture
def model(loaded, tmp_path, monkeypatch) -> trimask.TrainedModel:
    """The untrained model, as its folder opens, in a working directory with files to ask about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimask.diffusion.pretraining.trained_model.load", lambda folder, checkpoint: loaded)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    Image.fromarray(pixels).save("noise.png")
    Image.fromarray(np.tile(np.arange(6) >= 3, (4, 1)).astype(np.uint8) * 255).save("mask.png")
    soundfile.write("hum.wav", 0.3 * np.sin(np.arange(1200) / 4), 8000)
    return trimask.load("runs/tiny")


def test_the_examples_of_its_docstring_and_of_the_pages_run(model):
    pages = [
        (Path(__file__).parents[1] / page).read_text(encoding="utf-8") for page in ("README.md", "docs/sampling.md")
    ]
    shown = [re.search(r"```python\n(import trimask\n.*?)```", page, re.DOTALL)[1] for page in pages]
    own = "".join(f"{line[4:]}\n" for line in trimask.__doc__.splitlines() if line.startswith("    "))
    for example in (*shown, own):
        names: dict = {}
        for word, known in {"a handwritten seven": "one", "eight": "two"}.items():  # the words of the tests' model
            example = example.replace(word, known)
        exec(example, names)
        assert names["answer"].image.shape == (4, 6, 1)
        assert Image.open("seven.png").size == (26 * 6, 26 * 4)
        for path in (Path("seven.png"), Path("seven.gif")):
            path.unlink()
    assert names["env"].reset(seed=0)[0]["is_masked"].any()


CALLS = {
    "draw": (["--prompt", "one", "one", "two", "--to", "image"], {"prompt": ["one", "one", "two"], "to": "image"}),
    "speak": (["--prompt", "two", "--to", "audio", "--guidance", "1"], {"prompt": "two", "to": "audio", "guidance": 1}),
    "write": (["--prompt", "1+", "--to", "text", "--length", "4"], {"prompt": "1+", "to": "text", "length": 4}),
    "fill": (["--infill", "4__=8", "--strategy", "leftmost"], {"infill": "4__=8", "strategy": "leftmost"}),
    "read": (["--image", "noise.png"], {"image": "noise.png"}),
    "listen": (["--given", "audio=hum.wav", "--like", "spoken"], {"given": {"audio": "hum.wav"}, "like": "spoken"}),
    "draw anew": (
        ["--image", "noise.png", "--inpaint", "mask.png", "--to", "image"],
        {"image": Path("noise.png"), "inpaint": "mask.png", "to": "image"},
    ),
    "say anew": (
        ["--audio", "hum.wav", "--span", "0.05", "0.1", "--to", "audio", "--prompt", "one"],
        {"audio": "hum.wav", "span": (0.05, 0.1), "to": "audio", "prompt": "one"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_it_gives_the_answers_of_the_command(model, loaded, tmp_path, monkeypatch, call):
    words, asked = CALLS[call]
    monkeypatch.setattr("trimask.scripts.generate.load", lambda *_: loaded)
    generate.main(["runs/tiny", *words, "--seed", "3", "--temperature", "2", "--trace", "--out", "out"])
    entries = [json.loads(line) for line in Path("out/index.jsonl").read_text().splitlines()]
    answers = model.generate(**asked, seed=3, temperature=2.0)
    traces = model.trace(**asked, seed=3, temperature=2.0)
    assert isinstance(answers, list) == isinstance(traces, list) == (call == "draw")
    if call != "draw":
        answers, traces = [answers], [traces]
    for entry, answer, trace in zip(entries, answers, traces, strict=True):
        assert read_trace(Path("out", entry["trace"])) == trace_of(loaded.tokenizers, answer.prompt, trace.states)
        np.testing.assert_array_equal(trace.steps[-1].tokens, answer.tokens)
        np.testing.assert_array_equal(trace.answer.tokens, answer.tokens)
        np.testing.assert_array_equal(trace.answer.steps, answer.steps)
        for number, step in enumerate(trace.steps):
            np.testing.assert_array_equal(step.tokens >= 0, answer.steps <= number)
        assert (entry["prompt"], entry["to"], entry["nfe"]) == (answer.prompt, answer.modality, answer.nfe)
        answer.save(f"own{Path(entry['file']).suffix}")
        assert Path("out", entry["file"]).read_bytes() == Path(f"own{Path(entry['file']).suffix}").read_bytes()
        assert "text" not in entry or entry["text"] == answer.text == answer.content
    assert len({answer.tokens.tobytes() for answer in answers}) == len(answers), (
        "equal inputs have answers of their own"
    )


def test_a_policy_is_asked_in_its_blocks_unless_others_are_named(model, tmp_path):
    (tmp_path / "fast").mkdir()
    policy = Path(save_policy(tmp_path / "fast"))
    one, other = (model._query(infill="4__=8", strategy=policy, **more)[0].config for more in ({}, {"block_length": 2}))
    assert (one.block_length, other.block_length) == (4, 2) and one.strategy == str(policy)


def test_an_answer_has_what_it_is_and_says_so(model):
    image = model.generate("one", to="image")
    audio = model.generate("one", to="audio")
    text = model.generate(infill="4__=8")
    assert (image.image.dtype, image.image.shape) == (np.uint8, (4, 6, 1))
    assert (audio.audio.dtype, audio.audio.ndim, audio.sample_rate_hz) == (np.float32, 1, 8000)
    assert text.text.startswith("4") and (image.tokens.shape, image.nfe) == ((2, 3), 3)
    for answer, name, has in ((audio, "image", "audio"), (image, "sample_rate_hz", "image"), (image, "text", "image")):
        with pytest.raises(AttributeError, match=rf"an answer in {has} has \.{has}, and no \.{name}"):
            getattr(answer, name)
    assert repr(image) == "Answer('one' → image: tokens 2×3, nfe 3)"
    assert repr(text) == f"Answer('4__=8' → text: {text.text!r}, nfe {text.nfe})"
    assert repr(model.trace("one", to="image")) == f"Trace(3 steps to {image!r})"
    assert repr(model).endswith("step 7: text, text to audio, audio to text, text to image, image to text)")


def test_an_answer_is_saved_by_the_ending_of_what_it_is(model, tmp_path):
    answer, trace = model.generate("one", to="audio"), model.trace("one", to="audio")
    before = sorted(tmp_path.iterdir())
    for save, name, reason in (
        (answer.save, "a.png", "a.png: an answer in audio is written as .wav"),
        (answer.save, "a", "an answer in audio is written as .wav"),
        (trace.animate, "a.wav", "an animation is written as .gif or .mp4"),
        (trace.page, Path("a.htm"), "a page is written as .html"),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            save(name)
    assert sorted(tmp_path.iterdir()) == before
    answer.save("A.WAV")
    assert soundfile.info("A.WAV").samplerate == 8000


def test_a_notebook_shows_a_picture_a_player_or_the_order_of_a_text(model):
    image, audio = model.generate("one", to="image"), model.generate("one", to="audio")
    image.save("one.png")
    assert image._repr_png_() == Path("one.png").read_bytes() and image._repr_html_() is None
    audio.save("one.wav")
    uri = re.fullmatch(r'<audio controls src="data:audio/wav;base64,(.*)"></audio>', audio._repr_html_())[1]
    assert base64.b64decode(uri) == Path("one.wav").read_bytes() and audio._repr_png_() is None
    text = model.generate(infill="<_&", strategy="leftmost")
    shown = text._repr_html_()
    assert text._repr_png_() is None and text.steps[:3].tolist() == [0, 1, 0]
    assert re.search(r'>&lt;<span title="step 1" style="[^"]*">[^<]*<sub>1</sub></span>&amp;</div>', shown), shown


def test_a_trace_shows_and_writes_every_step(model):
    trace = model.trace("one", to="image", steps=2)
    first, _, last = trace.steps
    assert (first.tokens == -1).all() and (first.confidence == 0).all() and [s.nfe for s in trace.steps] == [0, 1, 2]
    assert (last.confidence > 0).all() and (last.confidence <= 1).all() and last.confidence.shape == (2, 3)
    trace.page("way.html")
    assert '"confidence"' in Path("way.html").read_text()
    trace.animate("way.gif")
    assert Image.open("way.gif").n_frames == 3


def test_a_list_in_is_a_list_out(model):
    assert [answer.prompt for answer in model.generate(("one", "two"), to="image")] == ["one", "two"]
    (answer,) = model.generate(image=["noise.png"])
    (trace,) = model.trace(image=["noise.png"])
    assert answer.prompt == trace.answer.prompt == "noise.png"
    assert model.generate([], to="image") == model.trace(infill=()) == []


def test_the_environment_is_of_the_runs_own_questions(model, prepared, monkeypatch):
    env = model.environment(
        task="text", split="test", inputs=("top",), num_top=2, max_problems=3, reward=lambda right, nfe, length: -nfe
    )
    seen, about = env.reset(seed=0)
    assert seen["top"].shape == (env.action_space.n, 2) and about["nfe"] == 0
    questions = env.episodes.problems
    assert (questions.name, len(questions.problems)) == ("sums text test", 3)
    assert model.environment(task="text_to_image", judge="label").episodes.problems.name == "drawn text_to_image train"
    for _ in range(100):
        _, reward, terminated, _, about = env.step(np.ones(env.action_space.n, bool))
        if terminated:
            break
    assert terminated and reward == -about["nfe"] < 0
    elsewhere = dataclasses.replace(model.run.description, data="gone")
    moved = trimask.TrainedModel(dataclasses.replace(model.run, description=elsewhere))
    assert moved.environment(data=str(prepared.folder)).episodes.problems.name == "sums text train"
    with pytest.raises(FileNotFoundError) as missing:
        moved.environment()
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing.value))):
        evaluate.run(moved.run, None, evaluate.EvaluateConfig())


@pytest.mark.parametrize(
    ("asked", "kind", "reason"),
    [
        ({}, ValueError, "give one kind of input: .*; got none"),
        ({"prompt": "one", "image": "noise.png", "to": "text"}, ValueError, "; got prompt and image"),
        ({"prompt": "one"}, ValueError, "a prompt needs `to`: text, image, audio, or another"),
        ({"prompt": "one", "to": "vidoe"}, ValueError, "this run generates text, .*audio.*; got `to` 'vidoe'"),
        ({"image": "noise.png", "to": "audio"}, ValueError, "was not trained on image to audio; it has text,"),
        ({"given": {"smell": "rose"}}, ValueError, "was not trained on smell to text"),
        ({"image": "no.png"}, FileNotFoundError, "no.png"),
        ({"prompt": "one", "to": "image", "treshold": 0.5}, TypeError, "'treshold'; did you mean 'threshold'"),
        ({"prompt": "one", "too": "image"}, TypeError, "no setting 'too'; did you mean 'to'"),
        ({"prompt": "one", "to": "image", "threshold": 0.5}, ValueError, "threshold is a parameter of threshold or"),
        ({"prompt": "one", "to": "image", "steps": 0}, ValueError, r"must be at least 1, got 0 @ \$.steps"),
        ({"prompt": "one", "to": "image", "steps": "3"}, ValueError, r'must be a whole number, got "3" @ \$.steps'),
        ({"prompt": "one", "to": "image", "strategy": 3}, ValueError, r"must be text, got 3 @ \$.strategy"),
        ({"prompt": "one", "to": "image", "strategy": "best"}, ValueError, "no strategy 'best'; there are random"),
        ({"prompt": "one", "to": "image", "seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"prompt": 1, "to": "image"}, TypeError, "prompt must be a text, or a list of them; got int"),
        ({"prompt": Path("one"), "to": "image"}, TypeError, "prompt must be a text, or a list of them; got PosixPath"),
        ({"image": [np.zeros(3)]}, TypeError, "image must be the path of a file, or a list of them; got ndarray"),
        ({"audio": "hum.wav", "span": (1.0,), "to": "audio"}, ValueError, "a span is two numbers.*; got 1"),
        ({"audio": "hum.wav", "span": (1.0, 0.5), "to": "audio"}, ValueError, "a span that ends after it begins"),
        ({"image": "noise.png", "span": (0.0, 0.5), "to": "audio"}, ValueError, "`span` needs audio.*; got image"),
        ({"prompt": "one", "to": "image", "like": "sums"}, ValueError, "was not trained on text to image; it has text"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(model, asked, kind, reason):
    for method in (model.generate, model.trace):
        with pytest.raises(kind, match=reason):
            method(**asked)


def test_guidance_is_refused_in_environments_of_a_run_that_never_hid_a_prompt(model, prepared, monkeypatch):
    """Also by gymnasium.make, by the training of policies, and by the study of sampling."""
    masking = dataclasses.replace(model.run.description.train.masking, drop_probability=0.0)
    train = dataclasses.replace(model.run.description.train, masking=masking)
    description = dataclasses.replace(model.run.description, train=train)
    plain = dataclasses.replace(model.run, description=description)
    said = "guidance needs a model that was trained without conditions, too"
    with pytest.raises(ValueError, match=said):
        trimask.TrainedModel(plain).environment(guidance=1.0)
    for module in (environment, train_policy):
        monkeypatch.setattr(module, "load", lambda *_: plain)
    with pytest.raises(ValueError, match=said):
        gymnasium.make("trimask/Unmasking-v0", run="anywhere", config=UnmaskingConfig(guidance=1.0))
    with pytest.raises(ValueError, match=said):
        train_policy.main(["policy", "--run", "anywhere", "--data", str(prepared.folder), "--generation.guidance", "1"])
    with pytest.raises(ValueError, match=said):
        sampling_fronts.asked_by_target(sampling_fronts.SamplingStudy(), plain, prepared)


def test_an_unknown_setting_of_the_environment_is_refused_with_the_nearest(model):
    for word, near in (("num_tops", "num_top"), ("dataset_", "dataset")):
        with pytest.raises(TypeError, match=f"no setting {word!r}; did you mean {near!r}"):
            model.environment(**{word: 2})


def test_numbers_and_arrays_of_numpy_are_settings_too(model):
    query, _ = model._query("one", to="image", temperature=np.float32(0.5), strategy="given", order=np.arange(6)[::-1])
    assert (query.config.temperature, query.config.order) == (0.5, (5, 4, 3, 2, 1, 0))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder; `trimask train` makes one"):
        trimask.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone: not a run folder"):
        trimask.load("gone", checkpoint="best")


def test_the_module_names_what_it_has():
    assert set(trimask.__all__) <= set(dir(trimask))
    assert all(getattr(trimask, name).__doc__ for name in trimask.__all__)
    with pytest.raises(AttributeError, match=r"module 'trimask' has no attribute 'laod'; it has Answer, .*load"):
        trimask.laod  # noqa: B018
