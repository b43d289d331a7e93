"""The cluster of our own: on the loopback interface, gone without a trace; and addresses of others."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import misbehaving
from support.misbehaving import Twin, setup_with
from support.pools import alive, children, until

from emufuzz.fuzz.workers.choose import WorkersError, make_pool
from emufuzz.fuzz.workers.local import WorkerUnavailableError

DRIVER = """
import sys
from support.misbehaving import Twin, setup_with
from support.pools import children, until_idle
from emufuzz.fuzz.workers.choose import make_pool
if __name__ == "__main__":
    pool = make_pool("ray:1", setup_with(Twin))
    pool.start()
    until_idle(pool)
    print("ready", flush=True)
    sys.stdin.readline()
    pool.close()
    print("closed", flush=True)
    sys.stdin.readline()
"""
#: 127.0.0.1 and ::1 as /proc has them, and the former as an address of IPv6.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture
def ray_parts():
    """The module under test and the one of Ray that it changes; skipped only where the library is missing."""
    if find_spec("ray") is None:
        pytest.skip("ray: the package is missing")
    return import_module("emufuzz.fuzz.workers.ray_cluster"), import_module("ray._private.services")


def test_a_node_that_registers_late_is_waited_for(monkeypatch, ray_parts):
    ray_cluster, services = ray_parts
    asked = []

    def late(address, node):
        asked.append(node)
        if len(asked) < 4:
            raise RuntimeError("not yet")
        return address, node

    monkeypatch.setattr(services, "get_node", late)
    monkeypatch.setattr(ray_cluster, "_PAUSE", 0.0)
    monkeypatch.setattr(ray_cluster, "_processes_of", lambda *_: [1])
    with ray_cluster.patient("/nowhere"):
        assert services.get_node("there", node="n") == ("there", "n")
    assert asked == ["n"] * 4
    assert services.get_node is late


@pytest.mark.parametrize(("seconds", "alive"), [(0.0, [1]), (1e9, [])])
def test_a_node_that_never_registers_or_has_died_is_an_error(monkeypatch, ray_parts, seconds, alive):
    ray_cluster, services = ray_parts

    def never(address):
        raise RuntimeError("no such node")

    monkeypatch.setattr(services, "get_node", never)
    monkeypatch.setattr(ray_cluster, "_START", seconds)
    monkeypatch.setattr(ray_cluster, "_processes_of", lambda *_: alive)
    with ray_cluster.patient("/nowhere"), pytest.raises(RuntimeError, match="no such node"):
        services.get_node("there")


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_start_that_fails_is_tried_again(monkeypatch, ray_parts, failures):
    ray_cluster, _ = ray_parts
    tried, environment = [], {"RAY_USAGE_STATS_ENABLED": "0"}

    def start(cpus):
        tried.append(cpus)
        if len(tried) <= failures:
            raise WorkerUnavailableError("ray: Ray does not start")
        return "cluster"

    monkeypatch.setattr(ray_cluster, "_start", start)
    monkeypatch.setattr(ray_cluster, "_ENVIRONMENT", environment)
    if failures < 3:
        assert ray_cluster.start_cluster(2) == "cluster"
        assert tried == [2] * (failures + 1)
    else:
        with pytest.raises(WorkerUnavailableError, match="does not start"):
            ray_cluster.start_cluster(2)
        assert tried == [2] * 3


def test_a_clusters_processes_are_known_by_its_directory(tmp_path, ray_parts):
    command = [sys.executable, "-c", "print(flush=True); input()", str(tmp_path / "socket")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()  # before, it may not have its command line yet
        assert ray_parts[0]._processes_of(str(tmp_path)) == [process.pid]
        assert ray_parts[0]._processes_of(str(tmp_path), "raylet/raylet") == []
        process.communicate(b"\n")
    assert ray_parts[0]._processes_of(str(tmp_path)) == []


@pytest.fixture
def driver(cluster, tmp_path):
    """A process with a cluster of its own, whose temporary files are in a directory of the test's."""
    short = Path(tempfile.mkdtemp(prefix="e"))  # the names of sockets are short
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    root = Path(misbehaving.__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests"))),
        "TMPDIR": str(short),
    }
    for name in [name for name in environment if name.startswith("RAY_")]:
        del environment[name]
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    process.short = short
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()
    subprocess.run(["rm", "-rf", str(short)], check=True)


def listening(pids):
    """Addresses that processes listen on."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            except OSError:
                continue
            inodes |= {found[1]} if found else set()
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def test_it_listens_on_the_loopback_interface_only_and_leaves_nothing(driver):
    pids = children(driver.pid)
    assert len(pids) > 3
    assert listening(pids) <= {
        "0100007F",
        "00000000000000000000000001000000",
        "0000000000000000FFFF00000100007F",
    }
    assert listening(pids)
    assert [path.name[:12] for path in driver.short.iterdir()] == ["emufuzz-ray-"]
    driver.stdin.write("\n")
    driver.stdin.flush()
    assert driver.stdout.readline() == "closed\n"
    until(lambda: not any(map(alive, pids)))
    assert list(driver.short.iterdir()) == []


def test_a_killed_driver_takes_everything_with_it_and_the_next_one_tidies_up(driver, monkeypatch):
    from emufuzz.fuzz.workers import ray_cluster

    pids = children(driver.pid)
    driver.kill()
    until(lambda: not any(map(alive, pids)))
    (left,) = driver.short.iterdir()
    monkeypatch.setattr(ray_cluster.tempfile, "gettempdir", lambda: str(driver.short))
    (driver.short / "emufuzz-ray-file").write_text("somebody else's")
    ray_cluster._remove_abandoned()
    assert not left.exists()
    assert (driver.short / "emufuzz-ray-file").exists()


def test_the_directory_of_a_cluster_that_lives_is_not_removed(driver, monkeypatch):
    from emufuzz.fuzz.workers import ray_cluster

    monkeypatch.setattr(ray_cluster.tempfile, "gettempdir", lambda: str(driver.short))
    ray_cluster._remove_abandoned()
    assert len(list(driver.short.iterdir())) == 1


@pytest.mark.parametrize("text", [
    "ray:nobody", "ray:host:99999", "ray:host:0", "ray:http://host:1", "ray:host:1;rm", "ray:,2", "ray:0",
    "ray:auto,0", "ray:auto,many", "ray:257", "ray:-1",
])  # fmt: skip
def test_addresses_that_cannot_be(cluster, text):
    with pytest.raises(WorkersError, match=r"expected an address as HOST:PORT or auto|must be 1 to 256"):
        make_pool(text, setup_with(Twin))


def test_an_address_where_nobody_listens_is_refused_at_once(cluster):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        WorkerUnavailableError, match=f"ray: no connection to 127.0.0.1:{port}: connection refused"
    ):
        make_pool(f"ray:127.0.0.1:{port},1", setup_with(Twin))


@pytest.mark.parametrize(("raised", "says"), [
    (Exception("timed out\nduring startup"), ": timed out during startup"),
    (ValueError("no such option"),           ": no such option"),
    (SystemExit(1),                          ""),
])  # fmt: skip
def test_a_cluster_that_does_not_start_is_one_line_and_leaves_nothing(
    cluster, monkeypatch, tmp_path, raised, says
):
    from emufuzz.fuzz.workers import ray_cluster

    def init(**_):
        raise raised

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(WorkerUnavailableError) as caught:
        ray_cluster.start_cluster(1)
    assert str(caught.value) == f"ray: Ray does not start{says}"
    assert list(tmp_path.iterdir()) == []
