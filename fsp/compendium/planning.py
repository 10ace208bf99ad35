"""Which runs a notebook asks for, without doing one, and without its data set.

Of a notebook the statements are executed that make the configs of its sweeps, and no others; the sweep notes down what
it is given.
"""

import ast
import builtins
import io
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from types import SimpleNamespace

import pandas as pd

from fsp import paths
from fsp.compendium import execute, study

CHANGING = ("append", "extend", "update", "add")  # methods that change a list, a dict or a set


def planned(stem: str, load: Callable, **parameters: object) -> list[tuple[Callable, dict]]:
    """Function and config of every run that a notebook would do, without doing one.

    Parameters
    ----------
    stem : str
        Name of the notebook.
    load : callable
        In place of `fsp.data.load`, for notebooks whose configs depend on the shape of the data.
    **parameters
        In place of its defaults, such as those of a profile; they are not checked.

    Returns
    -------
    list of (callable, dict)

    Raises
    ------
    ValueError
        If the notebook has no sweep.
    """
    cells = [cell for cell in execute.read(paths.NOTEBOOKS / f"{stem}.ipynb").cells if cell.cell_type == "code"]
    [head] = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    statements = [statement for cell in cells for statement in ast.parse(cell.source).body]
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    found: list[tuple[Callable, dict]] = []

    def note(function: Callable, configs: list[dict], *_: object, **__: object) -> pd.DataFrame:
        found.extend((function, config) for config in configs)
        return pd.DataFrame({"key": []})

    names: dict[str, object] = {"__name__": stem}
    exec(head, names)
    given = {name: value for name, value in names.items() if not name.startswith("__")} | parameters
    _execute(imports, names)
    provided = {
        "given": SimpleNamespace(**given | {"device": "cpu"}),
        "study": SimpleNamespace(**vars(study) | {"sweep": note}),
        "load": load,
    }
    names |= provided
    with redirect_stdout(io.StringIO()):  # a worked example may be among them
        _execute(_leading_to_sweeps([s for s in statements if s not in imports], provided.keys()), names)
    if not found:
        raise ValueError(f"{stem} has no statement that calls study.sweep: nothing is planned there")
    return found


def _execute(statements: list[ast.stmt], names: dict[str, object]) -> None:
    """Execute statements of a notebook in a namespace."""
    exec(compile(ast.Module(statements, []), names["__name__"], "exec"), names)


def _leading_to_sweeps(statements: list[ast.stmt], provided: Collection[str]) -> list[ast.stmt]:
    """The statements that sweep, and those that make what they need."""
    functions = {s.name for s in statements if isinstance(s, ast.FunctionDef) and _sweeps(s, set())}
    sweeping = [s for s in statements if not isinstance(s, ast.FunctionDef) and _sweeps(s, functions)]
    until = statements[: statements.index(sweeping[-1]) + 1] if sweeping else []
    of_functions: set[str] = set()  # what functions need may be made after them
    while True:
        needed, chosen = set(of_functions), []
        for statement in reversed(until):
            made = _made_by(statement)
            if statement in sweeping or made & needed:
                chosen.append(statement)
                if isinstance(statement, ast.Assign | ast.AnnAssign | ast.FunctionDef):
                    needed -= made  # what these names were before does not matter
                needed |= _read_by(statement) - set(provided)
        defined = [statement for statement in chosen if isinstance(statement, ast.FunctionDef | ast.ClassDef)]
        found = set().union(*map(_read_by, defined)) - set(provided)
        if found <= of_functions:
            return chosen[::-1]
        of_functions |= found


def _sweeps(statement: ast.stmt, functions: set[str]) -> bool:
    """Whether a statement has a call of study.sweep, or of one of these functions."""
    called = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(ast.unparse(function) in {"study.sweep", *functions} for function in called)


def _made_by(statement: ast.stmt) -> set[str]:
    """Names that a statement binds or changes."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found |= _names(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            found |= _names(node.func.value)
    return found


def _read_by(statement: ast.stmt) -> set[str]:
    """Names that a statement needs from before; of functions and loops without those that are set inside."""
    parts = [statement]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr):
        parts = [node for node in ast.walk(statement) if isinstance(node, ast.comprehension | ast.Lambda)]
    inside = [node for part in parts for node in ast.walk(part)]
    own = {node.arg for node in inside if isinstance(node, ast.arg)}
    own |= {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    added_to = {name for node in inside if isinstance(node, ast.AugAssign) for name in _names(node.target)}
    return _names(statement) - (own - added_to) - set(vars(builtins))


def _names(node: ast.AST) -> set[str]:
    """All names in a piece of code."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
