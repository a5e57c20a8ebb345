"""Runs a function on several gloo processes, with a time limit, and ends them whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback


def _child(function, rank, world_size, port, arguments, results):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_ranks(function, world_size: int, *arguments, seconds: float = 180) -> list:
    """What `function(*arguments)` returned on each rank. RuntimeError with a rank's traceback if one raised
    or time ran out."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # Ranks are forked from a process that has imported torch, once for all tests, and nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["chunkflow.execution.pipeline_stage", "chunkflow.storage.checkpoint", "tests.helpers.reference"]
    )
    results = context.Queue()
    processes = [
        context.Process(
            target=_child, args=(function, rank, world_size, port, arguments, results), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers, deadline = {}, time.monotonic() + seconds
    try:
        while len(answers) < world_size:
            try:
                rank, answer, error = results.get(timeout=max(0.1, deadline - time.monotonic()))
            except Exception:
                raise RuntimeError(
                    f"ranks {sorted(set(range(world_size)) - set(answers))} gave no answer in {seconds} s"
                ) from None
            if error:
                raise RuntimeError(f"rank {rank}:\n{error}")
            answers[rank] = answer
    finally:
        for process in processes:
            process.join(5 if len(answers) == world_size else 0.1)
            process.kill()
    return [answers[rank] for rank in range(world_size)]
