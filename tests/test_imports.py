"""Which room may import which, read from the source: the order of `ROOMS`, without circles.

`diffusion/` by itself is the paper: schedule, objective, network, parametrisation. It knows no folders, no data and no
runs.
"""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from test_defaults import ELSEWHERE

from trimask.diffusion.masking import draw_is_masked

ROOT = Path(__file__).parents[1]
TOP = ("tokenizers", "diffusion", "sampling_rl", "configs", "scripts")
PUBLIC = "trimask"
"""The folder of `import trimask`, above all rooms: it may import any of them, and none imports it."""
ROOMS = (
    "tokenizers/storage",
    "tokenizers",
    "diffusion/run",
    "diffusion",
    "diffusion/data",
    "diffusion/sampling",
    "diffusion/pretraining",
    "diffusion/evaluation",
    "diffusion/studies",
    "sampling_rl",
    "sampling_rl/studies",
    "configs",
    "scripts",
    PUBLIC,
)
"""Every room imports itself and those before it. A folder that is not listed belongs to the room around it."""
PAPER = "diffusion"
MODULES = sorted(path for room in (*TOP, PUBLIC) for path in (ROOT / room).rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tests").glob("*.py"))]
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SLOW = {
    "grain", "jinja2", "jiwer", "matplotlib", "pyarrow", "scipy", "sklearn", "tensorboardX", "tensorflow_datasets"
}  # fmt: skip
"""Packages that take from a hundredth of a second to seconds to load, and that few commands use."""


class Import(NamedTuple):
    importer: Path
    name: str

    @property
    def room(self) -> str:
        return self.importer.parts[0]

    @property
    def target(self) -> Path | None:
        """The module of ours that is imported, or from which a name is."""
        top, *parts = self.name.split(".")
        if top != PUBLIC:
            return None
        folder = Path() if parts and parts[0] in TOP else Path(PUBLIC)
        ends = [folder.joinpath(*parts[:stop]).with_suffix(".py") for stop in range(len(parts), 0, -1)]
        ends += [folder / "__init__.py"]
        return next((path for path in ends if (ROOT / path).is_file()), None)

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
    """All imports of the product and of its tests."""
    return [found for path in SOURCES for found in imports_of(path.read_text(), path.relative_to(ROOT))]


def room_of(path: Path) -> str:
    """The innermost listed room around a module."""
    return next(str(folder) for folder in path.parents if str(folder) in ROOMS)


def rooms_against_the_order(imports: list[Import]) -> list[Import]:
    return [
        found
        for found in imports
        if found.room in (*TOP, PUBLIC)
        and found.target is not None
        and ROOMS.index(room_of(found.target)) > ROOMS.index(room_of(found.importer))
    ]


def test_every_room_imports_only_those_before_it(imports):
    assert rooms_against_the_order(imports) == []
    assert {room_of(path.relative_to(ROOT)) for path in MODULES} == set(ROOMS)


def test_an_import_against_the_order_is_noticed_even_inside_a_function():
    source = "def f():\n    from trimask.configs import presets\n"
    assert rooms_against_the_order(list(imports_of(source, Path("diffusion/x.py"))))
    assert not rooms_against_the_order(list(imports_of(source, Path("scripts/output/x.py"))))
    for source in ("import trimask", "from trimask import load", "from trimask.interface import Answer as Made"):
        assert rooms_against_the_order(list(imports_of(source, Path("scripts/x.py")))), source
        assert not rooms_against_the_order(list(imports_of(source, Path("trimask/x.py")))), source
    assert not rooms_against_the_order(list(imports_of("import trimask.sampling_rl", Path("scripts/x.py"))))
    source = "from trimask.diffusion.data.prepare import prepare\n"
    assert rooms_against_the_order(list(imports_of(source, Path("diffusion/loss.py"))))
    assert not rooms_against_the_order(list(imports_of(source, Path("diffusion/data/readers/x.py"))))


def test_no_modules_import_each_other_in_a_circle(imports):
    graph: dict[Path, set[Path]] = {}
    for found in imports:
        if found.room in (*TOP, PUBLIC) and found.target is not None:
            graph.setdefault(found.importer, set()).add(found.target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_the_paper_imports_only_tokenizers_and_the_running_mean(imports):
    others = {
        (str(found.importer), str(found.target))
        for found in imports
        if found.room in TOP and room_of(found.importer) == PAPER and found.target is not None
        if room_of(found.target) not in (PAPER, "tokenizers", "tokenizers/storage")
    }
    assert others == {("diffusion/loss.py", "diffusion/run/running_mean.py")}


def test_every_module_is_used_by_another(imports):
    """By an import, or by its name in a table such as `CODECS`; one that fails may lack its line in a table.

    Benchmarks apart, of which `scripts/benchmark.py` knows the names.
    """
    used = {found.target for found in imports if found.room in (*TOP, PUBLIC) and found.target != found.importer}
    texts = "".join(path.read_text(encoding="utf-8") for path in MODULES)
    apart = ROOT / "scripts/benchmarks"
    modules = [path.relative_to(ROOT) for path in MODULES if path.stem != "__init__" and apart not in path.parents]
    unused = [path for path in modules if path not in used]
    assert [str(path) for path in unused if f'"trimask.{".".join(path.with_suffix("").parts)}"' not in texts] == []


def test_no_two_modules_share_a_name():
    """Commands and benchmarks are exceptions: they are named after the code that they run."""
    apart = (ROOT / "scripts", ROOT / "scripts/benchmarks")
    named = Counter(path.stem for path in MODULES if path.parent not in apart and path.name != "__init__.py")
    assert [name for name, count in named.items() if count > 1] == []


def test_tests_are_named_for_a_module():
    """A test file is called `test_<module>.py`, or is listed here because it covers many modules."""
    of_many = {
        "benchmark_tables", "break", "cpu_budget", "defaults", "docs", "hostile", "imports", "launch", "mutate",
        "other_code", "prepare_changes", "packaging", "refusals", "trimask", "walk", "written",
    }  # fmt: skip
    modules = {path.stem for path in MODULES}
    scripts = {f"{path.stem}_script" for path in (ROOT / "scripts").glob("*.py")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert tests - modules - scripts == of_many


def test_what_loads_slowly_is_loaded_where_it_is_used():
    """Exceptions are modules that are themselves imported only where they are used: TFDS, reports and figures."""
    at_once = {
        "diffusion/data/readers/digits.py",
        "diffusion/data/readers/stream.py",
        "diffusion/data/readers/tfds_records.py",
        "diffusion/studies/findings.py",
        "scripts/output/plots.py",
        "scripts/output/report.py",
    }
    found = {
        str(path.relative_to(ROOT))
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and {one.top for one in imports_of(ast.unparse(node), path)} & SLOW
    }
    assert found == at_once


def test_generation_loads_nothing_that_only_other_commands_need():
    apart = SLOW | {"gymnasium", "trimask.diffusion.evaluation.judges", "trimask.sampling_rl.train_policy"}
    code = f"import sys, trimask.scripts.generate; print(*{apart} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split() == []


def test_rooms_are_imported_by_their_one_name(imports):
    """A class of diffusion.x and of trimask.diffusion.x would be two. Bare tokenizers is Hugging Face's."""
    rooms = {*TOP, "tests", "conftest"}
    bare = [found for found in imports if found.top in rooms or found.name.startswith(".")]
    allowed = {Path("tokenizers/text.py"), Path("tests/test_text.py")}
    assert [found for found in bare if not (found.top == "tokenizers" and found.importer in allowed)] == []


def test_no_folder_has_an_init_file_but_the_one_that_registers_the_environment():
    """One in tokenizers/ would shadow Hugging Face's package wherever the root is on sys.path."""
    found = [path for room in (*TOP, "tests") for path in (ROOT / room).rglob("__init__.py*")]
    assert found == [ROOT / "sampling_rl/__init__.py"]
    assert not (ROOT / "__init__.py").exists()


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
        if found.room in (*TOP, PUBLIC)
        and found.top not in sys.stdlib_module_names
        and found.importer.stem not in ELSEWHERE
        if not names & {_normal(name) for name in distributions.get(found.top, [found.top])}
    }
    assert undeclared == set()


def test_import_trimask_and_help_load_nothing_heavy():
    code = (
        "import sys, trimask; from trimask.scripts.cli import main; main(['--help']); print(trimask.__version__)\n"
        "sys.exit(' '.join({'jax', 'numpy', 'tyro', 'rich', 'flax', 'trimask.interface'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.strip() == ""
    assert "usage: trimask" in process.stdout and process.stdout.endswith(f"\n{version('trimask')}\n")


def test_shapes_are_checked_under_pytest():
    """For an argument of the wrong shape the error is that of the hook, before any error of the function itself."""
    with pytest.raises(Exception, match="Type-check"):
        draw_is_masked(None, jnp.zeros(3), jnp.zeros(3))  # type: ignore[arg-type]


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
    """Only `tokenizers/storage/files.py` writes; other modules take a partial file or a folder from it."""
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
    """Exceptions are scripts that run in a Python of their own."""
    readers = {
        path.name
        for path in MODULES
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Attribute) and ast.unparse(call) in ("json.loads", "json.load")
    }
    elsewhere = {"torch_train.py", "torch_rollout.py", "md4_train.py", "llada_generate.py"}
    own = {"benchmark.py", "speech.py"}  # what they wrote themselves a moment before
    assert readers == {"json_text.py", *elsewhere, *own}
