"""Saves while training goes on: what is copied from the device, and on which GPU the thread is that writes."""

import dataclasses
import threading
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow.settings.config import load_config
from chunkflow.settings.keys import flat
from chunkflow.storage import checkpoint
from chunkflow.storage.checkpoint import snapshot
from chunkflow.training.optimizer import build_optimizer, optimizer_tensors
from chunkflow.training.progress import Progress
from models import llama
from tests.helpers.processes import run_ranks


def test_a_snapshot_leaves_the_device_once_and_is_a_true_copy(tmp_path):
    run_ranks(snapshots, 1)


def snapshots():
    """Tensors without content are on CUDA here, sharded ones too; the others are the CPU's."""

    class Departures(TorchDispatchMode):
        """The options of each operation that takes something from CUDA to the CPU."""

        def __init__(self):
            super().__init__()
            self.options = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            devices = {x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)}
            if devices == {"cuda", "cpu"}:
                self.options.append(kwargs or {})
            return result

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = DeviceMesh("cuda", [0, 1])
    for pinned in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True), mock.patch("torch.cuda.synchronize") as wait:
            whole = torch.empty(6, 4, device="cuda")
            sharded = DTensor.from_local(whole, mesh, [Shard(0)], run_check=False)
            with Departures() as departures:
                copies = snapshot({"whole": whole, "sharded": sharded, "step": torch.zeros(())}, pinned)
        assert [options.get("non_blocking", False) for options in departures.options] == [pinned, pinned]
        assert wait.call_count == pinned
        assert {name: copy.device.type for name, copy in copies.items()} == dict.fromkeys(copies, "cpu")
        assert copies["sharded"].shape == (12, 4) and copies["sharded"].placements == sharded.placements
    for tensor in (torch.ones(3, requires_grad=True), torch.zeros((), dtype=torch.uint8)):
        copy, before = snapshot({"a": tensor}, pinned=False)["a"], tensor.detach().clone()
        tensor.data.add_(1)
        assert torch.equal(copy, before) and not copy.requires_grad


def test_the_thread_that_saves_uses_this_process_s_gpu(tmp_path):
    run_ranks(save_as_gpu_3, 1, tmp_path)


def save_as_gpu_3(folder):
    """CUDA is pretended until the first save, which is real, on the CPU."""
    done = []

    def set_device(device):
        done.append((threading.current_thread().name, device))

    def save(*arguments, **options):
        done.append((threading.current_thread().name, "save"))
        return real_save(*arguments, **options)

    dist.init_process_group("gloo")
    options = [f"--job.dump_folder={folder}", "--checkpoint.enable", "--checkpoint.async_mode=async"]
    config, real_save = load_config(options), checkpoint.dcp.save
    model = llama.Transformer(dataclasses.replace(llama.flavors["debugmodel"], n_layers=1, vocab_size=32))
    loader = mock.Mock(identity={}, state={})
    loader.dataset.changed_file.return_value = ""
    where = config.checkpoint, str(folder), 5, flat(config)
    with mock.patch("torch.cuda.set_device", set_device), mock.patch.object(checkpoint.dcp, "save", save):
        with (
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.current_device", return_value=3),
        ):
            checkpoints = checkpoint.Checkpoints(*where, [model], None, loader)
        checkpoints.optimizer = torch.optim.AdamW(model.parameters())
        checkpoints.after_step(Progress(step=5), stopping=False, failed_in_background=False)
    assert done == [("checkpoint_0", 3), ("checkpoint_0", "save")]
    assert (folder / "checkpoint" / "step-5" / "manifest.json").exists()


def test_a_snapshot_of_8_bit_moments_is_a_true_copy(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    run_ranks(eight_bit_snapshot, 1)


def eight_bit_snapshot():
    """torchao's own conversion to the CPU returns a CPU's moments themselves."""
    layer = torch.nn.Linear(64, 64)
    optimizer = build_optimizer(layer, dataclasses.replace(load_config([]).optimizer, name="AdamW8bit"))
    state = optimizer_tensors(optimizer, {"weight": layer.weight})["optimizer.weight.exp_avg"]
    copy = snapshot({"exp_avg": state}, pinned=False)["exp_avg"]
    assert type(copy) is type(state) and (copy.dtype, copy.signed) == (state.dtype, state.signed)
    for part in ("codes", "scale", "qmap"):
        ours, theirs = getattr(copy, part), getattr(state, part)
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), part
