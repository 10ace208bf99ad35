"""The house is in order: nothing public is unused, words have one meaning, decisions are explained."""

import ast
import io
import json
import re
import tokenize

from fsp.paths import PACKAGE

ROOT = PACKAGE.parent
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
NOTEBOOKS = {path.name: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
CELLS = {
    f"{name}, cell {number}": "".join(cell["source"])
    for name, notebook in NOTEBOOKS.items()
    for number, cell in enumerate(notebook["cells"])
    if cell["cell_type"] == "code"
}
PAGES = "\n".join(path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


def names_used(source: str) -> set[str]:
    """Names that code uses; those that it imports, defines by def or class, or mentions in text do not count."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            used.add(node.id)
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            used |= set(re.findall(r"\w+", annotation.value))
    return used


def public_functions(source: str) -> set[str]:
    """Public functions and classes at the top level of a module."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")}


def test_the_reader_of_names_tells_use_from_mention():
    source = (
        'from a import imported\ndef defined(x: "Quoted"):\n    """mentioned"""\n    return used(other.attribute)\n'
    )
    assert names_used(source) == {"Quoted", "used", "other", "attribute"}
    assert public_functions(source + "def _private(): ...\nclass Kind: ...\n") == {"defined", "Kind"}


def test_every_public_function_is_used_by_the_package_a_notebook_or_a_page():
    used = set().union(*map(names_used, [*SOURCES.values(), *CELLS.values()]), re.findall(r"\w+", PAGES))
    unused = {file: sorted(public_functions(source) - used) for file, source in SOURCES.items()}
    assert {file: names for file, names in unused.items() if names} == {}


def test_no_identifier_says_sparsity_and_no_code_looks_into_its_own_namespace():
    offending = {}
    for place, code in (SOURCES | CELLS).items():
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        names = {token.string for token in tokens if token.type == tokenize.NAME}
        offending[place] = [name for name in names if "sparsity" in name.lower() or name in ("globals", "locals")]
    assert {place: names for place, names in offending.items() if names} == {}


def test_every_decision_that_code_or_text_names_is_explained():
    explained = set(re.findall(r"^#+ (D\d+)\b", (ROOT / "docs" / "decisions.md").read_text("utf-8"), re.MULTILINE))
    texts = SOURCES | {"README.md": PAGES}
    texts |= {name: "\n".join("".join(c["source"]) for c in nb["cells"]) for name, nb in NOTEBOOKS.items()}
    named = {place: set(re.findall(r"(?<=[(\s])D\d+(?=[),;:.\s])", text)) for place, text in texts.items()}
    assert len(set().union(*named.values())) > 20
    assert {place: sorted(found - explained) for place, found in named.items() if found - explained} == {}
