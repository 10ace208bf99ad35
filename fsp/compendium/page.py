"""Pages of HTML that need no other page, for reading a reproduction in a browser: the report, and its notebooks."""

import base64
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

import pandas as pd
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from nbconvert import HTMLExporter

from fsp.compendium import execute
from fsp.compendium.claims import VERDICTS, measured
from fsp.files import replacing
from fsp.paths import PACKAGE

TEMPLATES = PACKAGE / "compendium" / "templates"
MATHJAX = PACKAGE.parent / "docs" / "_static" / "mathjax"  # the book's; without it formulas are shown as LaTeX
OUTSIDE = re.compile(r"[a-z][a-z+.-]*:|//|#|$", re.IGNORECASE)  # of links: not to a file
CLAIM_HEAD = {"claim": "Claim", "found": "Measured [interval]", "n": "n", "bound": "Bound"}
CLAIM_HEAD |= {"holds": "Holds", "published": "Published", "source": "Paper", "note": "Note"}


def write(out: Path, facts: dict, claims: pd.DataFrame) -> None:
    """Write ``report.html`` and, beside each executed notebook, a page of it.

    Parameters
    ----------
    out : path
        Folder of the reproduction.
    facts : dict
        What `fsp.compendium.report.write` has gathered, for the template ``report.html``.
    claims : pandas.DataFrame
        Of all notebooks, from `fsp.compendium.claims.read_claims`.
    """
    folder = out / "notebooks"
    stems = [o.stem for o in facts["outcomes"] if o.status != "gated" and (folder / f"{o.stem}.ipynb").exists()]
    if stems and MATHJAX.is_dir():
        shutil.copytree(MATHJAX, folder / "mathjax", dirs_exist_ok=True)
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    written = {stem for stem in stems if _write_notebook(folder / f"{stem}.ipynb", stems, exporter)}
    notebooks = []
    for outcome in sorted(facts["outcomes"], key=lambda outcome: outcome.stem):
        own = claims[claims.notebook == outcome.stem]
        counts = own.holds.value_counts()
        notebooks.append(
            {
                "stem": outcome.stem,
                "heading": execute.heading(outcome.source),
                "outcome": outcome,
                "figure": _figure(out / "figures", outcome.stem) if len(own) else "",
                "counts": ", ".join(f"{counts[word]} {word}" for word in VERDICTS if word in counts),
                "claims": _claims_table(own) if len(own) else "",
                "read": outcome.stem in written,
            }
        )
    text = _rendered("report.html", **facts, notebooks=notebooks)
    with replacing(out / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_notebook(executed: Path, stems: Collection[str], exporter: HTMLExporter) -> bool:
    """Write an executed notebook as a page beside it; False if it is no whole notebook, as one that was killed."""
    try:
        notebook = execute.read(executed)
    except ValueError:
        return False
    body = BeautifulSoup(exporter.from_notebook_node(notebook)[0], "html.parser")
    for image in body.find_all("img", alt=re.compile("^No description")):
        image["alt"] = "Figure"
    for image in body.find_all("img", src=re.compile(r"^\.\./figures/")):
        image["src"] = _embedded(executed.parent / image["src"])
        if not image["src"]:  # this run has not drawn it
            image.decompose()
    for tag in body.find_all(href=True):
        target = _target(tag["href"], executed, stems)
        if target is None:
            tag.unwrap()
        else:
            tag["href"] = target
    for style in body.find_all("style"):  # of every table by pandas the same one; ours is in style.css
        style.decompose()
    mathjax = (executed.parent / "mathjax").is_dir()
    page = _rendered("notebook.html", title=executed.stem, body=Markup(body), mathjax=mathjax)
    with replacing(executed.with_suffix(".html")) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return True


def _target(link: str, executed: Path, stems: Collection[str]) -> str | None:
    """Where a link of a notebook leads from its page: to another page, to a file of the repository, or nowhere."""
    if OUTSIDE.match(link):
        return link
    path, mark, anchor = link.partition("#")
    if Path(path).stem in stems and path.endswith(".ipynb"):
        return f"{Path(path).stem}.html{mark}{anchor}"
    file = (PACKAGE.parent / "notebooks" / path).resolve()
    if path.endswith(".ipynb") or not file.exists():
        return None
    return Path(os.path.relpath(file, executed.parent.resolve())).as_posix() + mark + anchor


def _figure(folder: Path, stem: str) -> str:
    """A notebook's first figure as the text of a data URI; "" if it has none."""
    drawn = sorted(folder.glob(f"{stem}*.png"), key=lambda path: path.stem)
    return _embedded(drawn[0]) if drawn else ""


def _embedded(image: Path) -> str:
    """An image as the text of a data URI; "" if it is not there."""
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode() if image.exists() else ""


def _claims_table(claims: pd.DataFrame) -> Markup:
    """Claims of one notebook as a table."""
    rows = claims.to_dict("records")
    more = {"found": [measured(row) for row in rows], "source": (claims.paper + " " + claims.section).str.strip()}
    table = claims.assign(**more)[list(CLAIM_HEAD)].rename(columns=CLAIM_HEAD)
    with pd.option_context("display.max_colwidth", None):  # else sentences are cut
        return Markup(table.to_html(index=False, border=0, float_format="{:g}".format))


def _code(text: str) -> Markup:
    """Text in which what stands between two backticks is code; all else is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _rendered(name: str, **content: object) -> str:
    """A template with the style sheet and with content, which is escaped unless it is Markup."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(name).render(style=style, **content)
