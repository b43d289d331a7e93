"""Cases written for branches of kvm/ that generated cases seldom reach, or never.

Each module is about one part of KVM, and makes a grid: every value at which something changes, in every
machine that matters. The cases are candidates for distillation, which keeps those that cover something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import Case
from emufuzz.fuzz.corpus.crafted.apic import apic_cases
from emufuzz.fuzz.corpus.crafted.calls import hypercall_cases, hyperv_cases
from emufuzz.fuzz.corpus.crafted.delivery import delivery_cases
from emufuzz.fuzz.corpus.crafted.edges import edge_cases
from emufuzz.fuzz.corpus.crafted.handlers import handler_cases
from emufuzz.fuzz.corpus.crafted.invalid import invalid_cases
from emufuzz.fuzz.corpus.crafted.leaves import leaf_cases
from emufuzz.fuzz.corpus.crafted.msrs import msr_cases
from emufuzz.fuzz.corpus.crafted.paging import paging_cases
from emufuzz.fuzz.corpus.crafted.scripted import scripted_cases
from emufuzz.fuzz.corpus.crafted.smm import smm_cases

GROUPS: Final[dict[str, Callable[[], Iterator[Case]]]] = {
    "leaf": leaf_cases,
    "scripted": scripted_cases,
    "msr": msr_cases,
    "apic": apic_cases,
    "hypercall": hypercall_cases,
    "hyperv": hyperv_cases,
    "smm": smm_cases,
    "handler": handler_cases,
    "invalid": invalid_cases,
    "paging": paging_cases,
    "edge": edge_cases,
    "delivery": delivery_cases,
}


def crafted_cases() -> Iterator[Case]:
    """All of them; ids are `GROUP-N`. The groups give members of `kvm` in any form that the format has."""
    for group, make in GROUPS.items():
        for number, case in enumerate(make()):
            named = msgspec.structs.replace(case, id=f"{group}-{number}")
            yield case_from_json(case_to_json(named))
