"""Runs recipes in processes forked from one that has imported torch already: the same code in as many
processes, seconds sooner.

What run_train.sh adds to it is tested with run_train.sh. As a program this file is that process; `Forks`
talks to it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).parent.parent.parent


class Forks:
    """A server of forks. Its `start` is like subprocess.Popen for one or several ranks of a recipe."""

    def __init__(self):
        environ = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.helpers.forks"]
        self.server = subprocess.Popen(
            command, cwd=REPO, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **question):
        print(json.dumps(question), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(
        self, recipe: str | Path, arguments: list[str], environ: dict[str, str], log: Path, processes: int = 1
    ) -> Job:
        """`environ` is all of the environment; several processes get torchrun's variables. Both output
        streams of all go to `log`."""
        ranks = [{}]
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                common = {
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(probe.getsockname()[1]),
                }
            ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        environs = [environ | own for own in ranks]
        return Job(
            self, self._ask(do="start", argv=[str(recipe), *arguments], environs=environs, log=str(log))
        )

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(10)


class Job:
    def __init__(self, forks: Forks, pids: list[int]):
        self.forks, self.pids = forks, pids

    def poll(self) -> list[int] | None:
        """Exit statuses of all processes (negative: of signals), or None while one runs."""
        return self.forks._ask(do="poll", pids=self.pids)

    def wait(self, seconds: float) -> list[int]:
        """The same, when all have ended. AssertionError after `seconds`, and then they are killed."""
        deadline = time.monotonic() + seconds
        while (statuses := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"processes {self.pids} did not end in {seconds} s")
            time.sleep(0.02)
        return statuses

    def signal(self, number: int) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL for all, and waits until they are gone."""
        self.signal(signal.SIGKILL)
        self.wait(30)


def serve() -> None:
    import torch.utils.tensorboard  # noqa: F401  what recipes import, once

    ended: dict[int, int] = {}
    running: set[int] = set()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "start":
            answer = []
            for environ in question["environs"]:
                pid = os.fork()
                if pid == 0:
                    become(question["argv"], environ, question["log"])
                answer.append(pid)
                running.add(pid)
        else:
            for pid in running & set(question["pids"]):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    running.discard(pid)
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = None if running & set(question["pids"]) else [ended[pid] for pid in question["pids"]]
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def become(argv: list[str], environ: dict[str, str], log: str) -> None:
    """Turns this fork into `python argv...`. It ends as that does, but for tidying up modules, which takes a
    second."""
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, closefd=False)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    status = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # waits for threads, as the interpreter does
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
