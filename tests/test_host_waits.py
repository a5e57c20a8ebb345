"""The host queues work for the device and seldom waits for it: once a step, and for no copy of a chunk."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings
from chunkflow.training import parallel
from tests.helpers.layouts import join
from tests.helpers.processes import run_ranks

TENSORS = ("tokens", "labels", "positions", "query_ends", "key_ends", "sequences")


def agreements():
    """What ranks agree on, and the operations under it that read a number from the device or communicate."""
    device, rank, seen = join().device, dist.get_rank(), []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default or function.namespace == "c10d":
                seen.append(function.name())
            return function(*arguments, **(kwargs or {}))

    answers = []
    for wrong in (0.0, float("nan"), float("inf")):
        figures = [torch.tensor(0.1, dtype=torch.float64), torch.tensor(2.5 + wrong if rank else 2.5)]
        with Recorder():
            answers.append(parallel.agree(figures, [rank == 1, False], device))
    return answers, seen


def test_ranks_agree_with_one_collective_and_one_wait():
    (first, seen), (second, _) = run_ranks(agreements, 2)
    assert seen == ["c10d::allreduce_"] * 3, "numbers are read all together, at the end"
    assert first[0] == ([0.1, 2.5], [False, True, False]) == second[0]
    for ours, theirs in zip(first[1:], second[1:]):
        assert ours == ([0.1, 2.5], [True, True, False]), "rank 0's own figures are finite"
        assert theirs[1] == ours[1] and not 0 <= theirs[0][1] < float("inf")


def test_chunks_are_pinned_in_the_loaders_thread(monkeypatch):
    """All six tensors of each chunk, and what the runner copies are the pinned ones. The thread uses this
    process's GPU, not the machine's first."""
    pinned, threads, devices = {}, set(), []

    def pin_memory(tensor):
        threads.add(threading.current_thread().name)
        copy = tensor.clone()
        pinned[copy.data_ptr()] = tensor
        return copy

    def set_device(device):
        devices.append((threading.current_thread().name.rpartition("_")[0], device))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)

    def chunks(pin):
        dataset = SyntheticDataset("lmsys", vocab_size=600, seed=0, count=20)
        limits = {"global_batch_size": 4, "seq_len": 300_000, "overlong": "error"}
        loader = ChunkDataLoader(
            dataset, PlanSettings(Cost(1.0, 0.0), chunk_size=64), replica=0, shuffle=True, seed=0, pin_memory=pin,
            **limits,
        )  # fmt: skip
        return [chunk for group in next(iter(loader)).chunks for chunk in group]

    plain = chunks(False)
    assert not pinned and not devices
    got = chunks(True)
    assert devices == [("chunk-dataloader", 3)]
    assert len(got) == len(plain) > 1 and {name.rpartition("_")[0] for name in threads} == {
        "chunk-dataloader"
    }
    for chunk, expected in zip(got, plain):
        assert isinstance(chunk, ChunkTensors) and chunk.ends == expected.ends
        for name in TENSORS:
            tensor = getattr(chunk.to(torch.device("cpu")), name)
            assert tensor.data_ptr() in pinned and torch.equal(tensor, getattr(expected, name))
