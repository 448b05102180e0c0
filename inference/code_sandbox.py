"""The child process that runs generated code, started by `code_execution`.

It guards against accidents (a loop, a memory bomb, a fork bomb, deleted files, a call home), not against
an attacker: Python code that sets out to break Python is not held by audit hooks. Limits of the kernel come
first, an audit hook refuses what they do not cover. Imports the standard library only.
"""

import os
import resource
import sys

PASSED = b"passed"  # what the parent waits for: an early `exit(0)` is no pass

REFUSED = (
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.system",
    "subprocess.Popen", "resource.setrlimit", "ctypes.", "sqlite3.", "socket.",
)  # fmt: skip
# Events whose text arguments are changed paths, with the number of directory descriptors that end them.
CHANGES_FILES = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.symlink": 1, "os.chmod": 1, "os.chown": 1,
    "os.utime": 1, "os.rename": 2, "os.link": 2, "os.truncate": 0, "os.setxattr": 0, "os.removexattr": 0,
    "shutil.rmtree": 0, "shutil.move": 0,
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def set_limits(seconds: int, memory_bytes: int) -> None:
    """CPU time, address space, file size, open files and, for ordinary users, processes."""
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def refuse_the_outside(home: str) -> None:
    """Refuse processes, sockets and changes to files outside the directory `home`, from now on."""
    home = os.path.join(os.path.realpath(home), "")

    def inside(path: object) -> bool:
        if isinstance(path, int):
            return path < 0 or inside(os.readlink(f"/proc/self/fd/{path}"))
        return os.path.join(os.path.realpath(os.fsdecode(path)), "").startswith(home)

    def hook(event: str, args: tuple) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"generated code may not use {event}")
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not (flags or 0) & WRITES or path == os.devnull:
                return
            touched = (path,)
        elif event in CHANGES_FILES:
            touched = [arg for arg in args if isinstance(arg, str | bytes | os.PathLike)]
            touched += args[len(args) - CHANGES_FILES[event] :]
        else:
            return
        if not all(inside(path) for path in touched):
            raise PermissionError(f"generated code may not change files outside its directory ({event})")

    import _posixsubprocess  # multiprocessing spawns through it without an audit event

    def fork_exec(*_: object) -> int:
        raise PermissionError("generated code may not start processes")

    _posixsubprocess.fork_exec = fork_exec
    sys.addaudithook(hook)


def main() -> None:
    program, seconds, memory_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(program, encoding="utf-8") as file:
        source = file.read()
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    set_limits(seconds, memory_bytes)
    refuse_the_outside(os.getcwd())
    # Not `__main__`: an answer's own `if __name__ == "__main__"` is a script's business, not the tests'.
    exec(compile(source, program, "exec"), {"__name__": "answer"})
    os.write(verdict, PASSED)


if __name__ == "__main__":
    main()
