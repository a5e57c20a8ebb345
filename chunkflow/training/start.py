"""How a recipe starts: its checked config, errors as one sentence, the log, garbage collection. Torch is
imported only where it is needed, so that a mistyped key is answered at once."""

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from chunkflow.settings.config import all_data_sections, asked_processes, check_processes, load_config
from chunkflow.settings.faults import add, collected, refuse
from chunkflow.settings.keys import show, to_toml
from chunkflow.settings.options import Config

logger = logging.getLogger(__name__)


def main_config(
    argv: list[str] | None = None,
    check: Callable | None = None,
    planned: bool = False,
    chooses: bool = False,
) -> Config:
    """The checked config of a command line, or a line `error: ...` on stderr for all that is wrong, and exit
    status 2.

    `check(config)` adds the recipe's rules: it raises ValueError, one sentence a line. With --check among the
    arguments the process ends after the checks. `planned`: see world_size. `chooses`: the recipe can do with
    "auto" for chunkflow.chunk_size, k and kv_offload.
    """
    argv = sys.argv[1:] if argv is None else argv
    only_check, faults = "--check" in argv, {}
    try:
        config = read_config([argument for argument in argv if argument != "--check"], chooses, faults)
        if _is_rank_0():  # one process looks at the file system
            check_paths(config, faults)
        with collected(faults):
            if check:
                check(config)
        planned = planned or only_check or config.comm.mode == "fake_backend"
        if not any("pipeline_parallel_degree = " in fault for fault in faults):  # else it will be another
            with collected(faults):
                check_processes(config, world_size(planned))
        refuse(faults)
    except ValueError as error:
        fail(error if _is_rank_0() else "")
    if only_check:
        print("config and paths are good")
        gc.freeze()  # a second less: the interpreter then ends without a collection over all of torch
        raise SystemExit(0)
    if _is_rank_0() and config.job.print_config:
        print(to_toml(config))
    return config


def options_beside_config(doc: str) -> argparse.ArgumentParser:
    """For a recipe with options of its own, besides the run's keys (`parse_known_args` gives both). What is
    wrong ends as in `fail`. `doc`: the recipe's docstring, whose first line is the description."""
    epilog = "The run's keys, such as --model.hf_assets_path, count too: see recipes/finetune.py --help."
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], epilog=epilog, allow_abbrev=False)
    parser.error = fail
    return parser


def fail(reason: object) -> NoReturn:
    """Ends with exit status 2, and a line for each sentence of the reason."""
    for sentence in str(reason).splitlines():
        print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def read_config(argv: list[str], chooses: bool = False, faults: dict[str, str] | None = None) -> Config:
    """The config of a command line; the folder model.hf_assets_path determines model.name and model.flavor,
    the adapter of lora.adapter_path its rank, alpha and target modules.
    ValueError for wrong settings, or where a folder's configuration cannot be used; with `faults`, that goes
    there, as in load_config. `chooses`: see main_config."""
    found = {} if faults is None else faults
    config = load_config(argv, found)
    for name in () if chooses else ("chunk_size", "k", "kv_offload"):
        if getattr(config.chunkflow, name) == "auto":
            value = "one" if name == "kv_offload" else "a number"
            sentence = (
                f'chunkflow.{name} = "auto" is chosen by recipes/finetune.py, dpo.py and plan.py: set'
                f" {value}, such as that in the config.toml of a run"
            )
            add(found, sentence, f"chunkflow.{name}")
    if config.lora.adapter_path:
        from chunkflow.training.lora import take_over

        with collected(found, "lora.adapter_path"):
            take_over(config.lora)
    if folder := config.model.hf_assets_path:
        from models.hf_config import model_of

        with collected(found, "model.hf_assets_path"):
            config.model.name, _ = model_of(folder)
            config.model.flavor = Path(folder).expanduser().resolve().name
    if faults is None:
        refuse(found)
    return config


def world_size(planned: bool = False) -> int:
    """The number of processes: torchrun's; without torchrun one or, if `planned`, NGPU x NNODES, which one
    process stands for (--check, recipes that only plan, the fake backend). ConfigError where these are not
    whole numbers of at least 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return asked_processes() if planned else 1


def check_paths(config: Config, faults: dict[str, str] | None = None) -> None:
    """ValueError unless the named files exist and job.dump_folder can be written; with `faults`, that goes
    there, as in load_config. Leaves no file behind."""
    found, model = {} if faults is None else faults, config.model
    if model.tokenizer_path and not Path(model.tokenizer_path).exists():
        sentence = (
            f"model.tokenizer_path = {show(model.tokenizer_path)} does not exist: name a tokenizer.json, a"
            " sentencepiece model, or a folder with one"
        )
        add(found, sentence, "model.tokenizer_path")
        model.tokenizer_path = ""
    for name, section in all_data_sections(config).items():
        if section.dataset in ("jsonl", "parquet"):
            from chunkflow.data.files import find_files

            with collected(found):
                find_files(section.dataset, section.dataset_path, name)
    folder = Path(config.job.dump_folder).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        sentence = (
            f"job.dump_folder = {show(config.job.dump_folder)} cannot be written ({folder}:"
            f" {error.strerror}): name another folder"
        )
        add(found, sentence, "job.dump_folder")
    if faults is None:
        refuse(found)


@contextmanager
def user_errors():
    """Turns ValueError and OSError (of data, model or disk) into `error: ...` on stderr and exit status 1.
    Ranks other than 0, whose error rank 0 may not have, leave the sentence to run_train.sh; without it they
    raise the error: torchrun then reports it."""
    try:
        yield
    except (OSError, ValueError) as error:
        sentence, folder = str(error), os.environ.get("CHUNKFLOW_CONTROL")
        if isinstance(error, OSError):
            sentence = f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"
        if folder:
            (Path(folder) / f"error_of_rank_{os.environ.get('RANK', '0')}").write_text(sentence)
        elif not _is_rank_0():
            raise
        if _is_rank_0():
            print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(1) from None


def init_logger() -> None:
    """Logs to stdout, one line a record, in torchtitan's format."""
    format = "[chunkflow] %(asctime)s - %(name)s - %(levelname)s - %(message)s"
    logging.basicConfig(level=logging.INFO, format=format, stream=sys.stdout, force=True)
    for library in ("matplotlib", "PIL", "torchao", "fsspec", "wandb"):  # not what they do inside
        logging.getLogger(library).setLevel(logging.WARNING)
    os.environ["KINETO_LOG_LEVEL"] = "5"  # silences the profiler's messages


class GarbageCollection:
    """Collects on all ranks at the same steps, so that none waits for another's collection within a step."""

    def __init__(self, every_steps: int):
        self.every_steps = every_steps
        gc.disable()
        self._collect("Initial GC collection", 2)
        gc.freeze()  # later collections, and the end of the process, then pass over all of torch

    def run(self, step: int) -> None:
        if step > 1 and step % self.every_steps == 0:
            self._collect("Performing periodic GC collection", 1)

    def _collect(self, reason: str, generation: int) -> None:
        start = time.perf_counter()
        gc.collect(generation)
        logger.info(f"[GC] {reason} took {time.perf_counter() - start:.2f} seconds")


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"
