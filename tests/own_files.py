"""Small files of a user, and configurations that prepare them."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.reading_config import PictureConfig
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig

WORDS = ("one", "two", "three")


def make_files(root: Path) -> Path:
    """Writes 24 pictures and 24 sounds with captions, a text file, and prompts with responses."""
    rng = np.random.default_rng(0)
    for folder in ("photos", "voices"):
        (root / folder).mkdir()
        lines = []
        for number in range(24):
            name = f"{number}.png" if folder == "photos" else f"{number}.wav"
            if folder == "photos":
                size = (4, 6, 3) if number % 2 else (8, 12, 3)
                Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(root / folder / name)
            else:
                soundfile.write(root / folder / name, rng.uniform(-1, 1, 900 + 10 * number), 8000)
            who = "anna" if number % 4 == 0 else "ben"
            lines.append({"file_name": name, "text": WORDS[number % 3], "who": who})
        (root / folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paragraphs = [" ".join(rng.choice(WORDS, rng.integers(2, 30))) for _ in range(40)]
    (root / "prose.txt").write_text("\n\n".join(paragraphs))
    prompts = [{"prompt": f"{a}+{a}=", "response": str(2 * a)} for a in range(40)]
    (root / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    return root


def config_of(root, **changes) -> PrepareConfig:
    sources = {
        "photos": SourceConfig(kind="images", where=(str(root / "photos"),)),
        "voices": SourceConfig(kind="audio", where=(str(root / "voices"),)),
        "prose": SourceConfig(kind="text", where=(str(root / "prose.txt"),)),
        "sums": SourceConfig(kind="prompts", where=(str(root / "sums.jsonl"),)),
    }
    config = PrepareConfig(
        sources=sources,
        text_vocabulary=270,
        max_text_tokens=40,
        pictures=PictureConfig(height=4, width=6),
        codecs={"image": PatchConfig(codebook_size=12), "audio": MelConfig(codebook_size=9)},
        splits=SplitConfig(held_out=("who=anna",)),
        shard_records=7,
        workers=1,
    )
    return dataclasses.replace(config, **changes)


def photos_of(folder, **changes):
    source = {"photos": SourceConfig(kind="images", where=(str(folder),))}
    defaults = {"pictures": PictureConfig(height=4, width=6), "shard_records": 7, "workers": 1}
    return PrepareConfig(sources=source, **{**defaults, **changes})


def bytes_of(folder):
    """Path → digest of every file, except the lock, verified.json, and config.json, some of whose fields may change."""
    left_out = {folder / name for name in (".lock", "config.json", "verified.json")}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in left_out]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
