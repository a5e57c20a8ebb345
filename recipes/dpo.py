"""Direct preference optimization (DPO) in chunks: pairs of answers of any length, on every layout.

    TRAIN_FILE=recipes/dpo.py CONFIG_FILE=my.toml ./run_train.sh --training.dataset_path=pairs.jsonl

Copy this file, edit it, and start it with TRAIN_FILE=my_recipe.py ./run_train.sh. It is finetune.py with a
step of two phases: forwards alone give the log-probabilities of both answers of each pair, and so what each
answer's loss counts; then chunks run forward and backward with these weights. The reference is the model that
training starts from; its log-probabilities are computed before step 1.
"""

import functools
import logging
import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.elastic.multiprocessing.errors import record

from chunkflow.execution.linear import fit_linear_layers
from chunkflow.execution.loss import loss_sum
from chunkflow.execution.runner import Runner
from chunkflow.reporting.metrics import MetricsLogger
from chunkflow.reporting.profiling import profiler
from chunkflow.reporting.step_figures import gather_over_ranks, rank_figures, step_scalars
from chunkflow.settings.keys import flat, to_toml
from chunkflow.storage import manifest
from chunkflow.storage.checkpoint import Checkpoints
from chunkflow.storage.checkpoint import check as check_folders
from chunkflow.storage.files import claim_folder
from chunkflow.storage.references import References
from chunkflow.training import build, choice, parallel, prediction, preference, stages
from chunkflow.training.converters import convert_model
from chunkflow.training.lora import apply_lora, trained_parameters, without_adapters
from chunkflow.training.optimizer import build_optimizer, set_learning_rate
from chunkflow.training.preemption import StopRequest
from chunkflow.training.progress import Progress
from chunkflow.training.start import GarbageCollection, init_logger, main_config, user_errors
from chunkflow.training.validation import Validation

logger = logging.getLogger(__name__)


def check(config) -> None:
    """What the config and the folders it names can tell. Raises ValueError before any process starts."""
    build.check(config, functools.partial(check_folders, config), pairs=True)


def main() -> None:
    config = main_config(check=check, chooses=True)
    init_logger()
    if manifest.finished(config.checkpoint, config.job.dump_folder, config.training.steps):
        logger.info(
            f"Training is complete: step {config.training.steps} is saved; raise training.steps to go on"
        )
        return
    stop = StopRequest()
    seed = parallel.set_seed(config.debug)
    logger.info(f"Starting job: {config.job.description}")

    # ---- Data. Text becomes tokens on disk, once; whichever process of a machine comes first does it while
    # the others wait.
    training, fake = config.training, config.comm.mode == "fake_backend"
    folder = Path(config.job.dump_folder)
    with user_errors():
        spec = build.model_spec(config)
        dataset, validation_data = build.open_data(config, spec, seed, pairs=True), None
        if config.validation.enable and not fake:
            # Another seed than training's gives other synthetic sequences, of the same distribution.
            validation_data = build.open_data(config, spec, seed + 1, "validation", pairs=True)

    # ---- Processes. With the fake backend this one stands for rank 0 of NGPU, and tensors have shapes but no
    # content.
    offload = training.enable_cpu_offload
    processes = parallel.init_processes(config.comm, config.parallelism, offload)
    device, replica, pipeline_rank = processes.device, processes.replica, processes.pipeline_rank
    with user_errors():
        # "auto" becomes numbers, and what would not fit into memory is refused.
        saved = manifest.saved_settings(config.checkpoint, config.job.dump_folder)
        adapts = choice.settle(config, spec, dataset, seed, processes, saved)
    if processes.rank == 0:
        with user_errors():
            claim_folder(config.job.dump_folder, to_toml(config), locked=not fake)

    # --- Plans. Lengths become a plan for each step, the same on every rank; the ranks of a replica then read
    # the tokens of its sequences.
    settings = build.plan_settings(config, spec, processes.replicas, adapts=adapts, pairs=True)
    with user_errors():
        loader = build.open_loader(
            training, dataset, settings, replica, seed, pin_memory=device.type == "cuda"
        )
        build.check_waits(config.comm, loader, settings, device)
        validation = None
        if validation_data is not None:
            where = settings, processes, seed
            validation = Validation(config.validation, training, validation_data, *where)
        # What the model that training starts from says of the pairs: in a file where it was computed before.
        where = settings, training.steps, processes
        references = [References(config, spec.args, loader, *where)]
        if validation:
            where = settings, validation.steps, processes
            references.append(References(config, spec.args, validation.loader, *where))

    # ---- Model. Built without memory, cut into stages and shards, then filled: from a checkpoint, from a
    # Hugging Face folder, or at random, which depends on each parameter's name and the seed alone, whatever
    # the layout.
    reshard, compute_dtype = settings.lockstep, parallel.DTYPES[training.mixed_precision_param]
    tensors_without_content = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    logger.info(f"Building {spec.name} with {spec.args}")
    logger.info(f"Model {spec.name} size: {spec.parameters:,} total parameters{spec.stages_in_words}")
    if config.lora.rank:
        trained = trained_parameters(config.lora, spec.family, spec.args)
        share = f"{trained:,} of {trained + spec.parameters:,} parameters are trained"
        logger.info(f"LoRA: {share} ({100 * trained / (trained + spec.parameters):.2f} %)")
    build.activate_attention(config)
    with tensors_without_content:
        with torch.device(device if fake else "meta"), parallel.default_dtype(training.dtype):
            rank, ranks = processes.pipeline_rank, processes.pipeline_ranks
            models = stages.build_stages(spec.family, spec.args, spec.layers, rank, ranks)
        for model in models.values():
            convert_model(model, config.model.converters, config.quantize.linear.float8)
            apply_lora(model, config.lora, spec.family, training)
            parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
            if not fake:
                parallel.apply_compile(model, config.compile)
                narrow = device.type == "cpu" and compute_dtype == torch.bfloat16
                if narrow and not config.compile.enable:  # compiled graphs are for all lengths
                    fit_linear_layers(model)
            parallel.apply_fsdp(model, processes.data_mesh, training, reshard)
            if not fake:
                model.to_empty(device="cpu" if offload else device)
        chunk_stages = stages.make_stages(models, len(spec.layers), processes, compute_dtype)
        memory = {"keep_attention": config.chunkflow.keep_attention}
        memory["kv_offload"] = config.chunkflow.kv_offload == "host"
        runner = Runner(chunk_stages, device, loss_sum, processes.blocks, **memory)
        optimizer = build_optimizer(nn.ModuleList(models.values()), config.optimizer)
        progress = Progress()
        if not fake:
            with user_errors():
                where = config.checkpoint, folder, training.steps, flat(config)
                checkpoints = Checkpoints(*where, models.values(), optimizer, loader)
                origin = spec.family, config.model.hf_assets_path, seed
                if any(values.missing for values in references):
                    parallel.set_timeouts(processes, config.comm.train_timeout_seconds)
                    checkpoints.load_initial(*origin)
                    with without_adapters(models.values()):
                        for values in references:
                            values.compute(runner, models.values())
                progress = checkpoints.load(*origin)
            begin = {"start_step": progress.step, "tokens_seen": progress.tokens_seen, "config": flat(config)}
            begin["memory_of"] = functools.partial(prediction.memory_of_sequence, config, spec, settings)
            metrics = MetricsLogger(
                folder, config.metrics, device, compute_dtype, validates=config.validation.enable, **begin
            )

    first_step, stopping = progress.step + 1, False
    garbage = GarbageCollection(training.gc_freq)
    logger.info(
        f"Training starts at step {first_step}: {training.steps} steps (warm-up"
        f" {config.lr_scheduler.warmup_steps}) of {training.global_batch_size} pairs over"
        f" {processes.in_words}, chunks of {config.chunkflow.chunk_size} tokens, k = {config.chunkflow.k}"
    )
    with tensors_without_content, profiler(config.profiling, folder) as profile:
        for step, data in zip(range(first_step, training.steps + 1), loader):
            plan, counted = data.plan, sum(preference.counted(data.weight_sums))
            garbage.run(step)

            # ---- Forwards alone: the log-probability of each answer, on all ranks. With the reference's it
            # says what the loss of each answer's tokens counts.
            forwards = plan.forward_programs[replica][pipeline_rank]
            logps = preference.log_probabilities(runner, models.values(), forwards, data, replica)
            pairs = preference.dpo(config.dpo, logps, references[0].of(data.rows), data.weight_sums)

            # ---- Forward and backward: gradients of the mean loss over the pairs add up in .grad.
            for model in models.values():
                parallel.begin_step(model, reshard)
            optimizer.zero_grad()
            program, groups = plan.programs[replica][pipeline_rank], plan.groups[replica]
            if plan.notice:  # it was planned for less memory, or will take too much
                logger.info(f"step {step}: {plan.notice}")
            how = {"kv_offload": plan.kv_offload == "host"}
            result = runner.step(program, groups, data.chunks, counted or 1, pairs.sequence_weights, **how)
            stages.sum_tied_gradients(models, processes)
            grad_norm = parallel.clip_grad_norm(models.values(), training.max_norm, processes.mesh)
            lr = set_learning_rate(optimizer, step, config.optimizer.lr, config.lr_scheduler, training.steps)
            if fake:
                what = f"Rank 0 of {processes.count} can run this step"
                logger.info(f"{what}; loss and gradient norm mean nothing on the fake backend")
                dist.destroy_process_group()
                return

            # --- Update. Ranks agree on whether it may be applied, and whether one of them was asked to stop.
            figures = [pairs.loss, grad_norm]
            flags = [stop.asked, checkpoints.failed_in_background]
            (loss, norm), agreed = parallel.agree(figures, flags, device)
            not_finite, stopping, save_failed = agreed
            if counted and not not_finite:
                optimizer.step()
            if not counted:
                what = "no pair has targets in both answers"
                logger.info(f"step {step}: {what}, so nothing was updated")

            # ---- Figures, of this rank and gathered over all.
            cost = settings.cost  # of both phases
            useful = sum(cost.forward(length) + cost.training(length) for length in data.lengths)
            metrics.count(plan, useful, loader.take_wait())
            if metrics.due(step):
                figures = rank_figures(result, plan.simulations[replica])
                figures = gather_over_ranks(figures, device)
                metrics.log(
                    step,
                    plan,
                    loss=loss if processes.rank == 0 else 0.0,  # all ranks have it, and the log adds up
                    max_loss=-math.inf,
                    grad_norm=norm,
                    lr=lr,
                    supervised_tokens=data.targets,
                    by_source=preference.losses_by_source(pairs, loader.sources, data.source_of),
                    pairs=preference.means(pairs.sums(), counted),
                    scalars=step_scalars(
                        plan,
                        figures,
                        longest=max(data.lengths),
                        epoch=data.epoch,
                        ledger=vars(loader.ledger),
                        bad_steps=progress.bad_steps + not_finite,
                    ),
                )
            if step == 1:
                metrics.show_step(step, plan, result, dataset.lengths)
            traced = profile and step % config.profiling.profile_freq == 0
            if processes.pipeline_ranks > 1 and (step == 1 or traced):
                group = processes.mesh.get_group("pp") if profile else None  # measured only then
                metrics.show_timeline(step, plan.simulations[replica].timeline, result, group)
            if validation and validation.due(step):
                what = config.dpo, references[1].of, step, metrics, models.values(), runner, processes
                preference.validate(validation, *what)
            if profile:
                profile.step()
            if step == first_step:
                parallel.set_timeouts(processes, config.comm.train_timeout_seconds)

            # ---- Progress. A step that was not finite is reported, and too many of them end the run; else
            # what was trained is saved when it is due.
            stopping = stopping and step < training.steps
            with user_errors():
                sources = [dataset.source(row) for row in data.rows] if not_finite else []
                progress.count(step, plan.tokens, not_finite, training.max_bad_steps, norm, sources)
                waited = checkpoints.after_step(progress, stopping, save_failed)
            metrics.saved(waited)
            if stopping:
                break

    metrics.close({"": loader.ledger, **loader.ledger_by_source})
    if stopping:
        dist.destroy_process_group()
        stop.leave(saved=config.checkpoint.enable)
    if config.checkpoint.last_save_in_hf:
        # Ranks wait while rank 0 writes.
        parallel.set_timeouts(processes, config.comm.init_timeout_seconds)
        with user_errors():
            checkpoints.export(config, spec, device)
    logger.info("Training completed")
    dist.destroy_process_group()


if __name__ == "__main__":
    record(main)()
