"""What TensorBoard shows of a run beyond single curves: a dashboard, hyper-parameters, texts, pictures.

The dashboard is the tab CUSTOM SCALARS, hyper-parameters with the latest metrics are the tab HPARAMS. All of
it is in the run's own folder, so that a run is one line in TensorBoard's list, resumed or not.
"""

import io
import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chunkflow.settings.keys import show

logger = logging.getLogger(__name__)

DASHBOARD = {  # category -> chart -> patterns of its tags; a chart comes when there is a tag for it
    "Loss": {
        "loss: training and validation": [r"loss_metrics/global_avg_loss$", r"validation_metrics/loss$"],
        "validation loss by position": [r"validation_metrics/loss_by_position/"],
        "loss by source": [r"loss_by_source/"],
        "norm of the gradients": [r"grad_norm$"],
    },
    "Preferences": {
        "rewards and accuracy": [r"dpo/.*(reward|margin|accuracy)"],
        "log-probabilities": [r"dpo/.*logp"],
    },
    "Speed": {
        "tokens a second and device": [r"dashboard/throughput_tps$"],
        "mfu (%)": [r"dashboard/mfu_percent$"],
        "seconds: a step, its wait for data, checkpoints": [r"dashboard/time_metrics/.*_seconds$"],
    },
    "Memory of the fullest rank (GiB)": {
        "peak: allocated and reserved": [r"dashboard/memory/max_(active|reserved)_gib$"],
        "K/V and their gradients, kept attention": [r"dashboard/chunkflow/(kv|kept).*_gib$"],
    },
    "Chunks": {
        "padding and recomputed (%)": [r"dashboard/chunkflow/(padding|recomputed)_percent$"],
        "chunks of a step, and live at once": [r"chunkflow/(chunks|live_chunks_peak)$"],
        "longest sequence of a step (tokens)": [r"data/longest_sequence$"],
    },
    "Ranks": {
        "imbalance and template overhead (%)": [
            r"dashboard/chunkflow/(dp_imbalance|template_overhead)_percent$"
        ],
        "waiting for the busiest rank (%)": [r"dashboard/chunkflow/waiting_percent/"],
        "bubble (%): simulated, and measured by stage": [r"dashboard/chunkflow/bubble_percent/"],
    },
}

# The columns of the table of runs, the same for every run, since TensorBoard takes those of one for all. It
# shows the first five by name, and the others when they are ticked.
HPARAMS = """
    chunkflow.enable chunkflow.chunk_size chunkflow.k chunkflow.keep_attention chunkflow.kv_offload
    training.global_batch_size training.seq_len training.steps training.loss_weighting training.dataset
    training.dataset_path training.mixed_precision_param model.name model.flavor optimizer.name optimizer.lr
    optimizer.weight_decay lr_scheduler.warmup_steps lr_scheduler.decay_type lora.rank dpo.beta processes
    parallelism.pipeline_parallel_degree parallelism.context_parallel_degree
    parallelism.fsdp_reshard_after_forward debug.seed
"""
FINAL_METRICS = """
    loss_metrics/global_avg_loss validation_metrics/loss throughput(tps) memory/max_reserved(GiB) mfu(%)
"""


def plain(tag: str) -> str:
    """The name of a curve's copy for the dashboard. TensorBoard takes what is between the first and the
    last parenthesis of its legend, `tag (run)`, for the run, and draws none of an unknown run."""
    for unit, word in (("%", "percent"), ("GiB", "gib"), ("s", "seconds"), ("tps", "tps")):
        tag = tag.replace(f"({unit})", f"_{word}")
    return f"dashboard/{tag}"


def layout(tags: set[str]) -> dict[str, dict[str, list]]:
    """The dashboard's categories and charts, as SummaryWriter.add_custom_scalars wants them: those for which
    there is one of these tags."""
    shown = {
        category: {
            chart: ["Multiline", patterns]
            for chart, patterns in charts.items()
            if any(re.match(pattern, tag) for pattern in patterns for tag in tags)
        }
        for category, charts in DASHBOARD.items()
    }
    return {category: charts for category, charts in shown.items() if charts}


def hyper_parameters(config: dict[str, Any], processes: int) -> dict[str, float | str]:
    """Of the config's keys, by their full names, those that the table of runs compares."""
    values = {name: (config | {"processes": processes}).get(name) for name in HPARAMS.split()}
    return {
        name: show(value) if isinstance(value, bool) else value
        for name, value in values.items()
        if value is not None
    }


def start_wandb(dump_folder: Path, config: dict[str, Any], resumed: bool) -> Any:
    """A run of Weights & Biases that follows the TensorBoard events written from here on; `finish` ends it.
    Its names come from torchtitan's variables: WANDB_PROJECT, WANDB_TEAM, WANDB_RUN_NAME, WANDB_RUN_GROUP,
    and those that wandb reads by itself. A resumed run goes on in the same one."""
    import wandb

    remembered = dump_folder / "wandb_run_id"
    run_id = os.environ.get("WANDB_RUN_ID")
    if not run_id and resumed and remembered.exists():
        run_id = remembered.read_text()
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "chunkflow"),
        entity=os.environ.get("WANDB_TEAM"),
        name=os.environ.get("WANDB_RUN_NAME"),
        group=os.environ.get("WANDB_RUN_GROUP"),
        id=run_id,
        resume="allow",
        dir=str(dump_folder),
        config=config,
        sync_tensorboard=True,
    )
    remembered.write_text(run.id)
    return run


class Dashboard:
    """TensorBoard's events of a run. After the first error of the disk it writes no more, and says so."""

    def __init__(self, folder: Path, start_step: int):
        """`start_step`: the last step done before; what is later in the folder's events does not count."""
        from torch.utils.tensorboard import SummaryWriter  # here, since it takes seconds to import

        put_events_in_order(folder)
        self.writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=start_step + 1)
        self.tags: set[str] = set()
        self.end: Any = None  # the summary that tells the table of runs that this one is complete
        # Drawing takes as long as a small step: one thread does it beside training, one figure at a time.
        self.drawing = ThreadPoolExecutor(1, "pictures")

    def _write(self, write: Callable[[Any], None]) -> None:
        if not self.writer:
            return
        try:
            write(self.writer)
            self.writer.flush()  # so that a killed run shows all that it logged
        except OSError as error:  # the writer cannot be used any more
            self.writer = None
            logger.warning(
                f"TensorBoard's events could not be written ({error.strerror}): its curves pause until the"
                " run is started again, while metrics.jsonl goes on"
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes the values by their tags; new tags get their charts in the dashboard."""
        copies = {plain(tag): value for tag, value in values.items() if "(" in tag}
        values = values | {tag: value for tag, value in copies.items() if layout({tag})}

        def write(writer) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            if not values.keys() <= self.tags:
                before, self.tags = self.tags, self.tags | values.keys()
                if layout(self.tags) != layout(before):
                    writer.add_custom_scalars(layout(self.tags))

        self._write(write)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        self._write(lambda writer: writer.add_text(tag, markdown, step))

    def hyper_parameters(self, values: dict[str, float | str]) -> None:
        """What the table of runs shows of this run. Its metrics are the last values of the run's own curves,
        which a run has that goes on or was killed, too."""
        from torch.utils.tensorboard.summary import hparams

        experiment, start, self.end = hparams(values, dict.fromkeys(FINAL_METRICS.split(), 0.0))
        for summary in (experiment, start):
            self._write(lambda writer: writer.file_writer.add_summary(summary))

    def figure(self, tag: str, draw: Callable[[], Any], step: int) -> None:
        """Writes the matplotlib figure that `draw` returns, in a thread of its own."""
        self.drawing.submit(self._draw, tag, draw, step)

    def _draw(self, tag: str, draw: Callable[[], Any], step: int) -> None:
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary

            figure, file = draw(), io.BytesIO()
            figure.savefig(file, format="png")
            width, height = figure.canvas.get_width_height()
            image = Summary.Image(
                encoded_image_string=file.getvalue(), width=width, height=height, colorspace=4
            )
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            self._write(lambda writer: writer.file_writer.add_summary(summary, step))
        except ModuleNotFoundError as error:
            logger.info(f"No picture of {tag}: {error.name} is not installed (pip install matplotlib)")
        except Exception:  # a picture is not worth a run
            logger.exception(f"No picture of {tag}: it could not be drawn")

    def close(self, complete: bool) -> None:
        """Waits for the last picture. `complete`: the run has come to its end."""
        self.drawing.shutdown()
        if complete and self.end:
            self._write(lambda writer: writer.file_writer.add_summary(self.end))
        if self.writer:
            self.writer.close()


def put_events_in_order(folder: Path) -> None:
    """Renames event files so that one that starts now sorts after them: TensorBoard reads them in the order
    of their names, which have the second of their start. If the clock was set back, or the last one started
    in this second, a new file would come before those that it continues."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if files and files[-1].name >= f"events.out.tfevents.{int(time.time()):010}":
        for number, path in enumerate(files):
            rest = path.name.split(".", 4)[4]
            path.rename(folder / f"events.out.tfevents.{number:010}.{rest}")
