"""Writes folders of every kind that users keep, as the present code writes them, into one small archive.

    python tests/written/write.py tests/written/NAME.tar.xz

    sources/    captioned pictures and sounds, texts and prompts: what a user brings
    data/       all of them, prepared; one record is rejected
    run/        a model of a few thousand parameters: 9 steps, checkpoints of steps 5 and 9, an evaluation
    policy/     an unmasking policy of 2 steps
    study/      a study of the learning rate with 2 trials
    generated/  a text with its trace, a picture and a sound
    expected.json   what `identities` says of these folders

An archive is never replaced: whoever changes a format writes another one beside those that are there, and
`test_written.py` goes on opening all of them.
"""

import dataclasses
import hashlib
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from PIL import Image

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.diffusion.masking import MaskingConfig, forward_process
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import RunDescription, TrainConfig, load_description
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.run.folder import read_intact_lines
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.learned import open_policy
from trimask.diffusion.sampling.policy import PolicyConfig
from trimask.diffusion.studies.learning_rate_transfer import LearningRateTransfer
from trimask.diffusion.transformer import TransformerConfig
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.problem_sets import from_prepared
from trimask.sampling_rl.train_policy import PolicyTrainConfig, problems_summary, train_policy
from trimask.scripts import evaluate, generate, study
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig

COLOURS = {"dark": 40, "grey": 120, "light": 220}
NOTES_HZ = {"low": 300, "high": 1200}


def main(archive: Path) -> None:
    """Writes everything in a scratch folder, with paths relative to it, and packs it."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        _write_sources(Path("sources"))
        prepare(Path("data"), _prepare_config())
        train(Path("run"), Path("data"), _train_config())
        _make_relative(Path("run"))
        evaluate.main(["run", "--max-examples", "3", "--bound-samples", "2"])
        _write_policy()
        study_config = LearningRateTransfer(
            base=dataclasses.replace(_train_config(), batch=BatchConfig(tokens=256)),
            widths=(8,), depths=(1,), log2_learning_rates=(-8, -7), kinds=("completed_p",),
        )  # fmt: skip
        study.run("lr-transfer", study.Options(out=Path("study"), data=Path("data"), workers=0), study_config, "study")
        for asked in (["--prompt", "the cat", "--to", "text", "--trace"], ["--prompt", "dark", "--to", "image"],
                      ["--prompt", "low", "--to", "audio"]):  # fmt: skip
            generate.main(["run", *asked, "--out", "generated"])
        for lock in Path().rglob(".lock"):
            lock.unlink()
        Path("expected.json").write_text(json.dumps(identities(Path()), indent=1) + "\n")
        with tarfile.open(archive, "w:xz") as tar:
            for name in sorted(os.listdir()):
                tar.add(name, filter=_anonymous)


def identities(folder: Path) -> dict[str, Any]:
    """What must stay the same for as long as these folders are opened: fingerprints, digests, losses and keys."""
    prepared, description = Prepared(folder / "data"), load_description(folder / "run")
    batches = training_batches(prepared, description.train)
    loaded = load(folder / "run")
    steps = range(description.num_steps)
    return {
        "data": prepared.fingerprint,
        "tokenizers": prepared.tokenizers.fingerprints,
        "run_tokenizers": loaded.tokenizers.fingerprints,
        "vocabulary": prepared.tokenizers.vocabulary.fingerprint,
        "run_data": description.data_fingerprint,
        "examples": {
            f"{name}/{split}": _digest(
                *(part for example in prepared.examples(name, split) for part in _parts(example))
            )
            for name, dataset in prepared.manifest.datasets.items()
            for split in dataset.splits
        },
        "batches": [_digest_of_rows(batches(step)) for step in steps],
        "masks": [_digest_of_masks(description, batches(step), step) for step in steps[:2]],
        "weights": _digest_of_leaves(loaded.parameters),
        "policy": _identity_of_policy(folder / "policy"),
        "losses": [line["loss"] for line in read_intact_lines(folder / "run" / "metrics.jsonl")],
        "trials": {
            line["key"]: line["outcome"]["loss"] for line in read_intact_lines(folder / "study" / "trials.jsonl")
        },
        "generated": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted((folder / "generated").iterdir())
        },
    }


def _identity_of_policy(folder: Path) -> str:
    """Digest of the weights, or the sentence that refuses a policy of former rules."""
    try:
        return _digest_of_leaves(open_policy(str(folder)).parameters)
    except ValueError as refusal:
        return str(refusal)


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _digest_of_leaves(tree: Any) -> str:
    """Digest of the arrays of a tree, without their names."""
    return hashlib.sha256("".join(sorted(map(_digest, jax.tree.leaves(tree)))).encode()).hexdigest()[:16]


def _parts(example: dict[str, Any]) -> list[Any]:
    """An example's numbers and arrays by name, its id as bytes."""
    return [part.encode() if isinstance(part, str) else part for _, part in sorted(example.items())]


def _digest_of_rows(rows: Any) -> str:
    return _digest(rows.tokens, rows.modality, rows.coordinates, rows.segment, rows.is_condition)


_noised = jax.jit(forward_process, static_argnums=(2, 3))


def _digest_of_masks(description: RunDescription, rows: Any, step: int) -> str:
    """The masked tokens of a step, by the key that training uses."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(description.train.seed), 1), step)
    noised = _noised(key, rows, description.vocabulary, description.train.masking)
    return _digest(jax.random.key_data(key), noised.sequence.tokens, noised.is_masked, noised.is_target)


def _write_sources(folder: Path) -> None:
    """Pictures of a shade, sounds of a pitch, sentences and sums; one picture's caption is empty."""
    rng = np.random.default_rng(0)
    for name in ("images", "audio"):
        (folder / name).mkdir(parents=True)
    captions = []
    for number in range(24):
        word = list(COLOURS)[number % len(COLOURS)]
        pixels = np.clip(rng.normal(COLOURS[word], 25, (8, 8)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")
        captions.append({"file_name": f"{number:02}.png", "text": word if number != 5 else ""})
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions))
    captions = []
    for number in range(18):
        word = list(NOTES_HZ)[number % len(NOTES_HZ)]
        times = np.arange(800) / 8000
        wave = 0.5 * np.sin(2 * np.pi * NOTES_HZ[word] * times) + rng.normal(0, 0.02, 800)
        soundfile.write(folder / "audio" / f"{number:02}.wav", wave, 8000, subtype="PCM_16")
        captions.append({"file_name": f"{number:02}.wav", "text": word, "speaker": "ab"[number % 2]})
    (folder / "audio" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions))
    sentences = [
        f"the {a} {b} the {c}" for a in ("cat", "dog") for b in ("sees", "fears") for c in ("sun", "rain", "sea")
    ]
    (folder / "texts.txt").write_text("\n\n".join(sentences) + "\n")
    sums = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(2, 7) for b in range(3, 8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))


def _prepare_config() -> PrepareConfig:
    return PrepareConfig(
        sources={
            "pictures": SourceConfig(kind="images", where=("sources/images",)),
            "sounds": SourceConfig(kind="audio", where=("sources/audio",)),
            "texts": SourceConfig(kind="text", where=("sources/texts.txt",)),
            "sums": SourceConfig(kind="prompts", where=("sources/prompts.jsonl",)),
        },
        splits=SplitConfig(validation=0.15, test=0.2, held_out=("speaker=b",)),
        text_vocabulary=264,
        codecs={"image": PatchConfig(codebook_size=12), "audio": MelConfig(codebook_size=9)},
        shard_records=10,
        on_error="skip",
        workers=1,
    )


def _train_config() -> TrainConfig:
    return TrainConfig(
        model=TransformerConfig(num_layers=1, width=8, num_heads=1, mlp_width=16, place_features=8),
        masking=MaskingConfig(drop_probability=0.15),
        optimizer=OptimizerConfig(horizon_tokens=2000, warmup_tokens=500, ema_decay=0.9),
        batch=BatchConfig(tokens=256, weights={"pictures": 2.0}),
        loop=LoopConfig(log_every=1, checkpoint_every=5),
        generation={"image": GenerationConfig(steps=3, guidance=1.0), "audio": GenerationConfig(steps=4),
                    "text": GenerationConfig(strategy="threshold", temperature=0.0)},
    )  # fmt: skip


def _make_relative(run: Path) -> None:
    """Lets config.json name the data by a relative path, so that no path of this machine is in the archive."""
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "data": "data"}, indent=2, ensure_ascii=False) + "\n")


def _write_policy() -> None:
    loaded = load(Path("run"))
    problems = from_prepared(Prepared(Path("data")), "sums", "text", "train")
    config = PolicyTrainConfig(
        policy=PolicyConfig(width=8, num_heads=1, mlp_width=16),
        grpo=GRPOConfig(group=2, updates=1),
        generation=GenerationConfig(temperature=0.0, stop_at_eos=False, block_length=2),
        problems_per_step=2, epochs=4 / len(problems.problems),
        loop=LoopConfig(log_every=1, checkpoint_every=1, keep_best=1, best_metric="cost", spike_factor=None),
    )  # fmt: skip
    train_policy(Path("policy"), config, problems, loaded.denoise, problems_summary("run", loaded.step, problems))


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without owner and time; TensorBoard's files, which nothing reads, are left out."""
    if "tensorboard" in entry.name:
        return None
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
