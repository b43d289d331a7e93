"""The form in which exceptions are reported and injected (SDM Vol. 3A 6.13, Table 6-1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from emufuzz.arch.cr import X86_CR0_PE
from emufuzz.arch.exceptions import DB_VECTOR, PF_VECTOR, exception_name
from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.model import Outcome
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import EVENTS, FAULTED, Found, Rule
from emufuzz.oracle.rules.state import straight
from emufuzz.oracle.rules.view import MASK32, MASK64, View

#: Vectors with an error code: #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC, #SX.
WITH_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))
_PFERR_PRESENT: Final = 1
_PFERR_RESERVED: Final = 8 | 32 | 64  # RSVD, PK and SS are about pages that are present
_SELECTOR_CODES: Final = frozenset((10, 11, 12, 13))


def _field(outcome: Outcome, name: str) -> Any:
    return (outcome.extra or {}).get(name)


def _injected(outcome: Outcome) -> list[Mapping[str, Any]]:
    return list(_field(outcome, "injected") or ())


def _code_form(view: View, outcome: Outcome) -> Found | None:
    """Real mode pushes no code; what the emulator alone reports there is left open."""
    if outcome.exception is None:
        return None
    vector, code, _ = outcome.exception
    if (code is not None) == (vector in WITH_CODE) or (view.real and vector in WITH_CODE):
        return None
    return Found("exception.error_code", f"{exception_name(vector)}, code {code}")


def _address_form(_view: View, outcome: Outcome) -> Found | None:
    if outcome.exception is None or (outcome.exception[2] is not None) == (outcome.exception[0] == PF_VECTOR):
        return None
    return Found("exception.address", str(outcome.exception[2]))


def _selector_form(_view: View, outcome: Outcome) -> Found | None:
    if outcome.exception is None or outcome.exception[0] not in _SELECTOR_CODES:
        return None
    code = outcome.exception[1] or 0
    return Found("exception.error_code", hex(code)) if code >> 16 else None


def _alignment_form(_view: View, outcome: Outcome) -> Found | None:
    if outcome.exception is None or outcome.exception[0] not in {8, 17} or not outcome.exception[1]:
        return None
    return Found("exception.error_code", hex(outcome.exception[1]))


def _page_form(view: View, outcome: Outcome) -> Found | None:
    """A fault for lack of a page is none for its rights; U/S is the CPL but for system structures."""
    if outcome.exception is None or outcome.exception[0] != PF_VECTOR:
        return None
    code = outcome.exception[1] or 0
    if not code & _PFERR_PRESENT and code & _PFERR_RESERVED:
        return Found("exception.error_code", hex(code))
    return (
        Found("exception.error_code", f"{code:#x} at CPL {view.cpl}") if code & 4 and view.cpl < 3 else None
    )


def _injected_form(view: View, outcome: Outcome) -> Found | None:
    """What is queued in protected mode; in real mode delivery drops the code (SDM Vol. 3B 21.1.4)."""
    if not view.system.cr0 & X86_CR0_PE:
        return None
    for event in _injected(outcome):
        code = event.get("error_code")
        if (code is not None) != (event["vector"] in WITH_CODE):
            return Found("exception.error_code", f"{exception_name(event['vector'])}, {code}")
    return None


def _single_step(view: View, outcome: Outcome) -> Found | None:
    """TF at the start of an instruction that ends: #DB, unless the stack segment was loaded."""
    injected = _field(outcome, "injected")
    if outcome.exception is not None and outcome.exception[0] != DB_VECTOR:
        return None
    after = view.case.rip + view.insn.length & (MASK64 if view.long else MASK32)
    if injected is None or not view.case.rflags & X86_EFLAGS_TF or outcome.rip != after:
        return None
    if outcome.interruptibility & 1 or any(event["vector"] == DB_VECTOR for event in injected):
        return None
    return Found("exception", "no #DB")


def _steps(insn: Decoded) -> bool:
    return straight(insn)


# fmt: off
RULES: Final = (
    Rule("error-code-form", FAULTED, "SDM Vol. 3A Table 6-1",
         "the vector decides whether there is an error code",
         finds=_code_form),
    Rule("address-form", FAULTED, "SDM Vol. 3A 6.15, #PF", "#PF, and nothing else, has an address",
         finds=_address_form),
    Rule("selector-code-form", FAULTED, "SDM Vol. 3A 6.13", "an error code with a selector has 16 bits",
         finds=_selector_form),
    Rule("zero-code-form", FAULTED, "SDM Vol. 3A 6.15, #AC", "the error code of #AC and #DF is 0",
         finds=_alignment_form),
    Rule("page-code-form", FAULTED, "SDM Vol. 3A 4.7",
         "the bits of a #PF error code fit each other and the CPL",
         finds=_page_form),
    Rule("injected-code-form", EVENTS, "SDM Vol. 3A Table 6-1",
         "an exception is queued with an error code if its vector has one",
         finds=_injected_form),
    Rule("single-step", EVENTS, "SDM Vol. 3B 18.3.1.4", "with TF set #DB follows the instruction",
         encoding=_steps, finds=_single_step),
)
# fmt: on
