"""Flag effects of every instruction that KVM's emulator implements, and Zen 5's undefined values.

The facts are the SDM's (Vol. 1 Appendix A "EFLAGS Cross-Reference" and each instruction's "Flags
Affected" in Vol. 2), in the vocabulary of `effects_words`. Where KVM itself differs (quirks of
its own C code), the table still speaks of the SDM: only what that leaves undefined may be masked.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.effects_words import COUNT_ABOVE_WIDTH, STATUS_FLAGS, EffectsError, template

#: Conditions of undefined destinations that depend on a value, not on a count.
SOURCE_ZERO: Final = "source = 0"
SIZE_16: Final = "16-bit operand"

_PUSHED: Final = "TF=t IF=t DF=t IOPL=t NT=t AC=t ID=t"
_POPPED: Final = "TF=m IF=m DF=m IOPL=m NT=m AC=m ID=m"
_SAVED: Final = _POPPED.replace("=m", "=tm") + " RF=m"
_RESTORED: Final = _POPPED + " RF=m VM=m VIF=m VIP=m"

# fmt: off
TEMPLATES: Final = {
    #                       OF  SF  ZF  AF  PF  CF
    "NONE":    template("   -   -   -   -   -   -  ", "Vol. 2: Flags Affected: None"),
    "ARITH":   template("   m   m   m   m   m   m  ", "Vol. 2A ADD, ADC, CMP; Vol. 2B NEG, SBB, SUB"),
    "INCDEC":  template("   m   m   m   m   m   -  ", "Vol. 2A INC, DEC"),
    "LOGIC":   template("   0   m   m   u   m   0  ", "Vol. 2A AND; Vol. 2B OR; Vol. 2D TEST, XOR"),
    "MUL":     template("   m   u   u   u   u   m  ", "Vol. 2A IMUL; Vol. 2B MUL"),
    "DIV":     template("   u   u   u   u   u   u  ", "Vol. 2A DIV, IDIV"),
    "ROT":     template("   m1  -   -   -   -   m  ", "Vol. 2B RCL/RCR/ROL/ROR", by_count=True),
    "SHIFT":   template("   m1  m   m   u   m   mw ", "Vol. 2B SAL/SAR/SHL/SHR", by_count=True),
    "DSHIFT":  template("   m1  ms  ms  u   ms  ms ", "Vol. 2B SHLD, SHRD", by_count=True,
                        undefined_result=COUNT_ABOVE_WIDTH),
    "BT":      template("   u   u   -   u   u   m  ", "Vol. 2A BT, BTC, BTR, BTS"),
    "BSCAN":   template("   u   u   m   u   u   u  ", "Vol. 2A BSF, BSR", undefined_result=SOURCE_ZERO),
    "BSWAP":   template("   -   -   -   -   -   -  ", "Vol. 2A BSWAP", undefined_result=SIZE_16),
    "AAX":     template("   u   m   m   u   m   u  ", "Vol. 2A AAM, AAD"),
    "DAS":     template("   u   m   m   tm  m   tm ", "Vol. 2A DAS"),
    "SAHF":    template("   -   m   m   m   m   m  ", "Vol. 2B SAHF"),
    "LAHF":    template("   -   t   t   t   t   t  ", "Vol. 2A LAHF"),
    "PUSHF":   template("   t   t   t   t   t   t  ", "Vol. 2B PUSHF", others=_PUSHED),
    "POPF":    template("   m   m   m   m   m   m  ", "Vol. 2B POPF", others=_POPPED + " RF=0"),
    "IRET":    template("   m   m   m   m   m   m  ", "Vol. 2A IRET", others=_RESTORED),
    "INT":     template("   -   -   -   -   -   -  ", "Vol. 2A INT n/INTO/INT3",
                        others="IF=m TF=0 NT=m RF=0 VM=m AC=m"),
    "SYSCALL": template("   tm  tm  tm  tm  tm  tm ", "Vol. 2B SYSCALL", others=_SAVED),
    "SYSENTER":template("   -   -   -   -   -   -  ", "Vol. 2B SYSENTER", others="IF=0 VM=0 RF=0"),
    "RSM":     template("   m   m   m   m   m   m  ", "Vol. 2B RSM", others=_RESTORED),
    "VMX":     template("   0   0   m   0   0   m  ", "Vol. 3C 31.2 VMX instruction conventions"),
}

#: Status flags that a condition code tests (SDM Vol. 1 Appendix B Table B-1), by the code's suffix.
_CONDITION_FLAGS: Final = {
    "o":  "OF",  "no":  "OF",  "b":  "CF",       "nb":  "CF",       "z":  "ZF", "nz":  "ZF",
    "be": "CF ZF", "nbe": "CF ZF", "s": "SF",    "ns":  "SF",       "p":  "PF", "np":  "PF",
    "l":  "OF SF", "nl":  "OF SF", "le": "OF SF ZF", "nle": "OF SF ZF",
}

#: Reference -> mnemonics of opcodes.csv.
_REFERENCES: Final = {
    "ARITH":            ("add", "sub", "cmp", "neg", "xadd", "cmpxchg"),
    "ARITH|CF=tm":      ("adc", "sbb"),
    "ARITH|DF=t":       ("scasb", "scasw/d/q", "cmpsb", "cmpsw/d/q"),
    "INCDEC":           ("inc", "dec"),
    "LOGIC":            ("and", "or", "xor", "test"),
    "MUL":              ("mul", "imul", "imul r,r/m,imm"),
    "DIV":              ("div", "idiv"),
    "ROT":              ("rol", "ror"),
    "ROT|CF=tm":        ("rcl", "rcr"),
    "SHIFT":            ("shl", "shr"),
    "SHIFT|CF=m":       ("sar",),  # the sign goes on coming out
    "DSHIFT":           ("shld", "shrd"),
    "BT":               ("bt", "bts", "btr", "btc"),
    "BSCAN":            ("bsf", "bsr"),
    "BSWAP":            ("bswap",),
    "AAX":              ("aam", "aad"),
    "DAS":              ("das",),
    "NONE|CF=0":        ("clc",),
    "NONE|CF=1":        ("stc",),
    "NONE|CF=tm":       ("cmc",),
    "NONE|DF=0":        ("cld",),
    "NONE|DF=1":        ("std",),
    "NONE|IF=0 IOPL=t": ("cli",),
    "NONE|IF=1 IOPL=t": ("sti",),
    "NONE|CF=t":        ("salc",),
    "NONE|ZF=t":        ("loope", "loopne"),
    "NONE|ZF=m":        ("cmpxchg8b/cmpxchg16b",),
    "NONE|IOPL=t":      ("in", "out"),
    "NONE|DF=t IOPL=t": ("insb", "insw/d", "outsb", "outsw/d"),
    "NONE|DF=t":        ("movsb", "movsw/d/q", "stosb", "stosw/d/q", "lodsb", "lodsw/d/q"),
    "SAHF":             ("sahf",),
    "LAHF":             ("lahf",),
    "PUSHF":            ("pushf",),
    "POPF":             ("popf",),
    "IRET":             ("iret",),
    "INT":              ("int3", "int imm8"),
    "INT|OF=t":         ("into",),
    "SYSCALL":          ("syscall",),
    "SYSENTER":         ("sysenter",),
    "RSM":              ("rsm",),
    "VMX":              ("vmcall",),
    "NONE": (
        "not", "cbw/cwde/cdqe", "cwd/cdq/cqo",
        "mov", "movzx r,r/m8", "movzx r,r/m16", "movsx r,r/m8", "movsx r,r/m16", "movsxd", "movnti",
        "lea", "xlat", "mov r/m,sreg", "movbe",
        "push", "pop", "push cs", "push ds", "push es", "push fs", "push gs", "push ss", "pusha", "popa",
        "enter", "leave", "xchg", "xchg rAX,r", "nop/pause/xchg r8", "nop",
        "prefetch(w) group", "prefetchh group / nop",
        "jcxz/jecxz/jrcxz", "jmp rel8", "jmp rel16/32", "jmp r/m", "call rel", "call r/m", "ret",
        "ret imm16", "loop", "call far imm", "call far m", "jmp far imm", "jmp far m", "retf", "retf imm16",
        "pop ds", "pop es", "pop fs", "pop gs", "pop ss", "mov sreg,r/m16", "lds", "les", "lfs", "lgs", "lss",
        "sldt", "str", "lldt", "ltr", "sgdt", "sidt", "lgdt", "lidt", "smsw", "lmsw", "clts", "invlpg",
        "invd", "wbinvd", "clflush", "clflushopt", "hlt", "rdmsr", "wrmsr", "rdtsc", "rdpmc",
        "rdpid", "cpuid", "sysexit", "xsetbv", "vmmcall",
        "fninit", "fnstcw", "fnstsw m16", "fxsave", "fxrstor",
        "movups", "movupd", "movaps", "movapd", "movntps", "movntpd", "movdqa", "movdqu", "movntdq",
        "movq mm",
    ),
    # Vol. 2B MOV-Move to/from Control Registers, Debug Registers
    "NONE|OF=u SF=u ZF=u AF=u PF=u CF=u": ("mov r,cr", "mov cr,r", "mov r,dr", "mov dr,r"),
}

# Undefined values of a profile, per template: a rule of RULES for each flag that may be undefined.
PROFILES: Final = {
    "amd-zen5": {
        "LOGIC":  "AF=0",
        "MUL":    "SF=preserved ZF=preserved AF=preserved PF=preserved",
        "DIV":    "OF=preserved SF=0 ZF=0 AF=1 PF=0 CF=preserved",
        "ROT":    "OF=result",
        "SHIFT":  "OF=result AF=1 CF=last_bit",
        "DSHIFT": "OF=double_of SF=result ZF=result AF=1 PF=result CF=last_bit",
        "BT":     "OF=preserved SF=preserved AF=preserved PF=preserved",
        "BSCAN":  "OF=0 SF=0 AF=0 PF=index_parity CF=0",
        "AAX":    "OF=0 AF=0 CF=0",
        "DAS":    "OF=0",
        "NONE":   "OF=preserved SF=preserved ZF=preserved AF=preserved PF=preserved CF=preserved",
    },
}
# Undefined destinations of a profile, per template.
RESULT_PROFILES: Final = {
    "amd-zen5": {
        "DSHIFT": "rotate_source",
        "BSCAN":  "preserved",
        "BSWAP":  "0",
    },
}

#: Named rules of the profiles; `emufuzz.emulator.eflags` implements them.
RULES: Final = {
    "result":        "as in the defined case: zero, sign and parity of the result; OF as for a 1-bit shift",
    "last_bit":      "last bit of the destination shifted out, 0 beyond its width",
    "double_of":     "SHLD: OF of SHL by the same count; SHRD: the result's MSB differs from the bit below",
    "preserved":     "the old value stays",
    "0":             "cleared",
    "1":             "set",
    "index_parity":  "PF of the bit index, of 0 if the source is 0",
    "rotate_source": "SHLD, SHRD by more than 16 bits: the source rotated by count - 16",
}
# fmt: on


def references() -> dict[str, str]:
    """Mnemonic -> reference; EffectsError if a mnemonic has two."""
    table: dict[str, str] = {}
    for reference, mnemonics in _REFERENCES.items():
        for mnemonic in mnemonics:
            _enter(table, mnemonic, reference)
    for code, tested in _CONDITION_FLAGS.items():
        reference = "NONE|" + " ".join(f"{flag}=t" for flag in tested.split())
        for mnemonic in (f"j{code}", f"j{code} near", f"set{code}", f"cmov{code}"):
            _enter(table, mnemonic, reference)
    return table


def _enter(table: dict[str, str], mnemonic: str, reference: str) -> None:
    if mnemonic in table:
        raise EffectsError(f"{mnemonic!r} has two references: {table[mnemonic]!r} and {reference!r}")
    table[mnemonic] = reference


def profile_words(profile: str, template_name: str) -> dict[str, str]:
    """The undefined values of a template in a profile: {flag: rule}; EffectsError for unknown words."""
    words = {}
    for item in PROFILES[profile].get(template_name, "").split():
        flag, _, rule = item.partition("=")
        if flag not in STATUS_FLAGS or rule not in RULES:
            raise EffectsError(f"profile {profile}, template {template_name}: unknown {item!r}")
        words[flag] = rule
    return words
