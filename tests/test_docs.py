"""The docs say what is, and the code keeps the order that they draw."""

import ast
import contextlib
import re
import shlex
from pathlib import Path

import pytest

from boomgen import cli, manifest
from boomgen.errors import UsageError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "boomgen"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def commands() -> list[str]:
    """Every boomgen command line in the docs' code blocks and backticks."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`(boomgen [^`\n]+)`", text)
        lines = [line.strip() for block in blocks for line in block.splitlines()]
        found += [line for line in lines if line.startswith("boomgen ")]
    return found


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_docs_is_one_that_boomgen_understands(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    try:
        with contextlib.suppress(SystemExit):  # of --help; a mistake is a UsageError
            cli._parser().parse_args(arguments)
    except UsageError as err:
        pytest.fail(f"{line}: {err}")


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_format_page_lists_the_manifest_as_it_is() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert listed == [(name, str(kind), meaning) for name, kind, meaning in manifest.COLUMNS]
    for column in manifest.LINK_COLUMNS:
        assert f"`{column}`" in text.split("`--linkage none` drops")[1]


def rooms() -> list[str]:
    """The modules from left to right, as the architecture page lists them."""
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("| room |")[1].split("\n\n")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    return [name.rstrip("/") for cell in cells for name in re.findall(r"`([\w/]+)`", cell)]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a module imports anywhere, or only for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "boomgen":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_no_file_is_long() -> None:
    written = [path for kind in ("py", "c", "md", "yaml", "toml") for path in ROOT.rglob(f"*.{kind}")]
    written = [path for path in written if not {".venv", ".git", "runs"} & set(path.relative_to(ROOT).parts)]
    assert len(written) > 100
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in written
    }
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_knows_one_to_its_right(path: Path) -> None:
    order = rooms()
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in order, f"{room} is not on the architecture page"
    right = {other for other in imported(path) if order.index(other) > order.index(room)}
    assert right == set()
