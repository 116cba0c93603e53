"""Commands, flags, links, files, names and the version in the documentation agree with the code."""

import re
import shlex
import tomllib
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

import pytest

from trimask.scripts import cli, completion

ROOT = Path(__file__).parents[1]
GUIDES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
"""Pages that describe the present code."""
HISTORY = [f"docs/history/{path.name}" for path in sorted((ROOT / "docs/history").glob("*.md"))]
PAGES = [*GUIDES, "CONTRIBUTING.md", "CHANGELOG.md", "RESULTS.md", "SECURITY.md", *HISTORY]
SOURCE_FOLDERS = ("tokenizers", "diffusion", "sampling_rl", "configs", "scripts", "trimask", "tests", "docs/examples")
NOT_OURS = {"--help", "--version", "--melody.notes"}
"""Flags that every command has, and one of a modality that is an example."""
EXAMPLES = {"inspect.py", "my_judges.py", "test_photographer"}
"""Names that need not exist: the standard library's, and those of examples."""
PLANNED = "## How the types will grow"
"""Heading of docs/design.md below which names are decided that do not exist yet."""


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code, which may be broken over two lines."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]


def shell_lines(text: str) -> list[str]:
    """Lines of shell blocks, continued ones as one."""
    return [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def calls(page: str) -> list[tuple[list[str], bool]]:
    """Words of each call of trimask on the page, and whether it is whole: from a shell block, not a mention."""
    text = text_of(page)
    lines = [(line.replace("sbatch launch/slurm.sbatch", "trimask train"), True) for line in shell_lines(text)]
    lines += [(span.replace("…", "").replace("\\|", "|"), False) for span in spans(text)]
    words = [(shlex.split(line, comments=True), is_whole) for line, is_whole in lines if line.startswith("trimask ")]
    return [(found[1:], is_whole) for found, is_whole in words if found[1][0] not in "<-" and "NAME" not in found]


@pytest.fixture(scope="module")
def parsers() -> dict[str, ArgumentParser]:
    """Command, or command and part, such as "study search" → its parser, which asks for nothing that is required."""
    found: dict[str, ArgumentParser] = {}

    def visit(parser: ArgumentParser, name: str) -> None:
        found[name] = parser
        parser.allow_abbrev, parser.exit_on_error = False, False
        for action in parser._actions:
            if isinstance(action.choices, dict):
                for word, inner in action.choices.items():
                    visit(inner, f"{name} {word}".strip())
            elif not action.option_strings and action.nargs is None:
                action.nargs, action.required = "?", False

    visit(completion.parser_of_all(), "")
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_every_command_that_is_shown_parses(page, parsers):
    for words, is_whole in calls(page):
        parts = 2 if words[0] in ("study", "benchmark") else 1
        name = " ".join(words[:parts])
        assert name in parsers, f"{page}: no command {name!r}"
        try:
            parsed, left = parsers[name].parse_known_args([word for word in words[parts:] if word != "--help"])
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page}: trimask {shlex.join(words)}: {error}")
        assert not left, f"{page}: trimask {shlex.join(words)}: {left}"
        positionals = [action.dest for action in parsers[name]._actions if not action.option_strings]
        missing = [dest for dest in positionals if getattr(parsed, dest) is None]
        assert not (is_whole and missing and name != "demo"), f"{page}: trimask {shlex.join(words)} lacks {missing}"


@pytest.mark.parametrize("page", GUIDES)
def test_every_flag_that_is_named_exists(page, parsers):
    known = {flag for parser in parsers.values() for flag in parser._option_string_actions} | NOT_OURS
    known.add("--masking.schedules.image.kind")  # has a parser only where it is given
    text = text_of(page).partition(PLANNED)[0]
    named = {word.split("=")[0] for span in spans(text) for word in span.split() if re.match(r"--[a-z]", word)}
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text_of(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert file.resolve().is_relative_to(ROOT), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}; there are {', '.join(sorted(anchors(file)))}"


@cache
def anchors(file: Path) -> set[str]:
    """Anchors of the headings of a page: lower case, without punctuation, with - for blanks."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def sources() -> dict[str, str]:
    """Path of each source file → its text."""
    files = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


@cache
def words_of_sources() -> set[str]:
    return {word for text in sources().values() for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize("page", [*GUIDES, "CONTRIBUTING.md"])
def test_every_module_that_is_named_exists(page):
    """A module is named by its path from the root, or by the end of that path."""
    endings = {"/".join(Path(path).parts[-n:]) for path in sources() for n in range(1, len(Path(path).parts) + 1)}
    named = {word for span in spans(text_of(page)) for word in re.findall(r"(?:[\w.]+/)*\w+\.py\b", span)}
    assert {word for word in named if word.removeprefix("../") not in endings} - EXAMPLES == set()


@pytest.mark.parametrize("page", [*GUIDES, "CONTRIBUTING.md"])
def test_every_name_of_the_code_exists(page):
    """Classes, tables and names with an underscore, in inline code."""
    text = text_of(page).partition(PLANNED)[0]
    is_name = re.compile(r"[A-Za-z_][\w.]*")
    words = {part for span in spans(text) if is_name.fullmatch(span) for part in span.split(".")}
    names = {word for word in words if re.search(r"[a-z]_[a-z]|[a-z][A-Z]|^[A-Z]{4,}", word)}
    assert {name for name in names - words_of_sources() - EXAMPLES if not name.startswith("JAX_")} == set()


def test_the_map_of_modules_names_every_module():
    design = text_of("docs/design.md").partition(PLANNED)[0]
    modules = [Path(path) for path in sources() if not path.startswith(("tests/", "docs/")) and "__init__" not in path]
    assert [str(path) for path in modules if f"{path.name}`" not in design] == [], "its map of modules lacks them"


def test_python_that_is_shown_compiles():
    for page in GUIDES:
        for block in blocks(text_of(page), "python"):
            compile(block, page, "exec")


def test_targets_of_make_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = text_of(page)
        lines = [*shell_lines(text), *spans(text)]
        assert {found[1] for line in lines if (found := re.match(r"make ([a-z]+)", line))} <= targets, page


def test_the_readme_is_short_and_names_every_command_but_the_demo():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 150
    assert [name for name in cli.COMMANDS if f"trimask {name}" not in text] == []


def test_every_page_of_documentation_is_linked_from_the_readme():
    assert [page for page in PAGES[1:] if page not in HISTORY and f"({page})" not in text_of("README.md")] == []


def test_every_strategy_is_defined_in_the_documentation_with_its_flags():
    from trimask.diffusion.sampling.generation_config import strategy_parameters
    from trimask.diffusion.sampling.strategies import STRATEGIES

    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)", text_of("docs/sampling.md"), re.MULTILINE))
    assert [name for name in STRATEGIES if name not in rows] == [], "docs/sampling.md has no row of them"
    flags = {name: [f"`--{n.replace('_', '-')}`" for n in strategy_parameters(name)] for name in STRATEGIES}
    lacking = [(name, flag) for name, own in flags.items() for flag in own if flag not in rows[name]]
    assert lacking == [], "rows of docs/sampling.md that lack a flag"


def test_every_schedule_reward_and_flag_of_a_source_is_in_the_documentation():
    from trimask.diffusion.schedule import SCHEDULES
    from trimask.sampling_rl.reward import REWARDS
    from trimask.scripts.prepare import SOURCE_FLAGS

    tables = {
        "docs/training.md": SCHEDULES,
        "docs/policies.md": REWARDS,
        "docs/data.md": [f"--{name}" for name in SOURCE_FLAGS],
    }
    for page, names in tables.items():
        words = {word for span in spans(text_of(page)) for word in span.split()}
        assert [name for name in names if name not in words] == [], f"{page} does not name them"


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in text_of("CITATION.cff")
    assert re.findall(r"^## \[?([\d.]+)", text_of("CHANGELOG.md"), re.MULTILINE)[0] == version
