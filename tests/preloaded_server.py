"""A process that has imported the libraries and becomes, forked, any `python words…` that it is asked for.

    python tests/preloaded_server.py SOCKET PROGRAM

Importing torch, transformers and DeepSpeed takes five seconds of a process; a fork has them at once, and what
it does after the imports is as in a process that a shell starts. `tests/preloaded.py` asks; PROGRAM is what the
forks take for Python.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTED = (
    "training.pretrainer",
    "inference.chat",
    "inference.engines",
    "inference.evaluation",
    "inference.tree_of_thoughts",
    "data.loader",
    "matplotlib.figure",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.distributed.run",
    "torch.utils.tensorboard",
)


def serve(path: str) -> dict:
    """Fork once a request; returns in the forks alone, with what is asked of them.

    A connection sends one request with three files; the fork's process id comes back at once, the status of
    `os.waitpid` when it has ended. A connection that closes takes its fork with it, the standard input that
    ends takes the server.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                size, files, *_ = socket.recv_fds(connection, 8, 3)
                request = json.loads(connection.recv(int.from_bytes(size), socket.MSG_WAITALL))
                child = os.fork()
                if child == 0:
                    for held in selector.get_map().values():
                        if held.fd:
                            os.close(held.fd)
                    selector.close()
                    connection.close()
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                        os.close(file)
                    return request
                for file in files:
                    os.close(file)
                connection.send(child.to_bytes(4))
                ended = os.pidfd_open(child)
                selector.register(connection, selectors.EVENT_READ, child)
                selector.register(ended, selectors.EVENT_READ, (child, connection))
            elif isinstance(key.data, int):  # nobody waits any more
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)
            else:
                child, connection = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                status = os.waitpid(child, 0)[1]
                if connection in selector.get_map():
                    selector.unregister(connection)
                    connection.send(status.to_bytes(4))
                connection.close()


def become(words: list[str], variables: dict[str, str], directory: str) -> None:
    """Be `python words…` from here on."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(directory)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = words[0] == "-u"
    words = words[unbuffered:]
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stdout.reconfigure(write_through=unbuffered)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    kind = words[0]
    first = {"-c": "", "-m": directory}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:0] = [first, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-c":
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(words[1], vars(main))
    elif kind == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # else runpy warns
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


def exit_code(request: dict) -> int:
    try:
        become(**request)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    path, program = sys.argv[1:]
    sys.path[0] = str(REPOSITORY)
    for name in IMPORTED:
        importlib.import_module(name)
    import cpuinfo

    cpuinfo.get_cpu_info()
    del sys.path[0]
    gc.collect()
    gc.freeze()  # else the collector of each fork touches, and so copies, all of this
    request = serve(path)
    sys.executable = program
    code = exit_code(request)
    # As an interpreter ends, but for the teardown of all these modules, which takes a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
