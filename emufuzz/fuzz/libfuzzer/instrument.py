"""Instrumentation of emufuzz.emulator and emufuzz.kvm, and the proof that it is in effect.

atheris instruments modules as they are imported. A module that was loaded before stays as it is, and
libFuzzer would then fuzz without any feedback; so everything that is to be instrumented is imported here,
and looked at.
"""

from __future__ import annotations

import dis
import importlib
import pkgutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import emufuzz

#: Packages whose branches libFuzzer sees.
INSTRUMENTED: Final = ("emufuzz.emulator", "emufuzz.kvm")


class InstrumentationError(RuntimeError):
    """Code that should be instrumented is not."""


def load_atheris() -> Any:
    """The atheris package.

    Raises:
        ImportError: It is not installed, or does not fit this Python.
    """
    return importlib.import_module("atheris")


def instrument(packages: tuple[str, ...] = INSTRUMENTED) -> dict[str, int]:
    """Import all of some packages with instrumentation; how many functions of each have it.

    Raises:
        InstrumentationError: A module has functions none of which is instrumented.
        ImportError: There is no atheris.
    """
    atheris = load_atheris()
    names = list(module_names(list(emufuzz.__path__), "emufuzz."))
    wanted = [name for name in names if _is_below(name, packages)]
    others = [name for name in names if not _is_below(name, packages)]
    with atheris.instrument_imports(include=["emufuzz"], exclude=others):
        for name in wanted:
            importlib.import_module(name)
    return {package: _proven(package, atheris) for package in packages}


def _is_below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def module_names(paths: list[str], prefix: str) -> Iterator[str]:
    """All modules below a package, none of which is imported for that."""
    for info in pkgutil.iter_modules(paths, prefix):
        yield info.name
        if info.ispkg:
            last = info.name.rpartition(".")[2]
            yield from module_names([str(Path(path, last)) for path in paths], f"{info.name}.")


def _proven(package: str, atheris: Any) -> int:
    """How many functions of a package are instrumented; every module that has branches must have some."""
    count = 0
    for name, module in sorted(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        functions = [function for function in functions_of(module) if has_branches(function.__code__)]
        instrumented = sum(is_instrumented(function.__code__, atheris) for function in functions)
        if functions and not instrumented:
            raise InstrumentationError(f"{name}: none of {len(functions)} functions is instrumented")
        count += instrumented
    if not count:
        raise InstrumentationError(f"{package}: nothing is instrumented")
    return count


def functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """The functions and methods in a module's source, without what dataclasses and the like generate."""
    for value in vars(module).values():
        inside = vars(value).values() if isinstance(value, type) else (value,)
        for function in inside:
            if isinstance(function, types.FunctionType) and _is_source_of(function.__code__, module):
                yield function


def _is_source_of(code: types.CodeType, module: types.ModuleType) -> bool:
    """Whether code comes from a module's file, by folder and name: packed programs have no whole paths."""
    ours, its = Path(module.__file__ or ""), Path(code.co_filename)
    return ours.parts[-2:] == its.parts[-2:]


def has_branches(code: types.CodeType) -> bool:
    """Whether a function has jumps, and so anything for atheris to count."""
    return any(instruction.opcode in dis.hasjrel for instruction in dis.get_instructions(code))


def is_instrumented(code: types.CodeType, atheris: Any) -> bool:
    """Whether atheris has put its calls into a function: they need the package among its constants."""
    return any(constant is atheris for constant in code.co_consts)
