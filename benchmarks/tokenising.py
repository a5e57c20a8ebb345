"""Seconds and memory that the first start with a data set takes, by the number of worker processes.

    python benchmarks/tokenising.py                                 # 20,000 chats in a parquet file
    python benchmarks/tokenising.py --rows 200000 --workers 2 --kind jsonl

Chats of 2 to 6 turns, 800 tokens on average, are cut out of Python's standard library; the tokenizer.json is
trained on it. For each number of workers (0: none) a process opens the data as a recipe does, twice. Memory
is the peak resident memory (VmHWM): of that process beyond what it had before, and of the largest worker.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pyarrow
from pyarrow import parquet
from result_files import new_parser, parse_args
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, trainers

from chunkflow.data import token_cache
from chunkflow.data.dataset import open_dataset
from chunkflow.data.files import python_files
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.data.workers import TokenisingProcess

SENTENCE = (
    "{rows:,} rows, {tokens:,} tokens in {seconds[0]:.1f} s ({speed:,.0f} a second), then {seconds[1]:.2f} s;"
    " {main} MiB more, a worker {worker} MiB"
)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    raw, marks = RawTokenizer(models.BPE()), ["<|im_start|>", "<|im_end|>"]  # ChatML is built in for these
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {"special_tokens": marks, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    raw.train_from_iterator(texts[::10], trainers.BpeTrainer(vocab_size=8000, **alphabet))
    raw.save(str(folder / "tokenizer.json"))


def chats(count: int, texts: list[str]):
    draw = random.Random(0)
    for _ in range(count):
        messages = []
        for role, length in (("user", 450), ("assistant", 1450)) * draw.randint(1, 3):
            text = draw.choice(texts)[draw.randrange(1000) :]
            content = text[: 20 + int(draw.expovariate(1 / length))]
            messages.append({"role": role, "content": content.strip() or "?"})
        yield {"messages": messages}


def write_rows(folder: Path, rows: int, kind: str, texts: list[str]) -> Path:
    path, made = folder / f"chats.{kind}", chats(rows, texts)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        return path
    schema = pyarrow.Table.from_pylist(list(chats(1, texts))).schema
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        while group := list(islice(made, 20_000)):
            file.write_table(pyarrow.Table.from_pylist(group, schema))
    return path


def peak_mib(process: int | str = "self") -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) >> 10


def measure(folder: Path, path: Path, workers: int) -> dict:
    peaks, kill, seconds = [0], TokenisingProcess.kill, []

    def kill_and_tell(worker: TokenisingProcess) -> None:
        peaks.append(peak_mib(worker._process.pid))
        kill(worker)

    token_cache.worker_count, TokenisingProcess.kill = lambda: workers, kill_and_tell
    tokenizer, before = Tokenizer(str(folder)), peak_mib()
    options = {"vocab_size": tokenizer.vocab_size, "seed": 0, "cache_dir": tempfile.mkdtemp(dir=folder)}
    for _ in range(2):
        start = time.perf_counter()
        data = open_dataset(path.suffix[1:], str(path), tokenizer, **options)
        seconds.append(time.perf_counter() - start)
    tokens, main = sum(data.lengths), peak_mib() - before
    figures = {"rows": len(data), "tokens": tokens, "seconds": seconds, "speed": tokens / seconds[0]}
    return figures | {"main": main, "worker": max(peaks)}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--kind", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parse_args(parser)
    if options.measure:
        print(json.dumps(measure(*map(Path, options.measure), options.workers[0])))
        return
    with tempfile.TemporaryDirectory() as name:
        texts = [Path(file).read_text(errors="replace") for file in python_files()]
        folder, texts = Path(name), [text for text in texts if len(text) > 1000]
        write_tokenizer(folder, texts)
        path = write_rows(folder, options.rows, options.kind, texts)
        time.sleep(3)  # the digest of a file is remembered when it has not changed for a while
        print(f"{path.stat().st_size / 2**20:,.0f} MiB of {options.kind}")
        for workers in options.workers:
            command = [sys.executable, __file__, "--workers", str(workers), "--measure", name, str(path)]
            figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"{workers} workers:", SENTENCE.format(**figures), flush=True)


if __name__ == "__main__":
    main()
