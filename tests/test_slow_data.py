"""One machine tokenises for longer than comm.init_timeout_seconds; the others have the tokens already."""

import os
import time

import torch
import torch.distributed as dist

from tests.helpers.layouts import join, layout_config
from tests.helpers.processes import RECIPE, environment, rows_of, run_ranks, small_assets, start, write_rows

# Rank 1 has a cache of its own, which is empty, and takes its time to fill it.
SLOW_ON_RANK_1 = f"""
import os, runpy, time
from chunkflow.data import token_cache

recipe, write = runpy.run_path({str(RECIPE)!r}, run_name="recipe"), token_cache._write_cache


def write_slowly(*arguments):
    time.sleep(9)
    return write(*arguments)


if os.environ["RANK"] == "1":
    os.environ["CHUNKFLOW_CACHE"] += " of another machine"
    token_cache._write_cache = write_slowly
recipe["main"]()
"""


def test_a_machine_that_tokenises_long_holds_up_the_start_and_nothing_else(tmp_path):
    """Training's data and validation's. Without a limit from when all have come, rank 2 would end rank 0's wait."""
    slow, log = tmp_path / "slow.py", tmp_path / "log"
    slow.write_text(SLOW_ON_RANK_1)
    data = [write_rows(tmp_path / f"{name}.jsonl", [30, 20, 64, 5]) for name in ("rows", "valid")]
    options = [
        small_assets(tmp_path / "model"), f"--job.dump_folder={tmp_path / 'run'}", "--training.dataset=jsonl", f"--training.dataset_path={data[0]}",
        "--training.global_batch_size=3", "--training.steps=2", "--chunkflow.chunk_size=32", "--metrics.log_freq=1",
        "--metrics.no_enable_tensorboard", "--validation.enable", "--validation.dataset=jsonl", f"--validation.dataset_path={data[1]}",
        "--comm.init_timeout_seconds=8",
    ]  # fmt: skip
    statuses = start(slow, options, environment(tmp_path), log, 3).wait(150)
    assert statuses == [0, 0, 0], log.read_text()[-3000:]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "cache of another machine").is_dir()


def come_late(late):
    if int(os.environ["RANK"]) == late:
        time.sleep(7)
    config = layout_config()
    config.comm.init_timeout_seconds = 5
    join(config)
    one = torch.ones(())
    dist.all_reduce(one)
    return one.item()


def test_the_first_rank_may_be_the_last_to_come():
    assert run_ranks(come_late, 3, 0) == [3.0] * 3
