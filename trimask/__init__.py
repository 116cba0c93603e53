"""Trained models in Python: load a run, generate with it, save and show its answers.

    import trimask

    model = trimask.load("runs/tiny")
    answer = model.generate("a handwritten seven", to="image")
    answer.save("seven.png")
    model.generate(["three", "eight"], to="audio", strategy="threshold", threshold=0.9)
    model.generate(infill="47+38=__")
    model.generate(image="seven.png", to="text")
    model.trace("a handwritten seven", to="image").animate("seven.gif")
    env = model.environment(task="text")

Nothing else is imported before one of the public names is used. In a wheel the rooms of the project (tokenizers,
diffusion, …) lie in this folder; in a clone they lie beside it, and this package looks for them there. They have no
`__init__.py`, so wherever the clone's root is on `sys.path`, `tokenizers` is still Hugging Face's, and ours is
`trimask.tokenizers`.
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
