"""The log of a run's figures: the step line, metrics.jsonl and validation.jsonl, TensorBoard; a table at the
end."""

import logging
import math
import textwrap
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chunkflow.execution.runner import StepResult
from chunkflow.planning.planner import Plan
from chunkflow.planning.simulate import picture
from chunkflow.reporting import pictures
from chunkflow.reporting.console import Progress, Totals, markdown, open_terminal, table
from chunkflow.reporting.dashboard import Dashboard, hyper_parameters, start_wandb
from chunkflow.reporting.device import Memory, memory_capacity_gib, peak_flops, peak_memory, reset_peak_memory
from chunkflow.reporting.rows import RowsFile
from chunkflow.reporting.timeline import Timeline, gather_timeline, write_timelines
from chunkflow.settings import options

logger = logging.getLogger(__name__)


# the codes that set a terminal's colour
Colours = namedtuple("Colours", "red green yellow blue magenta cyan reset")
COLOURS = Colours(*(f"\033[{code}m" for code in (31, 32, 33, 34, 35, 36, 0)))


class MetricsLogger:
    """Adds up figures over steps, and writes them at step 1 and every metrics.log_freq steps. Every rank has
    one and calls `count` after each step, and `log` where `due`; rank 0 writes."""

    def __init__(
        self,
        dump_folder: Path,
        settings: options.Metrics,
        device: torch.device,
        dtype: torch.dtype,
        *,
        validates: bool = False,
        start_step: int = 0,
        tokens_seen: int = 0,
        config: dict[str, Any] | None = None,
        memory_of: Callable[[int], tuple[float, float]] | None = None,
    ):
        """`dtype`: what the model computes in. `validates`: whether `log_validation` will be called.
        `start_step`: the last step done before, after `tokens_seen` tokens; later rows are removed.
        `config`: the value of every key of a run, whose hyper-parameters and config.toml TensorBoard then
        shows; without it there is no progress. `memory_of`: as for Totals."""
        self.every_steps, self.device, self.tokens_seen = settings.log_freq, device, tokens_seen
        self.dump_folder = dump_folder
        self.folder = dump_folder / settings.save_tb_folder  # of TensorBoard's events
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        self.colours = Colours(*[""] * 7) if settings.disable_color_printing else COLOURS
        self.rows = self.validation_rows = self.board = self.wandb = self.progress = None
        self.totals, self.config = Totals(memory_of), config
        if self.writes:
            self.capacity_gib = memory_capacity_gib(device)
            cuda = device.type == "cuda"
            name = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
            logger.info(f"{device.type.upper()} capacity: {name} with {self.capacity_gib:.2f}GiB memory")
            self.peak_flops = peak_flops(device, dtype)
            logger.info(f"Peak FLOPS used for computing MFU: {self.peak_flops:.3e}")
            dump_folder.mkdir(parents=True, exist_ok=True)
            self.rows = RowsFile(dump_folder / "metrics.jsonl", start_step)
            if validates:
                self.validation_rows = RowsFile(dump_folder / "validation.jsonl", start_step)
            if config:
                self.progress = Progress(start_step, config["training.steps"], open_terminal())
            if settings.enable_wandb:  # before the events that it follows
                self.wandb = start_wandb(dump_folder, config or {}, resumed=start_step > 0)
            if settings.enable_tensorboard:
                self.board = Dashboard(self.folder, start_step)
                logger.info(f"TensorBoard logging enabled. Logs will be saved at {self.folder}")
                if config:
                    self.board.hyper_parameters(hyper_parameters(config, self.ranks))
                    code = textwrap.indent((dump_folder / "config.toml").read_text(), "    ")
                    self.board.text("config", code, start_step)
        self.start()

    def start(self) -> None:
        """Begins an interval of steps: time and memory since the last one are not counted."""
        self._steps = self._tokens = 0
        self._flops = self._data_seconds = self._saving_seconds = 0.0
        self._peaks = Memory()  # of this interval, up to the last interruption
        self._begin = time.perf_counter()
        reset_peak_memory(self.device)

    def interrupt(self) -> None:
        """Time and memory from here to `log_validation` are not counted in the interval."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._interrupted = time.perf_counter()
        self._peaks = Memory(*map(max, self._peaks, peak_memory(self.device)))
        reset_peak_memory(self.device)

    def count(self, plan: Plan, flops: float, data_seconds: float) -> None:
        """Adds a finished step: its plan, useful FLOPs of all ranks, and this rank's wait for data."""
        self._steps += 1
        self._tokens += plan.tokens
        self._flops += flops
        self._data_seconds += data_seconds
        self.tokens_seen += plan.tokens
        if self.writes:
            self.totals.count(plan)
        if self.progress:
            self.progress.step()

    def saved(self, seconds: float) -> None:
        """Training waited `seconds` for a checkpoint: logged by themselves, not in the steps' time."""
        self._saving_seconds += seconds
        self._begin += seconds
        for rows in filter(None, (self.rows, self.validation_rows)):
            rows.sync()

    def due(self, step: int) -> bool:
        """Whether `log` is to be called after this step."""
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
        by_source: dict[str, float] | None = None,
        pairs: dict[str, float] | None = None,
        scalars: dict[str, float] | None = None,
    ) -> float:
        """Writes the figures of the step and of the interval that ends with it; returns the loss over all
        ranks. A collective: all ranks call.

        `loss`: this rank's loss sum / the sum of weights of all ranks. `max_loss`: this rank's loss sum / its
        own sum of weights, -inf without targets. `grad_norm`, `lr` and `supervised_tokens` are of all ranks,
        as are `by_source`, the loss of each source of the data, and `pairs`, means over preference pairs.
        `scalars`: more values for TensorBoard, by tag.
        """
        largest = max_loss, self._data_seconds, *map(max, self._peaks, peak_memory(self.device))
        (loss,) = self._over_ranks(dist.ReduceOp.SUM, loss)
        max_loss, data_seconds, *peaks = self._over_ranks(dist.ReduceOp.MAX, *largest)
        memory, max_loss = Memory(*peaks), max_loss if math.isfinite(max_loss) else loss
        seconds = time.perf_counter() - self._begin  # after the reduction, which waits for the device
        if self.writes:
            flops = self._flops / seconds / self.ranks
            figures = {  # column of metrics.jsonl -> its tag in TensorBoard (or none), and the value
                "loss": ("loss_metrics/global_avg_loss", loss),
                "grad_norm": ("grad_norm", grad_norm),
                "lr": ("lr", lr),
                "tokens": ("chunkflow/tokens", plan.tokens),
                "supervised_tokens": ("chunkflow/supervised_tokens", supervised_tokens),
                "seconds": ("time_metrics/end_to_end(s)", seconds / self._steps),
                "tps": ("throughput(tps)", self._tokens / seconds / self.ranks),
                "tflops": ("tflops", flops / 1e12),
                "mfu_percent": ("mfu(%)", 100 * flops / self.peak_flops),
                "chunks": ("chunkflow/chunks", plan.chunks),
                "padding_percent": ("chunkflow/padding(%)", plan.padding_percent),
                "recomputed_chunks": ("", plan.recomputed_chunks),
                "dp_imbalance_percent": ("chunkflow/dp_imbalance(%)", plan.imbalance_percent),
                "spread_sequences": ("chunkflow/spread_sequences", plan.spread_sequences),
                "most_ranks_of_a_sequence": ("", plan.most_ranks_of_a_sequence),
                "memory_gib": ("memory/max_reserved(GiB)", memory.reserved_gib),
                "global_max_loss": ("loss_metrics/global_max_loss", max_loss),
                "n_tokens_seen": ("n_tokens_seen", self.tokens_seen),
            }
            for name, loss_of_source in (by_source or {}).items():
                figures[f"loss_of_{name}"] = f"loss_by_source/{name}", loss_of_source
            for name, value in (pairs or {}).items():
                figures[name] = f"dpo/{name}", value
            row = {"step": step} | {column: value for column, (_, value) in figures.items()}
            self.rows.write(row)
            self._write_line(row)
            self.totals.loss("loss", loss, memory.reserved_gib)
            values = {tag: value for tag, value in figures.values() if tag} | {
                "time_metrics/data_loading(s)": data_seconds / self._steps,
                "time_metrics/data_loading(%)": 100 * data_seconds / seconds,
                "time_metrics/checkpoint(s)": self._saving_seconds,
            }
            if self.board:
                self.board.scalars(step, values | self._memory_tags(memory) | (scalars or {}))
        self.start()
        return loss

    def log_validation(
        self,
        step: int,
        *,
        loss: float,
        tokens: int,
        supervised_tokens: int,
        by_position: dict[str, tuple[float, int]] | None = None,
        pairs: dict[str, float] | None = None,
    ) -> None:
        """Writes the figures of the validation after `step`, which began at `interrupt`, and continues
        training's interval. A collective: all ranks call.

        The arguments are over all ranks. `by_position`: name of a range of positions -> its mean loss and its
        supervised tokens. `pairs`: means over preference pairs.
        """
        by_position, pairs = by_position or {}, pairs or {}
        memory = Memory(*self._over_ranks(dist.ReduceOp.MAX, *peak_memory(self.device)))
        if self.writes:
            seconds = time.perf_counter() - self._interrupted
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
                **pairs,
            }
            self.validation_rows.write(row)
            self.totals.loss("validation loss", loss, memory.reserved_gib)
            colours, percent = self.colours, 100 * memory.reserved_gib / self.capacity_gib
            logger.info(
                f"{colours.yellow}validate step: {step:2}  {colours.green}loss: {loss:7.4f}  "
                f"{colours.cyan}memory: {memory.reserved_gib:5.2f}GiB({percent:.2f}%)  "
                f"{colours.blue}tps: {round(row['tps']):,}{colours.reset}"
                + "".join(f"  {name}: {mean:.4f}" for name, (mean, _) in by_position.items())
                + _line_of_pairs(pairs)
            )
            tags = {"loss": loss, "throughput(tps)": row["tps"], **self._memory_tags(memory)}
            tags |= {f"loss_by_position/{name}": mean for name, (mean, _) in by_position.items()} | pairs
            if self.board:
                self.board.scalars(step, {f"validation_metrics/{tag}": value for tag, value in tags.items()})
        self._begin += time.perf_counter() - self._interrupted
        reset_peak_memory(self.device)

    def show_step(self, step: int, plan: Plan, result: StepResult, lengths: Sequence[int]) -> None:
        """Puts a step into TensorBoard: its plan as text and as a picture, what this rank held in it; and the
        `lengths` (tokens) of all sequences of the data."""
        if not self.board:
            return
        chunk_size, k, seq_len = map(
            self.config.get, ("chunkflow.chunk_size", "chunkflow.k", "training.seq_len")
        )
        self.board.text(f"plan of step {step}", pictures.plan_text(plan), step)
        draw_lengths = partial(pictures.lengths_figure, lengths, chunk_size, seq_len)
        self.add_figure("data/lengths", draw_lengths, step)
        self.add_figure(
            f"chunkflow/plan of step {step}", partial(pictures.plan_figure, plan, chunk_size, k), step
        )
        held = result.clock.timeline(), result.held
        self.add_figure(f"chunkflow/memory of step {step}", partial(pictures.memory_figure, *held), step)

    def show_timeline(
        self, step: int, planned: Timeline, result: StepResult, group: dist.ProcessGroup | None
    ) -> None:
        """Keeps the timeline of a pipeline's step as a picture and as a trace file: as planned, and with
        `group`, the pipeline's ranks, as measured; a collective of these."""
        measured = gather_timeline(result.clock.timeline(), group) if group else None
        if self.writes:
            path = self.dump_folder / f"timeline_step_{step}.json"
            draw = partial(picture, *write_timelines(path, planned, measured))
            self.add_figure("chunkflow/timeline", draw, step)

    def add_figure(self, tag: str, draw: Callable[[], Any], step: int) -> None:
        """Puts the matplotlib figure that `draw` returns into TensorBoard. It is drawn in another thread."""
        if self.board:
            self.board.figure(tag, draw, step)

    def close(self, ledgers: dict[str, Any] | None = None) -> None:
        """Ends the log, with a table of what the run came to. `ledgers`: what became of the tokens, by the
        name of their source ("": of all)."""
        if self.progress and self.totals.steps:
            self.progress.clear()
            rows = self.totals.rows()
            for name, ledger in (ledgers or {}).items():
                rows.append((f"tokens of {name or 'the data'}", str(ledger)))
            done = "Trained up to" if self.progress.complete else "Stopped after"
            logger.info(f"{done} step {self.progress.done}:\n{table(rows)}")
            if self.board:
                self.board.text("summary", markdown(rows), self.progress.done)
                logger.info(f"See the curves: tensorboard --logdir {self.folder}")
        for file in filter(None, (self.rows, self.validation_rows)):
            file.close()
        if self.board:
            self.board.close(complete=not self.progress or self.progress.complete)
        if self.wandb:
            self.wandb.finish()

    def _over_ranks(self, operation: dist.ReduceOp, *values: float) -> list[float]:
        """Each value, reduced over all ranks."""
        if self.ranks == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, operation)
        return reduced.tolist()

    def _write_line(self, row: dict[str, float]) -> None:
        colours, percent = self.colours, 100 * row["memory_gib"] / self.capacity_gib
        logger.info(
            f"{colours.red}step: {row['step']:2}  {colours.green}loss: {row['loss']:8.5f}  "
            f"{colours.yellow}grad_norm: {row['grad_norm']:7.4f}  "
            f"{colours.cyan}memory: {row['memory_gib']:5.2f}GiB({percent:.2f}%)  "
            f"{colours.blue}tps: {round(row['tps']):,}  "
            f"{colours.cyan}tflops: {row['tflops']:,.2f}  {colours.magenta}mfu: {row['mfu_percent']:.2f}%  "
            f"{colours.reset}chunks: {row['chunks']:,}  padding: {row['padding_percent']:.2f}%  "
            f"recomputed: {row['recomputed_chunks']:,}  imbalance: {row['dp_imbalance_percent']:.2f}%"
            + _line_of_pairs(row)
            + (f"  {self.progress}" if self.progress else "")
        )

    def _memory_tags(self, memory: Memory) -> dict[str, float]:
        return {
            "memory/max_active(GiB)": memory.active_gib,
            "memory/max_active(%)": 100 * memory.active_gib / self.capacity_gib,
            "memory/max_reserved(GiB)": memory.reserved_gib,
            "memory/max_reserved(%)": 100 * memory.reserved_gib / self.capacity_gib,
            "memory/num_alloc_retries": memory.alloc_retries,
            "memory/num_ooms": memory.ooms,
        }


def _line_of_pairs(figures: dict[str, float]) -> str:
    """What the step line says of preference pairs, if the figures are of some."""
    if "reward_margin" not in figures:
        return ""
    percent = 100 * figures["reward_accuracy"]
    return f"  reward_margin: {figures['reward_margin']:.4f}  reward_accuracy: {percent:.1f}%"
