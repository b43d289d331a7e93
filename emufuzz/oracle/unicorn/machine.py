"""The machine behind the oracle: one engine, with what it is loaded with for a case.

States, address spaces and code are kept between cases: a state image for each System, page tables
for each Memory, translated code for each slot. `UnicornMachine` finds or makes them, puts a case in
place and runs it; what came of it is for emufuzz.oracle.unicorn.oracle to say.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Sequence
from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.model import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Case,
    Memory,
    System,
)
from emufuzz.oracle.unicorn.code import SLOT_EXACT, SLOT_MASK, CodeSlots, exact_bytes
from emufuzz.oracle.unicorn.engine import (
    NO_UNTIL,
    NO_VECTOR,
    UC_ERR_OK,
    Engine,
)
from emufuzz.oracle.unicorn.image import (
    CS_BASE_OFFSET,
    Template,
)
from emufuzz.oracle.unicorn.layout import probe
from emufuzz.oracle.unicorn.memory import (
    CODE_FRAMES,
    MEMORY_SIZE,
    AddressSpace,
    FramePool,
    MemoryFullError,
)
from emufuzz.oracle.unicorn.prefixes import (
    RepString,
    rep_string,
    unicorn_must_not_run,
)

#: 16 GPRs, RIP and RFLAGS at the start of the state.
REGISTERS: Final = struct.Struct("<18Q")
GPRS: Final = struct.Struct("<16Q")
RIP_RFLAGS: Final = struct.Struct("<2Q")
RIP_OFFSET: Final = GPRS.size
_LAST_FAST_OFFSET: Final = PAGE_SIZE - SLOT_EXACT
_CACHED_TEMPLATES: Final = 4096


class UnicornMachine:
    """An engine and everything that makes cases run on it in the fast mode."""

    def __init__(self) -> None:
        """Open the engine and find the layout of its state.

        Raises:
            OracleUnavailableError: Unicorn is not the known version, or a probe does not match.
        """
        engine = self._engine = Engine(MEMORY_SIZE)
        layout = self._layout = probe(engine)
        engine.save()
        self._pristine = bytes(engine.state)
        self._restore, self._start, self._save = engine.raw_calls()
        self._code = CodeSlots(engine)
        # Short ways for the hot path to what does not change.
        self._translated = self._code.translated
        self._buffer = engine.buffer
        self._state = engine.state
        self._handle, self._context = engine.handle, engine.context
        self._pool = FramePool(engine.buffer)
        self._read_code = False
        self._answer_ports()
        engine.hook_reads(CODE_FRAMES.start, CODE_FRAMES.stop - 1, self._on_code_read)
        # What ordinary instructions leave alone: hflags up to the pending exception, in two parts,
        # of which the larger one, from the FPU on, is looked at only when it may have changed.
        self._control = self._view(layout.hflags, layout.fpstt)
        self._fpu = self._view(layout.fpstt, layout.error_code)
        self._templates: dict[tuple[int, str], Template] = {}
        self._spaces: dict[int, tuple[Memory, AddressSpace]] = {}
        self._template: Template | None = None
        self._memory: Memory | None = None
        self._space = AddressSpace(self._pool, {})
        self._image = b""
        self._control_before = b""
        self._fpu_before = b""
        self._cr3 = 0
        #: How many runs needed the exact mode.
        self.exact_runs = 0

    def _answer_ports(self) -> None:
        """Ports float where nobody says otherwise."""
        self._engine.float_ports()

    def _view(self, start: int, end: int) -> ctypes.Array[ctypes.c_char]:
        """A part of the saved state, to be copied by its `raw`."""
        return (ctypes.c_char * (end - start)).from_address(self._engine.state_address + start)

    def _forget_signals(self) -> None:
        """Reset what the hooks told of a run; every run begins so."""
        self._engine.vector = NO_VECTOR
        self._read_code = False

    def _on_code_read(self) -> None:
        self._read_code = True

    def _fpu_changed(self) -> bool:
        return self._fpu.raw != self._fpu_before

    def _branched_to(self, template: Template, system: System, rip: int) -> None:
        """Unicorn has translated what lies at a branch target, too."""
        base = 0 if template.mode == "prot64" else system.seg[VCPU_SREG_CS].base
        self._code.branched_to(base + rip & template.address_mask)

    def forget_translations(self) -> None:
        """Make every case translate its code anew, as cases in fresh slots do."""
        self._code.flush()

    def raw_starts(self, batch: Sequence[Case]) -> float:
        """Seconds that the calls of uc_emu_start alone take for a batch, each case in a fresh slot.

        The yardstick of benchmarks: every case is prepared as in `run`, and as many instructions
        are run, but only the foreign calls are timed, and their results are thrown away. A case
        that needs the exact mode counts as it runs in the fast one; one that the fast mode cannot
        place, or that is never run, counts as the average of the others.
        """
        self.forget_translations()
        total, timed = 0.0, 0
        for case in batch:
            template = None if unicorn_must_not_run(case.code, case.mode) else self._prepare(case)
            if template is None:
                continue
            total += self._timed_starts(case, template)
            timed += 1
            self._forget_signals()
            self._restore_memory()
        return total * len(batch) / timed if timed else 0.0

    def _timed_starts(self, case: Case, template: Template) -> float:
        rep = rep_string(case.code, case.mode, case.system.seg[VCPU_SREG_CS].db)
        self._load(case, template.masked_flags | (X86_EFLAGS_TF if rep else 0))
        self._engine.restore()
        clock, start, handle = time.perf_counter, self._engine.raw_emu_start, self._engine.handle
        if rep is None or not rep.comparing:
            count = rep.iterations(case.gpr[VCPU_REGS_RCX]) if rep else 1
            before = clock()
            start(handle, case.rip, NO_UNTIL, 0, count)
            return clock() - before
        before = clock()
        self._compare_strings(case, rep)
        return clock() - before

    def _prepare(self, case: Case) -> Template | None:
        """Select template, memory and code slot; None if the fast mode cannot run the case."""
        template = self._template
        if template is None or case.system is not template.system or case.mode != template.mode:
            template = self._use_template(case.system, case.mode, case.mem)
        elif case.mem is not self._memory:
            self._use_memory(case.mem)
            self._compose(template)
        address = (template.code_base + case.rip) & template.address_mask
        frame = self._space.code.get(address >> PAGE_SHIFT)
        translated, code = self._translated, case.code
        if frame is not None:
            if not address & SLOT_MASK and address not in translated:
                # A whole slot that was never translated needs neither look nor flush.
                translated[address] = code
                offset = frame + (address & PAGE_MASK)
                self._buffer[offset : offset + SLOT_EXACT] = exact_bytes(code)
                return template
            if translated.get(address) == code:
                return template
        return template if self._place(case, address) else None

    def _load(self, case: Case, masked: int) -> None:
        """Fill the saved context with the state of a case."""
        state = self._engine.state
        state[:] = self._image
        REGISTERS.pack_into(state, 0, *case.gpr, case.rip, case.rflags & ~masked)

    def _use_template(self, system: System, mode: str, memory: Memory | None = None) -> Template:
        """Make the image of (system, mode) the current one, and `memory`, if given, the memory.

        Equal objects share an image by identity.
        """
        key = (id(system), mode)
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) >= _CACHED_TEMPLATES:
                self._templates.clear()
            template = Template(self._layout, self._pristine, system, mode)
            self._templates[key] = template
        self._template = template
        if memory is not None and memory is not self._memory:
            self._use_memory(memory)
        self._compose(template)
        return template

    def _use_memory(self, memory: Memory) -> None:
        """Make the address space of `memory` the current one."""
        known = self._spaces.get(id(memory))
        if known is None:
            known = (memory, self._build_space(memory.pages))
            self._spaces[id(memory)] = known
        self._memory = memory
        self._space = known[1]

    def _build_space(self, pages: dict[int, bytes]) -> AddressSpace:
        try:
            return AddressSpace(self._pool, pages)
        except MemoryFullError:
            self._spaces.clear()
            self._pool.reset()
            self._cr3 = 0
            return AddressSpace(self._pool, pages)

    def _compose(self, template: Template) -> None:
        """Join template and page tables; other page tables make the TLB stale."""
        cr3 = template.cr3(self._space)
        if cr3 != self._cr3:
            self._engine.flush_tlb()
            self._cr3 = cr3
        _, self._image, self._control_before, self._fpu_before = template.join(self._layout, cr3)

    def _place(self, case: Case, address: int) -> bool:
        """Put the code where the fast mode can run it; False if the fast mode cannot."""
        number = address >> PAGE_SHIFT
        if address & PAGE_MASK > _LAST_FAST_OFFSET or number in case.mem.pages:
            return False
        frame = self._code.frame(number)
        if not frame:
            self._forget_code()
            frame = self._code.frame(number)
        if number not in self._space.code:
            try:
                self._space.map_code(number, frame)
            except MemoryFullError:
                return False
        self._code.place(address, case.code)
        return True

    def _forget_code(self) -> None:
        """Start over with code pages: all address spaces map them."""
        self._code.drop_frames()
        self._spaces.clear()
        self._pool.reset()
        self._cr3 = 0
        memory, self._memory = self._memory, None
        if memory is not None:
            self._use_memory(memory)
            if self._template is not None:
                self._compose(self._template)

    def _execute(self, case: Case, template: Template, rep: RepString | None) -> int:
        """Load the state, run the instruction, save the state; gives a UC_ERR_* value."""
        engine = self._engine
        self._forget_signals()
        self._load(case, template.masked_flags | (X86_EFLAGS_TF if rep else 0))
        engine.restore()
        if rep is None:
            error = engine.start(case.rip, 1)
        elif rep.comparing:
            return self._compare_strings(case, rep)
        else:
            error = engine.start(case.rip, rep.iterations(case.gpr[VCPU_REGS_RCX]))
        engine.save()
        return error

    def _compare_strings(self, case: Case, rep: RepString) -> int:
        """REP CMPS and SCAS one iteration at a time, for ZF may end them after any."""
        engine = self._engine
        for _ in range(rep.iterations(case.gpr[VCPU_REGS_RCX])):
            error: int = engine.start(case.rip, 1)
            engine.save()
            if error or engine.vector != NO_VECTOR or self._rip() != case.rip:
                return error
        return UC_ERR_OK

    def _rip(self) -> int:
        rip: int = REGISTERS.unpack_from(self._engine.state)[16]
        return rip

    def _at_start(self, case: Case) -> bool:
        """Whether CS:RIP is where the case began: the instruction raised its exception itself."""
        (cs_base,) = struct.unpack_from("<Q", self._engine.state, self._layout.segs + CS_BASE_OFFSET)
        (before,) = struct.unpack_from("<Q", self._image, self._layout.segs + CS_BASE_OFFSET)
        same_base: bool = cs_base == before
        return same_base and self._rip() == case.rip

    def _restore_memory(self) -> None:
        if self._space.written():
            self._changed_pages()

    def _changed_pages(self) -> dict[int, bytes]:
        self._engine.flush_tlb()
        return self._space.changed_pages()

    def close(self) -> None:
        """Release the engine and its memory."""
        self._engine.close()
