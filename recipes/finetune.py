"""Fine-tunes a model on long-tailed text, in chunks, on FSDP2 ranks.

    NGPU=2 CONFIG_FILE=train_configs/debug_model.toml ./run_train.sh --training.steps=20

Copy this file, edit it, and start it with TRAIN_FILE=my_recipe.py ./run_train.sh. A step: the plan of its
global batch is ready (every rank made the same one while the last step ran), each rank runs its own actions
on its own chunks, gradients are summed over ranks, the optimizer steps.
"""

import logging
import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.elastic.multiprocessing.errors import record

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import open_dataset
from chunkflow.execution.executor import run_actions, run_evaluation
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings
from chunkflow.reporting.metrics import GarbageCollection, MetricsLogger, init_logger
from chunkflow.reporting.pictures import plan_figure
from chunkflow.reporting.profiling import profiler
from chunkflow.settings.config import ConfigError, flat, main_config, to_toml, user_errors
from chunkflow.storage import checkpoint, manifest
from chunkflow.storage import hf_weights as hf
from chunkflow.storage.files import claim_folder
from chunkflow.training import parallel
from chunkflow.training.converters import check_converters, convert_model
from chunkflow.training.model import apply_activation_checkpoint, apply_compile, model_args, open_tokenizer
from chunkflow.training.optimizer import build_optimizer, check_optimizer, set_learning_rate
from chunkflow.training.preemption import StopRequest
from chunkflow.training.progress import Progress
from chunkflow.training.validation import Validation

logger = logging.getLogger(__name__)


def check(config) -> None:
    """What the config and the folders it names can tell. Raises ValueError before any process starts."""
    if config.parallelism.pipeline_parallel_degree > 1:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree = {config.parallelism.pipeline_parallel_degree}: this"
            " recipe has no stages, use recipes/finetune_pipeline.py (TRAIN_FILE), or set it to 1"
        )
    tokenizer = open_tokenizer(config)
    family, args = model_args(config, tokenizer.vocab_size if tokenizer else 0)
    hf.check(config, family, args)
    check_converters(config, family, args)
    check_optimizer(config)
    manifest.check(config, args)
    if torch.cuda.is_available() and config.training.mixed_precision_param != "bfloat16":
        raise ConfigError(
            f"training.mixed_precision_param = {config.training.mixed_precision_param} cannot be used on"
            " CUDA, whose variable-length"
            ' attention computes in bfloat16: set "bfloat16"'
        )


def main() -> None:
    config = main_config(check=check)
    init_logger()
    if manifest.finished(config.checkpoint, config.job.dump_folder, config.training.steps):
        logger.info(
            f"Training is complete: step {config.training.steps} is saved; raise training.steps to go on"
        )
        return
    stop = StopRequest()
    seed = parallel.set_seed(config)
    logger.info(f"Starting job: {config.job.description}")

    # Data: text becomes tokens on disk, once; whichever process comes first does it while the others wait.
    training = config.training
    logger.info(f"Preparing {training.dataset} dataset from {training.dataset_path or 'its default place'}")
    with user_errors():
        tokenizer = open_tokenizer(config)
        family, args = model_args(config, tokenizer.vocab_size if tokenizer else 0)
        dataset = open_dataset(
            training.dataset, training.dataset_path, tokenizer, vocab_size=args.vocab_size, seed=seed
        )
    logger.info(
        f"{len(dataset):,} sequences, {sum(dataset.lengths):,} tokens, the longest has"
        f" {max(dataset.lengths):,}"
    )

    # Processes. With the fake backend this one stands for rank 0 of NGPU, and tensors have shapes but no
    # content.
    fake = config.comm.mode == "fake_backend"
    device, mesh = parallel.init_processes(config)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    reshard = parallel.reshards(config, ranks)
    folder = Path(config.job.dump_folder)
    if rank == 0:
        with user_errors():
            lock = claim_folder(config.job.dump_folder, to_toml(config), locked=not fake)  # noqa: F841  while this process lives

    # Lengths become a plan for each step, the same on every rank; each rank then reads the tokens of its own
    # sequences.
    cost = Cost.of_model(args)
    settings = PlanSettings(
        cost,
        ranks=ranks,
        enable=config.chunkflow.enable,
        chunk_size=config.chunkflow.chunk_size,
        k=config.chunkflow.k,
        fill_tails=config.chunkflow.fill_tails,
        balance=config.chunkflow.balance,
        lockstep=reshard,
    )
    with user_errors():
        loader = ChunkDataLoader(
            dataset,
            settings,
            rank=rank,
            global_batch_size=training.global_batch_size,
            seq_len=training.seq_len,
            overlong=training.overlong,
            shuffle=training.shuffle,
            seed=seed,
        )
        validation = None
        if config.validation.enable and not fake:
            validation = Validation(config, settings, rank, tokenizer, args.vocab_size, seed, device)
    if loader.notice:
        logger.info(loader.notice)

    # Model: built without memory, cut into shards, then filled: from a folder, or at random, which depends on
    # each parameter's name and the seed alone. A run that was here before goes on from its newest checkpoint,
    # whatever the number of ranks.
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        with torch.device(device if fake else "meta"), parallel.default_dtype(training.dtype):
            model = family.Transformer(args)
        name = f"{config.model.name} {config.model.flavor}"
        logger.info(f"Building {name} with {args}")
        logger.info(f"Model {name} size: {sum(p.numel() for p in model.parameters()):,} total parameters")
        convert_model(model, config)
        apply_compile(model, config)
        apply_activation_checkpoint(model, config)
        parallel.apply_fsdp(model, mesh, config, reshard)
        if not fake:
            model.to_empty(device="cpu" if training.enable_cpu_offload else device)
        optimizer = build_optimizer(model, config)
        progress = Progress()
        if not fake:
            with user_errors():
                checkpoints = checkpoint.Checkpoints(
                    config.checkpoint,
                    config.job.dump_folder,
                    training.steps,
                    flat(config),
                    [model],
                    optimizer,
                    loader,
                )
                progress = checkpoints.load(family, config.model.hf_assets_path, seed)
            compute_dtype = parallel.DTYPES[training.mixed_precision_param]
            metrics = MetricsLogger(
                config, device, compute_dtype, start_step=progress.step, tokens_seen=progress.tokens_seen
            )

    first_step, stopping = progress.step + 1, False
    garbage = GarbageCollection(training.gc_freq)
    logger.info(
        f"Training starts at step {first_step}: {training.steps} steps (warm-up"
        f" {config.lr_scheduler.warmup_steps}) of {training.global_batch_size} sequences over {ranks} ranks,"
        f" chunks of {config.chunkflow.chunk_size} tokens, k = {config.chunkflow.k}"
    )
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), profiler(config) as profile:
        for step, data in zip(range(first_step, training.steps + 1), loader):
            plan, busy = data.plan, parallel.BusyTimer(device)
            garbage.run(step)

            # Forward and backward of this rank's chunks: gradients of the mean token loss of the global batch
            # add up in .grad.
            parallel.begin_step(model, reshard)
            optimizer.zero_grad()
            result = run_actions(
                model,
                plan.groups[rank],
                plan.actions[rank],
                data.chunks,
                max(data.targets, 1),
                device,
                before_last_backward=lambda: (busy.stop(), parallel.before_last_backward(model)),
            )
            grad_norm = parallel.clip_grad_norm(list(model.parameters()), training.max_norm)
            lr = set_learning_rate(optimizer, step, config)
            if fake:
                logger.info(
                    f"Rank 0 of {ranks} can run this step; loss and gradient norm mean nothing on the fake"
                    " backend"
                )
                dist.destroy_process_group()
                return

            # Ranks agree on whether the update may be applied, and whether one of them was asked to stop.
            unsound = not math.isfinite(result.loss_sum.item() + grad_norm.item())
            flags = [unsound, stop.asked, checkpoints.failed_in_background]
            unsound, stopping, save_failed = parallel.any_rank(flags, device)
            if data.targets and not unsound:
                optimizer.step()
            if not data.targets:
                logger.info(
                    f"step {step}: none of its {plan.tokens:,} tokens is supervised, so nothing was updated"
                )

            metrics.count(
                plan.tokens, sum(cost.training(length) for length in data.lengths), loader.take_wait()
            )
            if metrics.due(step):
                own_loss = result.loss_sum.item()
                figures = parallel.gather_over_ranks(
                    [busy.seconds(), result.peak_live_chunks, result.peak_state_bytes / 2**30], device
                )
                metrics.log(
                    step,
                    plan,
                    loss=own_loss / max(data.targets, 1),
                    max_loss=own_loss / data.own_targets if data.own_targets else -math.inf,
                    grad_norm=grad_norm.item(),
                    lr=lr,
                    supervised_tokens=data.targets,
                    scalars=chunkflow_scalars(
                        plan, data, loader.ledger, figures, progress.bad_steps + unsound
                    ),
                )
            if step == 1:
                metrics.add_figure(
                    "chunkflow/plan of step 1", lambda: plan_figure(plan, config.chunkflow.chunk_size), step
                )
            if validation and validation.due(step):
                validation.run(
                    step,
                    metrics,
                    [model],
                    lambda data, take: run_evaluation(
                        model, data.plan.groups[rank], data.plan.actions[rank], data.chunks, device, take
                    ),
                )
            if profile:
                profile.step()

            if step == first_step:
                parallel.set_timeouts(mesh, config.comm.train_timeout_seconds)

            # A step that was not sound is reported, and too many of them end the run; else what was trained
            # is saved when it is due.
            stopping = stopping and step < training.steps
            with user_errors():
                progress.count(
                    step,
                    plan.tokens,
                    sound=not unsound,
                    limit=training.max_bad_steps,
                    grad_norm=grad_norm.item(),
                    sources=[dataset.source(row) for row in data.rows] if unsound else [],
                )
                metrics.saved(checkpoints.after_step(progress, stopping, save_failed))
            if stopping:
                break

    metrics.close()
    if stopping:
        dist.destroy_process_group()
        stop.leave(saved=config.checkpoint.enable)
    if config.checkpoint.last_save_in_hf:
        parallel.set_timeouts(mesh, config.comm.init_timeout_seconds)  # ranks wait while rank 0 writes
        with user_errors():
            dtype = config.checkpoint.export_dtype
            hf.save_model(checkpoints.hf_folder, [model], family, config.model, dtype, device)
    logger.info(f"Tokens: {loader.ledger}")
    if config.metrics.enable_tensorboard:
        logger.info(f"See the curves: tensorboard --logdir {folder / config.metrics.save_tb_folder}")
    logger.info("Training completed")
    dist.destroy_process_group()


def chunkflow_scalars(plan, data, ledger, figures, bad_steps) -> dict[str, float]:
    """What TensorBoard shows beyond torchtitan's tags. `figures`: [busy seconds, live chunks, K/V state GiB]
    of each rank."""
    busiest, live_chunks, state_gib = (max(column) for column in zip(*figures))
    waiting = {
        f"chunkflow/waiting(%)/rank_{rank}": 100 * (1 - busy / busiest)
        for rank, (busy, _, _) in enumerate(figures)
    }
    tokens = {f"data/{name}_tokens": count for name, count in vars(ledger).items()}
    return (
        waiting
        | tokens
        | {
            "chunkflow/groups": sum(map(len, plan.groups)),
            "chunkflow/recomputed(%)": 100 * plan.recomputed_chunks / plan.chunks,
            "chunkflow/live_chunks_peak": live_chunks,
            "chunkflow/kv_state(GiB)": state_gib,
            "chunkflow/tokens_per_supervised_token": plan.tokens / max(data.targets, 1),
            "chunkflow/template_overhead(%)": plan.template_overhead_percent,
            "chunkflow/bad_steps": bad_steps,
            "data/longest_sequence": max(data.lengths),
            "data/epoch": data.epoch,
        }
    )


if __name__ == "__main__":
    record(main)()
