"""What the pages say exists: commands compose, files and names are there, links lead somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from qat.compose import compose_plain
from qat.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "recipes").glob("*"))
TEXT = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
EVERYTHING = "\n".join(TEXT.values())
COMMANDS = sorted(set(re.findall(r"python train\.py ([^`\n]*recipe=\w[^`\n]*)", EVERYTHING)))
ROW = re.compile(r"^\| [^|]* \| (`[^|]*) \| ([^|]*) \|$", re.MULTILINE)
ARCHITECTURE = ROW.findall(TEXT["docs/architecture.md"])


def names_in(folder: Path, words: str) -> set[str]:
    """Top-level names and methods of the files that a cell of the table names."""
    found: set[str] = set()
    place = folder
    for word in re.findall(r"`([^`]+)`", words):
        path = folder / word if "/" in word else place / word
        place = path.parent if path.is_file() else path
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            assert file.is_file(), file
            found |= {n.name for n in ast.walk(ast.parse(file.read_text())) if hasattr(n, "name")}  # pyright: ignore[reportAttributeAccessIssue]
            found |= set(re.findall(r"^([A-Z]\w+)\b.* = ", file.read_text(), re.M))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    words = command.replace("package.module.Class", "torchvision.models.ResNet")
    overrides = [o for o in shlex.split(words) if o != "--multirun"]
    config = compose_plain([o if set("{[") & set(o) else o.split(",")[0] for o in overrides])
    assert config["name"] == config["name"].strip() != "run"


def test_there_are_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize(("files", "names"), ARCHITECTURE)
def test_architecture_names_what_is_there(files, names):
    known = names_in(ROOT, files)
    assert known, files
    assert set(re.findall(r"`(\w+)`", names)) <= known


@pytest.mark.parametrize("page", [p for p in TEXT if p.endswith(".md")])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", TEXT)
def test_scripts_that_are_named_exist(page):
    for script in re.findall(r"python (scripts/\w+\.py)", TEXT[page]):
        assert (ROOT / script).is_file(), script


def test_the_table_of_quantizers_has_each_with_what_can_be_deployed():
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| (\w+) \| [^|]*\|$", TEXT["docs/quantizers.md"], re.MULTILINE
    )
    assert dict(rows) == {word: kind.deployable.value for word, kind in QUANTIZERS.items()}
    assert len(rows) == len(QUANTIZERS)
    assert {p.stem for p in (ROOT / "conf" / "quantizer").glob("*.yaml")} | {"dynamic_tensor"} == (
        QUANTIZERS.keys()
    )


SECURITY = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT["docs/security.md"].splitlines()
    if line.startswith("| ") and "`tests/" in line
]


@pytest.mark.parametrize("row", SECURITY, ids=lambda row: row[0])
def test_each_row_of_the_security_page_has_tests(row):
    *_, tests = row
    files = re.findall(r"`(tests/[\w/]+\.py)`", tests)
    assert len(row) == 4
    assert files
    for file in files:
        assert "\ndef test_" in (ROOT / file).read_text(encoding="utf-8"), file


def test_the_security_page_has_all_its_rows():
    assert len(SECURITY) == 14
