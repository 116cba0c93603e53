"""Plan of a prepared folder (plan.json), made before anything is tokenised.

A plan lists the blocks of every source and fixes the shape of its media. From then on each block can be tokenised
without looking at any other, by any process, at any time, with the same result.
"""

import dataclasses
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from trimask.diffusion.data.records import Block, Entry
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.tokenizers.storage.formats import added_field

_DIGESTS = ("sha256", "media_sha256")
"""Fields of `Block` that plans of earlier versions lack."""


class Job(NamedTuple):
    """Name of a block to tokenise."""

    dataset: str
    number: int
    """Number of the block within its dataset, from 0."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is fixed before anything is tokenised."""

    blocks: dict[str, list[Block]]
    """Dataset → its blocks, which together hold all its records."""
    media_shapes: dict[str, list[int]]
    """Dataset → shape of its pictures (height, width, channels) or sounds (samples)."""
    contents: dict[str, dict[str, str]] = added_field(as_before={}, default_factory=dict)
    """Dataset → digest of a content that sources put into several splits → the split of all examples with that content.
    Empty unless `splits.by` is content."""
    unread: dict[str, dict[str, int]] = added_field(as_before={}, default_factory=dict)
    """Dataset → folder of its source → number of files in it that no record names."""
    given: dict[str, str] = added_field(as_before={}, default_factory=dict)
    """Field of the configuration that names reused tokenizers (`text_tokenizer`, `tokenizers`) → digest of them."""

    def __post_init__(self):
        for name in self.blocks:
            if not name.isidentifier():
                raise ValueError(f"a dataset's name must be a plain word, for it names a folder; got {name!r}")

    @property
    def jobs(self) -> list[Job]:
        """All blocks of all datasets, in order."""
        return [Job(name, number) for name, blocks in self.blocks.items() for number in range(len(blocks))]

    @property
    def num_records(self) -> int:
        """Number of records of all datasets."""
        return sum(block.count for blocks in self.blocks.values() for block in blocks)

    def block(self, job: Job) -> Block:
        """Block that a job names."""
        return self.blocks[job.dataset][job.number]

    def split_of(self, dataset: str, entry: Entry, content: str | None, splits: SplitConfig) -> str:
        """Split of a record; `content` is the digest of its content, which is needed if `splits.by` is content."""
        common = self.contents.get(dataset, {}).get(content) if content is not None else None
        return common or splits.split_of(entry, content)

    def first_difference(self, blocks: dict[str, list[Block]], given: dict[str, str]) -> str | None:
        """First difference between the planned and the present sources, in words; None if there is none.

        `blocks` are the present blocks, `given` the present digests of reused tokenizers. Lists and text files are
        compared by digest, media by size and time of their last change.
        """
        for name, digest in given.items():
            if self.given.get(name, digest) != digest:
                return f"the tokenizers that {name} names have changed since"
        for name, current in blocks.items():
            for now, before in zip_longest(current, self.blocks.get(name, [])):
                if now is not None and before is not None:
                    # Digests that the plan of an earlier version lacks are not compared.
                    now = dataclasses.replace(now, **{f: "" for f in _DIGESTS if not getattr(before, f)})
                if now == before:
                    continue
                if now is None:
                    return f"{name} has changed since: it has fewer records"
                if before is not None and dataclasses.replace(now, media_sha256=before.media_sha256) == before:
                    where = f"a file or a label that {now.file} names from line {now.line} on differs"
                else:
                    where = f"{now.file} differs from line {now.line} on"
                return f"{name} has changed since: {where}"
        return None

    def has_same_block(self, job: Job, other: "Plan") -> bool:
        """Whether a block, and everything of its dataset that its tokens depend on, is the same in another plan."""
        name, number = job
        mine, theirs = (
            (plan.blocks[name][number : number + 1], plan.media_shapes.get(name), plan.contents.get(name))
            for plan in (self, other)
        )
        return mine == theirs
