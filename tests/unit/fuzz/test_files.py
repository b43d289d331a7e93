"""Files appear whole or not at all, and nothing but files is replaced."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from emufuzz.fuzz.files import reason_of, write_atomically


def test_a_file_is_made_and_replaced(tmp_path):
    for data in (b"one", b"two"):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_is_replaced_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("x")
    for name, target in (("link", "precious"), ("dangling", "nothing")):
        (tmp_path / name).symlink_to(tmp_path / target)
        write_atomically(tmp_path / name, b"new")
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "precious").read_text() == "x"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["fifo", "socket", "link", "directory"])
def test_what_is_no_file_stays(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        Path("link").symlink_to("fifo")
        Path("directory").mkdir()
        before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
        with pytest.raises(OSError, match=r"not a regular file|Is a directory") as error:
            write_atomically(tmp_path / name, b"new")
        assert reason_of(error.value) in {"not a regular file", "is a directory"}
        assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before
