"""The book: `make book`. Its pages are the repository's own files where they lie, so that links hold in both."""

import hashlib
import importlib
import re
import sys
from pathlib import Path

from sphinx import addnodes

import fsp

ROOT = Path(__file__).resolve().parents[1]  # also Sphinx's source folder
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))

project = "fsp"
author = "The fsp developers"
copyright = "The fsp developers, MIT licence"
version = release = fsp.__version__
html_title = "The full-spectrum pruning compendium"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
extensions += ["numpydoc", "myst_nb"]
root_doc = "README"
include_patterns = ["README.md", "REPRODUCING.md", "CONTRIBUTING.md", "CHANGELOG.md"]
include_patterns += ["docs/*.md", "docs/api/*.rst", "data/*.md", "data/results/*.md", "notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "reproduced", "scratch", "data/raw", "data/runs", "fsp", "tests", "figures"]
exclude_patterns += ["data/results/gpu.md"]  # of one machine

nb_execution_mode = "off"  # what is shown is what is committed
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autosummary_generate = False  # its tables are used, not its pages
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's sections say the types
add_module_names = False
default_role = "py:obj"  # `imdb` in a docstring is a link where it names something
numpydoc_show_class_members = False
smartquotes = False  # quotes in docstrings are to be typed
suppress_warnings = ["ref.citation"]  # a reference that no sentence numbers
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["_static"]
html_extra_path = ["_extra"]  # index.html, which leads to README.html
html_css_files = ["book.css"]
html_copy_source = False
mathjax_path = "mathjax/tex-svg.js"  # a copy, with its licence: the book needs no network
mathjax3_config = {"options": {"enableMenu": False}}

CONTENTS = """
```{{toctree}}
:hidden:
:caption: Results

Answers <data/results/README>
docs/claims
REPRODUCING
```

```{{toctree}}
:hidden:
:caption: Notebooks

{notebooks}
```

```{{toctree}}
:hidden:
:caption: Reference

docs/api/index
docs/cluster
docs/decisions
data/README
data/results/faults
data/results/cluster
data/results/planted
```

```{{toctree}}
:hidden:
:caption: Project

CONTRIBUTING
CHANGELOG
```
"""


def adapt(app, docname: str, source: list[str]) -> None:
    """Put the table of contents below the README, and read anchors written in HTML as those of MyST."""
    if docname == root_doc:
        lines = [f"{stem[:2]} {stem[3:].replace('_', ' ')} <notebooks/{stem}>" for stem in NOTEBOOKS]
        source[0] += CONTENTS.format(notebooks="\n".join(lines))
    source[0] = re.sub(r'^<a id="([a-z]\d+)"></a>$', r"(\1)=", source[0], flags=re.MULTILINE)


def where_defined(app, env, node, contnode):
    """The page of a name that a wing imports from one of its files, such as `fsp.spectrum.imdb`."""
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.get_domain("py")
    inside = node.get("py:module") or "fsp"
    outer = [".".join(inside.split(".")[:depth]) for depth in range(inside.count(".") + 1, 0, -1)]
    for module, _, name in [target.rpartition("."), *((f"{place}.{target}").rpartition(".") for place in outer)]:
        if module.partition(".")[0] != "fsp":
            continue
        try:
            found = getattr(importlib.import_module(module), name)
            full = f"{found.__module__}.{found.__qualname__}"
        except (ImportError, AttributeError, ValueError):
            continue
        if full in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, contnode)
    return None


def modules(app, doctree) -> None:
    """Let a link to a Python file of the package lead to its page rather than download it."""
    for node in list(doctree.findall(addnodes.download_reference)):
        target = (Path(app.env.doc2path(app.env.docname)).parent / node["reftarget"]).resolve()
        if target.suffix == ".py" and target.is_relative_to(ROOT / "fsp"):
            name = ".".join(target.relative_to(ROOT).with_suffix("").parts)
            ours = {"refdomain": "py", "reftype": "mod", "reftarget": name, "refdoc": app.env.docname}
            node.replace_self(addnodes.pending_xref("", *node.children, refexplicit=True, **ours))


def link(app, what, name, obj, options, lines: list[str]) -> None:
    """In a docstring: (D7) is a link, and [1] without references of its own means those of its file, or of its wing."""
    if what == "module":
        text = re.sub(r"^References\n-+$", ".. rubric:: References\n", "\n".join(lines), flags=re.MULTILINE)
        lines[:] = text.split("\n")
    lines[:] = [re.sub(r"(?<=[( ])D(\d+)(?=[),;:. ])", r":ref:`D\1 <d\1>`", line) for line in lines]
    module = name
    while module not in sys.modules or not re.search(r"^\.\. \[1\]", sys.modules[module].__doc__ or "", re.MULTILINE):
        if "." not in module:
            return
        module = module.rpartition(".")[0]
    mark = "R" + hashlib.sha256(module.encode()).hexdigest()[:12]  # as numpydoc names them
    lines[:] = [re.sub(r"\[(\d)\]_", rf"[{mark}-\1]_", line) for line in lines]


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", adapt)
    app.connect("autodoc-process-docstring", link, priority=900)  # after numpydoc
    app.connect("doctree-read", modules, priority=400)  # before files to download are collected
    app.connect("missing-reference", where_defined)
