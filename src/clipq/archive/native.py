"""The archive's kernels as machine code for this processor, made by LLVM and kept for the next process.

The package ships them in LLVM's assembly language (see `clipq.archive.precompile`), so that neither Numba nor a
compiler is needed to read or write a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

ENTRY = "run"


@functools.cache
def address(name: str) -> int:
    """Where the machine code of a kernel is in this process; its one function is called as Numba's are."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly("", llvm.create_context()), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(_machine_code(name)))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(ENTRY)
    return address


_engines: list[Any] = []  # their memory is that of the machine code


@functools.cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(), opt=3, reloc="default", codemodel="jitdefault", jit=True
    )


def _features() -> str:
    try:
        features: str = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know on this platform
        return ""
    return features


def _machine_code(name: str) -> bytes:
    """An object file with the kernel; a kept one if there is, that is whole and for this processor."""
    source = resources.files("clipq.archive").joinpath("kernels", f"{name}.ll").read_text()
    made_for = [llvmlite.__version__, llvm.get_process_triple(), llvm.get_host_cpu_name(), _features(), source]
    key = hashlib.sha256("\n".join(made_for).encode()).hexdigest()[:16]
    for folder in _folders():
        with contextlib.suppress(OSError):
            content = (folder / f"{name}-{key}.o").read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                return content[32:]
    code = _compile(source)
    for folder in _folders():
        with contextlib.suppress(OSError):
            _keep(folder / f"{name}-{key}.o", hashlib.sha256(code).digest() + code)
            break
    return code


def _compile(source: str) -> bytes:
    module, machine = llvm.parse_assembly(source, llvm.create_context()), _machine()
    module.triple, module.data_layout = llvm.get_process_triple(), str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    with llvm.create_pass_builder(machine, options) as builder:
        builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


def _folders() -> Iterator[Path]:
    """Where machine code is kept: where Numba was told to, else beside the package, else with the user's caches."""
    if "NUMBA_CACHE_DIR" in os.environ:
        yield Path(os.environ["NUMBA_CACHE_DIR"])
        return
    yield Path(__file__).parent / "__pycache__"
    import pooch  # takes a while, and is rarely needed

    yield Path(pooch.os_cache("clipq"))


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
