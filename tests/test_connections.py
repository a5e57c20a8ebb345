"""Process groups and their communicators: which backend, and that all are there before the model is."""

from __future__ import annotations

import contextlib
import random
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow.planning.memory import communicators
from chunkflow.settings.config import load_config
from chunkflow.storage import hf_weights
from chunkflow.training import parallel
from models import families
from recipes import finetune
from tests.helpers.layouts import Pipeline, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run_ranks, write_rows
from tests.helpers.reference import random_lengths, random_sequences


class Captured(Exception):
    """Instead of a process group."""


@pytest.mark.parametrize(
    "cuda, offload, backend",
    [(True, False, "nccl"), (True, True, "cpu:gloo,cuda:nccl"), (False, True, "gloo")],
)
def test_offloaded_gradients_are_summed_by_gloo(cuda, offload, backend, tmp_path, monkeypatch):
    """The recipe up to its process group: norms of gradients in host memory are summed over ranks, too."""

    def capture(backend, **more):
        raise Captured(backend)

    data = write_rows(tmp_path / "rows.jsonl", [9, 7])
    options = ["--training.dataset=jsonl", f"--training.dataset_path={data}"]
    options += [f"--job.dump_folder={tmp_path / 'run'}", f"--training.enable_cpu_offload={offload}".lower()]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", capture)
    monkeypatch.setattr(finetune, "StopRequest", mock.Mock())  # it would handle this process's signals
    with pytest.raises(Captured, match=f"^{backend}$"):
        finetune.main()


class Recorder(TorchDispatchMode):
    """The communicators that NCCL would need for what runs under it: names of groups and, for a message that
    is in no batch, the pair of global ranks."""

    def __init__(self):
        super().__init__()
        self.used, self.in_a_batch = set(), False

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        name = function.name()
        if name.startswith("c10d::"):
            (group,) = [dist.ProcessGroup.unbox(a) for a in arguments if isinstance(a, torch.ScriptObject)
                        and "ProcessGroup" in str(a._type())]  # fmt: skip
            if name in ("c10d::send", "c10d::recv_") and not self.in_a_batch:
                peer = dist.get_process_group_ranks(group)[arguments[2]]
                self.used.add(frozenset({dist.get_rank(), peer}))
            elif group.size() > 1:
                self.used.add(group.group_name)
        elif name.startswith("_c10d_functional::") and isinstance(group := arguments[-1], str):
            if dist.distributed_c10d._resolve_process_group(group).size() > 1:
                self.used.add(group)
        return function(*arguments, **(kwargs or {}))

    @contextlib.contextmanager
    def __call__(self):
        batch = dist.batch_isend_irecv

        def in_a_batch(operations):
            self.in_a_batch = True
            works = batch(operations)
            self.in_a_batch = False
            return works

        with self, mock.patch.object(dist, "batch_isend_irecv", in_a_batch):
            yield


def connections(pipeline_ranks, virtual, replicated, reshard):
    """What init_processes uses on this rank, and what two steps and an export use."""
    config = layout_config(reshard=reshard, replicas=replicated)
    config.parallelism.pipeline_parallel_degree = pipeline_ranks
    config.parallelism.pipeline_parallel_schedule = "Interleaved1F1B" if virtual > 1 else "1F1B"
    start, steps = Recorder(), Recorder()
    with start():
        processes = parallel.init_processes(config.comm, config.parallelism)
    mesh, device = processes.mesh, processes.device
    whole = small_model("qwen3", n_layers=6, tied_embeddings=True)
    if pipeline_ranks > 1:
        pipeline = Pipeline("qwen3", mesh, virtual, whole, blocks=processes.blocks)
        models = list(pipeline.models.values())
    else:
        models = [whole]
        parallel.apply_fsdp(whole, mesh, config.training, reshard == "always")
    share = {"spread_over": processes.replicas, "kv_tokens": 40}
    with steps():
        for seed in range(2):
            lengths = random_lengths(random.Random(seed), 90) + [120, 100]
            sequences = random_sequences(lengths, 96, seed)
            if pipeline_ranks > 1:
                pipeline.step(pipeline.plan(lengths, 1, **share), sequences)
            else:
                sharded_gradients(whole, lengths, sequences, config, blocks=processes.blocks, **share)
            for model in models:  # the step took them
                for parameter in model.parameters():
                    parameter.grad = parameter.detach().clone()
            parallel.clip_grad_norm(models, 1.0, mesh)
            parallel.agree([torch.ones(())], [False], device)
        shapes = hf_weights.parameter_shapes(families["qwen3"], whole.args)
        for _ in hf_weights.gathered_parameters(models, shapes, torch.float32, device):
            pass
    return start.used, steps.used


@pytest.mark.parametrize(
    "pipeline_ranks, virtual, replicated, shards, reshard",
    [
        (1, 1, 1, 2, "always"),
        (1, 1, 2, 2, "always"),
        (1, 1, 2, 1, "never"),
        (2, 1, 1, 2, "never"),
        (2, 2, 1, 1, "never"),
        (4, 1, 1, 1, "never"),
        (3, 2, 1, 1, "never"),
    ],
)
def test_no_communicator_is_made_in_a_step(pipeline_ranks, virtual, replicated, shards, reshard):
    ranks = pipeline_ranks * replicated * shards
    answers = run_ranks(connections, ranks, pipeline_ranks, virtual, replicated, reshard, seconds=120)
    for start, steps in answers:
        assert steps and steps <= start, (steps - start, start)
    layout = pipeline_ranks, replicated, shards
    assert max(len(start) for start, _ in answers) == communicators(*layout, replicated * shards)
    if pipeline_ranks > 1:  # messages are seen at all, and each neighbour was met before
        pairs = set().union(*({use for use in steps if isinstance(use, frozenset)} for _, steps in answers))
        ring = virtual > 1 and pipeline_ranks > 2
        assert len(pairs) == (pipeline_ranks - 1 + ring) * shards


def test_waiting_is_limited_to_half_an_hour():
    assert load_config([]).comm.train_timeout_seconds == 1800
