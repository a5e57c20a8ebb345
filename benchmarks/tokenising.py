"""Seconds and memory that the first start with a data set takes, by the number of worker processes.

    python benchmarks/tokenising.py                                 # 20,000 chats in a parquet file
    python benchmarks/tokenising.py --rows 200000 --workers 2 --kind jsonl

Chats of 2 to 6 turns, 1,000 tokens on average, cut out of the sources of Python's standard library, with a
tokenizer.json trained on them and ChatML. Each number of workers (0: the process tokenises by itself) has a
process of its own, which opens the data set as a recipe does, twice: the second time there is nothing to do.

Memory is the peak resident memory (VmHWM, Linux): of the process beyond what it had before, and of the
largest worker.
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
from pathlib import Path

import pyarrow
from pyarrow import parquet

from chunkflow.data import token_cache
from chunkflow.data.dataset import open_dataset
from chunkflow.data.files import python_files
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.data.workers import TokenisingProcess

ROW_GROUP = 20_000
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    raw, marks = RawTokenizer(models.BPE()), ["<|im_start|>", "<|im_end|>"]
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": marks, "initial_alphabet": alphabet, "show_progress": False}
    raw.train_from_iterator(texts[::10], trainers.BpeTrainer(vocab_size=8000, **options))
    raw.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": marks[1], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def chats(count: int, texts: list[str]):
    draw = random.Random(0)
    for _ in range(count):
        messages = []
        for role, length in (("user", 450), ("assistant", 1450)) * draw.randint(1, 3):
            text = draw.choice(texts)
            start = draw.randrange(len(text))
            content = text[start : start + 20 + int(draw.expovariate(1 / length))]
            messages.append({"role": role, "content": content.strip() or "?"})
        yield {"messages": messages}


def write_rows(folder: Path, rows: int, kind: str, texts: list[str]) -> Path:
    path, made = folder / f"chats.{kind}", chats(rows, texts)
    if kind == "jsonl":
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        return path
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    schema = pyarrow.schema([("messages", pyarrow.list_(message))])
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        for start in range(0, rows, ROW_GROUP):
            group = [next(made) for _ in range(min(ROW_GROUP, rows - start))]
            file.write_table(pyarrow.Table.from_pylist(group, schema))
    return path


def peak_mib(process: int | str = "self") -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) >> 10


def measure(folder: Path, path: Path, workers: int) -> dict:
    peaks, kill = [0], TokenisingProcess.kill

    def look_and_kill(worker: TokenisingProcess) -> None:
        peaks.append(peak_mib(worker._process.pid))
        kill(worker)

    token_cache.worker_count, TokenisingProcess.kill = lambda: workers, look_and_kill
    tokenizer, before, figures = Tokenizer(str(folder)), peak_mib(), {}
    for name in ("seconds", "again"):
        start = time.perf_counter()
        data = open_dataset(
            path.suffix[1:], str(path), tokenizer, vocab_size=tokenizer.vocab_size, seed=0,
            cache_dir=str(folder / f"cache{workers}"),
        )  # fmt: skip
        figures[name] = time.perf_counter() - start
    figures |= {"main": peak_mib() - before, "worker": max(peaks)}
    return figures | {"tokens": sum(data.lengths), "rows": len(data)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--kind", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*map(Path, options.measure), options.workers[0])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), [Path(file).read_text(errors="replace") for file in python_files()]
        texts = [text for text in texts if text]
        write_tokenizer(folder, texts)
        path = write_rows(folder, options.rows, options.kind, texts)
        time.sleep(3)  # the digest of a file is remembered when it has not changed for a while
        print(f"{path.stat().st_size / 2**20:,.0f} MiB of {options.kind}")
        for workers in options.workers:
            command = [sys.executable, __file__, "--workers", str(workers), "--measure", name, str(path)]
            figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            speed = f"{figures['tokens'] / figures['seconds']:,.0f} tokens a second"
            sentence = (
                "{rows:,} rows, {tokens:,} tokens in {seconds:.1f} s, again {again:.2f} s, {main} MiB more"
            )
            print(f"{workers} workers: {speed}, {sentence.format(**figures)}, worker {figures['worker']} MiB")


if __name__ == "__main__":
    main()
