"""Blocks of rows tokenised in several processes, which import no torch and end with this one.

Threads would share the interpreter's lock, and multiprocessing would import the recipe once more.
"""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from chunkflow.data.blocks import Block
from chunkflow.data.rows import RowSettings
from chunkflow.data.tokenise import TokenBlock, tokenise_block

BYTES_OF_WORKER = 2 << 20  # of files: less is done before another process has started
BLOCKS_OF_WORKER = 2  # that are being made, are on their way, or wait for their turn


def worker_count(size: int) -> int:
    """How many processes should tokenise files of `size` bytes; 0: this one does."""
    cores = len(os.sched_getaffinity(0))
    count = min(cores, size // BYTES_OF_WORKER)
    return count if count > 1 else 0


def tokenise_blocks(
    blocks: Iterable[Block], settings: RowSettings, workers: int
) -> Iterator[tuple[int, TokenBlock]]:
    """Each block's `done` and its sequences, in order, by so many processes; 0: by this one.

    The ValueError of `blocks`, or of a block with a faulty row, comes after all blocks before it. No more
    than workers x BLOCKS_OF_WORKER blocks are held at a time.
    """
    if not workers:
        for block in blocks:
            yield block.done, tokenise_block(block, settings)
        return
    processes = [TokenisingProcess(settings) for _ in range(workers)]
    threads, idle, pending = ThreadPoolExecutor(workers), SimpleQueue(), deque()
    for process in processes:
        idle.put(process)

    def tokenise(block: Block) -> TokenBlock:
        process = idle.get()
        try:
            return process(block)
        finally:
            idle.put(process)

    def futures() -> Iterator[tuple[int, Future]]:
        try:
            for block in blocks:
                yield block.done, threads.submit(tokenise, block)
        except ValueError as error:
            failed = Future()
            failed.set_exception(error)
            yield 0, failed

    try:
        for ahead in futures():
            pending.append(ahead)
            if len(pending) == workers * BLOCKS_OF_WORKER:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


class TokenisingProcess:
    """Calls `tokenise_block` in a process of its own."""

    def __init__(self, settings: RowSettings):
        command = [sys.executable, "-m", "chunkflow.data.workers"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # both tokenizers would start threads for all cores
        environ = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        try:  # a session of its own: Ctrl-C does not reach it
            self._process = subprocess.Popen(command, **pipes, env=environ, start_new_session=True)
        except OSError as error:
            raise ValueError(
                f"a process to tokenise in cannot be started ({error.strerror}): start again where there is"
                " more memory, or with fewer cores (taskset)"
            ) from None
        self._settings: RowSettings | None = settings  # sent with the first block

    def __call__(self, block: Block) -> TokenBlock:
        """ValueError for a faulty row, and where the process has ended."""
        process = self._process
        try:
            for message in filter(None, (self._settings, block)):
                pickle.dump(message, process.stdin)
            process.stdin.flush()
            self._settings = None
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            process.kill()  # if it still runs, it cannot be talked to
            status = process.wait()
            raise ValueError(
                f"{block.path}:{block.first}: the process that tokenised from this row on has ended (status"
                f" {status}), perhaps for want of memory: start again where there is more, or with fewer"
                " cores (taskset)"
            ) from None
        if isinstance(answer, TokenBlock):
            return answer
        raise answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """After `kill`, when no thread uses it any more."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what it did not read any more
                pipe.close()


def main() -> None:
    # Signals may reach all processes of a job; the process that started this one decides what becomes of it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not come between answers
    try:
        settings = pickle.load(questions)
        while True:
            block = pickle.load(questions)
            try:
                answer = tokenise_block(block, settings)
            except ValueError as error:
                answer = ValueError(str(error))
            except Exception:
                answer = RuntimeError(f"a process that tokenises has failed:\n{traceback.format_exc()}")
            pickle.dump(answer, answers)
            answers.flush()
    except (EOFError, BrokenPipeError):  # the other process has ended
        os._exit(0)


if __name__ == "__main__":
    main()
