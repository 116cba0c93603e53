"""Who may import whom, read from the source: tokenizers ← diffusion ← sampling_rl ← configs ← scripts."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from test_defaults import ELSEWHERE

from trimask.diffusion.loss import target_counts

ROOT = Path(__file__).parents[1]
ROOMS = ("tokenizers", "diffusion", "sampling_rl", "configs", "scripts")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tests").glob("*.py"))]
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Import(NamedTuple):
    importer: Path
    name: str

    @property
    def room(self) -> str:
        return self.importer.parts[0]

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


def imports_of(source: str, importer: Path) -> Iterator[Import]:
    """Every name imported, inside functions too; `from a import b` gives a.b, `from . import b` gives ..b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(importer, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (Import(importer, f"{prefix}.{alias.name}") for alias in node.names)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    """Of the product and of its tests."""
    return [found for path in SOURCES for found in imports_of(path.read_text(), path.relative_to(ROOT))]


def rooms_against_the_direction(imports: list[Import]) -> list[Import]:
    return [
        found
        for found in imports
        if found.top == "trimask"
        and found.room in ROOMS
        and ROOMS.index(found.name.split(".")[1]) > ROOMS.index(found.room)
    ]


def test_imports_point_one_way(imports):
    assert rooms_against_the_direction(imports) == []


def test_an_import_against_the_direction_is_noticed_even_inside_a_function():
    source = "def f():\n    from trimask import configs\n"
    assert rooms_against_the_direction(list(imports_of(source, Path("diffusion/x.py"))))
    assert not rooms_against_the_direction(list(imports_of(source, Path("scripts/x.py"))))


def test_what_loads_slowly_is_loaded_where_it_is_used():
    """But by modules that themselves are: of the embedded dataset, and of studies."""
    at_once = {"diffusion/data/digits.py", "diffusion/studies/critical_batch.py", "sampling_rl/unmasking_study.py"}
    found = {
        str(path.relative_to(ROOT))
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and {one.top for one in imports_of(ast.unparse(node), path)} & {"sklearn", "scipy"}
    }
    assert found == at_once


def test_rooms_are_imported_by_their_one_name(imports):
    """A class of diffusion.x and of trimask.diffusion.x would be two. Bare tokenizers is Hugging Face's."""
    rooms = {*ROOMS, "tests", "conftest"}
    bare = [found for found in imports if found.top in rooms or found.name.startswith(".")]
    allowed = {Path("tokenizers/text.py"), Path("tests/test_text.py")}
    assert [found for found in bare if not (found.top == "tokenizers" and found.importer in allowed)] == []


def test_no_folder_has_an_init_file_but_the_one_that_registers_the_environment():
    """One in tokenizers/ would shadow Hugging Face's package wherever the root is on sys.path."""
    found = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("__init__.py*")]
    assert found == [ROOT / "sampling_rl/__init__.py"]


def test_no_script_is_named_like_a_module_it_would_shadow():
    """`python scripts/train.py` puts scripts/ on sys.path: scripts/inspect.py would break dataclasses."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert [path for path in (ROOT / "scripts").glob("*.py") if path.stem in taken] == []


def test_nothing_is_pickled(imports):
    assert [found for found in imports if found.top in UNSAFE] == []
    allowed = [
        f"{path.name}:{node.value.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert allowed == []


def test_every_imported_package_is_a_declared_dependency(imports):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["speech"], *extras["video"]]
    names = {_normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in declared} | {"trimask"}
    distributions = packages_distributions()
    undeclared = {
        (str(found.importer), found.top)
        for found in imports
        if found.room in ROOMS and found.top not in sys.stdlib_module_names and found.importer.stem not in ELSEWHERE
        if not names & {_normal(name) for name in distributions.get(found.top, [found.top])}
    }
    assert undeclared == set()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from trimask.scripts.cli import main; main(['--help'])\n"
        "sys.exit(' '.join({'jax', 'numpy', 'tyro', 'rich', 'flax'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.strip() == ""
    assert "usage: trimask" in process.stdout


def test_shapes_are_checked_under_pytest():
    """Whatever else a function would say to nonsense, the hook says first that it breaks the annotation."""
    with pytest.raises(Exception, match="Type-check"):
        target_counts(jnp.zeros(3), None)  # type: ignore[arg-type]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def without_encoding(source: str) -> list[int]:
    """Lines that open a text file and leave to the machine how its bytes are read."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        whose = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        modes = [ast.unparse(word) for word in (*call.args, *(k.value for k in call.keywords if k.arg == "mode"))]
        is_text = name in ("read_text", "write_text") or (
            name == "open" and not any("b" in mode and mode.strip("'rwabx+") == "" for mode in modes)
        )
        # Not files of text: archives, pictures, films and descriptors; and a function that knows its encoding itself.
        is_other = whose in ("os", "av", "Image", "tarfile", "soundfile", "configuration") or name == whose == ""
        is_own = name == "write_text" and not whose
        if is_text and not is_other and not is_own and "encoding" not in {k.arg for k in call.keywords}:
            found.append(call.lineno)
    return found


def test_every_text_file_is_opened_by_its_encoding():
    assert without_encoding("p.open()\nopen(p, 'w')\np.read_text()\np.open('rb')\np.open(encoding='utf-8')") == [
        1,
        2,
        3,
    ]
    found = {str(path.relative_to(ROOT)): without_encoding(path.read_text(encoding="utf-8")) for path in MODULES}
    assert not {path: lines for path, lines in found.items() if lines}


def test_files_are_written_in_one_place_which_follows_no_links():
    """`tokenizers/files.py`; others get the name of a partial file from it, or a folder of their own."""
    found = []
    for path in MODULES:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            writes = name == "open" and any(isinstance(word, str) and set(word) & set("wax+") for word in words)
            if name in ("write_text", "write_bytes", "savefig") or writes:
                receiver = ast.unparse(call.func.value) + "".join(map(ast.unparse, call.args))
                if "partial" not in receiver and "os.devnull" not in receiver:
                    found.append(f"{path.name}: {ast.unparse(call)[:60]}")
    assert found == []


def test_json_is_read_in_one_place():
    """But for scripts that run in Pythons of their own."""
    readers = {
        path.name
        for path in MODULES
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Attribute) and ast.unparse(call) in ("json.loads", "json.load")
    }
    elsewhere = {"torch_train.py", "torch_rollout.py", "md4_train.py", "llada_generate.py"}
    own = {"benchmark.py", "speech.py"}  # what they wrote themselves a moment before
    assert readers == {"json_text.py", *elsewhere, *own}
