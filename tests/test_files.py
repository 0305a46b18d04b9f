"""Files that are whole or absent, and what a killed process leaves of them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastspec.files import whole_file, write_atomically

fcntl = pytest.importorskip("fcntl")


def killed_while_writing(path):
    program = (
        "import os, signal, sys\n"
        "from fastspec.files import whole_file\n"
        "with whole_file(sys.argv[1]) as f:\n"
        "    f.write(b'half')\n"
        "    f.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -signal.SIGKILL
    (left,) = [p for p in path.parent.iterdir() if p.name.startswith(f".{path.name}.")]
    return left


def age(path, seconds=3600):
    past = time.time() - seconds
    os.utime(path, (past, past))


def test_what_a_kill_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "basis [1].safetensors"
    path.write_bytes(b"former")
    left = killed_while_writing(path)
    other = killed_while_writing(tmp_path / "basis [1].json")
    age(left)
    age(other)
    assert path.read_bytes() == b"former"
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert not left.exists()
    assert other.exists()


def test_a_file_that_is_being_written_stays(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as f:
        f.write(b"first")
        f.flush()
        (mine,) = tmp_path.iterdir()
        age(mine)
        write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_fresh_file_stays_for_it_may_not_be_locked_yet(tmp_path):
    left = killed_while_writing(tmp_path / "file")
    write_atomically(tmp_path / "file", b"whole")
    assert left.exists()


def test_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device.*adapter"),
        whole_file(tmp_path / "adapter"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
