"""The pages: their links lead somewhere, and the reference of the book has every file of the package."""

import ast
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from fsp.paths import PACKAGE

ROOT = PACKAGE.parent
KINDS = ("*.md", "docs/*.md", "data/*.md", "data/results/*.md", "notebooks/*.ipynb")
PAGES = sorted(path for kind in KINDS for path in ROOT.glob(kind))
REFERENCE = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.rst"))}
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def prose(path: Path) -> str:
    """The Markdown of a page or a notebook, without its code."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What a fragment may name on a page: its headings as code hosts write them, and its own anchors."""
    found = set(re.findall(r'<a id="([^"]+)">', path.read_text("utf-8")))
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-"))
    return found


def broken(path: Path) -> list[str]:
    """Links of a page, relative ones, that lead nowhere."""
    links = re.findall(r"\]\(([^()\s]+)\)", prose(path))
    lost = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        place, _, fragment = unquote(link).partition("#")
        target = (path.parent / place).resolve() if place else path
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (fragment and fragment not in anchors(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_and_anchor_leads_somewhere(path):
    assert broken(path) == []


def test_every_page_is_in_the_contents_of_the_book():
    """Sphinx warns of one that is not, and then `make book` fails."""
    contents = re.findall(r"^(?:.*<)?([\w/]+)>?$", (ROOT / "docs" / "conf.py").read_text("utf-8"), re.MULTILINE)
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES if path.suffix == ".md"}
    assert pages - {"README"} - {*contents} == set()


def test_a_link_that_leads_nowhere_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text('# A title: 1 + 1\n\n<a id="d1"></a>\n\n```\n# no heading\n```\n', "utf-8")
    good = "[a](other.md#a-title-1--1) [b](other.md#d1) [c](other.md) [d](https://nowhere.example) `[e](code.md)`"
    page.write_text(f"# Here\n\n{good} [f](#here) [g](gone.md) [h](other.md#no-heading) [i](../outside.md)", "utf-8")
    assert broken(page) == ["gone.md", "other.md#no-heading", "../outside.md"]


def test_the_reference_has_every_file_of_the_package_once():
    named = re.findall(r"^\.\. automodule:: (\S+)$", "\n".join(REFERENCE.values()), re.MULTILINE)
    files = [path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem != "__main__"]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in files]
    assert sorted(named) == sorted(modules)


@pytest.mark.parametrize("wing", WINGS)
def test_a_page_of_the_reference_lists_what_its_wing_offers(wing):
    tree = ast.parse((PACKAGE / wing / "__init__.py").read_text("utf-8"))
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    imports = [
        node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith(f"fsp.{wing}.")
    ]
    offered = {alias.name for node in imports for alias in node.names} | own
    _, _, table = REFERENCE[wing].partition("   :nosignatures:\n\n")
    listed = re.match(r"(?:   \w+\n)*", table)[0].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in offered if not name.isupper() and name != "Masks"}  # but for constants


def test_the_book_carries_its_mathjax_with_the_licence():
    folder = ROOT / "docs" / "_static" / "mathjax"
    configured = re.search(r'^mathjax_path = "(.+)"', (ROOT / "docs" / "conf.py").read_text("utf-8"), re.MULTILINE)[1]
    assert (folder.parent / configured).stat().st_size < 2.5e6
    assert "Apache License" in (folder / "LICENSE").read_text("utf-8")
