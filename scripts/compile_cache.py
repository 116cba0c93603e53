"""Keeps the programs that XLA has compiled for the next start, in a folder of the user.

    $XDG_CACHE_HOME/trimask/xla, else ~/.cache/trimask/xla, on macOS ~/Library/Caches/trimask/xla

JAX looks a program up by a digest of the program, the options, the versions and the devices, for CPUs also their
features, so a cached program gives the same bits. Programs that are loaded from the folder are executed, so a folder
that belongs to another user, or that others may write to, is not used. Neither is a folder that cannot be written;
everything is then compiled anew, without a message.
"""

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
from filelock import FileLock

_MOST_BYTES = 512 << 20
"""Largest size of the folder."""
_MOST_PROGRAMS = 500
"""Largest number of programs; JAX examines all of them, in a fiftieth of a second, before it adds another."""
_PATIENCE_S = 0.5
"""Seconds to wait for the folder's lock, which others hold for milliseconds, before the folder is not used."""
_PROGRAM, _LAST_USE = "-cache", "-atime"
"""Suffixes of the two files that JAX writes for a program, in this order."""


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """Settings of the compilation of programs."""

    compile_cache: bool = True
    """Keep compiled programs for the next start, at most 512 MB, in the folder trimask/xla of the user's cache folder
    ($XDG_CACHE_HOME, ~/.cache or ~/Library/Caches). A folder that JAX_COMPILATION_CACHE_DIR names is used instead."""

    def settle(self) -> None:
        """Configures JAX; must be called before JAX compiles anything."""
        if not self.compile_cache:
            jax.config.update("jax_enable_compilation_cache", False)
            return
        named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        # Processes on several machines would not find the same programs, and on GPUs they tune programs together.
        if named is None and not jax.distributed.is_initialized():
            _use_own_folder()


def _use_own_folder() -> None:
    folder = _own_folder()
    if folder is None or not _tidied(folder):
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": _MOST_BYTES,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_enable_xla_caches": "none",  # a second cache, for GPUs, of unlimited size
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX warns of entries that it cannot read or write, and goes on.
    warnings.filterwarnings("ignore", "(Error (read|writ)ing persistent compilation cache|Cache value for key)")


def _own_folder() -> Path | None:
    """The cache folder, made if necessary; None if it cannot be written, or if others could write to it."""
    if sys.platform == "win32":
        return None
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        base = Path(given) if os.path.isabs(given) else home
        for folder in (base, base / "trimask", base / "trimask" / "xla"):
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.stat()
            if folder != base and (status.st_uid != os.getuid() or status.st_mode & 0o022):
                return None
    except (OSError, RuntimeError):  # RuntimeError: the home folder is not known
        return None
    return folder if os.access(folder, os.W_OK) else None


def _tidied(folder: Path) -> bool:
    """Whether JAX can lock the folder. Removes the oldest programs, and incomplete ones that killed processes left.

    A program whose time of last use is missing would keep JAX from ever adding another.
    """
    try:
        with FileLock(folder / ".lockfile", timeout=_PATIENCE_S):
            names = set(os.listdir(folder))
            programs = {name.removesuffix(_PROGRAM) for name in names if name.endswith(_PROGRAM)}
            used = {name.removesuffix(_LAST_USE) for name in names if name.endswith(_LAST_USE)}
            both = programs & used
            newest = sorted(both, key=lambda name: (folder / (name + _LAST_USE)).stat().st_mtime_ns, reverse=True)
            for name in (programs | used) - set(newest[:_MOST_PROGRAMS]):
                (folder / (name + _PROGRAM)).unlink(missing_ok=True)
                (folder / (name + _LAST_USE)).unlink(missing_ok=True)
    except (OSError, NotImplementedError):  # NotImplementedError: the file system has no locks
        return False
    return True
