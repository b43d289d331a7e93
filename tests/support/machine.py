"""The emulator's context on flat memory, to call what no decoded instruction reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emufuzz.case.build import build_case
from emufuzz.case.model import Case, Fault, System
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.decode import init_decode_cache, x86_decode_insn
from emufuzz.emulator.execute import x86_emulate_insn
from emufuzz.emulator.x86emul import EMULATION_OK
from emufuzz.subject.flat.ops import load_fpu
from emufuzz.subject.flat.scripted import ScriptedOps


class Machine:
    """A case, its callbacks (some of them perhaps scripted) and a fresh context."""

    def __init__(self, case: Case, *scripts: Mapping[str, Any], ops: type[ScriptedOps] = ScriptedOps) -> None:
        self.case = case
        self.ops = ops(scripts)
        self.ops.load(case)
        self.ops.log = []
        self.ctxt = ctxt = X86EmulateCtxt(self.ops)
        load_fpu(ctxt.fpu, case.system.fpu)
        ctxt.mode = self.ops.mode
        ctxt.eip = ctxt.next_eip = case.rip
        ctxt.eflags = case.rflags
        ctxt.exception.vector = 0xFF
        init_decode_cache(ctxt)

    def decode(self, insn: bytes = b"") -> int:
        return x86_decode_insn(self.ctxt, insn)

    def emulate(self, check_intercepts: bool = False) -> int:
        return x86_emulate_insn(self.ctxt, check_intercepts)

    def step(self, check_intercepts: bool = False) -> int:
        assert self.decode() == EMULATION_OK
        return self.emulate(check_intercepts)

    def read(self, addr: int, size: int) -> bytes:
        return self.ops._read(addr, size, None, True, (1 << 64) - 1)[1]

    @property
    def events(self) -> list[tuple]:
        return [event for event in self.ops.log or () if event[0] != "fetch"]

    @property
    def system(self) -> System:
        return self.ops.system

    @property
    def fault(self) -> Fault:
        exception = self.ctxt.exception
        return (
            exception.vector,
            exception.error_code if exception.error_code_valid else None,
            exception.address,
        )


def machine(mode: str, code: str = "90", *scripts: Mapping[str, Any], **kwargs: Any) -> Machine:
    """A machine in the default layout with hex `code`; keywords as build_case takes them."""
    return Machine(build_case(mode, bytes.fromhex(code), **kwargs), *scripts)
