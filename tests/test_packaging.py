"""Installed as a wheel or editable, `trimask.tokenizers` and Hugging Face's `tokenizers` live together.

With the root of a clone on `sys.path`, as in its folder, `trimask` is the clone's; elsewhere it is what is installed,
even beside a folder that is called trimask. The package is installed from a copy of the source into an empty
environment that sees the dependencies of this one, so nothing is downloaded and this installation is out of reach.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = [folder for folder in PROJECT["tool"]["setuptools"]["package-dir"].values() if "/" not in folder]

BESIDE = """
from pathlib import Path

import tokenizers
import tokenizers.models  # Hugging Face's own
import trimask
import trimask.tokenizers.text
import trimask.diffusion.data.readers.speech


def test_beside():
    assert Path(tokenizers.__file__).is_relative_to({outside!r})
    assert Path(trimask.__file__).is_relative_to({inside!r}) and trimask.__version__ == {version!r}
    assert Path(trimask.tokenizers.text.__file__).is_relative_to({inside!r})
    assert Path(trimask.diffusion.data.readers.speech.__file__).is_relative_to({inside!r})
    assert trimask.tokenizers.text.tokenizers is tokenizers


test_beside()
"""


SPAWNED = """
import multiprocessing
from trimask.tokenizers.storage.files import printable

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(printable, ["a\\x1b"]) == "a\ufffd"
"""


class Installation(NamedTuple):
    root: Path
    """The copy of the source it was installed from."""
    python: Path
    inside: Path
    """Where the package is, unless the root is on the path."""

    def beside(self, inside: Path) -> str:
        """A test file, and script, that fails unless both packages are the right ones."""
        version = PROJECT["project"]["version"]
        return BESIDE.format(outside=sysconfig.get_path("purelib"), inside=str(inside), version=version)

    def run(self, *arguments: str | Path, cwd: Path) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        process = subprocess.run([self.python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "trimask"
    copy.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installation(request, source, wheel, tmp_path_factory) -> Installation:
    scratch = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", scratch / "venv"], check=True)
    python = scratch / "venv/bin/python"
    print_site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", print_site], check=True, capture_output=True, text=True).stdout.strip()
    Path(site, "dependencies.pth").write_text(
        sysconfig.get_path("purelib")
    )  # the folder itself, not the editable installs in it
    what = [wheel] if request.param == "wheel" else ["--no-build-isolation", "--editable", source]
    pip("--python", python, "install", "--ignore-installed", *what)
    return Installation(source, python, Path(site) if request.param == "wheel" else source)


def pip(*arguments: str | Path) -> None:
    command = next(place for place, word in enumerate(arguments) if word in ("wheel", "install")) + 1
    offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", *arguments[:command], *offline, *arguments[command:]], check=True)


def test_both_tokenizers_import_from_the_root(installation):
    installation.run("-c", installation.beside(installation.root), cwd=installation.root)


def test_both_tokenizers_import_from_elsewhere_even_from_the_folder_around_the_root(installation):
    installation.run("-c", installation.beside(installation.inside), cwd=installation.root.parent)


def test_both_tokenizers_import_under_pytest(installation):
    path = installation.root / "test_beside.py"
    path.write_text(installation.beside(installation.root))
    assert "1 passed" in installation.run("-m", "pytest", "-p", "no:cacheprovider", path, cwd=installation.root)


def test_processes_that_are_spawned_import_it(installation, tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    installation.run("spawned.py", cwd=tmp_path)


def test_the_command_is_installed(installation, tmp_path):
    trimask = installation.python.with_name("trimask")
    assert installation.run(trimask, "--version", cwd=tmp_path) == f"trimask {PROJECT['project']['version']}\n"
    assert "usage: trimask" in installation.run("scripts/cli.py", cwd=installation.root)
    for folder in (installation.root, tmp_path):
        assert "usage: trimask" in installation.run("-m", "trimask.scripts.cli", cwd=folder)


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    files = [path for folder in FOLDERS for kind in ("*.py", "*.jinja") for path in (ROOT / folder).rglob(kind)]
    modules = {str(Path("trimask", path.relative_to(ROOT))).replace("trimask/trimask/", "trimask/") for path in files}
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    assert names == modules | {"trimask/py.typed"}


def test_the_pins_cover_every_dependency_and_name_no_host():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if "://" in line or "@" in line or "/" in line or line.startswith("-")] == []
    pinned = {line.split("==")[0] for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    # Agents are for an example alone, and bring PyTorch; accelerators bring nothing that we import.
    asked = PROJECT["project"]["dependencies"] + extras["speech"] + extras["video"] + extras["test"]
    assert {name.split(">=")[0].lower() for name in asked} - pinned == set()
