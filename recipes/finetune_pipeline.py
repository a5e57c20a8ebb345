"""Fine-tunes a model on long-tailed text, in chunks, on pipeline stages; each data-parallel replica is a
pipeline of FSDP2 shards.

    NGPU=2 CONFIG_FILE=train_configs/debug_pipeline.toml TRAIN_FILE=recipes/finetune_pipeline.py
    ./run_train.sh

Copy this file, edit it, and start it with TRAIN_FILE=my_recipe.py ./run_train.sh. A step: the plan of its
global batch is ready (every rank made it while the last step ran), each rank runs its own actions on the
chunks of its replica and passes hidden states and their gradients to its neighbours, gradients are summed
over replicas, the optimizer steps.
"""

import logging
import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.elastic.multiprocessing.errors import record

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import open_dataset
from chunkflow.execution.pipeline import ChunkStage, StateAwareSchedule
from chunkflow.planning.background import PlanProcess
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PipelineSettings, PlanSettings, plan_step
from chunkflow.planning.simulate import picture
from chunkflow.reporting.metrics import GarbageCollection, MetricsLogger, init_logger
from chunkflow.reporting.pictures import plan_figure
from chunkflow.reporting.profiling import profiler
from chunkflow.reporting.timeline import gather_timeline, useful_time, write_timelines
from chunkflow.settings.config import ConfigError, flat, main_config, to_toml, user_errors
from chunkflow.storage import checkpoint, manifest
from chunkflow.storage import hf_weights as hf
from chunkflow.storage.files import claim_folder
from chunkflow.training import parallel, stages
from chunkflow.training.converters import check_converters, convert_model
from chunkflow.training.model import apply_activation_checkpoint, apply_compile, model_args, open_tokenizer
from chunkflow.training.optimizer import build_optimizer, check_optimizer, set_learning_rate
from chunkflow.training.preemption import StopRequest
from chunkflow.training.progress import Progress
from chunkflow.training.validation import Validation

logger = logging.getLogger(__name__)


def check(config) -> None:
    """What the config and the folders it names can tell. Raises ValueError before any process starts."""
    if config.parallelism.pipeline_parallel_degree == 1:
        raise ConfigError(
            "parallelism.pipeline_parallel_degree = 1: this recipe is for pipelines, use recipes/finetune.py"
            " (TRAIN_FILE), or set it to 2 or more"
        )
    if config.parallelism.fsdp_reshard_after_forward == "always":
        raise ConfigError(
            'parallelism.fsdp_reshard_after_forward = "always" would gather every layer for every chunk, and'
            " replicas have unequal"
            ' plans: with a pipeline set "default" or "never"'
        )
    tokenizer = open_tokenizer(config)
    family, args = model_args(config, tokenizer.vocab_size if tokenizer else 0)
    hf.check(config, family, args)
    check_converters(config, family, args)
    check_optimizer(config)
    manifest.check(config, args)
    stages.layers_of_stages(config, args)
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
    pipeline_ranks = config.parallelism.pipeline_parallel_degree
    device, mesh = parallel.init_processes(config, pipeline_ranks)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    replicas = ranks // pipeline_ranks
    pipeline_rank, replica = divmod(rank, replicas)
    data_mesh, pipeline_group = mesh[mesh.mesh_dim_names[1:]], mesh.get_group("pp")
    folder = Path(config.job.dump_folder)
    if rank == 0:
        with user_errors():
            lock = claim_folder(config.job.dump_folder, to_toml(config), locked=not fake)  # noqa: F841  while this process lives

    # Lengths become a plan for each step: the same groups on every rank, the same actions on the ranks of a
    # replica, which all read the tokens of its sequences.
    cost = Cost.of_model(args)
    layers = stages.layers_of_stages(config, args)
    settings = PlanSettings(
        cost,
        ranks=replicas,
        enable=config.chunkflow.enable,
        chunk_size=config.chunkflow.chunk_size,
        k=config.chunkflow.k,
        fill_tails=config.chunkflow.fill_tails,
        balance=config.chunkflow.balance,
        pipeline=PipelineSettings(stages.stage_costs(args, layers), pipeline_ranks, replica),
    )
    with user_errors():
        loader = ChunkDataLoader(
            dataset,
            settings,
            rank=replica,
            global_batch_size=training.global_batch_size,
            seq_len=training.seq_len,
            overlong=training.overlong,
            shuffle=training.shuffle,
            seed=seed,
            make_plan=PlanProcess(settings, pipeline_rank),
        )
        validation = None
        if config.validation.enable and not fake:
            validation = Validation(config, settings, replica, tokenizer, args.vocab_size, seed, device)
    if loader.notice:
        logger.info(loader.notice)

    # Model: built without memory, cut into stages and shards, then filled: from a folder, or at random, which
    # depends on each parameter's name and the seed alone. A run that was here before goes on from its newest
    # checkpoint, whatever its layout was. Parameters stay gathered from a step's first forward to its last
    # backward, since replicas need not agree on their chunks.
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        with torch.device(device if fake else "meta"), parallel.default_dtype(training.dtype):
            size = sum(parameter.numel() for parameter in family.Transformer(args).parameters())
            models = stages.build_stages(family, args, layers, pipeline_rank, pipeline_ranks)
        name = f"{config.model.name} {config.model.flavor}"
        logger.info(f"Building {name} with {args}")
        logger.info(
            f"Model {name} size: {size:,} total parameters, layers of its {len(layers)} stages:"
            f" {list(map(len, layers))}"
        )
        chunk_stages = []
        for stage, model in models.items():
            convert_model(model, config)
            apply_compile(model, config)
            apply_activation_checkpoint(model, config)
            parallel.apply_fsdp(model, data_mesh, config, reshard=False)
            if not fake:
                model.to_empty(device="cpu" if training.enable_cpu_offload else device)
            hidden_dtype = parallel.DTYPES[training.mixed_precision_param]
            chunk_stages.append(
                ChunkStage(
                    model,
                    stage,
                    len(layers),
                    device,
                    pipeline_group,
                    hidden_dtype,
                    parallel.before_last_backward,
                )
            )
        schedule = StateAwareSchedule(chunk_stages)
        optimizer = build_optimizer(nn.ModuleList(models.values()), config)
        progress = Progress()
        if not fake:
            with user_errors():
                checkpoints = checkpoint.Checkpoints(
                    config.checkpoint,
                    config.job.dump_folder,
                    training.steps,
                    flat(config),
                    models.values(),
                    optimizer,
                    loader,
                )
                progress = checkpoints.load(family, config.model.hf_assets_path, seed)
            metrics = MetricsLogger(
                config, device, hidden_dtype, start_step=progress.step, tokens_seen=progress.tokens_seen
            )

    first_step, stopping = progress.step + 1, False
    garbage = GarbageCollection(training.gc_freq)
    logger.info(
        f"Training starts at step {first_step}: {training.steps} steps (warm-up"
        f" {config.lr_scheduler.warmup_steps}) of {training.global_batch_size} sequences over {replicas}"
        f" pipelines of {pipeline_ranks} ranks, chunks of {config.chunkflow.chunk_size} tokens, k ="
        f" {config.chunkflow.k}"
    )
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), profiler(config) as profile:
        for step, data in zip(range(first_step, training.steps + 1), loader):
            plan = data.plan
            garbage.run(step)

            # Forward and backward of the replica's chunks on this rank's stages: gradients of the mean token
            # loss of the global batch add up in .grad.
            for model in models.values():
                parallel.begin_step(model, reshard=False)
            optimizer.zero_grad()
            result = schedule.step(
                plan.pipeline.program[pipeline_rank], plan.groups[replica], data.chunks, max(data.targets, 1)
            )
            stages.sum_tied_gradients(models, mesh, device)
            grad_norm = stages.clip_grad_norm(models, training.max_norm, mesh)
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
                own_loss = result.loss_sum.item()  # of the last stage; elsewhere 0
                timeline = result.clock.timeline()
                figures = parallel.gather_over_ranks(
                    [
                        useful_time(timeline),
                        timeline[-1].end,
                        plan.pipeline.simulation.bubble,
                        max(result.live_chunks),
                        max(result.stage_inputs),
                        result.state_bytes / 2**30,
                    ],
                    device,
                )
                metrics.log(
                    step,
                    plan,
                    loss=own_loss / max(data.targets, 1),
                    max_loss=own_loss / data.own_targets
                    if data.own_targets and pipeline_rank == pipeline_ranks - 1
                    else -math.inf,
                    grad_norm=grad_norm.item(),
                    lr=lr,
                    supervised_tokens=data.targets,
                    scalars=chunkflow_scalars(
                        plan, data, loader.ledger, figures, replicas, progress.bad_steps + unsound
                    ),
                )
            if step == 1 or (profile and step % config.profiling.profile_freq == 0):
                measured = gather_timeline(result, pipeline_group) if profile else None
                if rank == 0:
                    planned = plan_step(data.lengths, settings).pipeline.simulation.timeline
                    timelines = write_timelines(folder / f"timeline_step_{step}.json", planned, measured)
                    metrics.add_figure("chunkflow/timeline", lambda: picture(timelines), step)
            if step == 1:
                metrics.add_figure(
                    "chunkflow/plan of step 1", lambda: plan_figure(plan, config.chunkflow.chunk_size), step
                )
            if validation and validation.due(step):
                validation.run(
                    step,
                    metrics,
                    models.values(),
                    lambda data, take: schedule.evaluate(
                        data.plan.pipeline.program[pipeline_rank],
                        data.plan.groups[replica],
                        data.chunks,
                        take,
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
            hf.save_model(checkpoints.hf_folder, models.values(), family, config.model, dtype, device)
    logger.info(f"Tokens: {loader.ledger}")
    if config.metrics.enable_tensorboard:
        logger.info(f"See the curves: tensorboard --logdir {folder / config.metrics.save_tb_folder}")
    logger.info("Training completed")
    dist.destroy_process_group()


def chunkflow_scalars(plan, data, ledger, figures, replicas, bad_steps) -> dict[str, float]:
    """What TensorBoard shows beyond torchtitan's tags. `figures`: of each rank, as main gathers them; a
    pipeline rank's replicas are together."""
    useful, ends, simulated, live_chunks, stage_inputs, state_gib = zip(*figures)
    bubbles = {"chunkflow/bubble(%)/simulated": 100 * sum(simulated) / len(simulated)}
    for stage in range(len(figures) // replicas):
        own = useful[stage * replicas : (stage + 1) * replicas]
        bubbles[f"chunkflow/bubble(%)/stage_{stage}"] = 100 * (1 - sum(own) / replicas / max(ends))
    tokens = {f"data/{name}_tokens": count for name, count in vars(ledger).items()}
    return (
        bubbles
        | tokens
        | {
            "chunkflow/groups": sum(map(len, plan.groups)),
            "chunkflow/recomputed(%)": 100 * plan.recomputed_chunks / plan.chunks,
            "chunkflow/live_chunks_peak": max(live_chunks),
            "chunkflow/stage_inputs_peak": max(stage_inputs),
            "chunkflow/kv_state(GiB)": max(state_gib),
            "chunkflow/tokens_per_supervised_token": plan.tokens / max(data.targets, 1),
            "chunkflow/bad_steps": bad_steps,
            "data/longest_sequence": max(data.lengths),
            "data/epoch": data.epoch,
        }
    )


if __name__ == "__main__":
    record(main)()
