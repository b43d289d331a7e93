"""Quirks that need a device: operands, stacks and tables in MMIO, reached through real exits."""

from __future__ import annotations

import pytest
from support.machines import HIGH_DEVICE, LOW_DEVICE, accesses, enter, exits, mmio, path_case, reg, run_path

from emufuzz.case.model import Memory, TableRegister
from emufuzz.kvm.memslots import KvmMemslots

COUNTED = "".join(f"{4 * n:02x}000000" for n in range(32))  # each dword holds its own offset
DEVICE = mmio(reads=COUNTED)
ZF, CF, TF = 1 << 6, 1, 1 << 8
MEMORY_PATHS = ("ept-violation", "ept-misconfig", "fep")


@pytest.mark.parametrize("path", MEMORY_PATHS)
@pytest.mark.parametrize(("code", "selector"), [("0f0007", "7000"), ("0f000f", "5000")])
def test_quirk_15_sldt_and_str_read_the_device_first(path, code, selector):
    """Hardware only writes the selector (SDM Vol. 2B SLDT, STR): one write, no read."""
    outcome = run_path(path, code=code, rdi=LOW_DEVICE, devices=[DEVICE])
    assert accesses(outcome) == [("read", LOW_DEVICE, "00000000"), ("write", LOW_DEVICE, selector)]


@pytest.mark.parametrize("path", MEMORY_PATHS)
@pytest.mark.parametrize("code", ["0fae3f", "660fae3f"])
def test_quirk_36_clflush_reads_the_device(path, code):
    """Hardware reads no data for CLFLUSH and CLFLUSHOPT (SDM Vol. 2A CLFLUSH); a device sees nothing."""
    outcome = run_path(path, code=code, rdi=LOW_DEVICE + 4, devices=[DEVICE])
    assert accesses(outcome) == [("read", LOW_DEVICE + 4, "04")]


@pytest.mark.parametrize("code", ["0f0d07", "0f1807", "0f1f07"])
def test_prefetch_and_nop_do_not_read_the_device(code):
    """As on hardware, hints and NOPs access nothing, so the exit of quirk 36 is CLFLUSH's own."""
    outcome = run_path("fep", code=code, rdi=LOW_DEVICE, devices=[DEVICE])
    assert (outcome.rc, accesses(outcome)) == ("continue", [])


# -- locked instructions -------------------------------------------------------------------------


@pytest.fixture
def rival(monkeypatch):
    """Another vCPU stores 7 right before the exchange of a locked instruction; the exchanges tried."""
    exchange = KvmMemslots.cmpxchg
    tried = []

    def late(slots, slot, gpa, old, new):
        tried.append(gpa)
        slots.write_guest(gpa, b"\x07")
        return exchange(slots, slot, gpa, old, new)

    monkeypatch.setattr(KvmMemslots, "cmpxchg", late)
    return tried


def test_quirk_51_a_lost_exchange_commits_flags_and_nothing_else(rival):
    """Hardware locks the bus or cache line, so no other store comes between (SDM Vol. 3A 8.1.2)."""
    vm = enter("fep", code="f00107", rdi=0x8000, rax=0xFFFFFFFF, data={0x8000: b"\x01"})
    assert rival == [0x8000]
    assert (vm.rip, vm.reg("rax"), vm.mem(0x8000, 4)) == (0x6005, 0xFFFFFFFF, b"\x07\0\0\0")
    assert vm.flags & (ZF | CF) == ZF | CF  # of 1 + ffffffff, which was not stored
    assert vm.machine.retired == 1
    assert vm.pending is None


def test_quirk_51_adc_is_tried_again_with_the_carry_of_the_lost_try(rival):
    """LOCK ADC adds the guest's CF (SDM Vol. 2A ADC); the second try adds what the lost one has left."""
    vm = enter("fep", code="f01107", rdi=0x8000, rax=0xFFFFFFFF, data={0x8000: b"\x01"})
    assert len(rival) == 1
    assert vm.rip == 0x6005
    assert vm.flags & CF  # it was 0, and the guest runs the same instruction again


def test_quirk_51_a_lost_exchange_is_single_stepped(rival):
    """#DB comes after an instruction that has completed (SDM Vol. 3B 17.3.1.4), not after half of one."""
    vm = enter("fep", code="f00107", rdi=0x8000, rax=1, flags=TF)
    assert len(rival) == 1
    assert vm.rip == 0x6005
    assert (vm.vcpu.exception.vector, vm.vcpu.exception.payload) == (1, 1 << 14)


def test_quirk_51_the_page_is_dirty_although_nothing_was_stored(rival, monkeypatch):
    """Hardware sets the dirty flag for a write (SDM Vol. 3A 4.8); KVM logs the page before it looks."""
    monkeypatch.setattr(KvmMemslots, "write_guest", lambda *_: 0)  # the rival's store is of no interest
    monkeypatch.setattr(KvmMemslots, "cmpxchg", lambda *_: rival.append(0))
    slots = [{"base": 0, "size": 0x10000, "flags": 1}]
    vm = enter("fep", code="f00107", rdi=0x8000, kvm={"memslots": slots})
    assert len(rival) == 1
    assert vm.machine.memory.dirty == {(0, 8)}


@pytest.mark.parametrize(
    ("code", "addr", "written"),
    [
        ("f00107", LOW_DEVICE + 4, "09000000"),
        ("8707", LOW_DEVICE + 4, "05000000"),
        ("f00107", LOW_DEVICE - 2, "0000"),
    ],
)
def test_quirk_56_lock_on_a_device_is_a_read_and_a_write(code, addr, written, rival):
    """Hardware locks uncached memory too, by a bus lock (SDM Vol. 3A 8.1.2.2)."""
    outcome = run_path("ept-violation", code=code, rdi=addr, rax=5, devices=[DEVICE])
    place = max(addr, LOW_DEVICE)
    assert [access[:2] for access in accesses(outcome)] == [("read", place), ("write", place)]
    assert accesses(outcome)[1][2] == written
    assert rival == []


@pytest.mark.parametrize(
    ("addr", "split_lock_detect", "atomic"),
    [
        (0x8FFE, False, False),  # two pages
        (0x803E, False, True),  # two cache lines
        (0x803E, True, False),
        (0x803C, True, True),
    ],
)
def test_quirk_56_across_pages_or_cache_lines_it_is_a_plain_write(addr, split_lock_detect, atomic, rival):
    """A split lock is atomic on hardware, by a bus lock (SDM Vol. 3A 8.1.2.1)."""
    knobs = {"host_split_lock_detect": split_lock_detect}
    vm = enter("fep", code="f00107", rdi=addr, rax=5, knobs=knobs)
    assert bool(rival) is atomic
    assert vm.rip == (0x6005 if atomic else 0x6008)


def test_quirk_56_more_than_eight_bytes_are_a_plain_write(rival):
    """CMPXCHG16B is not emulated, so only SSE stores are this long, and they take no LOCK (#UD)."""
    vm = enter("fep", code="f00f2907", rdi=0x8000)
    assert (rival, vm.pending) == ([], (6, None, None))


def test_quirk_56_the_apic_page_is_never_exchanged(rival):
    """Locked accesses to the APIC page are undefined (SDM Vol. 3A 10.4.1); KVM reads, then writes."""
    knobs = {"irqchip": True}
    vm = enter("fep", code="f00107", rdi=0xFEE00080, rax=0x10, knobs=knobs)
    assert (rival, vm.rip) == ([], 0x6008)
    assert vm.vcpu.apic is not None
    assert vm.vcpu.apic.get_reg(0x80) == 0x10


# -- system structures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ("prot64", "0f0107"),  # SGDT
        ("prot64", "0f010f"),  # SIDT
        ("prot64", "0f0117"),  # LGDT, whose operand is read as data first
        ("prot32", "0fae07"),  # FXSAVE
        ("prot32", "0fae0f"),  # FXRSTOR
    ],
)
@pytest.mark.parametrize("path", MEMORY_PATHS)
def test_quirk_52_operands_in_a_device_are_tried_for_ever(path, mode, code):
    """Hardware reads and writes any memory type here (SDM Vol. 2B SGDT, Vol. 3A 11.3)."""
    outcome = run_path(path, mode, code, rdi=LOW_DEVICE, devices=[DEVICE])
    assert (outcome.rc, outcome.exception) == ("io_needed", None)
    assert outcome.rip == (0x6005 if path == "fep" else 0x6000)
    assert outcome.extra["livelock"] is True


def test_quirk_52_a_descriptor_in_a_device_is_tried_for_ever():
    """Descriptor tables may lie in any memory (SDM Vol. 3A 3.5.1); userspace is never asked."""
    case = path_case("fep", "prot32", "8ed8", rax=0x28, gdtr=TableRegister(LOW_DEVICE, 0xFFF))
    kept = tuple((addr, data) for addr, data in case.mem.entries if addr >> 12 != LOW_DEVICE >> 12)
    outcome = run_path(
        "fep", "prot32", "8ed8", rax=0x28, devices=[DEVICE],
        gdtr=TableRegister(LOW_DEVICE, 0xFFF), mem=Memory(kept),
    )  # fmt: skip
    assert (outcome.rc, exits(outcome)) == ("io_needed", [])
    assert outcome.extra["livelock"] is True


def test_quirk_52_a_vector_table_in_a_device_is_tried_for_ever():
    """The IVT is read like other memory (SDM Vol. 3B 21.1.4); each try pushes the frame again."""
    code, idtr = "cd10", TableRegister(LOW_DEVICE, 0x3FF)
    outcome = run_path(
        "rmode-exception", "real", code, idtr=idtr, rsp=0xC100, devices=[DEVICE]
    )  # fmt: skip
    assert (outcome.rc, outcome.rip, reg(outcome, "rsp")) == ("io_needed", 0x6000, 0xC100)
    assert outcome.extra["livelock"] is True


def test_quirk_52_with_tf_the_guest_steps_on_the_spot():
    """#DB comes after an instruction that has completed (SDM Vol. 3B 17.3.1.4); this one never does."""
    outcome = run_path("fep", code="0f0107", rdi=LOW_DEVICE, devices=[DEVICE], flags=TF)
    assert (outcome.exception, outcome.rip) == ((1, None, None), 0x6005)
    assert "livelock" not in outcome.extra


def test_an_answered_read_is_no_livelock():
    """What is completed by userspace goes on; only X86EMUL_IO_NEEDED without an exit does not."""
    outcome = run_path("ept-violation", code="8b07", rdi=LOW_DEVICE, devices=[DEVICE])
    assert "livelock" not in outcome.extra


# -- several accesses ----------------------------------------------------------------------------

PUSHED = {"rax": 1, "rcx": 2, "rdx": 3, "rbx": 4, "rbp": 6, "rsi": 7, "rdi": 8}


@pytest.mark.parametrize(
    ("rsp", "reported"),
    [
        (LOW_DEVICE + 0x20, (LOW_DEVICE, "08000000")),  # all eight; EDI is the last
        (0xC010, (0xBFF0, "08000000")),  # four in memory, then four
        (HIGH_DEVICE + 0x10, (HIGH_DEVICE, "04000000")),  # four, then four in memory
    ],
)
def test_quirk_53_pusha_reports_its_last_write_to_a_device(rsp, reported):
    """Hardware makes eight writes (SDM Vol. 2B PUSHA); userspace sees one, and the others are lost."""
    devices = [mmio(), mmio(HIGH_DEVICE)]
    outcome = run_path("ept-violation", "prot32", "60", rsp=rsp, devices=devices, **PUSHED)
    assert accesses(outcome) == [("write", *reported)]
    assert (outcome.rip, reg(outcome, "rsp")) == (0x6001, rsp - 0x20)


def test_quirk_53_a_far_call_reports_only_the_offset():
    """Both CS and EIP are pushed (SDM Vol. 2A CALL); the device never sees CS."""
    devices = [mmio()]
    outcome = run_path("ept-violation", "prot32", "9a007000000800", rsp=LOW_DEVICE + 0x40, devices=devices)
    assert accesses(outcome) == [("write", LOW_DEVICE + 0x38, "07600000")]


def test_quirk_53_a_fault_takes_all_writes_to_the_device_back():
    """Hardware's writes before the fault are made (SDM Vol. 2B PUSHA); here userspace hears of none."""
    vm = enter("ept-violation", "prot32", "60", rsp=0xE010, devices=[mmio(0xE000)], **PUSHED)
    assert (vm.left, vm.pending, vm.machine.mmio.needed) == (False, (14, 2, 0xDFFC), False)


def test_quirk_53_what_went_to_memory_stays_in_memory():
    """The half of PUSHA that hit memory is there, as on hardware (SDM Vol. 2B PUSHA)."""
    vm = enter("ept-violation", "prot32", "60", rsp=0xC010, devices=[mmio()], **PUSHED)
    assert vm.mem(0xC000, 16) == b"".join(n.to_bytes(4, "little") for n in (4, 3, 2, 1))


@pytest.mark.parametrize(
    ("code", "addr", "places", "value"),
    [
        ("488b07", LOW_DEVICE - 4, [(LOW_DEVICE, 4)], 0x00000000_99999999),
        ("488b07", LOW_DEVICE + 0xFFC, [(LOW_DEVICE + 0xFFC, 4)], 0x55555555_00000000),
        ("488b07", LOW_DEVICE + 8, [(LOW_DEVICE + 8, 8)], 0x0000000C_00000008),
    ],
)
def test_reads_across_pages_ask_for_the_device_s_part(code, addr, places, value):
    """As hardware splits an access between memory types (SDM Vol. 3A 11.3.3)."""
    data = {LOW_DEVICE - 4: b"\x99" * 4, 0xC000: b"\x55" * 4}
    vm = enter("ept-violation", code=code, rdi=addr, devices=[DEVICE], data=data)
    assert [(vm.exit.data["phys_addr"], vm.exit.data["len"])] == places
    assert reg(vm.finish(), "rax") == value


# -- stacks --------------------------------------------------------------------------------------


def test_quirk_54_popa_moves_rsp_with_every_answer():
    """Hardware reads eight dwords in a row (SDM Vol. 2B POPA: ESP rises by 20h).

    Each run starts with RSP as the last one left it and takes answers in order: the n-th read
    happens n increments further.
    """
    outcome = run_path("ept-violation", "prot32", "61", rsp=LOW_DEVICE, devices=[DEVICE])
    offsets = [place - LOW_DEVICE for _, place, _ in accesses(outcome)]
    assert offsets == [0x00, 0x04, 0x0C, 0x1C, 0x30, 0x48, 0x64]
    assert [reg(outcome, name) for name in ("rdi", "rsi", "rbp")] == [0x00, 0x04, 0x0C]
    assert reg(outcome, "rsp") == LOW_DEVICE + 0x84


@pytest.mark.parametrize(
    ("mode", "code", "offsets", "rsp"),
    [
        ("prot32", "cb", [0, 4], 0x0C),  # RETF: EIP, then CS
        ("prot64", "c3", [0], 8),  # RET: one read, no harm
        ("prot64", "5b", [0], 8),  # POP
    ],
)
def test_quirk_54_stack_reads_of_other_instructions(mode, code, offsets, rsp):
    """RETF takes two adjacent slots and ESP rises by both once (SDM Vol. 2B RET)."""
    reads = (0x7000).to_bytes(8, "little").hex() if mode == "prot64" else "0070000008000000"
    outcome = run_path("ept-violation", mode, code, rsp=LOW_DEVICE, devices=[mmio(reads=reads)])
    assert [place - LOW_DEVICE for _, place, _ in accesses(outcome)] == offsets
    assert reg(outcome, "rsp") == LOW_DEVICE + rsp


# -- the address of the exit ---------------------------------------------------------------------


def test_quirk_55_the_push_of_a_call_goes_where_the_operand_was():
    """CALL m pushes to the stack (SDM Vol. 2A CALL); with the same page offset it hits the device."""
    device = mmio(LOW_DEVICE, reads="00" * 0x7F8 + (0x7000).to_bytes(8, "little").hex())
    vm = enter("ept-violation", code="ff17", rdi=LOW_DEVICE + 0x7F8, rsp=0xC800, devices=[device])
    outcome = vm.finish()
    assert accesses(outcome)[-1] == ("write", LOW_DEVICE + 0x7F8, "0260000000000000")
    assert vm.mem(0xC7F8, 8) == bytes(8)
    assert (outcome.rip, reg(outcome, "rsp")) == (0x7000, 0xC7F8)


def test_quirk_55_another_offset_is_translated():
    """The shortcut needs the same offset into the page; any other push is where the SDM says."""
    device = mmio(LOW_DEVICE, reads="00" * 0x7F0 + (0x7000).to_bytes(8, "little").hex())
    vm = enter("ept-violation", code="ff17", rdi=LOW_DEVICE + 0x7F0, rsp=0xC800, devices=[device])
    vm.finish()
    assert vm.mem(0xC7F8, 8) == (0x6002).to_bytes(8, "little")


def test_quirk_55_a_repeated_store_is_translated_each_time():
    """The 513th quadword has the offset of the first, which an eventfd took; it is for memory."""
    fds = [{"addr": LOW_DEVICE + 0xFF8, "len": 8}]
    vm = enter("ept-violation", code="f348ab", rdi=LOW_DEVICE + 0xFF8, rcx=0x201, rax=0x55,
               devices=[mmio()], kvm={"ioeventfds": fds})  # fmt: skip
    assert (vm.left, vm.reg("rcx"), vm.machine.restarts) == (False, 0, 0x200)
    assert vm.mem(0xCFF8, 8) == b"\x55" + bytes(7)


def test_quirk_55_with_two_memory_operands_the_address_is_not_used():
    """MOVS has two; each goes through the guest's tables as on hardware (SDM Vol. 3A 4.6)."""
    outcome = run_path(
        "ept-violation", code="a4", rsi=LOW_DEVICE, rdi=0x8000, devices=[mmio(reads="5a")]
    )  # fmt: skip
    assert accesses(outcome) == [("read", LOW_DEVICE, "5a")]
    assert outcome.pages[8][0] == 0x5A
