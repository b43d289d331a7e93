"""Exception vectors (SDM Vol. 3A Table 6-1) and page-fault error code bits (Vol. 3A 4.7)."""

from __future__ import annotations

from typing import Final

DE_VECTOR: Final = 0
DB_VECTOR: Final = 1
NMI_VECTOR: Final = 2
BP_VECTOR: Final = 3
OF_VECTOR: Final = 4
BR_VECTOR: Final = 5
UD_VECTOR: Final = 6
NM_VECTOR: Final = 7
DF_VECTOR: Final = 8
TS_VECTOR: Final = 10
NP_VECTOR: Final = 11
SS_VECTOR: Final = 12
GP_VECTOR: Final = 13
PF_VECTOR: Final = 14
MF_VECTOR: Final = 16
AC_VECTOR: Final = 17
MC_VECTOR: Final = 18
XM_VECTOR: Final = 19

PFERR_PRESENT: Final = 1 << 0
PFERR_WRITE: Final = 1 << 1
PFERR_USER: Final = 1 << 2
PFERR_RSVD: Final = 1 << 3
PFERR_FETCH: Final = 1 << 4

EXCEPTION_NAMES: Final = {
    DE_VECTOR: "#DE",
    DB_VECTOR: "#DB",
    NMI_VECTOR: "NMI",
    BP_VECTOR: "#BP",
    OF_VECTOR: "#OF",
    BR_VECTOR: "#BR",
    UD_VECTOR: "#UD",
    NM_VECTOR: "#NM",
    DF_VECTOR: "#DF",
    TS_VECTOR: "#TS",
    NP_VECTOR: "#NP",
    SS_VECTOR: "#SS",
    GP_VECTOR: "#GP",
    PF_VECTOR: "#PF",
    MF_VECTOR: "#MF",
    AC_VECTOR: "#AC",
    MC_VECTOR: "#MC",
    XM_VECTOR: "#XM",
}


def exception_name(vector: int) -> str:
    """The SDM's mnemonic of a vector, or `vector N` where it has none."""
    return EXCEPTION_NAMES.get(vector, f"vector {vector}")
