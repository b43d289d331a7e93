"""Time in which a process waits for a processor does not count."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from support.pools import until

from emufuzz.fuzz.workers.clock import ProcessClock, waited

BUSY = "import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass"
ASLEEP = "import time\ntime.sleep(600)"


@pytest.fixture
def start():
    """Starts processes, and ends them."""
    running = []

    def process(program):
        running.append(subprocess.Popen([sys.executable, "-c", program]))
        return running[-1].pid

    yield process
    for each in running:
        each.kill()
        each.wait()


def test_a_process_that_has_to_share_a_processor_has_less_time_than_passes(start):
    cpu = min(os.sched_getaffinity(0))
    pid, *_ = (start(BUSY % cpu) for _ in range(4))
    clock, began = ProcessClock(pid), time.monotonic()
    before = waited(pid)
    until(lambda: waited(pid) > before + 0.5)
    passed = time.monotonic() - began
    assert clock.seconds() < passed - 0.4


def test_waiting_for_anything_else_counts(start):
    pid = start(ASLEEP)
    time.sleep(0.2)
    clock, began = ProcessClock(pid), time.monotonic()
    before = waited(pid)
    time.sleep(0.4)
    assert clock.seconds() >= time.monotonic() - began - (waited(pid) - before) - 0.05
    clock.restart()
    assert clock.seconds() < 0.4


def test_a_process_that_is_gone_has_waited_for_nothing():
    assert waited(0) == 0.0
    assert ProcessClock(0).seconds() < 60
