"""Processes to be killed: forked from one that has imported everything, so that each costs what it does and no more.

As a program, the server: it reads requests as lines of JSON and answers in the same way. `Forks` is its client.

    {"do": "import", "names": [...]}
    {"do": "shell", "command": "mount ..."}
    {"do": "start", "call": "module:function", "args": [...], "log": FILE, "stop": null, "file_size": null}
    {"do": "wait", "pid": N}
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


class Stop:
    """Kills its own process just before it changes the file system in a certain way.

    Args:
        below: the folder whose files count.
        number: which of the changes there; 0: none, all are counted.
        event: the audit event, such as `os.rename`, on a path that ends in `ends`, instead of the number.
    """

    def __init__(self, below: str, number: int = 0, event: str = "", ends: str = "") -> None:
        self.below, self.number, self.event, self.ends = below, number, event, ends
        self.seen = 0
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in _CHANGES
        if not changes:
            return
        paths = [os.fsdecode(a) for a in args if isinstance(a, str | bytes)]
        by_descriptor = event != "open" and isinstance(args[-1], int) and args[-1] > 2  # as rmtree goes
        if not by_descriptor and not any(p.startswith(self.below) for p in paths):
            return
        self.seen += 1
        if self.event:
            hit = event == self.event and any(p.startswith(self.below) and p.endswith(self.ends) for p in paths)
        else:
            hit = self.seen == self.number
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)


def _child(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code, most = 70, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        module, name = request["call"].split(":")
        function = getattr(importlib.import_module(module), name)
        if request["file_size"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], most[1]))
        stop = Stop(**request["stop"]) if request["stop"] else None
        code = function(*request["args"]) or 0
        if stop is not None and not (stop.number or stop.event):
            print(stop.seen)
    except BaseException:
        import traceback

        resource.setrlimit(resource.RLIMIT_FSIZE, most)  # of the log, too
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Do what the client asks for, until it is gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["do"] == "import":
            for name in request["names"]:
                importlib.import_module(name)
        elif request["do"] == "shell":
            done = subprocess.run(request["command"], shell=True, capture_output=True, text=True)
            answer = [done.returncode, done.stdout + done.stderr]
        elif request["do"] == "start":
            answer = os.fork()
            if answer == 0:
                _child(request)
        elif request["do"] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
        print(json.dumps(answer), file=answers, flush=True)


@dataclass
class Ended:
    """What became of a process."""

    code: int
    """Its exit code, or minus the signal's number."""
    said: str
    """Its stdout and stderr."""

    @property
    def error(self) -> str:
        """The last line, if it is the one that a command fails with."""
        last = self.said.strip().splitlines()[-1] if self.said.strip() else ""
        return last if last.startswith("slimdiff: error: ") and "Traceback" not in self.said else ""


class Fork:
    """A process that was started."""

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self.forks, self.pid, self.log = forks, pid, log

    def kill(self) -> Ended:
        """Kill it, if it is still there (until it is waited for, its pid is nobody else's)."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        """Until it has ended."""
        code = self.forks.ask("wait", pid=self.pid)
        return Ended(code, self.log.read_text(errors="replace"))


class Forks:
    """The server, in a mount namespace of its own where the kernel allows that."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.count = 0
        self.no_mounts = _why_no_mounts(scratch)
        command = [sys.executable, str(Path(__file__).resolve())]
        path = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            command if self.no_mounts else ["unshare", "-rm", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, do: str, **more: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **more}, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server of forks has died"
        return json.loads(line)

    def load(self, *names: str) -> None:
        """Import modules that all later processes have."""
        self.ask("import", names=names)

    def shell(self, command: str) -> str:
        """Run a command where mounts are its own."""
        code, said = self.ask("shell", command=command)
        assert code == 0, said
        return said

    def start(self, call: str, *args: Any, stop: dict[str, Any] | None = None, file_size: int | None = None) -> Fork:
        """Start a function `module:name`; see `Stop`. No file grows beyond `file_size`."""
        self.count += 1
        log = self.scratch / f"{self.count}.log"
        log.touch()  # it may be killed before it gets so far
        pid = self.ask("start", call=call, args=args, log=log, stop=stop, file_size=file_size)
        return Fork(self, pid, log)

    def run(self, call: str, *args: Any, **more: Any) -> Ended:
        """Start one and wait for it."""
        return self.start(call, *args, **more).wait()

    def command(self, argv: Sequence[Any], **more: Any) -> Fork:
        """Start a command of slimdiff."""
        return self.start("deploy.cli.app:main", [str(a) for a in argv], **more)


def _why_no_mounts(scratch: Path) -> str:
    if shutil.which("unshare") is None:
        return "there is no unshare"
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "slimdiff-test", str(scratch)]
    tried = subprocess.run(command, capture_output=True, text=True)
    return "" if tried.returncode == 0 else tried.stderr.strip() or "the kernel forbids it"


def until(true: Any, seconds: float = 120.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


if __name__ == "__main__":
    serve()
