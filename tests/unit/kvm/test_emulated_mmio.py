"""Operand accesses: pieces and fragments, in-kernel devices, traces, exchanges."""

from __future__ import annotations

import pytest
from support.machines import HIGH_DEVICE, LOW_DEVICE, PathVm, accesses, enter, mmio, path_case, reg, run_path

from emufuzz.kvm.emulated_mmio import MmioFragment

BYTES = bytes(range(1, 65)).hex()
APIC_TPR = 0xFEE00080


def exit_of(vm: PathVm) -> tuple[int, int, bool]:
    data = vm.exit.data
    assert vm.exit.exit_reason == "MMIO"
    return data["phys_addr"], data["len"], data["is_write"]


# -- KVM_EXIT_MMIO -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["ept-violation", "ept-misconfig", "fep"])
@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [
        ("8a07", 1, 0x1122334455667701),
        ("668b07", 2, 0x1122334455660201),
        ("8b07", 4, 0x04030201),
        ("488b07", 8, 0x0807060504030201),
        ("0fb607", 1, 0x01),
    ],
)
def test_read(path, code, size, rax):
    vm = enter(path, code=code, rdi=LOW_DEVICE, rax=0x1122334455667788, devices=[mmio(reads=BYTES)])
    assert exit_of(vm) == (LOW_DEVICE, size, False)
    assert vm.rip == (0x6005 if path == "fep" else 0x6000)
    assert vm.reg("rax") == 0x1122334455667788
    assert reg(vm.finish(), "rax") == rax
    assert vm.rip == (0x6005 if path == "fep" else 0x6000) + len(code) // 2


@pytest.mark.parametrize(
    ("code", "data"),
    [("8807", "88"), ("668907", "8877"), ("8907", "88776655"), ("488907", "8877665544332211")],
)
def test_write_is_over_when_userspace_sees_it(code, data):
    vm = enter("ept-misconfig", code=code, rdi=LOW_DEVICE, rax=0x1122334455667788, devices=[mmio()])
    assert exit_of(vm) == (LOW_DEVICE, len(data) // 2, True)
    assert vm.exit.data["data"].hex() == data
    assert vm.rip == 0x6000 + len(code) // 2
    emulations = vm.machine.emulations
    assert not vm.run().left
    assert vm.machine.emulations == emulations


def test_sixteen_bytes_are_two_exits_for_a_read():
    vm = enter("ept-violation", code="0f2807", rdi=LOW_DEVICE, devices=[mmio(reads=BYTES)])
    assert exit_of(vm) == (LOW_DEVICE, 8, False)
    vm.run(data=b"\x11" * 8)
    assert exit_of(vm) == (LOW_DEVICE + 8, 8, False)
    vm.run(data=b"\x22" * 8)
    assert vm.outcome().system.fpu.xmm[0] == int.from_bytes(b"\x11" * 8 + b"\x22" * 8, "little")


def test_sixteen_bytes_are_two_exits_for_a_write():
    vm = PathVm(path_case("ept-violation", code="0f2907", rdi=LOW_DEVICE, devices=[mmio()]))
    vm.machine.ctxt.fpu.xmm[0] = int.from_bytes(bytes(range(16)), "little")
    vm.enter()
    assert (exit_of(vm), vm.exit.data["data"]) == ((LOW_DEVICE, 8, True), bytes(range(8)))
    vm.run()
    assert (exit_of(vm), vm.exit.data["data"]) == ((LOW_DEVICE + 8, 8, True), bytes(range(8, 16)))
    assert not vm.run().left


@pytest.mark.parametrize(
    ("code", "addr", "places"),
    [
        ("488b07", HIGH_DEVICE - 3, [(HIGH_DEVICE, 5)]),  # memory, then the device
        ("488b07", LOW_DEVICE + 0xFFD, [(LOW_DEVICE + 0xFFD, 3)]),  # the device, then memory
        ("488b07", HIGH_DEVICE + 0xFFD, [(HIGH_DEVICE + 0xFFD, 3), (HIGH_DEVICE + 0x1000, 5)]),
        (
            "0f1007",
            HIGH_DEVICE + 0xFF7,
            [(HIGH_DEVICE + 0xFF7, 8), (HIGH_DEVICE + 0xFFF, 1), (HIGH_DEVICE + 0x1000, 7)],
        ),
    ],
)  # fmt: skip
def test_two_pages_are_two_fragments_of_pieces(code, addr, places):
    devices = [mmio(reads=BYTES), mmio(HIGH_DEVICE, 0x2000, behaviour="float")]
    vm = enter("fep", code=code, rdi=addr, devices=devices)
    asked = []
    while vm.left:
        asked.append(exit_of(vm)[:2])
        vm.run(data=b"\xaa" * 8)
    assert asked == places


def test_a_write_of_two_fragments():
    vm = enter("fep", code="488907", rdi=HIGH_DEVICE + 0xFFD, rax=0x0807060504030201,
               devices=[mmio(HIGH_DEVICE, 0x2000)])  # fmt: skip
    assert exit_of(vm) == (HIGH_DEVICE + 0xFFD, 3, True)
    assert vm.exit.data["data"] == b"\x01\x02\x03"
    vm.run()
    assert exit_of(vm) == (HIGH_DEVICE + 0x1000, 5, True)
    assert vm.exit.data["data"] == b"\x04\x05\x06\x07\x08"
    assert not vm.run().left


def test_a_fault_on_the_second_page_takes_the_first_back():
    """Nothing is reported of the part that hit the device; memory would have been written."""
    vm = enter("fep", code="488907", rdi=HIGH_DEVICE + 0xFFD, devices=[mmio(HIGH_DEVICE)])
    assert (vm.left, vm.pending) == (False, (14, 2, HIGH_DEVICE + 0x1000))
    assert not vm.machine.mmio.needed


@pytest.mark.parametrize(("mode", "second"), [("prot32", 0x0), ("prot64", 0x1_0000_0000)])
def test_the_second_page_is_below_4_gib_outside_64_bit_mode(mode, second):
    devices = [mmio(0xFFFFF000), mmio(0), mmio(0x1_0000_0000)]
    vm = enter("fep", mode, "8b07", rdi=0xFFFFFFFE, devices=devices)
    assert exit_of(vm) == (0xFFFFFFFE, 2, False)
    assert exit_of(vm.run(data=b"\1\2")) == (second, 2, False)


def test_xchg_with_a_device_reads_and_writes():
    outcome = run_path("ept-misconfig", code="8707", rdi=LOW_DEVICE, rax=7, devices=[mmio(reads=BYTES)])
    assert accesses(outcome) == [("read", LOW_DEVICE, "01020304"), ("write", LOW_DEVICE, "07000000")]
    assert reg(outcome, "rax") == 0x04030201


def test_movs_from_one_device_to_another():
    devices = [mmio(reads=BYTES), mmio(HIGH_DEVICE)]
    outcome = run_path("ept-misconfig", code="48a5", rsi=LOW_DEVICE, rdi=HIGH_DEVICE, devices=devices)
    assert accesses(outcome) == [
        ("read", LOW_DEVICE, "0102030405060708"), ("write", HIGH_DEVICE, "0102030405060708")
    ]  # fmt: skip


def test_rep_movs_to_a_device_leaves_after_each_element():
    outcome = run_path("ept-misconfig", code="f3a4", rsi=0x8000, rdi=LOW_DEVICE, rcx=3, devices=[mmio()],
                       data={0x8000: b"abc"})  # fmt: skip
    assert accesses(outcome) == [("write", LOW_DEVICE, "61")]
    assert (outcome.rip, reg(outcome, "rcx"), reg(outcome, "rdi")) == (0x6000, 2, LOW_DEVICE + 1)


# -- in-kernel devices ---------------------------------------------------------------------------


def test_an_ioeventfd_takes_a_write():
    fds = [{"addr": LOW_DEVICE, "len": 4, "datamatch": 7}]
    vm = enter("ept-misconfig", code="8907", rdi=LOW_DEVICE, rax=7, devices=[mmio()], kvm={"ioeventfds": fds})
    assert (vm.left, vm.rip) == (False, 0x6002)


@pytest.mark.parametrize(
    ("fd", "rax"),
    [
        ({"addr": LOW_DEVICE, "len": 4, "datamatch": 7}, 8),
        ({"addr": LOW_DEVICE, "len": 2}, 7),
        ({"addr": LOW_DEVICE + 4, "len": 4}, 7),
    ],
)
def test_an_ioeventfd_that_does_not_match(fd, rax):
    vm = enter("ept-misconfig", code="8907", rdi=LOW_DEVICE, rax=rax, devices=[mmio()],
               kvm={"ioeventfds": [fd]})  # fmt: skip
    assert exit_of(vm) == (LOW_DEVICE, 4, True)


def test_an_ioeventfd_takes_the_first_half_of_sixteen_bytes():
    """Only the rest is left for userspace (handled bytes are skipped)."""
    fds = [{"addr": LOW_DEVICE, "len": 8}]
    vm = enter("ept-violation", code="0f2907", rdi=LOW_DEVICE, devices=[mmio()], kvm={"ioeventfds": fds})
    assert exit_of(vm) == (LOW_DEVICE + 8, 8, True)
    assert not vm.run().left


def test_an_ioeventfd_takes_one_side_of_a_split_write():
    fds = [{"addr": HIGH_DEVICE + 0x1000, "len": 4}]
    vm = enter("fep", code="488907", rdi=HIGH_DEVICE + 0xFFC, rax=0x0807060504030201,
               devices=[mmio(HIGH_DEVICE, 0x2000)], kvm={"ioeventfds": fds})  # fmt: skip
    assert exit_of(vm) == (HIGH_DEVICE + 0xFFC, 4, True)
    assert not vm.run().left


def test_an_ioeventfd_cannot_be_read():
    fds = [{"addr": LOW_DEVICE, "len": 4}]
    vm = enter("ept-violation", code="8b07", rdi=LOW_DEVICE, devices=[mmio()], kvm={"ioeventfds": fds})
    assert exit_of(vm) == (LOW_DEVICE, 4, False)


def test_the_local_apic_is_read_and_written_in_the_kernel():
    write = enter("fep", code="8907", rdi=APIC_TPR, rax=0x30, knobs={"irqchip": True})
    read = enter("fep", code="8b07", rdi=APIC_TPR, knobs={"irqchip": True}, kvm={"lapic": {0x80: 0x20}})
    assert (write.left, write.vcpu.apic.get_reg(0x80)) == (False, 0x30)
    assert (read.left, read.reg("rax")) == (False, 0x20)


@pytest.mark.parametrize(
    ("code", "addr", "asked"),
    [
        ("488b07", 0xFEDFFFFC, (0xFEDFFFFC, 4, False)),
        ("488b07", 0xFEE00FFC, (0xFEE01000, 4, False)),
        ("488907", 0xFEDFFFFC, (0xFEDFFFFC, 4, True)),
        ("488907", 0xFEE00FFC, (0xFEE01000, 4, True)),
    ],
)
def test_the_local_apic_takes_its_part_of_a_split_access(code, addr, asked):
    devices = [mmio(0xFEDFF000), mmio(0xFEE01000)]
    vm = enter("fep", code=code, rdi=addr, rax=0x0807060504030201, devices=devices, knobs={"irqchip": True})
    assert exit_of(vm) == asked
    if asked[2]:
        assert vm.exit.data["data"] == (b"\x01\x02\x03\x04" if addr == asked[0] else b"\x05\x06\x07\x08")
    assert not vm.run(data=b"\xaa" * 4).left
    if not asked[2]:
        assert vm.reg("rax") == (0xAAAAAAAA if addr == asked[0] else 0xAAAAAAAA << 32)


def test_without_an_in_kernel_apic_its_page_is_userspace_s():
    vm = enter("ept-violation", code="8b07", rdi=APIC_TPR, devices=[mmio(0xFEE00000)])
    assert exit_of(vm) == (APIC_TPR, 4, False)


def test_the_apic_page_is_a_device_even_where_memory_is():
    """Memory at the APIC's address is never reached by the emulator."""
    vm = enter("fep", code="8b07", rdi=APIC_TPR, data={0xFEE00000: b"\x99" * 0x100})
    assert exit_of(vm) == (APIC_TPR, 4, False)


# -- memory --------------------------------------------------------------------------------------


def test_a_write_to_a_read_only_slot_is_a_device_s():
    slots = [{"base": 0, "size": 0x8000}, {"base": 0x8000, "size": 0x1000, "flags": 2},
             {"base": 0x9000, "size": 0x4000}]  # fmt: skip
    vm = enter("ept-violation", code="8907", rdi=0x8000, rax=7, kvm={"memslots": slots})
    assert exit_of(vm) == (0x8000, 4, True)
    read = enter("fep", code="8b07", rdi=0x8000, kvm={"memslots": slots}, data={0x8000: b"\x05"})
    assert (read.left, read.reg("rax")) == (False, 5)


def test_a_failed_exchange_leaves_memory():
    vm = enter("fep", code="f00fb10f", rdi=0x8000, rax=1, rcx=2, data={0x8000: b"\x09"})
    assert (vm.mem(0x8000, 1), vm.reg("rax")) == (b"\x09", 9)


# -- tracepoints ---------------------------------------------------------------------------------


def traced(vm: PathVm) -> list[tuple]:
    assert vm.vcpu.trace is not None
    return [tuple(event.fields.values()) for event in vm.vcpu.trace.events if event.name == "kvm_mmio"]


def test_trace_of_a_read():
    vm = enter("ept-misconfig", code="8b07", rdi=LOW_DEVICE, devices=[mmio(reads=BYTES)], trace=True)
    vm.finish()
    assert traced(vm) == [("unsatisfied-read", 4, LOW_DEVICE, 0), ("read", 4, LOW_DEVICE, 0x04030201)]


def test_trace_of_a_read_of_sixteen_bytes_names_the_last_piece():
    """The fragment's address has moved on by the time the answer is traced."""
    vm = enter("ept-misconfig", code="0f2807", rdi=LOW_DEVICE, devices=[mmio(reads=BYTES)], trace=True)
    vm.finish()
    assert traced(vm) == [
        ("unsatisfied-read", 16, LOW_DEVICE, 0), ("read", 16, LOW_DEVICE + 8, 0x0807060504030201)
    ]  # fmt: skip


def test_trace_of_a_split_read_counts_the_second_page_only():
    vm = enter("fep", code="488b07", rdi=LOW_DEVICE + 0xFFD, devices=[mmio()], trace=True)
    assert traced(vm) == [("unsatisfied-read", 5, LOW_DEVICE + 0xFFD, 0)]


def test_trace_of_a_write():
    vm = enter("ept-misconfig", code="8907", rdi=LOW_DEVICE, rax=7, devices=[mmio()], trace=True)
    assert traced(vm) == [("write", 4, LOW_DEVICE, 7)]


def matches(vm: PathVm) -> list[tuple]:
    assert vm.vcpu.trace is not None
    return [tuple(event.fields.values()) for event in vm.vcpu.trace.events if event.name == "vcpu_match_mmio"]


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("ept-misconfig", "8b07", [(LOW_DEVICE, LOW_DEVICE, False, True)]),  # by the exit's address
        ("ept-misconfig", "a6", [(LOW_DEVICE, LOW_DEVICE, False, True)]),  # by the tables
        ("fep", "8b07", []),  # nothing was cached
    ],
)
def test_trace_of_a_match(path, code, expected):
    vm = enter(path, code=code, rdi=LOW_DEVICE, rsi=LOW_DEVICE, devices=[mmio()], trace=True)
    assert matches(vm) == expected


def test_trace_of_a_match_by_the_linear_address():
    """Shadow paging caches linear addresses, so that the tables are not walked again."""
    pages = {LOW_DEVICE: b""}  # for its page-table entry; no memslot has the page
    slots = [
        {"base": 0, "size": LOW_DEVICE},
        {"base": 0xC000, "size": 0x1000},
        {"base": 0x100000, "size": 0x4000},
    ]
    vm = enter("shadow-pf", code="8907", rdi=LOW_DEVICE, physical=True, devices=[mmio()], data=pages,
               kvm={"memslots": slots}, trace=True)  # fmt: skip
    assert matches(vm) == [(LOW_DEVICE, LOW_DEVICE, True, False)]


def test_the_apic_s_page_needs_no_match():
    vm = enter("fep", code="8b07", rdi=APIC_TPR, trace=True, devices=[mmio(APIC_TPR & ~0xFFF)])
    assert (exit_of(vm), matches(vm)) == ((APIC_TPR, 4, False), [])


def test_an_exchange_on_a_read_only_page_is_a_write_to_a_device():
    """The slot has no writable memory, so it becomes a plain write, which is userspace's."""
    slots = [{"base": 0, "size": 0x8000}, {"base": 0x8000, "size": 0x1000, "flags": 2}]
    vm = enter("fep", code="f00107", rdi=0x8000, rax=5, kvm={"memslots": slots})
    assert exit_of(vm) == (0x8000, 4, True)


@pytest.mark.parametrize(("size", "last"), [(1, 0), (8, 0), (9, 8), (16, 8)])
def test_last_piece_of_a_fragment(size, last):
    assert MmioFragment(0x1000, size, b"").last_piece == 0x1000 + last
