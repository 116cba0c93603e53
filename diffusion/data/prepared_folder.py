"""Paths of a prepared folder, and its files while it is made. No other module knows where a file lies.

config.json  plan.json                         configuration, and the plan made of it
tokenizers/<modality>/                         reused, or fitted on the training splits
raw/                                           files that sources build for themselves
<dataset>/<split>-00007.array_record           examples of one split of a block
<dataset>/block-00007.json                     report of a block; written last: a block that has one is done
rejects.jsonl                                  records that were not used, with file, line and reason
manifest.json                                  written last: a folder that has one is complete
verified.json                                  size and time of last change of shards whose digest was right
"""

import re
from functools import cached_property
from pathlib import Path

from trimask.diffusion.data.plan import Job, Plan
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.records import Source
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration


class PreparedFolder:
    """A prepared folder, complete or not. Its files are read when they are first used."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.plan_file = path / "plan.json"
        self.tokenizers_folder = path / "tokenizers"
        self.rejects_file = path / "rejects.jsonl"
        self.manifest_file = path / "manifest.json"
        self.verified_file = path / "verified.json"

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> PrepareConfig:
        """Configuration that the folder was made with."""
        return configuration.load(self.config_file, PrepareConfig)

    @cached_property
    def plan(self) -> Plan:
        """Plan of the folder's blocks."""
        return configuration.load(self.plan_file, Plan)

    @cached_property
    def tokenizers(self) -> MediaTokenizers:
        """Tokenizers that the folder's examples are made with."""
        return media_tokenizers.load_tokenizers(self.tokenizers_folder)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Dataset → its source, opened by the folder's configuration."""
        return {name: self.open_source(name) for name in self.config.sources}

    def open_source(self, dataset: str, config: PrepareConfig | None = None) -> Source:
        """Opens the source of a dataset by a configuration, or by the folder's own if it is None."""
        return (config or self.config).open_source(dataset, self.path / "raw")

    def shard(self, job: Job, split: str) -> Path:
        """File of the examples of one split of a block."""
        return self.path / job.dataset / f"{split}-{job.number:05}.array_record"

    def report(self, job: Job) -> Path:
        """File of the report of a block."""
        return self.path / job.dataset / f"block-{job.number:05}.json"

    def name_of(self, file: Path) -> str:
        """Path of a file relative to the folder, which is its name in verified.json."""
        return str(file.relative_to(self.path))

    def remove_block(self, job: Job) -> None:
        """Removes the report of a block, then its shards."""
        shards = (self.path / job.dataset).glob(f"*-{job.number:05}.array_record")
        for file in (self.report(job), *shards):
            if not file.is_dir() or file.is_symlink():
                file.unlink(missing_ok=True)

    def remove_partials(self, plan: Plan) -> None:
        """Removes the partial shards that killed processes left behind, and nothing else."""
        for name, blocks in plan.blocks.items():
            for file in (self.path / name).glob("*.array_record.*.partial"):
                found = re.fullmatch(r"\w+-(\d{5,})\.array_record\.\d+\.partial", file.name)
                if found is not None and int(found[1]) < len(blocks) and not file.is_dir():
                    file.unlink()
