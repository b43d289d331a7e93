# ruff: noqa: INP001 - beside a script, not a package
"""What docs/porting.md says beyond what the code says itself; docs/generate_porting.py puts it together."""

from __future__ import annotations

from typing import Final, NamedTuple

#: Parts of emulate.c in its order, with the functions of each.
FUNCTIONS: Final[dict[str, str]] = {
    "Registers and faults": """
        writeback_registers invalidate_registers assign_masked ad_mask stack_mask stack_size address_mask
        register_address masked_increment register_address_increment rsp_increment desc_limit_scaled
        seg_base emulate_exception emulate_db emulate_gp emulate_ss emulate_ud emulate_ts emulate_de
        emulate_nm emulator_check_intercept""",
    "Segmentation and memory": """
        get_segment_selector set_segment_selector ctxt_virt_addr_bits emul_is_noncanonical_address
        insn_alignment __linearize linearize assign_eip emulator_recalc_and_set_mode assign_eip_near
        assign_eip_far jmp_rel linear_read_system linear_write_system segmented_read_std
        segmented_write_std read_emulated segmented_read segmented_write segmented_cmpxchg""",
    "Fetching and decoding": """
        __do_insn_fetch_bytes do_insn_fetch_bytes decode_register decode_register_operand
        fetch_register_operand adjust_modrm_seg decode_modrm decode_abs fetch_bit_operand imm_size
        decode_imm decode_operand x86_decode_insn x86_page_table_writing_insn init_decode_cache""",
    "Descriptors": """
        read_interrupt_descriptor get_descriptor_table_ptr get_descriptor_ptr read_segment_descriptor
        write_segment_descriptor __load_segment_descriptor load_segment_descriptor read_descriptor""",
    "Stack": """
        emulate_push em_push emulate_pop em_pop emulate_popf em_popf em_enter em_leave em_push_sreg
        em_pop_sreg em_pusha em_pushf em_popa""",
    "Interrupts, far transfers, system calls": """
        __emulate_int_real emulate_int_real emulate_int emulate_iret_real em_iret em_jmp_far em_call_far
        em_ret_far em_ret_far_imm em_rsm setup_syscalls_segments em_syscall em_sysenter em_sysexit""",
    "Near branches": """
        em_jmp_abs em_call_near_abs em_call em_ret em_ret_near_imm em_loop em_jcxz test_cc""",
    "Task switches": """
        save_state_to_tss16 load_state_from_tss16 task_switch_16 save_state_to_tss32
        load_state_from_tss32 task_switch_32 emulator_do_task_switch emulator_task_switch""",
    "Moves, arithmetic, flags": """
        em_mov em_movsxd em_movbe em_xchg em_cmpxchg em_cmpxchg8b em_bsf_c em_bsr_c em_bswap em_imul_3op
        em_cwd em_das em_aam em_aad em_sahf em_lahf em_cli em_sti fastop""",
    "Ports": """
        emulator_bad_iopl emulator_io_port_access_allowed emulator_io_permitted pio_in_emulated em_in
        em_out check_perm_in check_perm_out""",
    "Segment and table registers": """
        em_lseg em_store_sreg em_mov_rm_sreg em_mov_sreg_rm em_sldt em_lldt em_str em_ltr
        emulate_store_desc_ptr em_sgdt em_sidt em_lgdt_lidt em_lgdt em_lidt""",
    "System instructions": """
        em_cr_write em_dr_write em_wrmsr em_rdmsr em_rdpid em_rdtsc em_rdpmc em_invlpg em_clts
        em_hypercall em_smsw em_lmsw em_cpuid em_clflush em_clflushopt em_xsetbv valid_cr
        check_cr_access check_dr_read check_dr_write check_svme check_svme_pa check_rdtsc check_rdpmc""",
    "FPU": """
        em_fninit em_fnstcw em_fnstsw check_fxsr __fxstate_size fxstate_size fxregs_fixup em_fxsave
        em_fxrstor flush_pending_x87_faults fetch_possible_mmx_operand""",
    "Execution": """
        write_register_operand writeback string_registers_quirk string_addr_inc string_insn_completed
        x86_emulate_insn emulator_invalidate_register_cache emulator_writeback_register_cache
        emulator_can_use_gpa""",
}  # fmt: skip

#: C function -> Python functions that do its work, where the name differs.
RENAMED: Final[dict[str, str]] = {
    "invalidate_registers": "emulator_invalidate_register_cache",
    "emulator_writeback_register_cache": "writeback_registers",
    "ad_mask": "address_mask",
    "register_address": "address_mask",
    "masked_increment": "register_address_increment",
    "seg_base": "linearize",
    "emulator_check_intercept": "intercept",
    "ctxt_virt_addr_bits": "_linearize_high",
    "emul_is_noncanonical_address": "is_canonical_addr",
    "__linearize": "linearize _linearize_high _type_allows",
    "assign_eip_near": "assign_eip",
    "__do_insn_fetch_bytes": "do_insn_fetch_bytes",
    "do_insn_fetch_bytes": "insn_fetch insn_fetch_signed",
    "decode_register": "set_byte_register",
    "decode_register_operand": "set_register set_byte_register set_vector_register",
    "fetch_register_operand": "set_register",
    "adjust_modrm_seg": "_modrm32 _sib",
    "desc_limit_scaled": "DescStruct",
    "read_interrupt_descriptor": "_read_interrupt_descriptor",
    "get_descriptor_table_ptr": "_descriptor_table",
    "__load_segment_descriptor": "_load_segment_descriptor _check_descriptor _check_code _mark_and_set",
    "read_descriptor": "_load_desc_ptr",
    "__emulate_int_real": "_emulate_int_real",
    "emulate_int": "_emulate_int",
    "emulate_iret_real": "_emulate_iret_real",
    "setup_syscalls_segments": "_load_flat_segments",
    "save_state_to_tss16": "_task_switch_16",
    "load_state_from_tss16": "_task_switch_16 _load_selectors",
    "task_switch_16": "_task_switch_16",
    "save_state_to_tss32": "_task_switch_32",
    "load_state_from_tss32": "_load_tss32 _load_selectors",
    "task_switch_32": "_task_switch_32",
    "emulator_do_task_switch": "_do_task_switch",
    "pio_in_emulated": "em_in _read_ahead_count",
    "emulate_store_desc_ptr": "_store_desc_ptr",
    "em_lgdt_lidt": "_load_desc_ptr",
    "valid_cr": "check_cr_access",
    "check_fxsr": "_check_fxsr",
    "__fxstate_size": "_fxstate_size",
    "fxstate_size": "_fxstate_size",
    "fxregs_fixup": "em_fxrstor",
    "flush_pending_x87_faults": "x87_fault_pending",
    "fetch_possible_mmx_operand": "_check_fpu",
    "write_register_operand": "_write_register_operand",
}

#: C function -> why no single Python function answers to it.
DISSOLVED: Final[dict[str, str]] = {
    "fastop": "each `em_*` of `insn/alu.py`, `bits.py`, `shift.py`, `muldiv.py` calls `eflags*.py`",
    "fetch_bit_operand": "part of the copy of the memory operand in the operand decoders",
    "imm_size": "part of the decoder of each immediate",
    "decode_imm": "one operand decoder per kind of immediate",
    "decode_operand": "one function per operand kind, chosen when the tables are built",
}


class Quirk(NamedTuple):
    """A place where KVM's emulation differs from the processor.

    `places` names the marked functions of the emulator, `model` functions of the KVM model around it
    as `module:function`.
    """

    number: int
    what: str
    places: str
    model: str = ""


QUIRKS: Final = (
    Quirk(1, "64-bit mode: only an operand's first byte must be canonical", "_linearize_high"),
    Quirk(2, "A segment of 4 GiB has no end: accesses wrap or run beyond 4 GiB", "linearize"),
    Quirk(3, "No alignment check below 16 bytes, hence no #AC", "insn_alignment"),
    Quirk(4, "Outside 64-bit mode code is fetched from data segments", "_type_allows"),
    Quirk(5, "64-bit mode: ES, CS, SS, DS prefixes cancel FS and GS", "_decode_prefixes"),
    Quirk(6, "TZCNT and LZCNT run as BSF and BSR", "em_bsf_c"),
    Quirk(7, "BSF and BSR of zero leave the whole destination", "em_bsf_c"),
    Quirk(8, "AAM and AAD set SF and ZF by AX or EAX", "em_aam em_aad"),
    Quirk(9, "Many instructions are not implemented", "_decode"),
    Quirk(10, "ENDBR and some multi-byte NOPs decode and then fail", "_execute"),
    Quirk(11, "RDTSCP, MONITOR, MWAIT, INT1, SVM instructions decode and then fail", "_execute"),
    Quirk(
        12,
        "A failure at CPL 0 queues #UD and leaves to userspace as well",
        "",
        "x86.py:handle_emulation_failure",
    ),
    Quirk(13, "66 together with a mandatory F2 or F3 is refused", "_select"),
    Quirk(14, "MOV m, Sreg, SLDT and STR with REX.W store 8 bytes", "em_store_sreg"),
    Quirk(15, "SLDT and STR read their destination first", "em_sldt em_str"),
    Quirk(16, "MOV Sreg reads memory before an invalid register is #UD", "em_mov_sreg_rm"),
    Quirk(
        17,
        "The MOV SS shadow is set although the load faults",
        "em_mov_sreg_rm em_pop_sreg",
        "interruptibility.py:toggle_interruptibility",
    ),
    Quirk(
        18, "STI sets its shadow although IF was set", "em_sti", "interruptibility.py:toggle_interruptibility"
    ),
    Quirk(19, "CLI and STI in virtual-8086 mode are #GP with any IOPL", "emulator_bad_iopl"),
    Quirk(20, "PUSHF in virtual-8086 mode ignores IOPL, POPF checks it late", "em_pushf em_popf"),
    Quirk(21, "ENTER: no nesting, stack-sized push, no probe of the frame", "em_enter"),
    Quirk(22, "Real-mode INT: 66 makes a 32-bit frame, IDTR's limit is ignored", "_emulate_int_real"),
    Quirk(23, "Real-mode IRET checks EIP against FFFFh only", "_emulate_iret_real"),
    Quirk(24, "INT and IRET outside real mode are unhandleable", "_emulate_int em_iret"),
    Quirk(25, "Gates, TSSs and outer returns are unhandleable", "_check_descriptor _check_code"),
    Quirk(26, "A bad offset of JMP far and RETF: unhandleable with CS replaced", "em_jmp_far em_ret_far"),
    Quirk(27, "A failed CALL far restores CS without bits 63:32 of its base", "em_call_far"),
    Quirk(28, "SYSCALL from compatibility mode cuts CSTAR to 32 bits", "em_syscall"),
    Quirk(29, "SYSENTER in 64-bit mode; SYSEXIT with a null SYSENTER_CS", "em_sysenter em_sysexit"),
    Quirk(30, "Privilege is checked before an instruction's own conditions", "_check em_xsetbv"),
    Quirk(31, "Bits 63:32 for CR0 and CR4 are dropped", "em_cr_write"),
    Quirk(32, "A bad value for DR4 or DR5 is ignored", "em_dr_write"),
    Quirk(
        33,
        "MOV DR: high bits rank above #UD and #DB; DR6.BD is written early",
        "check_dr_write check_dr_read",
    ),
    Quirk(34, "LMSW and CLTS ignore a refused CR0", "em_lmsw em_clts"),
    Quirk(35, "INVLPG of a bad address is a no-op", "em_invlpg"),
    Quirk(36, "CLFLUSH really reads", "em_clflush em_clflushopt"),
    Quirk(37, "LTR: 16-bit TSS in IA-32e mode, upper half unchecked", "_check_descriptor _mark_and_set"),
    Quirk(38, "Limit violations are #GP in task switches too; LDT limits have 16 bits", "get_descriptor_ptr"),
    Quirk(39, "The accessed bit is a plain 8-byte store", "_mark_and_set"),
    Quirk(40, "CMPXCHG16B is unhandleable, CMPXCHG8B asks no CPUID", "em_cmpxchg8b"),
    Quirk(41, "Register forms of MOVNTDQ and the prefetches are taken", "MOVNTDQ TWO_BYTE_ROWS"),
    Quirk(42, "MOVSXD reads 4 bytes for 16 bits; BSWAP of 16 bits gives 0", "em_movsxd em_bswap"),
    Quirk(43, "SGDT stores 0 as top byte; LGDT reads in two accesses", "_store_desc_ptr _load_desc_ptr"),
    Quirk(
        44, "FXSAVE, FXRSTOR: not in 64-bit mode, 160 or 288 bytes", "_check_fxsr _fxstate_size em_fxrstor"
    ),
    Quirk(45, "I/O bitmap: limit, page faults, short TSS", "emulator_io_port_access_allowed"),
    Quirk(46, "REP IN reads the port many times", "_read_ahead_count", "pio.py:emulator_pio_in_emulated"),
    Quirk(47, "A fault in a task switch is lost", "emulator_task_switch", "exit_event.py:kvm_task_switch"),
    Quirk(
        48,
        "REP INS reads the port before it checks the destination",
        "em_in",
        "pio.py:emulator_pio_in_emulated",
    ),
    Quirk(49, "One #DB and no interrupt window per up to 1024 REP iterations", "", "x86.py:_writeback"),
    Quirk(50, "Data and I/O breakpoints are not checked", "", "debugregs.py:kvm_vcpu_check_code_breakpoint"),
    Quirk(51, "A failed cmpxchg commits RFLAGS and counts as an instruction", "", "x86.py:_writeback"),
    Quirk(
        52,
        "Descriptor tables and images in MMIO are tried for ever",
        "",
        "guest_virt.py:read_guest_virt guest_virt.py:write_guest_virt",
    ),
    Quirk(
        53,
        "Of several MMIO writes of an instruction the last is reported",
        "",
        "emulated_mmio.py:emulator_write_emulated",
    ),
    Quirk(54, "Stack reads from MMIO move RSP twice", "emulate_pop", "emulated_mmio.py:advance_mmio"),
    Quirk(
        55,
        "The address of the exit stands for any access with its page offset",
        "",
        "emulated_mmio.py:_translate",
    ),
    Quirk(
        56, "LOCK on MMIO and across pages is a plain write", "", "emulated_mmio.py:emulator_cmpxchg_emulated"
    ),
    Quirk(57, "Hypercalls are patched at RIP as a linear address", "em_hypercall"),
    Quirk(58, "OUT completes before userspace sees it", "em_out", "x86.py:_conclude"),
    Quirk(59, "POPF knows no VIF and VIP", "em_popf"),
    Quirk(60, "Real mode with CS.D decodes as 32-bit code", "_decode_prefixes"),
    Quirk(61, "LAHF, CMPXCHG, MOVNTI and SSE do not ask CPUID", "em_sahf _decode"),
    Quirk(62, "A fault while decoding on #UD becomes #UD", "", "x86.py:_decode"),
    Quirk(63, "REP with a zero count: RIP not cut, no third intercept stage", "_check"),
    Quirk(
        64,
        "A nested hypervisor sees the current RIP as the next one, and PAUSE by the wrong controls",
        "",
        "nested.py:vmx_check_intercept",
    ),
    Quirk(65, "What PUSHA and CALL far pushed before a fault stays", "em_pusha em_call_far"),
    Quirk(66, "HLT only leaves a request that another exit consumes", "", "emulate_ops.py:halt"),
    Quirk(67, "LSS, LFS, LGS with REX.W read 10 bytes for AMD too", "em_lseg"),
    Quirk(68, "FNST* do not raise #MF; FNSTSW AX is missing", "em_fnstsw"),
    Quirk(69, "INT n has a sign-extended vector: 80h and above lie below the IVT", "sw_int"),
    Quirk(70, "A failed CMPXCHG of 32-bit registers zero-extends the destination", "em_cmpxchg"),
    Quirk(71, "MOVNTI, FXSAVE, FXRSTOR and VMCALL accept 66, F2 and F3", "_select"),
    Quirk(72, "What reads and writes a read-only segment reads it before the #GP", "_read_operands"),
    Quirk(73, "MOVQ m, mm that faults has marked all x87 registers valid", "_check_fpu"),
)

#: Rule of the comparison with other decoders -> (who is right, what they disagree about).
DECODER_DISAGREEMENTS: Final[dict[str, tuple[str, str]]] = {
    "not-in-64-bit-mode": (
        "capstone, iced-x86",
        "PUSH ES, PUSHA, DAS, AAM, 82h ... have no 64-bit form: KVM decodes them, then #UD.",
    ),
    "far-pointer-in-a-register": (
        "capstone, iced-x86",
        "LSS, LFS, LGS, CALL far and JMP far with a register operand: KVM decodes them, then #UD.",
    ),
    "segment-register-6-or-7": (
        "capstone, iced-x86",
        "MOV with segment register 6 or 7: KVM decodes it, then #UD.",
    ),
    "movntdq-register-form": (
        "capstone, iced-x86",
        "66 0F E7 with a register operand: #UD on processors, taken by KVM (quirk 41).",
    ),
    "no-prefix-allowed": (
        "iced-x86",
        "VMCALL, XSETBV, FXSAVE, FXRSTOR, MOVNTI with 66, F2 or F3, which KVM ignores: NP in the SDM.",
    ),
    "lock": (
        "all",
        "LOCK where it is not allowed: capstone knows no length, the others do. It is #UD everywhere.",
    ),
    "capstone-repeat": (
        "KVM, iced-x86",
        "F2 or F3 without meaning, together with 66 or 67 or on BSF and BSR: capstone refuses.",
    ),
    "capstone-reserved-nop": (
        "KVM, iced-x86",
        "0F 0D and 0F 18 with a reserved ModRM.reg are NOPs with an operand: capstone refuses.",
    ),
    "capstone-movsxd": (
        "KVM, iced-x86",
        "MOVSXD in 64-bit mode with a prefix 67 and without REX.W: capstone refuses.",
    ),
    "capstone-jcc-66": (
        "KVM, iced-x86",
        "66 before JO and JNO rel32 in 64-bit mode: ignored by Intel processors; capstone reads two bytes.",
    ),
    "capstone-ret-66-rex-w": (
        "KVM, iced-x86",
        "RET imm16 with 66 and REX.W: the immediate has two bytes, capstone reads four.",
    ),
}

#: Python function -> a branch of it that no input takes, and why it is there all the same.
UNREACHABLE: Final[dict[str, str]] = {
    "_emulate_iret_real": "a failed load of CS: in real mode a load cannot fail; emulate.c has the same test",
}
