"""Keeps what a benchmark prints as a dated Markdown file, with the machine, the versions and the command.

    python benchmarks/attention.py --markdown benchmarks/results

writes benchmarks/results/DATE-attention.md; a name that ends in .md is the file itself.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPO = Path(__file__).parent.parent
PACKAGES = ("torch", "torchao", "transformers")
# Variables that change figures, and so are a part of the command.
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA")


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, which may have --markdown besides: then the same command runs without it, in a
    process whose output is passed on, a file keeps that output, and this process ends with its status."""
    keeps = "keep the output, in a folder or in a file that ends in .md"
    parser.add_argument("--markdown", type=Path, metavar="PATH", help=keeps)
    parser.allow_abbrev = False  # the process below must not have it, however it is written
    options = parser.parse_args()
    if path := options.markdown:
        words = [word for word in sys.argv[1:] if not word.startswith("--markdown=")]
        while "--markdown" in words:
            place = words.index("--markdown")
            del words[place : place + 2]
        sys.exit(keep(path, words))
    return options


def keep(path: Path, arguments: list[str]) -> int:
    """Runs this script with these arguments, and writes the file if it succeeds; returns its status."""
    load, start, lines = os.getloadavg()[0], time.perf_counter(), []
    command = [sys.executable, "-u", sys.argv[0], *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode == 0:
        seconds = time.perf_counter() - start
        file = file_of(path, Path(sys.argv[0]).stem)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(report(arguments, "".join(lines), load, seconds), encoding="utf-8")
        print(f"kept in {file}", file=sys.stderr)
    return process.returncode


def file_of(path: Path, name: str) -> Path:
    """A file of its own in a folder; or the one that is named."""
    if path.suffix == ".md":
        return path
    number, file = 1, path / f"{date.today()}-{name}.md"
    while file.exists():
        number += 1
        file = path / f"{date.today()}-{name}-{number}.md"
    return file


def report(arguments: list[str], output: str, load: float, seconds: float) -> str:
    """The file's text. Output with a table in Markdown stands as it is, other output in a block."""
    table = any(line.startswith("|") for line in output.splitlines())
    return "\n".join([
        f"# {Path(sys.argv[0]).name}, {date.today()}", "",
        *facts(arguments),
        f"| load average before | {load:.1f} |",
        f"| took | {seconds:,.0f} s |", "",
        output.strip() if table else f"```text\n{output.strip()}\n```", "",
    ])  # fmt: skip


def facts(arguments: list[str]) -> list[str]:
    """The beginning of a table: this script's command, the machine, the versions."""
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    command = shlex.join([*given, "python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    rows = {"command": f"`{command}`", "machine": machine(), "versions": versions()}
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def machine() -> str:
    """CPU, how it multiplies bfloat16, cores, memory, GPUs."""
    names, flags = [platform.processor() or platform.machine()], ""
    with suppress(OSError):
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")] or names
        flags = next((line for line in cpus if line.startswith("flags")), "")
    bf16 = "AMX" if "amx_bf16" in flags else "no AMX" + ", no bf16 products" * ("avx512_bf16" not in flags)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        gpus = ["no GPU"]
    return "; ".join([f"{names[0]}, {cores} cores, {bf16}, {memory:.0f} GiB", *gpus])


def versions() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.strip()
    found = [f"commit {commit or 'unknown'}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
