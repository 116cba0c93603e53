"""What XLA has compiled is kept for the next start, in a folder of the user's own.

    $XDG_CACHE_HOME/trimask/xla, else ~/.cache/trimask/xla, on macOS ~/Library/Caches/trimask/xla

JAX looks a program up by a digest of the program, the options, the versions and the devices, of a CPU its features too,
so what is found does the same to the bit. What is loaded from there runs: a folder that belongs to somebody else, or
that others may write to, is not used. Nor is one that cannot be written, and nothing is said of it: everything is
compiled then, as without.
"""

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
from filelock import FileLock

_MOST_BYTES = 512 << 20
_MOST_PROGRAMS = 500
"""JAX looks at every one of them before it adds another: a fiftieth of a second."""
_PATIENCE_S = 0.5
"""How long another process may hold the folder's lock, which takes milliseconds, before this one goes without."""
_PROGRAM, _LAST_USE = "-cache", "-atime"
"""Ends of the names of the two files that JAX writes for a program, in this order."""


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """How programs are compiled."""

    compile_cache: bool = True
    """Keep compiled programs for the next start: 512 MB at most, in trimask/xla of the user's cache folder
    ($XDG_CACHE_HOME, ~/.cache or ~/Library/Caches). A folder that JAX_COMPILATION_CACHE_DIR names is JAX's own."""

    def settle(self) -> None:
        """Sets up JAX, which may not have compiled anything."""
        if not self.compile_cache:
            jax.config.update("jax_enable_compilation_cache", False)
            return
        named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        # Several processes, on machines of their own, would not all find the same, and on GPUs they tune together.
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
        "jax_persistent_cache_enable_xla_caches": "none",  # a second cache of GPUs, without bounds
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX warns of an entry that it can neither read nor write, and goes on.
    warnings.filterwarnings("ignore", "(Error (read|writ)ing persistent compilation cache|Cache value for key)")


def _own_folder() -> Path | None:
    """The folder, made if need be; None if it cannot be written, or others could put something into it."""
    if sys.platform == "win32":
        return None
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        base = Path(given) if os.path.isabs(given) else home
        for folder in (base, base / "trimask", base / "trimask" / "xla"):
            folder.mkdir(mode=0o700, exist_ok=True)
            about = folder.stat()
            if folder != base and (about.st_uid != os.getuid() or about.st_mode & 0o022):
                return None
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where home is
        return None
    return folder if os.access(folder, os.W_OK) else None


def _tidied(folder: Path) -> bool:
    """Whether JAX can lock the folder. Drops what a process that was killed had half written, and the oldest programs.

    A program whose last use is not known would keep JAX from ever adding another.
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
    except (OSError, NotImplementedError):  # NotImplementedError: of file systems without locks
        return False
    return True
