"""Which code makes a result: one digest over a run's function and all that it reaches.

Source counts as its syntax tree, so comments, docstrings and layout do not; and the tree is written in a form that is
the same in every version of Python that has the same syntax.
"""

import ast
import dataclasses
import dis
import functools
import hashlib
import linecache
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

from fsp.files import digest
from fsp.paths import PACKAGE

PLAIN = (NoneType, bool, int, float, complex, str, bytes, range, torch.dtype)
# Modules of fsp that change no result where another one imports them: figures, reports, bookkeeping.
BESIDE_IN_COMPENDIUM = ("plot", "report", "stats", "claims", "reproduce", "renew", "execute")
BESIDE = ("fsp.progress", "fsp.runs", *(f"fsp.compendium.{name}" for name in BESIDE_IN_COMPENDIUM))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
MADE_BY_PYTHON = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__"}
MADE_BY_PYTHON |= {"__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__", "_abc_impl"}


def run_code(function: Callable) -> str:
    """SHA-256 of the code that decides what a function returns.

    These count:

    * the function, and the functions, classes and constants (numbers, text, None, arrays, tensors, tables, and lists,
      tuples, sets and dicts of these) that it reaches by name, by closure or as arguments of a partial, wherever they
      are defined: in other cells of a notebook, in a script, in a module of one's own;
    * the modules of fsp that any of these name or import, and those that these import in turn, except `BESIDE` ones,
      which count only where the function itself uses something of them.

    What else is installed counts by name alone; `fsp.runs.provenance` has the versions.

    Returns
    -------
    str
        64 hexadecimal digits.

    Notes
    -----
    Constants count with the value they have now: a function that changes its own globals has another digest
    afterwards. Other objects, such as paths and generators, count by their class alone, and modules of one's own
    that are imported inside a function not at all: what decides a result belongs into the config. A function whose
    source cannot be had counts as its bytecode and constants, which differ between versions of Python.

    Examples
    --------
    >>> def one(config):
    ...     return {"y": config["x"]}
    >>> first = run_code(one)
    >>> def one(config):
    ...     '''A docstring.'''
    ...     return {"y": config["x"]}  # and a comment
    >>> run_code(one) == first
    True
    """
    reached = _Reached()
    described = reached.describe(function)
    return hashlib.sha256(repr([described, _with_imports(reached.modules)]).encode()).hexdigest()


class _Reached:
    """Objects that a function reaches, described by nested lists of text, and the names of the fsp modules."""

    def __init__(self):
        self.modules: set[str] = set()
        self._known: dict[int, tuple[int, object]] = {}  # functions, classes and instances: a number for each
        self._open: list[int] = []  # containers that are being described

    def describe(self, value: object, names: Iterable[str] = ()) -> object:
        """Describe a value; of a namespace or a module only what has one of these names."""
        if isinstance(value, PLAIN):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, list | tuple | set | frozenset | dict | SimpleNamespace | ModuleType):
            if id(value) in self._open:
                return "itself"
            self._open.append(id(value))
            described = self._container(value, sorted(names))
            self._open.pop()
            return described
        if isinstance(value, torch.Tensor | np.ndarray | pd.DataFrame | pd.Series):
            return [type(value).__name__, _content(value)]
        if id(value) in self._known:
            return f"object {self._known[id(value)][0]}"
        self._known[id(value)] = len(self._known), value  # alive, so that no other object gets its id
        if isinstance(value, functools.partial):
            return ["partial", *map(self.describe, (value.func, value.args, value.keywords))]
        if isinstance(value, MethodType):
            return ["method", self.describe(value.__func__), self.describe(value.__self__)]
        if isinstance(value, staticmethod | classmethod):
            return [type(value).__name__, self.describe(value.__func__)]
        if isinstance(value, property):
            return ["property", *map(self.describe, (value.fget, value.fset, value.fdel))]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        return self._instance(value)

    def _container(self, value: object, names: list[str]) -> list:
        if isinstance(value, dict):
            return ["dict", *([self.describe(name), self.describe(item)] for name, item in value.items())]
        if isinstance(value, set | frozenset):
            return ["set", *sorted(repr(self.describe(item)) for item in value)]
        if isinstance(value, list | tuple):
            return [type(value).__name__, *map(self.describe, value)]
        found = {name: vars(value)[name] for name in names if name in vars(value)}
        if isinstance(value, ModuleType):
            if _is_fsp(value.__name__):
                if not _is_beside(value.__name__):
                    self.modules.add(value.__name__)
                # its own source has the constants
                kinds = ModuleType | FunctionType | type
                found = {name: item for name, item in found.items() if isinstance(item, kinds)}
            elif _is_installed(value.__name__):
                found = {}
        return [type(value).__name__, *([name, self.describe(item, names)] for name, item in found.items())]

    def _function(self, function: FunctionType) -> object:
        name, code = f"{function.__module__}.{function.__qualname__}", function.__code__
        if _is_fsp(function.__module__) and not code.co_filename.startswith("<"):  # as in an example of a docstring
            self.modules.add(function.__module__)
            return name
        wrapped = self.describe(vars(function).get("__wrapped__"))
        if _is_installed_file(code.co_filename):
            return [name, wrapped]
        names = {name for part in _parts(code) for name in part.co_names}
        for imported in filter(_is_fsp, names):  # in its body: import fsp.a, from fsp import a
            self.modules |= {found for name in names if (found := _module_of(f"{imported}.{name}")) != "fsp"}
        steps = [step for part in _parts(code) for step in dis.get_instructions(part)]
        loaded = sorted({step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")})
        values = {name: function.__globals__[name] for name in loaded if name in function.__globals__}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # it has no value yet
                values[name] = cell.cell_contents
        reached = [[name, self.describe(value, names)] for name, value in values.items()]
        defaults = [self.describe(value) for value in (function.__defaults__, function.__kwdefaults__)]
        return [_source(code, function.__doc__), reached, defaults, wrapped]

    def _class(self, kind: type) -> object:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if _is_fsp(kind.__module__):
            self.modules.add(kind.__module__)
            return name
        if _is_installed(kind.__module__):
            return name
        members = {name: value for name, value in vars(kind).items() if name not in MADE_BY_PYTHON}
        if dataclasses.is_dataclass(kind) or issubclass(kind, tuple):  # methods that nobody wrote, from the fields
            members = {name: value for name, value in members.items() if not _is_generated(value)}
        bases = [self.describe(base) for base in kind.__bases__]
        return [kind.__name__, bases, *([name, self.describe(value)] for name, value in members.items())]

    def _instance(self, value: object) -> list:
        kind, own = type(value), getattr(value, "__dict__", {})
        described = [self.describe(kind), str(getattr(value, "__name__", ""))]
        if _is_installed(kind.__module__) and not _is_fsp(kind.__module__):
            return [*described, self.describe(own.get("__wrapped__"))]  # by functools.cache, for one
        return [*described, self.describe(dict(own))]


def _content(value: torch.Tensor | np.ndarray | pd.DataFrame | pd.Series) -> str:
    """What an array or a table holds, as text or as a digest."""
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and value.device.type != "meta"
        return digest({"": value}) if plain else ""
    if isinstance(value, np.ndarray):
        held = repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
        return f"{value.dtype} {value.shape} {hashlib.sha256(held).hexdigest()}"
    return value.to_csv()


def _parts(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of the functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


# ---- where something comes from ----------------------------------------------------------------------------------


def _is_fsp(module: str | None) -> bool:
    return module is not None and (module == "fsp" or module.startswith("fsp."))


def _is_beside(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in BESIDE)


def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to a package, and not to whoever runs the sweep."""
    if module in (None, "__main__"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return module in sys.builtin_module_names if file is None else _is_installed_file(file)


def _is_installed_file(file: str) -> bool:
    return file.startswith((sysconfig.get_path("stdlib"), "<frozen ")) or bool(
        {"site-packages", "dist-packages"}.intersection(Path(file).parts)
    )


def _is_generated(value: object) -> bool:
    return isinstance(value, FunctionType) and value.__code__.co_filename.startswith("<string>")


# ---- source ------------------------------------------------------------------------------------------------------


def _source(code: CodeType, docstring: str | None) -> object:
    """Syntax tree of a function as text; its bytecode and constants if the source cannot be had."""
    nodes = _definitions("".join(linecache.getlines(code.co_filename)))
    # several lambdas in a line cannot be told apart: all count
    return nodes.get((code.co_name, code.co_firstlineno)) or _bytecode(code, docstring)


def _bytecode(code: CodeType, docstring: str | None = None) -> list:
    constants: list[object] = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constants.append(_bytecode(constant))
        elif isinstance(constant, frozenset):
            constants.append(sorted(map(repr, constant)))
        elif docstring is None or constant != docstring:
            constants.append(repr(constant))
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants]


@functools.lru_cache(maxsize=256)
def _definitions(source: str) -> dict[tuple[str, int], list[str]]:
    """Functions in a source text, by name and first line."""
    found: dict[tuple[str, int], list[str]] = {}
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            found.setdefault(("<lambda>", node.lineno), []).append(_outline(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.setdefault((node.name, first), []).append(_outline(node))
    return found


def _outline(node: object) -> str:
    """A syntax tree as text without docstrings."""
    if isinstance(node, list):
        return f"[{' '.join(map(_outline, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    said = [type(node).__name__]
    for name in node._fields:
        value: Any = getattr(node, name, None)
        if name == "body" and isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node, clean=False):
            value = value[1:]
        if value is not None and value != [] and name != "ctx":  # the syntax says whether a name is read or written
            said.append(f"{name}={_outline(value)}")
    return f"({' '.join(said)})"


# ---- modules of fsp ----------------------------------------------------------------------------------------------


def _with_imports(modules: set[str]) -> list[tuple[str, str]]:
    """Modules and all that they import, with a digest of each."""
    found, waiting = {}, sorted(modules)
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in found or file is None:
            continue
        found[name], imported = _module(file)
        waiting += [other for other in map(_module_of, imported) if not _is_beside(other)]
    return sorted(found.items())


@functools.cache
def _module(file: Path) -> tuple[str, list[str]]:
    """SHA-256 of the syntax tree of a file, and what it imports from fsp; read once, as Python does."""
    tree = ast.parse(file.read_bytes())
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
    return hashlib.sha256(_outline(tree).encode()).hexdigest(), sorted(filter(_is_fsp, imported))


def _module_of(dotted: str) -> str:
    """The module that a dotted name is, or is defined in."""
    while _file_of(dotted) is None:
        dotted = dotted.rpartition(".")[0]
    return dotted


def _file_of(module: str) -> Path | None:
    """Source file of a module of fsp."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
