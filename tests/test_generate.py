"""trimask generate and the samples of a run in training, with a small untrained model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_policy import save_policy

from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.sampling.prompts import Prompts
from trimask.scripts.generate import Arguments, main, run
from trimask.scripts.output import samples
from trimask.scripts.output.samples import save_training_samples
from trimask.scripts.questions import prompts_of
from trimask.tokenizers.sequence import assemble, stack_rows
from trimask.tokenizers.storage import configuration

STEP = 7
WORDS = ("one", "two", "three")


@pytest.fixture
def generate(loaded, tmp_path, monkeypatch):
    """Calls the command and returns the lines of the index."""

    def call(*arguments):
        monkeypatch.setattr("trimask.scripts.generate.load", {loaded.folder: loaded}.get)
        main([str(loaded.folder), *map(str, arguments), "--out", str(tmp_path / "out")])
        return lines_of(tmp_path / "out/index.jsonl")

    return call


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_drawing_is_written_with_its_animation_and_its_line_in_the_index(generate, tmp_path):
    (entry,) = generate("--prompt", "one", "--to", "image", "--animate", "gif", "--steps", 2, "--temperature", 2)
    assert sorted(content(tmp_path / "out")) == ["index.jsonl", "one.gif", "one.png"]
    assert Image.open(tmp_path / "out/one.png").size == (26 * 6, 26 * 4)
    assert Image.open(tmp_path / "out/one.gif").n_frames == 3
    expected = {"prompt": "one", "task": "text_to_image", "seed": 0, "number": 0, "step": STEP, "nfe": 2}
    assert {**entry, **expected, "file": "one.png", "animation": "one.gif"} == entry
    assert entry["settings"] == configuration.to_dict(GenerationConfig(steps=2, temperature=2.0))


def test_speech_is_written_at_the_codecs_rate_and_read_back(generate, tmp_path, capsys):
    first, second = generate("--prompt", "two", "--to", "audio", "--num", 2)
    assert f"2 answers in {tmp_path / 'out'}" in capsys.readouterr().out
    assert [first["file"], second["file"]] == ["two.wav", "two-2.wav"]
    assert soundfile.info(tmp_path / "out/two.wav").samplerate == 8000
    assert (tmp_path / "out/two.wav").read_bytes() != (tmp_path / "out/two-2.wav").read_bytes()
    *_, entry = generate("--audio", tmp_path / "out/two.wav")
    assert entry["task"] == "audio_to_text" and entry["file"] == "two-3.txt"


def test_a_picture_is_described_in_text_that_is_also_printed(generate, tmp_path, capsys):
    Image.new("RGB", (50, 40)).save(tmp_path / "Photo 1.jpg")
    (entry,) = generate("--image", tmp_path / "Photo 1.jpg", "--to", "text")
    assert (tmp_path / "out/photo-1.txt").read_text() == entry["text"] + "\n"
    printed = capsys.readouterr().out
    assert f"Photo 1.jpg → {entry['text']}" in printed and f"1 answer in {tmp_path / 'out'}" in printed


def test_a_policy_is_asked_in_its_blocks_unless_others_are_named(generate, tmp_path):
    (tmp_path / "fast").mkdir()
    call = ("--infill", "4__=8", "--strategy", save_policy(tmp_path / "fast"))
    (entry,) = generate(*call)
    assert entry["settings"]["block_length"] == 4
    for said, used in (("2", 2), ("None", None)):
        assert generate(*call, "--block-length", said)[-1]["settings"]["block_length"] == used


def test_an_infill_keeps_what_was_given(generate):
    (entry,) = generate("--infill", "4__=8", "--temperature", 0)
    assert entry["text"].startswith("4") and entry["text"].endswith("=8")


def halves(shape):
    """A mask file's picture that is bright on the right."""
    return Image.fromarray(np.tile(np.arange(shape[1]) >= shape[1] // 2, (shape[0], 1)).astype(np.uint8) * 255)


def test_a_span_of_sounds_without_a_sample_rate_is_refused(generate, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.scripts.questions.SoundCodec", bytes)
    soundfile.write(tmp_path / "hum.wav", np.sin(np.arange(1200) / 5), 8000)
    with pytest.raises(ValueError, match="a span counts seconds; the codec for audio, mel, has no sample rate"):
        generate("--audio", tmp_path / "hum.wav", "--span", "0", "0.05", "--to", "audio")


@pytest.mark.parametrize("prompt", [("--prompt", "one"), ()])
def test_a_region_is_drawn_anew_and_the_rest_stays(generate, tmp_path, prompt):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    halves((4, 6)).save(tmp_path / "mask.png")
    words = ("--image", tmp_path / "noise.png", "--inpaint", tmp_path / "mask.png", "--to", "image", "--log-probs")
    (entry,) = generate(*words, *prompt, "--trace", "--temperature", "3")
    made = np.asarray(Image.open(tmp_path / "out/noise.png").convert("L"))[::26, ::26]
    np.testing.assert_array_equal(made[:, :3], pixels[:, :3])
    assert (made[:, 3:] != pixels[:, 3:]).any() and entry["task"] == "text_to_image"
    # Patches of 2 by 2 in a grid of 2 by 3: the middle ones are touched, too; and the description, if it is not given.
    head = json.loads((tmp_path / "out" / entry["trace"]).read_text().splitlines()[0])
    assert [code is None for code in head["start"]] == [False, True, True] * 2
    assert (len(entry["log_probs"]) > 4) == (not prompt)


@pytest.mark.parametrize(("grey", "said"), [(0, "nothing of"), (255, "all of")])
def test_a_mask_of_one_colour_is_said(generate, tmp_path, capsys, grey, said):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    Image.new("L", (6, 4), grey).save(tmp_path / "mask.png")
    words = ("--image", tmp_path / "noise.png", "--inpaint", tmp_path / "mask.png", "--to", "image", "--prompt", "one")
    (entry,) = generate(*words)
    made = np.asarray(Image.open(tmp_path / "out/noise.png").convert("L"))[::26, ::26]
    assert (made == pixels).all() == (grey == 0) == (entry["nfe"] == 0)
    assert f"{said} {tmp_path / 'noise.png'} is bright in the mask" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["image", "audio"])
def test_an_empty_prompt_is_the_hidden_condition_that_guidance_imagines(generate, loaded, to):
    (entry,) = generate("--prompt", "", "--to", to, "--trace", "--temperature", "0")
    assert entry["file"].startswith("unconditional.") and entry["prompt"] == "" and entry["nfe"] > 0
    example = Prompts(loaded.tokenizers, loaded.description.layouts).from_text("", to)
    row = stack_rows([assemble(loaded.vocabulary, [example], example.length)])
    assert (row.tokens[row.is_condition & (row.modality != 0)] == loaded.vocabulary.mask_id).all()
    (answer,) = Generator(loaded.denoise, loaded.vocabulary).generate([example], loaded.generation(to), 0)
    assert (answer.example.segments[0].codes == -1).all() and (answer.example.segments[1].codes >= 0).all()
    with pytest.raises(ValueError, match="guidance needs a condition to follow; a text without a beginning"):
        generate("--prompt", "", "--to", to, "--guidance", "1")


def test_an_empty_prompt_is_refused_by_a_run_that_never_went_without(generate, loaded, monkeypatch):
    masking = replace(loaded.description.train.masking, drop_probability=0.0)
    train = replace(loaded.description.train, masking=masking)
    other = replace(loaded, description=replace(loaded.description, train=train))
    arguments = Arguments(run=loaded.folder, prompt=("",), to="image")
    out = loaded.folder / "nowhere"
    with pytest.raises(ValueError, match="was trained without conditions, too"):
        run(other, arguments, out)
    guided = Arguments(run=loaded.folder, prompt=("one",), to="image", sampling=GenerationConfig(guidance=1.5))
    with pytest.raises(
        ValueError, match=r"without conditions, too, .* its masking.drop_probability is 0; got guidance"
    ):
        run(other, guided, out)
    assert not out.exists()


def test_guidance_of_a_text_is_refused_by_a_run_that_never_hid_the_beginning_of_one(loaded):
    """In runs of rules 1 the conditions of other tasks were hidden."""
    former, guided = replace(loaded, description=replace(loaded.description, rules=1)), GenerationConfig(guidance=1.0)
    with pytest.raises(ValueError, match=r"task text: it never hid the beginning of a text; got guidance 1.0"):
        former.require_trained_guidance("text", guided)
    former.require_trained_guidance("image_to_text", guided)
    former.require_trained_guidance("text", GenerationConfig())
    loaded.require_trained_guidance("text", guided)


def test_a_span_is_spoken_anew_and_the_rest_stays(generate, tmp_path):
    sound = 0.3 * np.sin(np.arange(1200) / 4)
    soundfile.write(tmp_path / "hum.wav", sound, 8000)
    (entry,) = generate("--audio", tmp_path / "hum.wav", "--span", "0.05", "0.1", "--to", "audio", "--prompt", "one")
    made, _ = soundfile.read(tmp_path / "out" / entry["file"])
    outside = np.r_[0:340, 860:1200]
    np.testing.assert_allclose(made[outside], sound[outside], atol=1e-3)
    assert np.abs(made[460:740] - sound[460:740]).max() > 0.01


def test_prompts_of_a_file_join_those_of_the_command_line(generate, tmp_path):
    (tmp_path / "prompts").write_text("three\n\none\n")
    entries = generate("--prompt", "two", "--prompts", tmp_path / "prompts", "--to", "image")
    assert [entry["prompt"] for entry in entries] == ["two", "three", "one"]


def test_the_same_call_gives_the_same_bytes_again(generate, tmp_path):
    call = ("--prompt", "one", "one", "two", "--to", "image", "--animate", "gif")
    generate(*call)
    first = content(tmp_path / "out")
    generate(*call)
    assert content(tmp_path / "out") == first
    assert len(first) == 7


def test_another_call_adds_to_the_index_and_overwrites_nothing(generate, tmp_path):
    generate("--prompt", "one", "--to", "image")
    first = content(tmp_path / "out")
    (tmp_path / "out/one-2.png").write_text("mine")
    entries = generate("--prompt", "one", "--to", "image", "--seed", 1)
    assert [(entry["file"], entry["seed"]) for entry in entries] == [("one.png", 0), ("one-3.png", 1)]
    after = content(tmp_path / "out")
    assert after["one.png"] == first["one.png"] != after["one-3.png"]
    assert after["one-2.png"] == b"mine"


def test_an_animation_may_be_an_mp4(generate, tmp_path):
    (entry,) = generate("--prompt", "one", "--to", "image", "--animate", "mp4", "--steps", 2)
    assert entry["animation"] == "one.mp4" and sorted(content(tmp_path / "out")) == [
        "index.jsonl",
        "one.mp4",
        "one.png",
    ]


def test_a_failure_while_writing_leaves_nothing_behind(generate, tmp_path, monkeypatch):
    generate("--prompt", "one", "--to", "image")
    first = content(tmp_path / "out")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("trimask.scripts.output.answers.write_animation", fail)
    with pytest.raises(OSError, match="disk full"):
        generate("--prompt", "two", "--to", "image", "--animate", "gif")
    assert content(tmp_path / "out") == first


def test_an_answer_does_not_depend_on_what_else_is_asked(loaded):
    prompts = prompts_of(loaded)
    generator, config = Generator(loaded.denoise, loaded.vocabulary), loaded.generation("image")
    asked = prompts.from_text("one", "image")
    others = [prompts.from_text(text, "image") for text in WORDS[1:]] * 20
    crowd = [*others[:37], asked, *others[37:], prompts.complete("1+"), asked]
    alone = generator.generate([asked, asked], config, seed=3)
    among = generator.generate(crowd, config, seed=3)
    for number, answer in ((37, alone[0]), (len(crowd) - 1, alone[1])):
        codes = among[number].example.segments[-1].codes
        np.testing.assert_array_equal(codes, answer.example.segments[-1].codes)
    assert not np.array_equal(*(answer.example.segments[-1].codes for answer in alone))


def test_an_animation_ends_at_the_answer(loaded):
    prompts, config = prompts_of(loaded), loaded.generation("image")
    generator = Generator(loaded.denoise, loaded.vocabulary)
    asked = [prompts.from_text(text, "image") for text in ("one", "two", "one")]
    answers = generator.generate(asked, config, seed=5)
    for path, answer in zip(generator.trajectories(asked, config, seed=5), answers, strict=True):
        np.testing.assert_array_equal(path[-1].example.segments[-1].codes, answer.example.segments[-1].codes)
        assert [int((state.example.segments[-1].codes < 0).sum()) for state in path] == [6, 4, 2, 0]


def test_an_animation_stops_when_its_own_answer_is_full(loaded):
    prompts, generator = prompts_of(loaded), Generator(loaded.denoise, loaded.vocabulary)
    asked = [prompts.infill("4_=8"), prompts.complete("1+")]
    paths = generator.trajectories(asked, loaded.generation("text"), seed=0)
    assert [len(path) for path in paths] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", "one one one one", "--to", "image"], "tokens; at most"),
        (["--prompt", "", "--to", "text"], "must not be empty"),
        (["--infill", "1+1=2"], "nothing is masked"),
        (["--image", "no.png", "--to", "audio"], "not trained on image to audio; it has text, text to audio"),
        (["--infill", "1+_=2", "--guidance", "1"], "guidance needs a condition"),
        (["--prompt", "one", "--to", "image", "--threshold", "0.5"], "a parameter of threshold or leftmost"),
        (["--prompt", "one", "--to", "image", "--cache", "dual"], "needs a block_length"),
        (
            ["--image", "grey.png", "--inpaint", "large.png", "--to", "image"],
            "the mask is 12×8 but the picture .*grey.png is 6×4",
        ),
        (["--prompt", "one", "--to", "image", "--max-nfe", "1", "--block-length", "4"], "2 blocks take at least 2"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(generate, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (6, 4), 90).save("grey.png")
    Image.new("L", (12, 8), 90).save("large.png")
    with pytest.raises(ValueError, match=reason):
        generate(*arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "got none"),
        (["--prompt", "x", "--image", "y", "--to", "text"], "got prompt and image"),
        (["--prompt", "x"], "a prompt needs `to`: text"),
        (["--infill", "_", "--to", "image"], "an infill generates text, got `to` image"),
        (["--infill", "_", "--num", "0"], "--num: must be at least 1, got 0"),
        (["--infill", "_", "--seed", "-1"], "--seed: must not be negative, got -1"),
        (["--prompt", "x", "--inpaint", "m", "--to", "image"], "`inpaint` needs image"),
        (["--image", "x", "--inpaint", "m", "--to", "text"], "needs `to` image"),
        (["--image", "x", "--span", "0", "1", "--to", "audio"], "`span` needs audio"),
        (["--audio", "x", "--span", "1", "0.5", "--to", "audio"], "ends after it begins"),
        (["--infill", "_", "--temperature", "nan"], "temperature: must be finite, got nan"),
        (["--infill", "_", "--steps", "0"], "steps: must be at least 1, got 0"),
        (["--infill", "_", "--strategy", "best"], "no strategy 'best'; there are random"),
    ],
)
def test_contradicting_arguments_end_with_a_message(generate, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        generate(*arguments)
    assert stop.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


ENTRY = {
    "file": "a.txt",
    "prompt": "_",
    "task": "text",
    "to": "text",
    "number": 0,
    "seed": 0,
    "step": 7,
    "settings": {},
}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: not strict JSON"),
        ('{"file": "x"}', "line 1: not an entry of an index; choose another --out: .*required field is missing"),
        ("[]", "must be an object"),
        (json.dumps(ENTRY | {"seed": "0"}), r"must be a whole number, got \"0\" @ \$\.seed"),
        (json.dumps(ENTRY | {"file": "../victim.txt"}), r"line 1 @ \$\.file: a file name must consist of letters"),
        (json.dumps(ENTRY | {"file": "/tmp/victim.txt"}), r"@ \$\.file: a file name must consist of letters"),
        (json.dumps(ENTRY | {"file": "a.py"}), r"@ \$\.file: a file name must end with \.txt"),
        (json.dumps(ENTRY | {"file": "index.jsonl"}), r"@ \$\.file: a file name must end with \.txt"),
        (json.dumps(ENTRY | {"animation": "../a.gif"}), r"@ \$\.animation: a file name must consist of letters"),
        (json.dumps(ENTRY | {"trace": "a.html"}), r"@ \$\.trace: a file name must end with \.trace\.jsonl"),
        (json.dumps(ENTRY | {"to": "../x"}), "no modality '../x'"),
    ],
)
def test_a_foreign_index_is_refused_before_anything_is_computed_and_left_alone(
    generate, tmp_path, monkeypatch, line, reason
):
    monkeypatch.setattr("trimask.scripts.questions.Generator", lambda *_: pytest.fail("computed"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.jsonl").write_text(line)
    with pytest.raises(ValueError, match=reason):
        generate("--infill", "_")
    assert content(tmp_path / "out") == {"index.jsonl": line.encode()}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        main([str(tmp_path), "--infill", "_"])


def test_training_samples_show_every_task(loaded, tmp_path):
    here = replace(loaded, folder=tmp_path)
    save_training_samples(here, 20)
    assert sorted(content(tmp_path / "samples")) == [
        "samples.jsonl",
        "step-000020-drawn.png",
        "step-000020-spoken.wav",
    ]
    lines = [json.loads(line) for line in (tmp_path / "samples/samples.jsonl").read_text().splitlines()]
    references = {
        task: [line["reference"] for line in lines if line["task"] == task] for task in ("image_to_text", "text")
    }
    # Held out are 20 … 31: three different captions, but ten of twelve sums.
    assert references["image_to_text"] == ["three", "one", "two"]
    assert references["text"] == [f"{n}+{n}={2 * n}" for n in range(20, 30)]
    assert all(line["text"].startswith(line["reference"][:4]) for line in lines if line["task"] == "text")


def test_training_samples_of_all_tasks_are_rows_of_one_length(loaded, tmp_path, monkeypatch):
    lengths = []
    original = Generator.generate

    def generate(self, requests, *rest, **named):
        lengths.extend((self.bucket, request.length) for request in requests)
        return original(self, requests, *rest, **named)

    monkeypatch.setattr(Generator, "generate", generate)
    save_training_samples(replace(loaded, folder=tmp_path), 20)
    buckets, own = map(set, zip(*lengths, strict=True))
    assert buckets == {max(own)} and len(own) > 1


def test_a_dataset_without_any_split_has_no_samples(loaded, prepared, tmp_path, monkeypatch):
    datasets = prepared.manifest.datasets
    nothing = replace(datasets["drawn"], splits={})
    without = replace(prepared.manifest, datasets={"nothing": nothing, **datasets})
    monkeypatch.setattr(
        samples,
        "Prepared",
        lambda folder: SimpleNamespace(manifest=without, examples=prepared.examples, tokenizers=prepared.tokenizers),
    )
    assert {name for name, _ in samples._questions.__wrapped__(prepared.folder)} == set(datasets)


def test_a_resumed_run_rewrites_its_later_samples(loaded, tmp_path):
    here = replace(loaded, folder=tmp_path)
    for step in (10, 20):
        save_training_samples(here, step)
    first = content(tmp_path / "samples")
    save_training_samples(here, 20)
    assert content(tmp_path / "samples") == first
    save_training_samples(here, 10)
    steps = [json.loads(line)["step"] for line in (tmp_path / "samples/samples.jsonl").read_text().splitlines()]
    assert set(steps) == {10}


def test_what_a_killed_run_left_beside_its_samples_is_removed(loaded, tmp_path):
    left = tmp_path / "samples/.partial-1"
    left.mkdir(parents=True)
    (left / "step-000010-drawn.png").write_bytes(b"half")
    save_training_samples(replace(loaded, folder=tmp_path), 20)
    assert not left.exists() and (tmp_path / "samples/samples.jsonl").is_file()


def test_a_file_where_answers_should_go_is_refused(generate, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file; it must be a folder, or a name for a new one"):
        generate("--prompt", "one", "--to", "image")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_the_prepared_data_there_are_no_samples(loaded, tmp_path):
    description = replace(loaded.description, data=str(tmp_path / "gone"))
    save_training_samples(replace(loaded, folder=tmp_path, description=description), 20)
    assert not (tmp_path / "samples").exists()
