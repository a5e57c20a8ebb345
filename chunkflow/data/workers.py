"""Blocks of rows tokenised in several processes, which import no torch and end with this one.

Threads would share the interpreter's lock, and multiprocessing would import the recipe once more.
"""

import gc
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from queue import Empty, SimpleQueue

from chunkflow.data.blocks import Block
from chunkflow.data.rows import RowSettings
from chunkflow.data.tokenise import TokenBlock, tokenise_block

SMALL = 4  # blocks of a dataset that is tokenised before another process would have started
AHEAD = 2  # blocks of each worker that are being made, are on their way, or wait for their turn


def worker_count() -> int:
    """As many as there are cores that this process may use; 0 if it is alone: it tokenises by itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores if cores > 1 else 0


def tokenise_blocks(
    blocks: Iterator[Block], settings: RowSettings, workers: int
) -> Iterator[tuple[int, TokenBlock]]:
    """Each block's `done` and its sequences, in order, by at most so many processes. By this one if these are
    0, or the blocks no more than SMALL.

    The ValueError of `blocks`, or of a block with a faulty row, comes after all blocks before it. No more
    than workers x AHEAD blocks, or SMALL, are held at a time.
    """
    found = _and_fault(blocks)
    first = list(islice(found, SMALL + 1))
    found = chain(first, found)
    if not workers or len(first) <= SMALL:
        for block in found:
            yield _sound(block).done, tokenise_block(block, settings)
        return
    processes: list[TokenisingProcess] = []
    threads, idle, pending = ThreadPoolExecutor(workers), SimpleQueue(), deque()

    def tokenise(block: Block | ValueError) -> tuple[int, TokenBlock]:
        block = _sound(block)
        try:
            process = idle.get_nowait()
        except Empty:
            process = TokenisingProcess(settings)
            processes.append(process)
        try:
            return block.done, process(block)
        finally:
            idle.put(process)

    try:
        for block in found:
            pending.append(threads.submit(tokenise, block))
            if len(pending) == workers * AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


def _and_fault(blocks: Iterator[Block]) -> Iterator[Block | ValueError]:
    try:
        yield from blocks
    except ValueError as error:
        yield error


def _sound(block: Block | ValueError) -> Block:
    if isinstance(block, ValueError):
        raise block
    return block


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
        """When no thread uses it any more."""
        self._process.kill()
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
    gc.freeze()
    gc.disable()  # lists of numbers, in which there are no circles, would be looked through again and again
    try:
        settings = pickle.load(questions)
        while True:
            block = pickle.load(questions)
            gc.collect()  # of chat templates
            try:
                answer = tokenise_block(block, settings)
            except ValueError as error:
                answer = ValueError(str(error))
            except Exception:
                answer = RuntimeError(f"a process that tokenises has failed:\n{traceback.format_exc()}")
            pickle.dump(answer, answers)
            answers.flush()
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # the other process has ended
        os._exit(0)


if __name__ == "__main__":
    main()
