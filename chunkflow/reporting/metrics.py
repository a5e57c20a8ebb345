"""What a run says of itself: the log, the step line, metrics.jsonl, TensorBoard; and the device figures
behind them."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from chunkflow.planning.planner import Plan

logger = logging.getLogger(__name__)

GIB = 2**30


def init_logger() -> None:
    """One line a record on stdout, in torchtitan's shape."""
    logging.basicConfig(
        level=logging.INFO,
        format="[chunkflow] %(asctime)s - %(name)s - %(levelname)s - %(message)s",
        handlers=[logging.StreamHandler(sys.stdout)],
        force=True,
    )
    os.environ["KINETO_LOG_LEVEL"] = "5"  # the profiler's own messages


# ----------------------------------------------------------------------------------------------------- device


@dataclass
class Memory:
    """Peaks of this process since the last reset. On a CPU both are its resident memory."""

    active_gib: float
    reserved_gib: float
    alloc_retries: int = 0  # of the allocator, since the process began
    ooms: int = 0


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: the peak is then that of the whole run


def peak_memory(device: torch.device) -> Memory:
    if device.type == "cuda":
        figures = torch.cuda.memory_stats(device)
        return Memory(
            torch.cuda.max_memory_allocated(device) / GIB,
            torch.cuda.max_memory_reserved(device) / GIB,
            figures.get("num_alloc_retries", 0),
            figures.get("num_ooms", 0),
        )
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(peak / GIB, peak / GIB)


def _largest(one: Memory, other: Memory) -> Memory:
    return Memory(*map(max, astuple(one), astuple(other)))


def memory_capacity_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


# Dense bf16 FLOPs a second, from the data sheets; the first name that occurs in the device's counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI355X": 2500e12,
    "MI325X": 1300e12,
    "MI300X": 1300e12,
    "MI250X": 191.5e12,  # one of its two dies, which is what PyTorch calls a device
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second that mfu is relative to: the data sheet's, else what a matrix product in `dtype` reaches
    in 0.2 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return flops
    size = 1024
    a, b = (
        torch.ones(size, size, dtype=dtype, device=device),
        torch.ones(size, size, dtype=dtype, device=device),
    )
    fastest, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < 0.2 or fastest == math.inf:
        before = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - before)
    return 2 * size**3 / fastest


class GarbageCollection:
    """Collects on all ranks at the same steps, so that none waits for another's collector in mid-step."""

    def __init__(self, every_steps: int):
        self.every_steps = every_steps
        gc.disable()
        self._collect("Initial GC collection", 2)
        # what is there now stays: later collections, and the end of the process, need not look at all of
        # torch
        gc.freeze()

    def run(self, step: int) -> None:
        if step > 1 and step % self.every_steps == 0:
            self._collect("Performing periodic GC collection", 1)

    def _collect(self, reason: str, generation: int) -> None:
        start = time.perf_counter()
        gc.collect(generation)
        logger.info(f"[GC] {reason} took {time.perf_counter() - start:.2f} seconds")


# ------------------------------------------------------------------------------------------------- the logger


class Colours(NamedTuple):
    red: str = "\033[31m"
    green: str = "\033[32m"
    yellow: str = "\033[33m"
    blue: str = "\033[34m"
    magenta: str = "\033[35m"
    cyan: str = "\033[36m"
    reset: str = "\033[0m"


class MetricsLogger:
    """Collects figures from step to step and writes them at step 1 and every metrics.log_freq steps.

    Every rank has one and calls `count` after each step, `log` where `due`; rank 0 writes. `start_step` is
    the last step that the run has done before (0: none): later rows and events of the dump folder are taken
    back. `tokens_seen` runs on.
    """

    def __init__(
        self, config, device: torch.device, dtype: torch.dtype, *, start_step: int = 0, tokens_seen: int = 0
    ):
        """`dtype`: what the model computes in."""
        self.folder = Path(config.job.dump_folder) / config.metrics.save_tb_folder
        self.every_steps, self.device, self.tokens_seen = config.metrics.log_freq, device, tokens_seen
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        self.colours = Colours(*[""] * 7) if config.metrics.disable_color_printing else Colours()
        self.rows = self.validation_rows = self.tensorboard = None
        if self.writes:
            self.capacity_gib = memory_capacity_gib(device)
            name = (
                torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"{torch.get_num_threads()} threads"
            )
            logger.info(f"{device.type.upper()} capacity: {name} with {self.capacity_gib:.2f}GiB memory")
            self.peak_flops = peak_flops(device, dtype)
            logger.info(f"Peak FLOPS used for computing MFU: {self.peak_flops:.3e}")
            dump_folder = Path(config.job.dump_folder)
            dump_folder.mkdir(parents=True, exist_ok=True)
            self.rows = RowsFile(dump_folder / "metrics.jsonl", start_step)
            if config.validation.enable:
                self.validation_rows = RowsFile(dump_folder / "validation.jsonl", start_step)
            if config.metrics.enable_tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # here, since it takes seconds to import

                folder = dump_folder / config.metrics.save_tb_folder
                put_events_in_order(folder)
                self.tensorboard = SummaryWriter(str(folder), purge_step=start_step + 1)
                logger.info(f"TensorBoard logging enabled. Logs will be saved at {folder}")
        self.start()

    def start(self) -> None:
        """Begins an interval: what happened since the last one belongs to no step."""
        self._steps = self._tokens = 0
        self._flops = self._data_seconds = self._saving_seconds = 0.0
        self._peaks = Memory(0.0, 0.0)  # of this interval, before it was last interrupted
        self._begin = time.perf_counter()
        reset_peak_memory(self.device)

    def interrupt(self) -> None:
        """What happens from here to `log_validation` belongs to no step: neither its time nor its memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._interrupted = time.perf_counter()
        self._peaks = _largest(self._peaks, peak_memory(self.device))
        reset_peak_memory(self.device)

    def count(self, tokens: int, flops: float, data_seconds: float) -> None:
        """A step is done: real tokens and useful FLOPs of all ranks, and how long this rank waited for its
        data."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._data_seconds += data_seconds
        self.tokens_seen += tokens

    def saved(self, seconds: float) -> None:
        """Training waited so long for a checkpoint: a figure of its own, not a part of the steps' time."""
        self._saving_seconds += seconds
        self._begin += seconds
        for rows in (self.rows, self.validation_rows):
            if rows:
                rows.sync()

    def due(self, step: int) -> bool:
        return step == 1 or step % self.every_steps == 0

    def log(
        self,
        step: int,
        plan: Plan,
        *,
        loss: float,
        max_loss: float,
        grad_norm: float,
        lr: float,
        supervised_tokens: int,
        scalars: dict[str, float] | None = None,
    ) -> float:
        """Writes what the step and the interval that ends with it amount to; returns the loss of all ranks.

        `loss` is this rank's part of it (own loss sum / targets of all ranks), `max_loss` its own (own loss
        sum / own targets, -inf without any). `grad_norm`, `lr` and `supervised_tokens` are of all ranks.
        `scalars`: further ones for TensorBoard, by tag. A collective: all ranks call.
        """
        memory = _largest(self._peaks, peak_memory(self.device))
        loss, max_loss, data_seconds, *peaks = self._reduce(
            loss, [max_loss, self._data_seconds, *astuple(memory)]
        )
        memory = Memory(*peaks)
        seconds = time.perf_counter() - self._begin  # after the reduction, which waits for the device
        if self.writes:
            flops = self._flops / seconds / self.ranks
            row = {
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": lr,
                "tokens": plan.tokens,
                "supervised_tokens": supervised_tokens,
                "seconds": seconds / self._steps,
                "tps": self._tokens / seconds / self.ranks,
                "tflops": flops / 1e12,
                "mfu_percent": 100 * flops / self.peak_flops,
                "chunks": plan.chunks,
                "padding_percent": plan.padding_percent,
                "recomputed_chunks": plan.recomputed_chunks,
                "dp_imbalance_percent": plan.imbalance_percent,
                "memory_gib": memory.reserved_gib,
                "global_max_loss": max_loss if math.isfinite(max_loss) else loss,
                "n_tokens_seen": self.tokens_seen,
            }
            self.rows.write(row)
            self._write_line(row)
            self._write_events(step, self._tags(row, memory, data_seconds, seconds) | (scalars or {}))
        self.start()
        return loss

    def log_validation(
        self,
        step: int,
        *,
        loss: float,
        tokens: int,
        supervised_tokens: int,
        by_position: dict[str, tuple[float, int]],
    ) -> None:
        """Writes what the validation after `step`, since `interrupt`, amounts to; the interval of training
        then goes on.

        All of it is of all ranks already. `by_position`: name of a range of positions -> mean loss there,
        supervised tokens there. A collective: all ranks call.
        """
        memory = peak_memory(self.device)
        _, *peaks = self._reduce(0.0, list(astuple(memory)))
        memory = Memory(*peaks)
        now = time.perf_counter()
        if self.writes:
            seconds = now - self._interrupted
            row = {
                "step": step,
                "loss": loss,
                "tokens": tokens,
                "supervised_tokens": supervised_tokens,
                "seconds": seconds,
                "tps": tokens / seconds / self.ranks,
                "memory_gib": memory.reserved_gib,
                **{f"loss_{name}": mean for name, (mean, _) in by_position.items()},
                **{f"supervised_tokens_{name}": count for name, (_, count) in by_position.items()},
            }
            self.validation_rows.write(row)
            colours, percent = self.colours, 100 * memory.reserved_gib / self.capacity_gib
            logger.info(
                f"{colours.yellow}validate step: {step:2}  {colours.green}loss: {loss:7.4f}  "
                f"{colours.cyan}memory: {memory.reserved_gib:5.2f}GiB({percent:.2f}%)  "
                f"{colours.blue}tps: {round(row['tps']):,}{colours.reset}"
                + "".join(f"  {name}: {mean:.4f}" for name, (mean, _) in by_position.items())
            )
            tags = {"loss": loss, "throughput(tps)": row["tps"], **self._memory_tags(memory)}
            tags |= {f"loss_by_position/{name}": mean for name, (mean, _) in by_position.items()}
            self._write_events(step, {f"validation_metrics/{tag}": value for tag, value in tags.items()})
        self._begin += time.perf_counter() - self._interrupted
        reset_peak_memory(self.device)

    def add_figure(self, tag: str, draw: Callable[[], Any], step: int) -> None:
        """Puts the matplotlib figure that `draw` makes into TensorBoard."""
        if not self.tensorboard:
            return
        try:
            self.tensorboard.add_figure(tag, draw(), step)
        except ModuleNotFoundError as error:
            logger.info(f"No picture of {tag}: {error.name} is not installed (pip install matplotlib)")

    def close(self) -> None:
        for rows in (self.rows, self.validation_rows):
            if rows:
                rows.close()
        if self.tensorboard:
            self.tensorboard.close()

    def _reduce(self, summed: float, largest: list[float]) -> list[float]:
        """Over all ranks: the sum of the first, the maximum of each of the others."""
        if self.ranks == 1:
            return [summed, *largest]
        total = torch.tensor(summed, dtype=torch.float64, device=self.device)
        maxima = torch.tensor(largest, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, dist.ReduceOp.SUM)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return [total.item(), *maxima.tolist()]

    def _write_line(self, row: dict[str, float]) -> None:
        colours = self.colours
        percent = 100 * row["memory_gib"] / self.capacity_gib
        logger.info(
            f"{colours.red}step: {row['step']:2}  {colours.green}loss: {row['loss']:8.5f}  "
            f"{colours.yellow}grad_norm: {row['grad_norm']:7.4f}  "
            f"{colours.cyan}memory: {row['memory_gib']:5.2f}GiB({percent:.2f}%)  {colours.blue}tps:"
            f" {round(row['tps']):,}  "
            f"{colours.cyan}tflops: {row['tflops']:,.2f}  {colours.magenta}mfu: {row['mfu_percent']:.2f}%  "
            f"{colours.reset}chunks: {row['chunks']:,}  padding: {row['padding_percent']:.2f}%  "
            f"recomputed: {row['recomputed_chunks']:,}  imbalance: {row['dp_imbalance_percent']:.2f}%"
        )

    def _write_events(self, step: int, tags: dict[str, float]) -> None:
        if not self.tensorboard:
            return
        try:
            for tag, value in tags.items():
                self.tensorboard.add_scalar(tag, value, step)
            self.tensorboard.flush()  # a killed run shows what it logged
        except OSError as error:  # its writer is of no use after that
            self.tensorboard = None
            logger.warning(
                f"TensorBoard's events could not be written ({error.strerror}): its curves pause until the"
                " run is started again, while metrics.jsonl goes on"
            )

    def _tags(
        self, row: dict[str, float], memory: Memory, data_seconds: float, seconds: float
    ) -> dict[str, float]:
        return {
            "loss_metrics/global_avg_loss": row["loss"],
            "loss_metrics/global_max_loss": row["global_max_loss"],
            "grad_norm": row["grad_norm"],
            "lr": row["lr"],
            "n_tokens_seen": row["n_tokens_seen"],
            "throughput(tps)": row["tps"],
            "tflops": row["tflops"],
            "mfu(%)": row["mfu_percent"],
            "time_metrics/end_to_end(s)": row["seconds"],
            "time_metrics/data_loading(s)": data_seconds / self._steps,
            "time_metrics/data_loading(%)": 100 * data_seconds / seconds,
            "time_metrics/checkpoint(s)": self._saving_seconds,
            **self._memory_tags(memory),
            "chunkflow/tokens": row["tokens"],
            "chunkflow/supervised_tokens": row["supervised_tokens"],
            "chunkflow/chunks": row["chunks"],
            "chunkflow/padding(%)": row["padding_percent"],
            "chunkflow/recomputed_chunks": row["recomputed_chunks"],
            "chunkflow/dp_imbalance(%)": row["dp_imbalance_percent"],
        }

    def _memory_tags(self, memory: Memory) -> dict[str, float]:
        return {
            "memory/max_active(GiB)": memory.active_gib,
            "memory/max_active(%)": 100 * memory.active_gib / self.capacity_gib,
            "memory/max_reserved(GiB)": memory.reserved_gib,
            "memory/max_reserved(%)": 100 * memory.reserved_gib / self.capacity_gib,
            "memory/num_alloc_retries": memory.alloc_retries,
            "memory/num_ooms": memory.ooms,
        }


def put_events_in_order(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, which tell the second of their start. Where
    the clock was set back, or the last start was this very second, a new file would come before those that it
    continues: they get smaller numbers."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if files and files[-1].name >= f"events.out.tfevents.{int(time.time()):010}":
        for number, path in enumerate(files):
            path.rename(
                path.with_name(".".join(["events.out.tfevents", f"{number:010}", *path.name.split(".")[4:]]))
            )


class RowsFile:
    """metrics.jsonl or validation.jsonl: one JSON object a line, appended. What a full disk refuses is kept,
    and written when there is room."""

    def __init__(self, path: Path, last_step: int):
        """Takes away what is not to stay: a torn last line, and rows beyond `last_step`."""
        keep_rows(path, last_step)
        self.path, self.waiting = path, b""
        self.file = open(path, "ab", buffering=0)

    def write(self, row: dict[str, float]) -> None:
        clean = {
            name: value if math.isfinite(value) else None for name, value in row.items()
        }  # JSON has no nan and no infinity
        self.waiting += json.dumps(clean, allow_nan=False).encode() + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            rest = memoryview(self.waiting)
            while rest:
                rest = rest[self.file.write(rest) :]
            self.waiting = b""
        except OSError as error:
            os.ftruncate(self.file.fileno(), size)  # no torn line in the middle
            logger.warning(
                f"{self.path} could not be written ({error.strerror}): make room; the rows are kept until"
                " then"
            )

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def keep_rows(path: Path, last_step: int) -> None:
    """Removes a torn last line, and rows beyond `last_step`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _row_step(line) <= last_step]
    if len(kept) < len(lines):
        logger.info(
            f"{path}: removed {len(lines) - len(kept)} lines that are torn or beyond step {last_step}"
        )
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _row_step(line: bytes) -> float:
    """The step of a row; infinite for a line that was not written to its end."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
