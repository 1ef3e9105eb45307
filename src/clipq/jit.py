"""Functions compiled by Numba, and kept on disk for the next process where there is a place to keep them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """The function, compiled on its first call, or taken from what an earlier process kept.

    Numba raises where nothing can be kept (a read-only installation, a full disk); here the code is compiled anew in
    every process then, with one warning if a folder was there to be written to.

    Args:
        options: further ones of ``numba.njit``.
    """
    dispatcher: Any = njit(nogil=True, **options)(function)
    with contextlib.suppress(RuntimeError):  # no folder that could be written to
        dispatcher._cache = _Kept(function)  # type: ignore[no-untyped-call]
    made: Function = dispatcher
    return made


def compiled_ahead(function: Function) -> Function:
    """Mark a kernel that the package ships compiled, or a part of one: it may not allocate.

    See `clipq.archive.precompile`.
    """
    options: Any = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    made: Function = njit(nogil=True, error_model="numpy", **options)(function)
    return made


class _Kept(FunctionCache):
    warned = False

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            if not _Kept.warned:
                _Kept.warned = True
                warnings.warn(
                    f"compiled code cannot be kept in {self.cache_path} ({error}), so that each process compiles anew; "
                    f"free space there, or set NUMBA_CACHE_DIR to another folder",
                    stacklevel=2,
                )
