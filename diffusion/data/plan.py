"""What to prepare: the configuration, and the plan made of it before anything is tokenised.

A plan lists every source's blocks and fixes the shape of its media; from then on a block is tokenised without looking
at any other, by any process, at any time, with the same result.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimask.diffusion.data.modalities import modality
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.records import Block, Entry, RawExample
from trimask.tokenizers.storage.formats import added_field


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed before anything is tokenised."""

    blocks: dict[str, list[Block]]
    """Dataset → all its records."""
    media_shapes: dict[str, list[int]]
    """Dataset → shape of its pictures (height, width, channels) or sounds (samples)."""
    contents: dict[str, dict[str, str]] = added_field(as_before={}, default_factory=dict)
    """Dataset → digest of a content that its source puts in several splits → the one it is in, where that is asked
    for."""
    unread: dict[str, dict[str, int]] = added_field(as_before={}, default_factory=dict)
    """Dataset → folder of it → number of files there that no record names."""
    given: dict[str, str] = added_field(as_before={}, default_factory=dict)
    """text_tokenizer and tokenizers, where the configuration names them → digest of what they were."""

    def __post_init__(self):
        for name in self.blocks:
            if not name.isidentifier():
                raise ValueError(f"a dataset's name must be a plain word, for it names a folder; got {name!r}")

    @property
    def records(self) -> dict[str, int]:
        """Dataset → number of its records."""
        return {name: sum(block.count for block in blocks) for name, blocks in self.blocks.items()}


def split_of(name: str, entry: Entry, content: str | None, config: PrepareConfig, plan: Plan) -> str:
    """The split of a record of a dataset; its content's digest is needed where splits go by it."""
    own = plan.contents.get(name, {}).get(content) if content is not None else None
    return own or config.splits.of(entry, content)


def fitted(example: RawExample, medium: str | None, shape: list[int], config: PrepareConfig) -> RawExample:
    """The example with its medium at a dataset's shape."""
    if medium is None:
        return example
    try:
        content = modality(medium).at_shape(example.media[medium], tuple(shape), config.media)
    except ValueError as error:
        raise ValueError(f"{example.id}: {error}") from error
    return RawExample(example.id, {**example.media, medium: content}, example.given)


def stacked(examples: list[RawExample], medium: str) -> Any:
    """A medium of many examples of one shape."""
    return np.stack([example.media[medium] for example in examples])
