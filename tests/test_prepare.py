"""From files to shards: counts add up, the bytes are the same however they are made, and no work is done twice."""

import concurrent.futures
import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from own_files import bytes_of, config_of, make_files
from PIL import Image

from trimask.diffusion.data import fitting, shaping, sources
from trimask.diffusion.data import prepare as preparing
from trimask.diffusion.data import survey as surveying
from trimask.diffusion.data.modalities import shape_example
from trimask.diffusion.data.plan import Plan
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.reading_config import FieldConfig, PictureConfig
from trimask.diffusion.data.records import BadRecord, Block, RawExample
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.diffusion.run.progress import silent
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig
from trimask.tokenizers.storage import configuration


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("whole"), config_of(files))


def test_every_record_is_an_example_of_one_split_and_can_be_read_again(files, whole):
    for name, count in {"photos": 24, "voices": 24, "sums": 40}.items():
        dataset = whole.dataset(name)
        assert (dataset.records, dataset.rejected, sum(dataset.splits.values())) == (count, 0, count)
        ids = [e["id"] for split in dataset.splits for e in whole.examples(name, split)]
        assert len(set(ids)) == count
        for split in dataset.splits:
            raw = list(whole.raw(name, split))
            assert [example.id for example in raw] == [e["id"] for e in whole.examples(name, split)]
            texts = whole.tokenizers.decode("text", [e["text"] for e in whole.examples(name, split)])
            assert texts == [example.media["text"] for example in raw]


def test_held_out_records_are_in_no_other_split(whole):
    anna = {f"{number}.wav" for number in range(0, 24, 4)}
    assert {e["id"] for e in whole.examples("voices", "test_who")} == anna
    others = [split for split in whole.dataset("voices").splits if split != "test_who"]
    assert not anna & {e["id"] for split in others for e in whole.examples("voices", split)}


def test_pictures_and_sounds_have_one_shape(whole):
    layout = whole.dataset("photos").layout
    assert layout.shapes["image"] == [2, 3] and layout.example_length() == 1 + 1 + layout.shapes["text"][0] + 1 + 6
    assert {e["image"].shape for e in whole.examples("photos", "train")} == {(2, 3)}
    assert {example.media["image"].shape for example in whole.raw("photos", "train")} == {(4, 6, 3)}
    assert whole.dataset("voices").layout.shapes["audio"] == [3, 2]  # the longest, 1,130 samples, is 3 frames of 400


def test_long_texts_are_cut_into_pieces_that_together_are_the_text(files, whole):
    paragraphs = (files / "prose.txt").read_text().split("\n\n")
    eos, pieces = whole.tokenizers.vocabulary.eos_code, {}
    for split in whole.dataset("prose").splits:
        for example, length in zip(whole.examples("prose", split), whole.lengths("prose", split), strict=True):
            assert length == len(example["text"]) + 2 <= 42
            name, _, number = example["id"].partition("-")
            pieces.setdefault(name, {})[int(number or 0)] = example["text"]
    joined = [np.concatenate([parts[n] for n in range(len(parts))]) for parts in pieces.values()]
    assert all(np.flatnonzero(text == eos).tolist() == [len(text) - 1] for text in joined)
    assert sorted(whole.tokenizers.text.decode(text[:-1]) for text in joined) == sorted(set(paragraphs))


def test_a_response_is_padded_with_eos_and_its_prompt_is_not(whole):
    layout = whole.dataset("sums").layout
    assert layout.fill == "answer" and layout.answer_length == 3
    for example in whole.examples("sums", "train"):
        prompt = whole.tokenizers.text.decode(example["text"][: example["num_given"]])
        assert prompt.endswith("=") and len(example["text"]) == example["num_given"] + 3
        answer = whole.tokenizers.vocabulary.until_eos(example["text"][example["num_given"] :])
        assert whole.tokenizers.text.decode(answer) == str(2 * int(prompt.partition("+")[0]))
    lengths = whole.lengths("sums", "train")
    assert lengths.tolist() == [len(e["text"]) + 2 for e in whole.examples("sums", "train")]


def test_a_complete_folder_is_opened_and_another_configuration_refused(files, whole, monkeypatch):
    monkeypatch.setattr(preparing, "encode_block", None)
    assert prepare(whole.folder, config_of(files, workers=3)).fingerprint == whole.fingerprint
    with pytest.raises(ValueError, match="text_vocabulary: 270 → 271"):
        prepare(whole.folder, config_of(files, text_vocabulary=271))


def test_progress_reports_name_each_stage_with_the_number_done_and_the_total(tmp_path):
    kinds, reports = ("drawn", "sums"), []
    config = PrepareConfig(sources={kind: SourceConfig(kind="synthetic", where=(kind,)) for kind in kinds})
    prepare(tmp_path, config, lambda *report: reports.append(report))
    reading = [("reading sources", n, 2) for n in range(3)]
    reading += [(f"reading records of {name}", n, 44) for name in kinds for n in (0, 44)]
    fitting = [(f"fitting the {name} tokenizer", n, 1) for name in ("text", "image") for n in range(2)]
    records = (0, 20, 32, 44, 64, 76, 88)  # of three blocks of each
    assert reports == [*reading, *fitting, *(("tokenising", done, 88) for done in records)]


def test_stopped_after_any_block_it_continues_with_the_next(files, whole, tmp_path, monkeypatch):
    made, limit = [], 0
    original = preparing.encode_block

    def counted(folder, job):
        if len(made) == limit:
            raise KeyboardInterrupt
        made.append(job)
        return original(folder, job)

    monkeypatch.setattr(preparing, "encode_block", counted)
    blocks = sum(map(len, json.loads((whole.folder / "plan.json").read_text())["blocks"].values()))
    for limit in range(1, blocks):  # noqa: B007 (read by `counted`)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "x", config_of(files))
    limit = blocks
    reports = []
    prepare(tmp_path / "x", config_of(files), lambda *report: reports.append(report))
    begun, *_, ended = (done for what, done, _ in reports if what == "tokenising")
    assert 0 < begun < ended == next(total for what, _, total in reports if what == "tokenising")
    assert len(made) == len(set(made)) == blocks
    assert bytes_of(tmp_path / "x") == bytes_of(whole.folder)


KILLED = """
    import contextlib, json, os, pathlib, random, signal, sys, time
    from trimask.tokenizers.storage import configuration
    from trimask.diffusion.data.prepare_config import PrepareConfig
    from trimask.diffusion.data.prepare import prepare

    config = configuration.from_dict(json.loads(sys.argv[2]), PrepareConfig, "argument")

    def living(group):  # where the system shows it
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, its = path.read_text().rpartition(")")[2].split()[:3]
                if its == str(group) and state != "Z":
                    return True
        return False

    draw = random.Random(0)
    for wanted in sys.argv[3:]:
        said, says = os.pipe()
        process = os.fork()
        if process == 0:
            os.setpgrp()
            report = lambda what, done, total: os.write(says, f"{what} {done}\\n".encode())
            prepare(pathlib.Path(sys.argv[1]), config, report)
            os._exit(0)
        os.close(says)
        with open(said) as lines:
            assert any(line == wanted + "\\n" for line in lines)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while living(process):
            assert time.monotonic() < deadline, "workers of a killed process live on"
            time.sleep(0.1)
"""


def test_several_processes_killed_at_random_moments_end_with_the_same_bytes(files, whole, tmp_path):
    """A process that has done the imports is forked for each attempt; the two workers of the second attempt are new."""
    config = json.dumps(configuration.to_dict(config_of(files, workers=2)))
    moments = ("fitting the image tokenizer 0", "tokenising 14")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "x"), config, *moments]
    subprocess.run(command, check=True)
    prepare(tmp_path / "x", config_of(files, workers=2))
    assert bytes_of(tmp_path / "x") == bytes_of(whole.folder)


@pytest.fixture
def pools(monkeypatch):
    """Numbers of processes that pools were created with; they run threads instead, one at a time."""
    asked = []

    def pool(workers, _, begin, arguments):
        asked.append(workers)
        monkeypatch.setattr(preparing, "end_with", lambda _: None)
        return concurrent.futures.ThreadPoolExecutor(1, initializer=begin, initargs=arguments)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", pool)
    return asked


@pytest.fixture
def broken(tmp_path):
    """Configuration of a source of six pictures, of which two cannot be used."""
    for number in range(6):
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 4), np.uint8))
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"\x89PNG")
    lines = [{"file_name": f"{n}.png", "text": "" if n == 1 else "x", "split": "train"} for n in range(6)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PrepareConfig(sources={"some": SourceConfig(kind="images", where=(str(tmp_path),))}, shard_records=4)


def test_a_bad_record_stops_with_file_line_and_reason(broken, tmp_path):
    with pytest.raises(BadRecord, match=r'metadata\.jsonl, line 2: "text" is empty'):
        prepare(tmp_path / "out", broken)


def test_skipped_records_are_listed_and_add_up(broken, tmp_path):
    with pytest.raises(BadRecord):
        prepare(tmp_path / "out", broken)
    prepared = prepare(tmp_path / "out", dataclasses.replace(broken, on_error="skip"))
    dataset = prepared.dataset("some")
    assert (dataset.records, dataset.rejected, dataset.splits) == (6, 2, {"train": 4})
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(r["dataset"], r["line"]) for r in rejects] == [("some", 2), ("some", 4)]
    assert rejects[0]["reason"] == '"text" is empty' and "not a readable picture" in rejects[1]["reason"]
    assert [example.id for example in prepared.raw("some", "train")] == ["0.png", "2.png", "4.png", "5.png"]


def test_pictures_of_several_sizes_are_refused_until_a_size_is_given(files, tmp_path):
    with pytest.raises(ValueError, match=r"--pictures\.height and --pictures\.width"):
        prepare(tmp_path / "x", config_of(files, pictures=PictureConfig()))


def test_a_text_that_does_not_fit_is_a_bad_record(files, tmp_path):
    sums = {"sums": config_of(files).sources["sums"]}
    with pytest.raises(BadRecord, match="--response-tokens 2 keeps one for EOS"):
        prepare(tmp_path / "x", config_of(files, sources=sums, splits=SplitConfig(), response_tokens=2))
    with pytest.raises(BadRecord, match="--max-text-tokens allows 5"):
        prepare(tmp_path / "y", config_of(files, sources=sums, splits=SplitConfig(), max_text_tokens=5))


def test_tokenizers_of_another_folder_are_used_and_missing_ones_fitted(files, whole, tmp_path):
    sources = {"more": config_of(files).sources["photos"], "voices": config_of(files).sources["voices"]}
    small = PrepareConfig(sources={"prose": config_of(files).sources["prose"]}, text_vocabulary=265)
    only_text = prepare(tmp_path / "text", small)
    grown = prepare(tmp_path / "grown", config_of(files, sources=sources, tokenizers=str(only_text.folder)))
    assert grown.tokenizers.text.fingerprint == only_text.tokenizers.text.fingerprint
    assert set(grown.tokenizers.codecs) == {"image", "audio"}
    same = prepare(tmp_path / "same", config_of(files, sources=sources, tokenizers=str(whole.folder)))
    assert same.tokenizers.fingerprints == whole.tokenizers.fingerprints


def test_with_the_tokenizers_of_prepared_data_media_have_its_shapes_and_no_training_split_is_needed(
    files, whole, tmp_path
):
    photos = {"more": config_of(files).sources["photos"]}
    config = PrepareConfig(
        sources=photos,
        tokenizers=str(whole.folder),
        splits=SplitConfig(test=0.99, validation=0.0, held_out=("who=ben",)),
    )
    more = prepare(tmp_path / "x", config)
    assert "train" not in more.dataset("more").splits
    assert more.dataset("more").layout.shapes["image"] == whole.dataset("photos").layout.shapes["image"]


@pytest.mark.parametrize("missing", [("manifest.json",), ("manifest.json", "config.json")])
def test_tokenizers_are_not_taken_from_a_folder_that_is_not_finished(whole, tmp_path, missing):
    shutil.copytree(whole.folder, tmp_path / "data")
    for name in missing:
        (tmp_path / "data" / name).unlink()
    sources = {"prose": SourceConfig(kind="text", where=("x.txt",))}
    with pytest.raises(ValueError, match="neither a run nor prepared data that is finished"):
        prepare(tmp_path / "new", PrepareConfig(sources=sources, tokenizers=str(tmp_path / "data")))
    assert not (tmp_path / "new").exists()


def test_a_dataset_without_usable_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "long", "split": "train"}\n')
    config = PrepareConfig(
        sources={"x": SourceConfig(kind="prompts", where=(str(tmp_path / "a.jsonl"),))},
        max_text_tokens=2,
        on_error="skip",
    )
    with pytest.raises(ValueError, match=r"none of its records could be used; .*rejects\.jsonl"):
        prepare(tmp_path / "out", config)


@pytest.mark.parametrize(("limit", "count"), [(1 << 30, 20), (60, 3), (72, 4), (0, 1)])
def test_the_sample_for_fitting_has_a_largest_size_in_bytes(monkeypatch, limit, count):
    """Each picture has 24 bytes; the one that exceeds the limit is the last of the sample."""
    monkeypatch.setattr(surveying, "_FIT_BYTES", limit)
    source = sources.SOURCES["synthetic"](("drawn",), None)
    config = PrepareConfig(sources={"drawn": SourceConfig(kind="synthetic", where=("drawn",))})
    sample = surveying.survey_source("drawn", source, source.blocks(20), config, {}, True, silent).sample
    assert [example.media["image"].nbytes for example in sample] == [24] * count


def test_colour_is_kept_if_any_picture_has_it(tmp_path):
    for number, mode in enumerate(("L", "RGB", "L")):
        Image.new(mode, (4, 4), "red").save(tmp_path / f"{number}.png")
    lines = [{"file_name": f"{n}.png", "text": "x", "split": "train"} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = PrepareConfig(sources={"some": SourceConfig(kind="images", where=(str(tmp_path),))})
    shapes = {e.media["image"].shape for e in prepare(tmp_path / "out", config).raw("some", "train")}
    assert shapes == {(4, 4, 3)}


def test_the_error_for_no_sources_names_the_flags(tmp_path):
    with pytest.raises(ValueError, match="--images"):
        prepare(tmp_path / "x", PrepareConfig())


def test_a_source_without_records_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    config = PrepareConfig(sources={"text": SourceConfig(kind="text", where=(str(tmp_path / "a.txt"),))})
    with pytest.raises(ValueError, match=r"a\.txt holds no records"):
        prepare(tmp_path / "x", config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitConfig(test=0.6, validation=0.4), "leave something to train on"),
        (lambda: SplitConfig(held_out=("anna",)), "FIELD=VALUE"),
        (lambda: PictureConfig(height=3), "given together"),
        (lambda: PrepareConfig(seconds=0.0), "seconds must lie in"),
        (lambda: PrepareConfig(sources={"a b": SourceConfig(kind="text", where=())}), "a plain word"),
    ],
)
def test_errors_of_wrong_configurations_name_the_allowed_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shares_of_splits_are_as_configured(tmp_path, pools, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(40), raising=False)
    (tmp_path / "a.txt").write_text("\n".join(f"line {n}" for n in range(4000)))
    fields = FieldConfig(text_unit="line")
    config = PrepareConfig(sources={"text": SourceConfig(kind="text", where=(str(tmp_path / "a.txt"),))}, fields=fields)
    splits = prepare(tmp_path / "x", config).dataset("text").splits
    assert pools == [4]  # of 32, as there are four blocks
    # Five standard deviations of a share of 4,000.
    assert abs(splits["test"] / 4000 - 0.1) < 0.024 and abs(splits["validation"] / 4000 - 0.05) < 0.018


def test_a_source_without_a_usable_training_record_is_refused_by_its_split(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b", "split": "test"}\n')
    config = PrepareConfig(sources={"x": SourceConfig(kind="prompts", where=(str(tmp_path / "a.jsonl"),))})
    with pytest.raises(ValueError, match="x: there is no usable record in its training split, on which"):
        prepare(tmp_path / "out", config)


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_a_record_whose_reader_fails_is_a_bad_record_with_its_line(tmp_path, monkeypatch, on_error):
    class Faulty(type(sources.SOURCES["synthetic"](("sums",), None))):
        def _example(self, number):
            if number == 5:
                raise ValueError("not a sum")
            return super()._example(number)

    monkeypatch.setitem(sources.SOURCES, "synthetic", lambda where, _: Faulty(where[0]))
    config = PrepareConfig(sources={"sums": SourceConfig(kind="synthetic", where=("sums",))}, on_error=on_error)
    if on_error == "stop":
        with pytest.raises(BadRecord, match="sums train, line 6: not a sum"):
            prepare(tmp_path, config)
        return
    prepared = prepare(tmp_path, config)
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"], reject["reason"]) == ("sums train", 6, "not a sum")
    assert [example["id"] for example in prepared.examples("sums", "train")][4:6] == ["4", "6"]


def test_media_have_the_shape_of_those_of_the_run_whose_tokenizers_are_reused(prepared, tmp_path):
    shutil.copytree(prepared.folder / "tokenizers", tmp_path / "run/tokenizers")
    layouts = {name: configuration.to_dict(prepared.dataset(name).layout) for name in ("drawn", "spoken", "sums")}
    (tmp_path / "run/config.json").write_text(json.dumps({"layouts": layouts}))
    for folder, pictures, seconds in (
        (tmp_path / "run", PictureConfig(height=4, width=6), 0.15),
        (tmp_path / "run/tokenizers", PrepareConfig().pictures, None),
    ):
        config = fitting.with_reused_codecs(PrepareConfig(tokenizers=str(folder)))
        assert (config.pictures, config.seconds) == (pictures, seconds)
        assert config.codecs["image"] == prepared.tokenizers.codec("image").config


@pytest.mark.parametrize(
    ("workers", "records", "processors", "expected"),
    [(None, 2048, 50, 1), (None, 2049, 50, 32), (None, 2049, 3, 3), (7, 2049, 3, 7), (7, 1, 3, 7)],
)
def test_few_records_are_prepared_by_one_process_and_many_by_one_per_core(
    monkeypatch, workers, records, processors, expected
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)), raising=False)
    plan = Plan(blocks={"a": [Block(file="a", start=0, line=1, count=records)]}, media_shapes={})
    assert preparing._num_workers(PrepareConfig(workers=workers), plan) == expected


@pytest.mark.parametrize(("seconds", "samples"), [(None, 1200), (1e-9, 400), (0.05, 400), (0.0502, 800)])
def test_sounds_are_rounded_up_to_whole_frames_and_at_least_one(seconds, samples):
    """A frame has 400 samples at 8 kHz, and the longest sound has 801 samples."""
    lengths = {"voices": [np.zeros(length, np.float32) for length in (1, 801)]}
    assert shaping.shapes_of_sounds(lengths, PrepareConfig(seconds=seconds).media, None) == {"voices": [samples]}


def test_partial_shards_of_killed_processes_are_removed_and_nothing_else(files, tmp_path):
    ours = ["prose/train-00000.array_record.123.partial", "prose/test_who-00000.array_record.7.partial"]
    others = ["film.partial", "docs/a.tex.partial", "prose/a.partial", "prose/train-00007.array_record.123.partial"]
    others += ["other/train-00000.array_record.123.partial", "prose/train-00000.array_record.1.partial/a"]
    for name in [*ours, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    sources = {"prose": SourceConfig(kind="text", where=(str(files / "prose.txt"),))}
    prepare(tmp_path, PrepareConfig(sources=sources, text_vocabulary=258))
    assert (tmp_path / "manifest.json").is_file()
    assert not any((tmp_path / name).exists() for name in ours) and all((tmp_path / name).is_file() for name in others)


def test_a_folder_at_the_path_of_a_shard_is_refused_and_no_partial_file_is_left(files, tmp_path):
    config = PrepareConfig(
        sources={"prose": SourceConfig(kind="text", where=(str(files / "prose.txt"),))}, text_vocabulary=258
    )
    prepare(tmp_path, config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shard = tmp_path / "prose" / "train-00000.array_record"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(OSError, match=f"{shard.name}: a folder, not a file"):
        prepare(tmp_path, config)
    shard.rmdir()
    shard.write_bytes(before[shard])
    (tmp_path / "prose" / "train-00000.array_record.123.partial").write_text("half")  # of a mending that was killed
    prepare(tmp_path, config)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - {tmp_path / "verified.json"} == set(before)


def test_a_medium_that_cannot_have_the_shape_is_refused_with_the_example():
    example = RawExample("some/7", {"text": "x", "image": np.zeros((2, 2, 3), np.uint8)})
    with pytest.raises(ValueError, match=r"^some/7: .*pictures have 2 channels; files have 1 or 3"):
        shape_example(example, "image", [2, 2, 2], PrepareConfig().media)
    assert shape_example(example, None, [], PrepareConfig().media) == (example, [])
    with pytest.raises(ValueError, match=r"codecs of an unknown modality 'imag'; .*image"):
        PrepareConfig(codecs={"imag": PatchConfig()})


def test_a_mistake_leaves_nothing_and_a_folder_without_a_plan_takes_another_configuration(files, tmp_path, monkeypatch):
    folder = tmp_path / "new"
    with pytest.raises(FileNotFoundError, match=r"prse\.txt: no such file"):
        prepare(folder, PrepareConfig(sources={"prose": SourceConfig(kind="text", where=(str(files / "prse.txt"),))}))
    assert not folder.exists()
    prose = {"prose": SourceConfig(kind="text", where=(str(files / "prose.txt"),))}
    with monkeypatch.context() as patch:
        patch.setattr(preparing.configuration, "save", _killed_at_plan)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, config_of(files, text_vocabulary=258))
    assert (folder / "config.json").exists() and (folder / "tokenizers/image").is_dir()
    prepared = prepare(folder, PrepareConfig(sources=prose, text_vocabulary=257))
    assert prepared.tokenizers.text.size == 257 and not (folder / "tokenizers/image").exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "config.json", "manifest.json", "plan.json", "prose", "tokenizers"
    ]  # fmt: skip


def _killed_at_plan(path, content):
    if path.name == "plan.json":
        raise KeyboardInterrupt
    configuration.write_json(path, configuration.to_dict(content))


def test_a_text_vocabulary_too_large_for_the_texts_is_refused(files, tmp_path):
    size = len((files / "prose.txt").read_bytes())
    prose = {"prose": config_of(files).sources["prose"]}
    with pytest.raises(ValueError, match=r"text_vocabulary must be at most .*; got 4,194,304") as refused:
        prepare(tmp_path / "new", PrepareConfig(sources=prose, text_vocabulary=1 << 22))
    most = int(str(refused.value).partition("at most ")[2].partition(" for")[0].replace(",", ""))
    assert 256 < most <= 256 + size and not (tmp_path / "new").exists()
    sums = {"sums": config_of(files).sources["sums"]}
    little = config_of(files, sources=sums, text_vocabulary=320, splits=SplitConfig())
    assert prepare(tmp_path / "little", little).tokenizers.text.size <= 320
    with pytest.raises(
        ValueError, match=r"pictures of 9000 × 8000 pixels are more than the 67,108,864 of limits.pixels"
    ):
        PrepareConfig(pictures=PictureConfig(height=9000, width=8000))
    with pytest.raises(ValueError, match=r"80000 seconds at 8,000 Hz are more than the 67,108,864 samples of limits"):
        PrepareConfig(seconds=80_000.0)
    with pytest.raises(ValueError, match=r"frames of 80,000,000 samples .* than the 67,108,864 of limits.samples"):
        PrepareConfig(codecs={"audio": MelConfig(spectra_per_frame=1_000_000)})
    with pytest.raises(ValueError, match="response_tokens must be at most one more than max_text_tokens, 9; got 10"):
        PrepareConfig(response_tokens=10, max_text_tokens=8)
    PrepareConfig(response_tokens=9, max_text_tokens=8)
