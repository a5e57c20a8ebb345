"""K/V in host memory: the same numbers, bit by bit; what the device holds; and, on a simulated GPU, that copies
beside the computation neither come too late nor touch what is in use."""

from __future__ import annotations

import random
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from chunkflow.execution import host_state
from chunkflow.execution.generation import Context, continuation
from chunkflow.execution.host_state import HostMemory, Use
from chunkflow.execution.loss import last_logits
from chunkflow.execution.runner import Runner
from chunkflow.execution.state import KeyValueState
from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import Action, Kind, linear_schedule
from chunkflow.training import parallel
from models import families
from tests.helpers.cuda_kernels import cuda_attention_on_cpu
from tests.helpers.layouts import SMALL, Pipeline, join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import rows_of, run_ranks, small_assets, train, write_rows
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    chunked_gradients,
    gradients,
    random_lengths,
    random_sequences,
    runner_of,
    whole_sequence_gradients,
)

quick = pytest.mark.quick
CPU = torch.device("cpu")
ROW = 2 * SMALL["n_kv_heads"] * SMALL["head_dim"]  # numbers of a token in a layer: its key and value


def window_bytes(groups, numbers=ROW, size=8, wide=8) -> int:
    """The most that two windows have, by arithmetic."""
    dependent = [group for group in groups if len(group.chunks) > 1]
    each = [group.tokens * size + group.chunks[-1].prefix * wide for group in dependent]
    return 2 * numbers * max(each, default=0)


def late(runner: Runner) -> int:
    return runner.host.late


# ------------------------------------------------------------------------------------------------- one process


@pytest.mark.proves(
    "one process + kv_offload + k > 1",
    "one process + kv_offload + full/selective",
    "one process + kv_offload + tied",
)
@quick
@pytest.mark.parametrize("seed", range(12))
def test_it_changes_no_bit_and_the_device_holds_two_layers(seed):
    rng = random.Random(seed)
    layers, heads = rng.choice([1, 2, 3, 6]), rng.choice([1, 2, 4])
    changes = {"n_layers": layers, "n_kv_heads": heads, "tied_embeddings": bool(seed % 2)}
    model = small_model(rng.choice(list(families)), **changes)
    mode = rng.choice(["none", "full", "selective"])
    parallel.apply_activation_checkpoint(model, layout_config(mode=mode).activation_checkpoint)
    lengths = [rng.randint(40, 120), *random_lengths(rng, 90)]
    groups = build_groups(lengths, rng.randint(6, 39), fill_tails=rng.random() < 0.7)
    rng.shuffle(groups)
    sequences, k = random_sequences(lengths, 96, seed), rng.choice([1, 2, 3, 100])
    loss, expected = whole_sequence_gradients(model, sequences)
    plain_loss, plain, on_device = chunked_gradients(model, sequences, groups, k)
    ours, got, result = chunked_gradients(model, sequences, groups, k, kv_offload=True)
    assert ours == plain_loss and abs(ours - loss) <= 1e-10 * loss
    assert all(torch.equal(got[name], plain[name]) for name in plain)
    assert_same_gradients(got, expected, 1e-10)
    numbers = 2 * heads * SMALL["head_dim"]
    assert result.state_bytes == on_device.state_bytes == on_device.device_state_bytes
    assert 0 < result.device_state_bytes <= window_bytes(groups, numbers)
    longest = max(len(group.chunks) for group in groups)
    if layers > 1 and longest > 2:
        assert result.device_state_bytes == window_bytes(groups, numbers), "two layers, no less"


@pytest.mark.proves("one process + kv_offload + bf16 + k > 1")
@quick
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, None)])
def test_other_dtypes(dtype, tolerance):
    model, lengths = small_model("qwen3", dtype), [75, 3, 40, 12]
    sequences, groups = random_sequences(lengths, 96, 0), build_groups([75, 3, 40, 12], 16)
    _, plain, _ = chunked_gradients(model, sequences, groups, 2)
    _, got, result = chunked_gradients(model, sequences, groups, 2, kv_offload=True)
    assert all(torch.equal(got[name], plain[name]) for name in plain)
    assert result.device_state_bytes == window_bytes(groups, size=dtype.itemsize, wide=4)
    if tolerance:
        assert_same_gradients(got, whole_sequence_gradients(model, sequences)[1], tolerance)


@quick
def test_what_the_device_holds_does_not_grow_with_layers_and_grows_with_two_of_them():
    held = []
    for layers, length in ((4, 200), (12, 200), (4, 400)):
        model, groups = small_model("llama3", n_layers=layers), build_groups([length], 20)
        _, _, result = chunked_gradients(model, random_sequences([length], 96, 0), groups, 1, kv_offload=True)
        held.append((result.device_state_bytes, result.state_bytes))
    (few, few_state), (many, many_state), (long, long_state) = held
    assert few == many and many_state == 3 * few_state
    assert long == 2 * ROW * 8 * (400 + 380) and long_state > 2 * few_state


@quick
def test_the_next_window_is_always_on_its_way():
    """Also the first of an action: no layer of a chunk with a prefix has to begin its copy when it needs it."""
    lengths = [95, 50, 10, 33]
    groups = build_groups(lengths, 12)
    for mode in ("none", "full"):
        model = small_model("llama3")
        parallel.apply_activation_checkpoint(model, layout_config(mode=mode).activation_checkpoint)
        for k in (1, 2, 99):
            runner = runner_of(model, kv_offload=True)
            actions = linear_schedule([len(group.chunks) for group in groups], k)
            chunks = chunk_tensors(groups, random_sequences(lengths, 96, 0))
            runner.step(actions, groups, chunks, 100)
            assert late(runner) == 0
            assert not runner.host.windows, "nothing is held after the step"


@quick
def test_a_recomputation_may_come_early():
    """As stages of a pipeline do it: then a window lacks what a later chunk wrote, and is completed."""
    kinds = {"S": Kind.FORWARD_STATE, "F": Kind.FORWARD, "R": Kind.RECOMPUTE, "B": Kind.BACKWARD}
    actions = [
        Action(kinds[a[0]], 0, int(a[1]))
        for a in ["S0", "S1", "S2", "F3", "B3", "R2", "R1", "B2", "R0", "B1", "B0"]
    ]
    for layers in (1, 2, 4):
        model, sequences = small_model("qwen3", n_layers=layers), random_sequences([40], 96, 0)
        groups = build_groups([40], 10)
        _, plain, _ = chunked_gradients(model, sequences, groups, 2, actions)
        _, got, result = chunked_gradients(model, sequences, groups, 2, actions, kv_offload=True)
        assert all(torch.equal(got[name], plain[name]) for name in plain)
        assert result.device_state_bytes == min(layers, 2) * window_bytes(groups) / 2


@quick
def test_an_action_that_was_not_announced_is_refused():
    group, rows = build_groups([20], 10)[0], torch.zeros(10, 2, 8)
    state = KeyValueState(group, HostMemory(CPU))
    with pytest.raises(AssertionError, match="did not begin"):
        state.write(0, 0, rows, rows)


@quick
def test_losses_of_evaluation():
    model, lengths = small_model("qwen2"), [95, 50, 10, 33]
    sequences, results = random_sequences(lengths, 96, 0), []
    plan = plan_step(lengths, PlanSettings(Cost.of_model(model.args), 1, chunk_size=12, forward_only=True))
    for offload in (False, True):
        runner, losses = runner_of(model, kv_offload=offload), []
        chunks = chunk_tensors(plan.groups[0], sequences)
        result = runner.evaluate(
            plan.programs[0][0],
            plan.groups[0],
            chunks,
            lambda chunk, losses_T, to=losses: to.append(losses_T),
        )
        results.append((torch.cat(losses), result))
    (plain, on_device), (ours, result) = results
    assert torch.equal(plain, ours) and late(runner) == 0
    longest = max(group.tokens for group in plan.groups[0])
    assert result.device_state_bytes == 2 * ROW * 8 * longest < on_device.device_state_bytes
    assert result.state_bytes == on_device.state_bytes


@quick
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("layers", [1, 3])
def test_reading_and_generating(family, layers):
    """Also after a part is forgotten and read on otherwise."""
    model, answers = small_model(family, n_layers=layers), []
    first, second = (torch.randint(96, (length,)).tolist() for length in (45, 31))
    for offload in (False, True):
        context, answer = Context(model, 60, 7, offload), []
        for start, ids in ((0, first), (17, second)):
            context.forget(start)
            answer.append(context.read(ids, last_logits))
        ids = list(continuation(context, answer[-1], 6, lambda logits_V: int(logits_V.argmax())))
        context.forget(30)
        answers.append((*answer, torch.tensor(ids), context.losses([5, 6], [6, 7])))
    assert all(torch.equal(ours, plain) for plain, ours in zip(*answers))
    assert context._host.peak_bytes == min(layers, 2) * ROW * 8 * 60


# ---------------------------------------------------------------------------------------------- a simulated GPU


class SimulatedGPU(TorchDispatchMode):
    """Tensors in pinned memory are the host's, all others the device's. Copies on the copy stream run as late as
    CUDA may run them: when the computation waits for an event behind them. Memory begins as NaN. Asserts that the
    computation touches no tensor of the host, no tensor of the copy stream that it has not waited for, and that
    memory is allocated and copied on that stream only behind all that was computed."""

    def __init__(self):
        super().__init__()
        self.pinned, self.unseen = weakref.WeakSet(), weakref.WeakSet()  # storages; unseen: not waited for
        self.on_stream, self.computed, self.waited = False, 0, -1
        self.queue, self.run = [], 0
        self.copies = self.delayed = 0  # copies, and waits for some that had not run

    # What host_state asks of torch.cuda.
    def wait_stream(self, stream):
        self.waited = self.computed

    def record_event(self):
        return len(self.queue), list(self.unseen)

    def wait_event(self, event):
        position, storages = event
        self.delayed += position > self.run
        with _disable_current_modes():
            while self.run < position:
                self.queue[self.run]()
                self.run += 1
        for storage in storages:
            self.unseen.discard(storage)

    @contextmanager
    def stream(self, stream):
        self.on_stream = True
        try:
            yield
        finally:
            self.on_stream = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function._schema.name.split("::")[1]
        pinned = kwargs.pop("pin_memory", None)
        if name == "empty":
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            if pinned:
                self.pinned.add(tensor.untyped_storage())
            elif self.on_stream:
                assert self.waited == self.computed, "memory changes hands while it is computed with"
                self.unseen.add(tensor.untyped_storage())
            return tensor
        is_view = any(item.alias_info and not item.alias_info.is_write for item in function._schema.returns)
        if is_view or name == "detach":
            return function(*args, **kwargs)
        storages = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if self.on_stream:
            assert name == "copy_" and args[2] is True, "only copies that nobody waits for"
            assert self.waited == self.computed
            assert sum(storage in self.pinned for storage in storages) == 1, "between host and device"
            assert args[0].is_contiguous() and args[1].is_contiguous(), "else CUDA makes a temporary"
            self.queue.append(lambda: function(*args, **kwargs))
            self.copies += args[0].numel() > 0
            return args[0]
        self.computed += 1
        assert not any(storage in self.pinned for storage in storages), f"{name} on a tensor of the host"
        assert not any(storage in self.unseen for storage in storages), f"{name} before a copy arrived"
        return function(*args, **kwargs)


@contextmanager
def simulated_gpu():
    gpu = SimulatedGPU()
    with (
        gpu,
        mock.patch.object(host_state, "_copy_stream", lambda device: gpu),
        mock.patch.object(torch.cuda, "current_stream", lambda: gpu),
        mock.patch.object(torch.cuda, "stream", gpu.stream),
    ):
        yield gpu


@pytest.mark.proves("one process + kv_offload")
@quick
@pytest.mark.parametrize("seed", range(6))
def test_late_copies_change_nothing(seed):
    rng = random.Random(seed)
    model = small_model(rng.choice(list(families)), n_layers=rng.choice([1, 2, 4]))
    mode = rng.choice(["none", "full", "selective"])
    parallel.apply_activation_checkpoint(model, layout_config(mode=mode).activation_checkpoint)
    lengths = [rng.randint(40, 90), *random_lengths(rng, 60)]
    groups, sequences = build_groups(lengths, rng.randint(5, 20)), random_sequences(lengths, 96, seed)
    k = rng.choice([1, 2, 99])
    with cuda_attention_on_cpu():
        loss, plain, _ = chunked_gradients(model, sequences, groups, k)
        model.zero_grad()
        actions = linear_schedule([len(group.chunks) for group in groups], k)
        chunks = chunk_tensors(groups, sequences)
        with simulated_gpu() as gpu:
            result = runner_of(model, kv_offload=True).step(actions, groups, chunks, 100)
    got = gradients(model)
    assert gpu.copies > 50 and gpu.delayed > 5
    targets = sum(int((labels != -100).sum()) for _, labels in sequences)
    assert result.loss_sum / targets == pytest.approx(loss, rel=1e-12)
    assert_same_gradients(got, {name: g * targets / 100 for name, g in plain.items()}, 1e-12)


@quick
def test_a_prompt_on_the_simulated_gpu():
    model, ids = small_model("qwen3"), torch.randint(96, (50,)).tolist()
    with cuda_attention_on_cpu():
        expected = Context(model, 60, 7).read(ids, last_logits)
        with simulated_gpu() as gpu:
            got = Context(model, 60, 7, kv_offload=True).read(ids, last_logits)
    assert torch.equal(got, expected) and gpu.delayed > 10


@quick
def test_windows_are_filled_while_the_layer_before_computes():
    """When a layer has written, and its attention has not begun, the copy of the next one's is in the queue."""
    group, copies = build_groups([40], 10)[0], []
    with simulated_gpu() as gpu:
        host = HostMemory(CPU)
        state = KeyValueState(group, host)
        for index in range(3):
            host.begin(Use(state, index, False), Use(state, index + 1, False))
            for layer in range(3):
                rows = torch.zeros(10, 2, 8)
                before = gpu.copies
                state.write(layer, index, rows, rows)
                copies.append(gpu.copies - before)
    # Two copies, of keys and of values: into the next window (also an action's first one, in the action before),
    # and back to the host. The first chunk needs no window filled, and leaves that of the first layer.
    assert copies == [2, 2, 2] + 2 * [4, 4, 4]
    assert host.late == 0


# --------------------------------------------------------------------------------------------- ranks and stages


def on_ranks():
    processes, checked = join(layout_config()), 0
    for reshard, mode in (("never", "full"), ("always", "none")):
        config = layout_config(reshard=reshard, mode=mode)
        reference, model = small_model("qwen3"), small_model("qwen3")
        parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
        parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
        rng = random.Random(f"{reshard}/{mode}")
        lengths = [rng.randint(60, 200), rng.randint(60, 200), *random_lengths(rng, 50)]
        sequences, k = random_sequences(lengths, 96, 0), rng.choice([1, 2, 9])
        loss, expected = whole_sequence_gradients(reference, sequences)
        for spread in (1, processes.replicas):
            more = {"spread_over": spread, "kv_tokens": 60, "blocks": processes.blocks}
            plain_loss, plain = sharded_gradients(model, lengths, sequences, config, k, **more)
            got_loss, got = sharded_gradients(model, lengths, sequences, config, k, kv_offload=True, **more)
            assert got_loss == plain_loss and abs(got_loss - loss) <= 1e-10 * loss
            assert all(torch.equal(got[name], plain[name]) for name in plain)
            assert_same_gradients(got, expected, 1e-10)
            checked += 1
    return checked


@pytest.mark.proves(
    "never + kv_offload + full",
    "always + kv_offload",
    "never + shared + kv_offload + full",
    "always + shared + kv_offload",
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_and_sequences_that_they_share(world_size):
    assert run_ranks(on_ranks, world_size) == [4] * world_size


def shared_windows(length):
    """Bytes on the device, and of the state, of a sequence that all ranks share; training, then evaluation."""
    processes, model, figures = join(), small_model("llama3"), []
    parallel.apply_fsdp(model, processes.data_mesh, layout_config().training, False)
    runner = runner_of(model, parallel.before_last_backward, blocks=processes.blocks, kv_offload=True)
    for forward_only in (False, True):
        settings = PlanSettings(
            Cost.of_model(model.args),
            processes.replicas,
            chunk_size=16,
            spread_over=processes.replicas,
            kv_tokens=1,
            forward_only=forward_only,
        )
        plan = plan_step([length], settings, [processes.replica])
        groups, ((program,),) = plan.groups[processes.replica], plan.programs.values()
        chunks = chunk_tensors(groups, random_sequences([length], 96, 0))
        if forward_only:
            losses = []
            result = runner.evaluate(program, groups, chunks, lambda chunk, losses_T: losses.append(losses_T))
            assert losses
        else:
            parallel.begin_step(model, False)
            result = runner.step(program, groups, chunks, 100)
        figures.append((result.device_state_bytes, result.state_bytes))
    return figures, late(runner)


def test_a_rank_has_windows_of_its_own_tokens_only():
    length, token = 512, ROW * 8
    for ((device, state), (forward, kv)), missed in run_ranks(shared_windows, 2, length):
        # Half of the tokens; before the last chunk (of 2 x 16) are 15 / 16 of them.
        assert device == 2 * token * (length // 2) * (1 + 15 / 16)
        assert forward == 2 * token * (length // 2)
        layers = SMALL["n_layers"]
        assert layers * forward / 2 == kv < state <= layers * device / 2
        assert not missed


def on_stages(virtual):
    processes = join(stages_config())
    whole, checked = small_model("llama3", n_layers=5), 0
    pipeline = Pipeline("llama3", processes.mesh, virtual, whole, blocks=processes.blocks)
    plain_runner, host_runner = (
        Runner(pipeline.stages, CPU, blocks=processes.blocks, kv_offload=offload) for offload in (False, True)
    )
    for seed in range(3):
        rng = random.Random(seed)
        lengths, k = [rng.randint(60, 200), *random_lengths(rng, 90)], rng.choice([1, 2, 9])
        sequences = random_sequences(lengths, 96, seed)
        loss, expected = whole_sequence_gradients(whole, sequences)
        plan = pipeline.plan(lengths, k)
        pipeline.runner = plain_runner
        plain_loss, plain, on_device = pipeline.step(plan, sequences)
        pipeline.runner = host_runner
        got_loss, got, result = pipeline.step(plan, sequences)
        assert got_loss == plain_loss and abs(got_loss - loss) <= 1e-10 * loss
        assert all(torch.equal(got[name], plain[name]) for name in plain)
        assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
        assert result.state_bytes == on_device.device_state_bytes
        assert 0 < result.device_state_bytes <= window_bytes(plan.groups[0])
        assert late(host_runner) == 0
        checked += 1
    return checked


def stages_config():
    config = layout_config()
    config.parallelism.pipeline_parallel_degree = 2
    return config


@pytest.mark.proves("stages/virtual stages + kv_offload + k > 1")
@pytest.mark.parametrize("virtual", [1, 2])
def test_stages(virtual):
    assert run_ranks(on_stages, 2, virtual) == [3, 3]


# ---------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.proves("always + shared + kv_offload + validation")
def test_the_recipe_shares_validates_and_tells_what_the_device_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = write_rows(tmp_path / "rows.jsonl", [700, 20, 64, 5, 430, 31, 7, 90])
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 4}
    options = [small_assets(tmp_path / "model", **sizes), "--training.dtype=float64", "--training.steps=2"]
    options += ["--validation.enable", "--validation.dataset=jsonl", "--validation.freq=2"]
    options += ["--metrics.enable_tensorboard"]
    options += [f"--validation.dataset_path={tmp_path / 'rows.jsonl'}"]
    runs = [
        train(tmp_path, name, data, *options, f"--chunkflow.kv_offload={name}", processes=2)
        for name in ("none", "host")
    ]
    assert [row["loss"] for row in runs[0]] == [row["loss"] for row in runs[1]]
    assert max(row["most_ranks_of_a_sequence"] for row in rows_of(tmp_path / "host")) == 2
    scalars = []
    for name in ("none", "host"):
        events = EventAccumulator(str(tmp_path / name / "tb"))
        events.Reload()
        tags = [f"chunkflow/{tag}(GiB)" for tag in ("kv_state", "kv_on_device")]
        tags.append("validation_metrics/loss")
        scalars.append([[event.value for event in events.Scalars(tag)] for tag in tags])
    (state, on_device, loss), (host_state_, windows, host_loss) = scalars
    assert state == on_device == host_state_ and loss == host_loss
    assert all(0 < window < whole for window, whole in zip(windows, state))
