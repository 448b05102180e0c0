"""Unit tests for generated code, each in a process of its own with limits (see `code_sandbox`)."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SANDBOX = Path(__file__).with_name("code_sandbox.py")


@functools.cache
def network_namespace() -> tuple[str, ...]:
    """The command that starts a program without any network; () where the kernel does not let this user."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--map-root-user", "--net")
    permitted = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    return command if permitted else ()


def passes_tests(answer: str, tests: str, *, seconds: int = 10, memory_bytes: int = 1 << 30) -> bool:
    """Whether `answer` followed by `tests` (Python source) runs to its end without an exception.

    The process gets an empty temporary directory, no standard input, no network, no other program, at most
    `seconds` of wall and CPU time and `memory_bytes` of address space; its session is killed at the end.
    """
    with tempfile.TemporaryDirectory(prefix="pragnosia-code-") as home:
        program = Path(home, "program.py")
        program.write_text(f"{answer}\n\n{tests}\n", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [
                *network_namespace(),
                sys.executable,
                "-I",
                "-B",
                SANDBOX,
                program,
                str(seconds),
                str(memory_bytes),
            ],
            cwd=home,
            env={"PATH": os.defpath, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            verdict, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            verdict = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        return verdict == b"passed"
