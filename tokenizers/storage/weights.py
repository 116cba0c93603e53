"""Files of network weights: safetensors, named by their SHA-256 and read when they are first needed.

Folders that hold the same weights share one file where the file system allows hard links.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimask.tokenizers.storage.files import reading, replacing, require_regular_file

MAX_WEIGHT_BYTES = 16 << 30
"""Size in bytes above which a file of weights is refused."""


@dataclass(frozen=True)
class WeightFile:
    """A file of weights that was not read yet, and the digest that it must have."""

    path: Path
    sha256: str
    """SHA-256 of the file, 64 hex digits."""

    def read(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """The arrays of the file, float32, by name; `expected` has the shape of each.

        Raises ValueError for a damaged file, other names or shapes, another type, and numbers that are not finite.
        """
        from safetensors.numpy import load  # only learned codecs need it

        require_regular_file(self.path)
        if self.path.stat().st_size > MAX_WEIGHT_BYTES:
            raise ValueError(
                f"{self.path}: {self.path.stat().st_size:,} bytes, at most {MAX_WEIGHT_BYTES:,} are allowed"
            )
        content = self.path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{self.path}: damaged or edited: its SHA-256 is {found[:16]}…, expected {self.sha256[:16]}…"
            )
        with reading(self.path, "not a file of weights"):
            arrays = load(content)
        if arrays.keys() != expected.keys():
            different = sorted(arrays.keys() ^ expected.keys())
            raise ValueError(
                f"{self.path}: holds other weights than its configuration says: {', '.join(different[:5])}"
            )
        for name, array in arrays.items():
            if array.shape != expected[name] or array.dtype != np.float32:
                raise ValueError(
                    f"{self.path}: {name} must be float32 of shape {expected[name]}, got {array.dtype} of {array.shape}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"{self.path}: {name} holds NaN or infinite numbers")
        return arrays

    def save(self, path: Path) -> None:
        """Makes `path` the same file, by a hard link where the file system allows it, else by a copy."""
        if path.exists() and path.samefile(self.path):
            return
        with replacing(path) as partial:
            partial.unlink()
            try:
                os.link(self.path, partial)
            except OSError:
                shutil.copyfile(self.path, partial)


def write_weights(path: Path, arrays: Mapping[str, np.ndarray]) -> WeightFile:
    """Writes arrays as safetensors in float32; equal arrays give equal bytes."""
    from safetensors.numpy import save

    content = save({name: np.ascontiguousarray(arrays[name], np.float32) for name in sorted(arrays)})
    with replacing(path) as partial:
        partial.write_bytes(content)
    return WeightFile(path, hashlib.sha256(content).hexdigest())
