"""Find the function that a user names as ``file.py:function`` or ``module:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from clipq.errors import ClipqError
from clipq.suggest import nearest


def load_function(spec: str, what: str, error: type[ClipqError]) -> Callable[..., Any]:
    """Import the file or module and give back the function.

    A file is run as Python runs a script: its own folder comes first on ``sys.path``, so that it can import its
    neighbours.

    Args:
        spec: ``path/to/file.py:function`` or ``package.module:function``.
        what: what the function is for, in an error; such as "data".
        error: the class of error to raise.

    Raises:
        error: the spec has another form, the file or module cannot be imported, or it has no such function.
    """
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise error(f"{what} {spec!r} is not of the form 'file.py:function' or 'module:function'")
    module = _import_file(Path(source), spec, what, error) if source.endswith(".py") else None
    if module is None:
        try:
            module = importlib.import_module(source)
        except Exception as cause:
            raise error(
                f"{what} {spec!r}: importing module {source!r} raised {type(cause).__name__}: {cause}. "
                "Name a module that Python finds, or a file as 'file.py:function'"
            ) from cause
    function = getattr(module, name, None)
    if not callable(function):
        found = "has no" if function is None else f"has a {type(function).__name__}, not a function, named"
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(f"{what} {spec!r}: {source} {found} {name!r}{nearest(name, callables)}")
    found_function: Callable[..., Any] = function
    return found_function


def _import_file(path: Path, spec: str, what: str, error: type[ClipqError]) -> ModuleType:
    path = path.absolute()
    # The name is our own so that a file called random.py does not hide the module of that name.
    name = f"_clipq_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None or not path.is_file():
        raise error(
            f"{what} {spec!r}: there is no file {path}; give a path relative to the current folder, or a full one"
        )
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # pickling and dataclasses look the module up by its name
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as cause:
        del sys.modules[name]
        raise error(f"{what} {spec!r}: running {path} raised {type(cause).__name__}: {cause}") from cause
    return module
