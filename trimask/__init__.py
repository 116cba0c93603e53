"""Trained tri-modal models in Python: open a run, ask it, look at and listen to what it makes.

    import trimask

    model = trimask.load("runs/tiny")
    answer = model.generate("a handwritten seven", to="image")
    answer.save("seven.png")

Nothing else is imported before one of these names is used. In a wheel the rooms of the project (tokenizers, diffusion,
…) lie beside this file; in a clone they lie beside its folder, without an `__init__.py` and under names that other
packages may have, so they are found by the path of this package alone: `trimask.tokenizers` is ours and `tokenizers`
Hugging Face's, whatever stands on `sys.path`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimask.interface import Answer, Step, Trace, TrainedModel, load

    __version__: str

__all__ = ["Answer", "Step", "Trace", "TrainedModel", "__version__", "load"]

_FOLDER = Path(__file__).resolve().parent
if not (_FOLDER / "tokenizers").is_dir():
    __path__.append(str(_FOLDER.parent))


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used."""
    if name == "__version__":
        from importlib.metadata import version

        return version("trimask")
    if name in __all__:
        from trimask import interface

        return getattr(interface, name)
    raise AttributeError(f"module 'trimask' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
