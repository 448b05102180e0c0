"""Generated code runs with limits: each test breaks out of one of them and must fail."""

import time
from pathlib import Path

import pytest

from inference.code_execution import network_namespace, passes_tests

RIGHT = "def add(a, b):\n    return a + b\n"


def test_right_answer_passes_and_wrong_answer_fails() -> None:
    assert passes_tests(RIGHT, "assert add(2, 3) == 5")
    assert not passes_tests(RIGHT, "assert add(2, 3) == 6")
    assert not passes_tests("def add(a, b:", "assert add(2, 3) == 5")


def test_own_directory_threads_and_output_are_allowed() -> None:
    tests = """
import shutil, tempfile, threading
from pathlib import Path
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "a").mkdir()
    Path(folder, "a", "b.txt").write_text("x")
    Path(folder, "a", "b.txt").rename(Path(folder, "c.txt"))
    shutil.copy(Path(folder, "c.txt"), "d.txt")
Path("d.txt").unlink()
seen = []
thread = threading.Thread(target=seen.append, args=(1,))
thread.start(); thread.join()
assert seen == [1]
print("x" * 1000000)
"""
    assert passes_tests("", tests)


@pytest.mark.parametrize(
    "leave", ["exit(0)", "import os; os._exit(0)", "import os; os.write(1, b'passed'); exit()"]
)
def test_leaving_early_is_no_pass(leave: str) -> None:
    assert not passes_tests(leave, "assert False")


def test_infinite_loop_is_killed() -> None:
    for loop in ("while True: pass", "import time; time.sleep(60)"):
        started = time.monotonic()
        assert not passes_tests(loop, "", seconds=2)
        assert time.monotonic() - started < 6


def test_memory_bomb_is_killed() -> None:
    assert passes_tests("block = bytearray(100 << 20)", "", memory_bytes=1 << 30)
    assert not passes_tests("block = bytearray(2 << 30)", "", memory_bytes=1 << 30)
    assert not passes_tests(
        "blocks = []\nwhile True: blocks.append(bytearray(16 << 20))", "", memory_bytes=1 << 28
    )


def test_network_is_refused() -> None:
    assert not passes_tests("import socket\nsocket.socket()", "")
    assert not passes_tests("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')", "")
    # The answer sees the hook's refusal, not a failed connection.
    refused = (
        "import socket\ntry:\n    socket.socket()\nexcept PermissionError:\n    pass\nelse:\n    assert False"
    )
    assert passes_tests(refused, "")


@pytest.mark.skipif(not network_namespace(), reason="the kernel lets this user make no network namespace")
def test_process_has_no_network_interface_but_loopback() -> None:
    assert passes_tests(
        "",
        "import os\nassert os.listdir('/sys/class/net') and open('/proc/net/route').read().count('\\n') <= 1",
    )


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "import os\nos.system('true')",
        "import multiprocessing as m\np = m.get_context('spawn').Process(target=print)\np.start()",
        "import os\nos.execv('/bin/true', ['true'])",
    ],
)
def test_processes_are_refused(bomb: str) -> None:
    assert not passes_tests(bomb, "", seconds=5)
    assert passes_tests(
        "try:\n" + "".join(f"    {line}\n" for line in bomb.split("\n")) + "except PermissionError: pass", ""
    )


def test_files_outside_are_safe(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    for harm in (
        f"open({str(kept)!r}, 'w')",
        f"import os\nos.remove({str(kept)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nfd = os.open({str(tmp_path)!r}, os.O_RDONLY)\nos.remove('kept.txt', dir_fd=fd)",
        f"import os\nos.rename({str(kept)!r}, 'mine.txt')",
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nopen('link/kept.txt', 'w')",
    ):
        assert not passes_tests(harm, ""), harm
        assert kept.read_text() == "kept", harm


def test_standard_input_is_empty() -> None:
    assert passes_tests("import sys", "assert sys.stdin.read() == ''")
