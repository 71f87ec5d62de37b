"""Python in a process of its own that need not import torch and what compiles: 3 to 8 s of processor time each.

A nursery, one for each test session, is a process that has imported them, and has run nothing. What is asked of it runs
in a child: no graph, no cache, no thread and none of fxquant's modules is there before. Tests of imports, of hash seeds
and of what the environment says to them start Python itself.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codecache", "torch.onnx._internal")
COMMON = ("onnx", "onnxscript", "transformers.trainer")  # onnxruntime begins a thread, which no child would have


class Child:
    """One that was started: like `subprocess.Popen`, whose output waits in files."""

    def __init__(self, arguments: Sequence[str], status: IO[str], stdout: IO[str], stderr: IO[str]) -> None:
        self.args, self.status, self.stdout, self.stderr = list(arguments), status, stdout, stderr
        self.pid = int(status.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """What it returned and printed, once it has ended; it is killed where that takes more seconds."""
        if not select.select([self.status], [], [], timeout)[0]:
            self.kill()
        code = os.waitstatus_to_exitcode(int(self.status.readline()))
        said = []
        for file in (self.stdout, self.stderr):
            file.seek(0)
            said.append(file.read())
            file.close()
        self.status.close()
        return subprocess.CompletedProcess(self.args, code, *said)


def start(arguments: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Child:
    """``python arguments…``, of which ``-c``, ``-m``, ``-W`` and a script are known."""
    request = {"arguments": list(arguments), "env": dict(os.environ if env is None else env), "cwd": str(cwd)}
    stdout, stderr = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115 - Child closes
    ours, theirs = os.pipe()
    nursery = of_this_session()
    socket.send_fds(nursery, [b"!"], [stdout.fileno(), stderr.fileno(), theirs])
    os.close(theirs)  # so that what is read ends when the one that waits does
    message = json.dumps(request).encode()
    nursery.sendall(len(message).to_bytes(8, "big") + message)
    return Child(arguments, os.fdopen(ours), stdout, stderr)


def run(
    arguments: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return start(arguments, env, cwd).wait()


@functools.cache
def of_this_session() -> socket.socket:
    """The nursery, started when it is first asked for; it ends when this process does."""
    ours, theirs = socket.socketpair()
    end = theirs.fileno()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}  # numpy's would begin threads
    nursery = subprocess.Popen([sys.executable, "-m", "tests.forked", str(end)], cwd=ROOT, env=env, pass_fds=[end])
    theirs.close()
    atexit.register(nursery.wait)
    atexit.register(ours.close)
    return ours


# ---------------------------------------------------------------- the nursery


def main(asked: socket.socket) -> None:
    for name in (*TORCH, *(name for name in COMMON if importlib.util.find_spec(name.partition(".")[0]))):
        importlib.import_module(name)
        assert len(os.listdir("/proc/self/task")) == 1, f"{name} begins threads, of which a child would have one"
    assert "fxquant" not in sys.modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        token, files, _, _ = socket.recv_fds(asked, 1, 3)
        if not token:
            return
        request = json.loads(received(asked, int.from_bytes(received(asked, 8), "big")))
        if os.fork() == 0:
            asked.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return tended(request, *files)
        for file in files:
            os.close(file)


def received(asked: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        parts += asked.recv(size - len(parts))
    return parts


def tended(request: dict[str, Any], stdout: int, stderr: int, status: int) -> None:
    """Runs the request in a child, and says its number and how it ended."""
    child = os.fork()
    if child:
        os.write(status, f"{child}\n".encode())
        os.write(status, f"{os.waitpid(child, 0)[1]}\n".encode())
        os._exit(0)
    os.close(status)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if "OMP_NUM_THREADS" in os.environ:  # it was read when torch was imported
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    code = 0
    try:
        as_python(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # a second of taking down what was imported is left out


def as_python(arguments: list[str]) -> None:
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT))]  # the nursery's own
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    while arguments[0] == "-W":
        action, _, category = arguments[1].partition("::")
        warnings.simplefilter(action, pkgutil.resolve_name(category))  # type: ignore[arg-type]
        del arguments[:2]
    how, *rest = arguments
    if how == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.path.insert(0, str(Path(how).resolve().parent))
        sys.argv = arguments
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
