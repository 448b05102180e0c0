"""Triton kernels without a GPU: run in the interpreter, and compiled for each kind of GPU to see that they fit."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import interpreter

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB of shared memory that one program may have, by compute capability."""


def run_checks(checks: Iterable[Callable[[str], None]]) -> None:
    """Make every check in the interpreter and print its name.

    At every call of a function by a kernel the interpreter searches Triton's modules for what to replace, which
    takes longer than most functions; here it does so once for each module that holds functions.
    """
    patch, done = interpreter._patch_lang, set()

    def call(self, *arguments, **options):
        if id(self.fn.__globals__) not in done:
            patch(self.fn)
            done.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
    for check in checks:
        check("cpu")
        print(check.__name__, flush=True)


def interpreted(program: str) -> list[str]:
    """What a test file prints, in words, when it runs as a program in Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def assert_fits(
    kernel, types: dict, launch: dict, capability: int, directory: Path, registers: int, aligned=("E", "D")
) -> str:
    """Compile for one capability; nothing may spill, nor need more registers a thread than given. Returns the PTX.

    types: a type such as `*fp32` for each pointer, None or another constant for what is known when compiling, fp32
    for floats; whatever is not named is an int32. Pointers, and numbers named in `aligned`, are multiples of 16.
    """
    signature, attributes, constants = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = types.get(name, "i32")
        if not isinstance(kind, str):
            constants[name], kind = kind, "constexpr"
        signature[name] = kind
        if kind.startswith("*") or (name in aligned and kind == "i32"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options=launch)
    assert binary.metadata.shared <= SHARED[capability] * 1024
    file = directory / "kernel.ptx"
    file.write_text(binary.asm["ptx"])
    name = re.search(r"\.target (sm_\w+)", binary.asm["ptx"])[1]
    done = subprocess.run(
        [get_ptxas(capability).path, "-v", f"--gpu-name={name}", str(file), "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    assert re.findall(r"(\d+) bytes spill", done.stderr) == ["0", "0"], done.stderr
    assert int(re.search(r"Used (\d+) registers", done.stderr)[1]) <= registers, done.stderr
    return binary.asm["ptx"]
