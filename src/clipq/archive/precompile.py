"""Compile the archive's kernels to LLVM's assembly language, which the package ships: ``make kernels``.

Numba takes seconds to make machine code of Python, nearly all of it for types and lowering, and merely importing it
takes a third of one. What it makes is the same on every 64-bit little-endian machine until LLVM optimises it for one.
So it is made here, once, and `clipq.archive.native` leaves the rest to LLVM. What newer LLVMs only would understand is
left out: hints, all of them.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from clipq.archive.native import ENTRY

KERNELS = Path(__file__).parent / "kernels"
_HINTS = r" (?:captures|range|memory)\([^)]*\)| (?:nneg|samesign|disjoint)\b| #\d+\b|(?<=trunc) (?:nuw|nsw)\b"
_NOT_NEEDED = r"^(?:; ModuleID|; Function Attrs|source_filename|target |attributes |.*@llvm\.lifetime\.).*\n"
_CONSTANT = re.compile(r"^(@\S+) = internal constant (\[.*)\n", re.M)


def kernels() -> dict[str, str]:
    """The code of each kernel, by its name; its one function is `ENTRY`."""
    os.environ["NUMBA_OPT"] = "0"  # read when Numba is imported
    from numba import types

    from clipq.archive import floats, model

    u8, i8, u16, i32, i64 = (
        types.Array(getattr(types, t), 1, "C") for t in ("uint8", "int8", "uint16", "int32", "int64")
    )
    of_tile = (u8, i32, i8, i64, i32, i32, *[types.int64] * 9)
    of_floats = (u16, i64, i32, i32, i64)
    return {
        "encode_tile": _code(model.encode_tile, of_tile),
        "decode_tile": _code(model.decode_tile, of_tile),
        "encode_floats": _code(floats.encode_floats, of_floats),
        "decode_floats": _code(floats.decode_floats, of_floats),
    }


def _code(dispatcher: Any, arguments: tuple[Any, ...]) -> str:
    import llvmlite.binding as llvm
    import numba

    dispatcher.compile(arguments)
    compiled = dispatcher.overloads[arguments]
    name = compiled.fndesc.llvm_func_name
    module = llvm.parse_assembly(compiled.library.get_llvm_str())
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != name:
            value.linkage = "internal"
    for function in module.functions:
        if not function.is_declaration and function.name != name:
            function.add_function_attribute("alwaysinline")
    machine = llvm.Target.from_default_triple().create_target_machine()
    with llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0)) as builder:
        passes = llvm.create_new_module_pass_manager()
        passes.add_always_inliner_pass()
        for _ in range(2):
            passes.add_sroa_pass()
            passes.add_instruction_combine_pass()
            passes.add_simplify_cfg_pass()
        passes.add_global_dead_code_eliminate_pass()
        passes.run(module, builder)
    text = re.sub(_NOT_NEEDED, "", str(module), flags=re.M)
    text = re.sub(_HINTS, "", text).replace(f"@{name}(", f"@{ENTRY}(")
    first: dict[str, str] = {}
    same = {name: first.setdefault(value, name) for name, value in _CONSTANT.findall(text)}
    text = _CONSTANT.sub(lambda found: found[0] if same[found[1]] == found[1] else "", text)
    text = re.sub(r"@[\w.]+", lambda found: same.get(found[0], found[0]), text)
    return f"; Made by `make kernels` with Numba {numba.__version__}.\n\n{text.lstrip()}"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else KERNELS
    folder.mkdir(exist_ok=True)
    for name, code in kernels().items():
        (folder / f"{name}.ll").write_text(code)
