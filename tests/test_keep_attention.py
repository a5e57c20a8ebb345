"""Attention that is computed once: the bits of attention computed again, in a counted number of kernels, gathers
and bytes, on the device or on its way to the host and back."""

import random
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from chunkflow.execution import attention, kept_attention, runner, shared_state
from chunkflow.execution.kept_attention import AttentionStore, KeptAttention
from chunkflow.planning.chunks import build_groups
from chunkflow.planning.schedule import forward_only, linear_schedule
from chunkflow.settings.options import ActivationCheckpoint
from chunkflow.training import parallel
from models import families
from tests.helpers.cuda_kernels import cuda_attention_on_cpu
from tests.helpers.layouts import SMALL, Pipeline, join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import assert_same_curves, run_ranks, small_assets, train, write_rows
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    chunked_gradients,
    random_lengths,
    random_sequences,
    runner_of,
    whole_sequence_gradients,
)
from tests.test_compile import GRAPHS, graphs, prepared

LAYERS, HEADS = SMALL["n_layers"], SMALL["n_heads"]
TOKEN = HEADS * (SMALL["head_dim"] + 1) * 8  # bytes of a token in a layer: output and log-sum-exps, fp64
CHECKPOINTED = {"none": 0, "op": 0, "2": 2, "full": 3}  # layers that backward runs again
PLACES = ("none", "device", "host")


def model_of(family, mode, **changes):
    model = small_model(family, **changes)
    whole = mode if mode in ("none", "full") else "selective"
    parallel.apply_activation_checkpoint(model, ActivationCheckpoint(whole, mode if mode == "2" else "op"))
    return model


@contextmanager
def counted_forwards():
    """Yields a list that grows with each forward of attention, by the rows of its queries."""
    rows, forward = [], attention._forward_cpu

    def counted(q_THD, *more):
        rows.append(len(q_THD))
        return forward(q_THD, *more)

    with mock.patch.object(attention, "_forward_cpu", counted):
        yield rows


def assert_same_bits(ours, theirs):
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def stores(monkeypatch):
    """Those that runners make."""
    made = []

    def make(*arguments, **more):
        made.append(AttentionStore(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(runner, "AttentionStore", make)
    return made


# ------------------------------------------------------------------------------------------------ one process


@pytest.mark.proves("one process + keep_attention + k > 1", "one process + keep_attention + full/selective")
@pytest.mark.quick
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_kept_attention_is_that_computed_again(family, mode, stores):
    for seed in range(2):
        rng = random.Random(f"{family}/{mode}/{seed}")
        lengths, k = [*random_lengths(rng, 70), rng.randint(40, 70)], rng.choice([1, 2, 9])
        groups = build_groups(lengths, rng.randint(5, 30), fill_tails=rng.random() < 0.7)
        rng.shuffle(groups)
        sequences, model = random_sequences(lengths, 96, seed), model_of(family, mode)
        loss, expected = whole_sequence_gradients(model, sequences)
        for place in PLACES:
            with counted_forwards() as rows:
                got = chunked_gradients(model, sequences, groups, k, keep_attention=place)
            ours, gradients, result = got
            if place == "none":
                again, (same_loss, same_gradients, _) = len(rows), got
                assert abs(ours - loss) <= 1e-10 * loss
                assert_same_gradients(gradients, expected, 1e-10)
                assert result.kept_attention_bytes == (0, 0)
                continue
            assert ours == same_loss
            assert_same_bits(gradients, same_gradients)
            chunks = sum(len(group.chunks) for group in groups)
            alone = sum(len(group.chunks) == 1 for group in groups)
            assert len(rows) == LAYERS * chunks + CHECKPOINTED[mode] * alone
            assert len(rows) < again or k == 9 and not CHECKPOINTED[mode]
    assert len(stores) == 4 and not any(store.device_bytes or store.host_bytes for store in stores)


@pytest.mark.quick
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("mode", CHECKPOINTED)
@pytest.mark.parametrize("k", [1, 3])
def test_bytes(place, mode, k):
    """At their peak, when the group's last chunk has had its forward: of discarded chunks all layers but the
    last, of others those that backward runs again."""
    lengths, model = [93, 12, 10], model_of("qwen2", mode)
    groups = build_groups(lengths, 16)
    _, _, result = chunked_gradients(model, random_sequences(lengths, 96, 0), groups, k, keep_attention=place)
    tokens = [chunk.tokens for chunk in groups[0].chunks]
    kept = TOKEN * (sum(tokens[:-k]) * (LAYERS - 1) + sum(tokens[-k:]) * CHECKPOINTED[mode])
    device, host = result.kept_attention_bytes
    if place == "device":
        assert (device, host) == (kept, 0)
    else:
        assert host == kept and device == 2 * 16 * TOKEN  # two layers of a chunk


@pytest.mark.proves(
    "one process + kv_offload + keep_attention", "one process + kv_offload + keep_attention + full"
)
@pytest.mark.quick
@pytest.mark.parametrize("mode", ["none", "full"])
def test_keys_and_values_on_the_host_stay_there_where_attention_is_kept(mode):
    """RECOMPUTE fetches them for the last layer only, ahead of it."""
    lengths, model = [93, 30, 12], model_of("llama3", mode)
    groups, sequences = build_groups(lengths, 16), random_sequences(lengths, 96, 0)
    actions, fetched, results = linear_schedule([len(group.chunks) for group in groups], 1), [], []
    for place in PLACES:
        offloading, tokens = runner_of(model, keep_attention=place, kv_offload=True), []

        def copy(state, host, count, copy=offloading.host._copy, tokens=tokens):
            tokens.append(count)
            return copy(state, host, count)

        model.zero_grad()
        with mock.patch.object(offloading.host, "_copy", copy):
            offloading.step(actions, groups, chunk_tensors(groups, sequences), 100)
        results.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert_same_bits(results[-1], results[0])
        assert offloading.host.late == 0
        fetched.append(sum(tokens))
    # Recomputation would have read the prefix of each discarded chunk in all layers; what it fetched of the
    # first and of the last layer other actions need, too.
    saved = (LAYERS - 2) * sum(chunk.prefix for group in groups for chunk in group.chunks[:-1])
    assert fetched[0] - saved == fetched[1] == fetched[2]


@pytest.mark.quick
def test_validation_keeps_nothing():
    lengths, model = [70, 9, 33], small_model("llama3")
    groups, sequences = build_groups(lengths, 16), random_sequences(lengths, 96, 0)
    ((*actions,),) = forward_only([[len(group.chunks) for group in groups]], lockstep=False)
    losses = []
    for place in PLACES:
        taken = []
        runs, chunks = runner_of(model, keep_attention=place), chunk_tensors(groups, sequences)
        result = runs.evaluate(actions, groups, chunks, lambda chunk, losses_T: taken.append(losses_T))
        assert result.kept_attention_bytes == (0, 0)
        losses.append(torch.cat(taken))
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_kernels_of_cuda(mode):
    """Output, log-sum-exps and the random state: the backward of torch's operator asks for all three."""
    lengths, model = [93, 12, 10], model_of("llama3", mode)
    groups, sequences = build_groups(lengths, 16), random_sequences(lengths, 96, 1)
    chunks, results = sum(len(group.chunks) for group in groups), []
    for place in PLACES:
        with cuda_attention_on_cpu() as calls:
            results.append(chunked_gradients(model, sequences, groups, 2, keep_attention=place))
        forwards = sum(not call.backward for call in calls)
        assert len(calls) - forwards == LAYERS * chunks
        once = LAYERS * chunks + CHECKPOINTED[mode] * (len(groups) - 1)
        assert forwards > once if place == "none" else forwards == once
        assert_same_bits(results[-1][1], results[0][1])
    tokens = [chunk.tokens for chunk in groups[0].chunks]
    layers = (LAYERS - 1) * (len(tokens) - 2) + 2 * CHECKPOINTED[mode]
    kept = TOKEN * (sum(tokens[:-2]) * (LAYERS - 1) + sum(tokens[-2:]) * CHECKPOINTED[mode]) + 16 * layers
    assert results[1][2].kept_attention_bytes == (kept, 0)
    assert results[2][2].kept_attention_bytes[1] == kept


@pytest.mark.proves("one process + keep_attention + compile", "one process + keep_attention + compile + full")
@pytest.mark.quick
@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_layers_take_what_is_kept(mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, groups = prepared(small_model("llama3"), mode, "eager"), build_groups([60, 9, 12], 16)
    sequences, results = random_sequences([60, 9, 12], 96, 0), []
    for place in PLACES:
        results.append(chunked_gradients(model, sequences, groups, 1, keep_attention=place)[1])
        assert_same_bits(results[-1], results[0])
    assert graphs() <= GRAPHS
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------ a stream of its own


class LateStream:
    """Stands for a CUDA stream that runs as late as it may: a copy when its event is waited for. Until then
    nobody but its users keeps its tensors alive, as on CUDA."""

    def __init__(self):
        self.copies, self.done, self.pinned = [], 0, []
        self.entered = self.waited = False

    def record_event(self):
        return len(self.copies)

    def wait_stream(self, stream):
        assert stream is self.of_kernels and not self.entered
        self.waited = True

    @contextmanager
    def enter(self, stream):
        assert stream is self and self.waited, "kernels may still write what is copied, or use its place"
        self.entered, self.waited = True, False
        yield
        self.entered = False

    @contextmanager
    def installed(self):
        real_copy, real_empty = torch.Tensor.copy_, torch.empty_like

        def copy(target, source, non_blocking=False):
            assert non_blocking == self.entered
            if not non_blocking:
                return real_copy(target, source)
            self.copies.append((weakref.ref(target), weakref.ref(source)))

        def empty(like, device=None, pin_memory=False, **more):
            if device is None:
                return real_empty(like, **more)
            self.pinned += [pin_memory] * (device == "cpu")
            made = real_empty(like)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        def wait_event(event):
            for pair in self.copies[self.done : event]:
                target, source = (reference() for reference in pair)
                assert target is not None and source is not None, "freed before it was copied"
                real_copy(target, source)
            self.done = max(self.done, event)

        self.of_kernels = mock.Mock(wait_event=wait_event)
        with (
            mock.patch.object(kept_attention, "_copy_stream", lambda device: self),
            mock.patch.object(torch.cuda, "current_stream", lambda device: self.of_kernels),
            mock.patch.object(torch.cuda, "stream", self.enter),
            mock.patch.object(torch.Tensor, "copy_", copy),
            mock.patch.object(torch, "empty_like", empty),
        ):
            yield


@pytest.mark.quick
@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_copies_on_a_stream_of_their_own_are_waited_for(mode):
    lengths, model = [93, 30, 12, 10], model_of("llama3", mode)
    groups, sequences = build_groups(lengths, 16), random_sequences(lengths, 96, 2)
    with cuda_attention_on_cpu():
        expected = chunked_gradients(model, sequences, groups, 2)[1]
        stream = LateStream()
        with stream.installed():
            got = chunked_gradients(model, sequences, groups, 2, keep_attention="host")[1]
    assert_same_bits(got, expected)
    assert stream.pinned and all(stream.pinned) and len(stream.copies) == stream.done
    # Each of the three results leaves once, and comes back for each of the later forwards.
    discarded = sum(max(0, len(group.chunks) - 2) for group in groups)
    live = sum(len(group.chunks) for group in groups if len(group.chunks) > 1) - discarded
    out = discarded * (LAYERS - 1) + live * CHECKPOINTED[mode] + (discarded if CHECKPOINTED[mode] > 0 else 0)
    again = (discarded + live) * CHECKPOINTED[mode]
    assert len(stream.pinned) == 3 * out
    assert len(stream.copies) == 3 * (out + discarded * (LAYERS - 1) + again)


@pytest.mark.quick
@pytest.mark.parametrize("up", [True, False])
def test_results_are_fetched_one_layer_ahead(up):
    kept = KeptAttention(AttentionStore(torch.device("cpu"), host=True))
    for layer in (2, 3, 5, 6):
        kept.put(layer, (torch.full((4,), float(layer)),))
    layers, ahead = [2, 3, 4, 5, 6], {2: [2, 3], 3: [3, 5], 4: [5], 5: [5, 6], 6: [6]}
    if not up:
        kept.begin(7)
        layers, ahead = layers[::-1], {6: [5, 6], 5: [3, 5], 4: [3], 3: [2, 3], 2: [2]}
    for layer in layers:
        kept.begin(layer)
        assert sorted(kept.arriving) == ahead[layer] and kept.store.device_bytes == 16 * len(ahead[layer])
        results = kept.take(layer, again=up)
        assert results is None if layer == 4 else results[0].eq(layer).all()
    assert len(kept.results) == (4 if up else 0)
    for layer in layers:
        kept.drop(layer)
    assert kept.store.device_bytes == kept.store.host_bytes == 0 and kept.store.peaks == (32, 64)


# ------------------------------------------------------------------------------------------ ranks and stages


@contextmanager
def counted_gathers():
    calls, gather = [], shared_state.all_gather

    def counted(*arguments, **more):
        calls.append(arguments)
        return gather(*arguments, **more)

    with mock.patch.object(shared_state, "all_gather", counted):
        yield calls


def on_ranks(reshard, mode, k):
    """For each place: gathers of this rank, and forwards of attention."""
    processes, lengths = join(layout_config(reshard=reshard)), [300, 70, 20, 3, 9, 33]
    config = layout_config(reshard=reshard)
    model, sequences = model_of("qwen3", mode), random_sequences(lengths, 96, 0)
    parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
    loss, expected = whole_sequence_gradients(small_model("qwen3"), sequences)
    more = {"spread_over": processes.replicas, "kv_tokens": 60, "blocks": processes.blocks}
    results, counts = [], []
    for place in PLACES:
        with counted_forwards() as rows, counted_gathers() as gathers:
            arguments = model, lengths, sequences, config, k
            got = sharded_gradients(*arguments, **more, keep_attention=place)
        results.append(got)
        counts.append((len(gathers), len(rows)))
        assert abs(got[0] - loss) <= 1e-10 * loss
        assert_same_gradients(got[1], expected, 1e-10)
        assert got[0] == results[0][0]
        assert_same_bits(got[1], results[0][1])
    return counts


@pytest.mark.proves(
    "never + shared + keep_attention + k > 1", "always + shared + keep_attention + full + k > 1"
)
@pytest.mark.parametrize("reshard, mode", [("never", "none"), ("always", "full")])
def test_ranks_that_share_a_sequence_gather_once_forward_and_once_backward(reshard, mode):
    (first, second) = run_ranks(on_ranks, 2, reshard, mode, 2)
    chunks = -(-300 // 32) + -(-70 // 32)
    gathers = LAYERS * (2 * chunks - 2)  # of a group's first chunk it has no prefix to gather
    for none, device, host in (first, second):
        assert device == host and device[0] == 2 * gathers < none[0] and device[1] < none[1]


def on_stages(mode, virtual, k):
    """For each place: forwards of attention, and the rows of queries that were kept."""
    config = layout_config()
    config.parallelism.pipeline_parallel_degree = 2
    processes, lengths = join(config), [150, 12, 60, 5]
    whole, sequences = small_model("llama3", n_layers=5), random_sequences(lengths, 96, 0)
    loss, expected = whole_sequence_gradients(whole, sequences)
    counts, results = [], []
    for place in PLACES:
        more = {"blocks": processes.blocks, "keep_attention": place, "kv_offload": place == "host"}
        pipeline = Pipeline("llama3", processes.mesh, virtual, whole, **more)
        for model in pipeline.models.values():
            parallel.apply_activation_checkpoint(model, ActivationCheckpoint(mode))
        plan = pipeline.plan(lengths, k)
        with counted_forwards() as rows:
            ours, gradients, result = pipeline.step(plan, sequences)
        results.append((ours, gradients))
        assert abs(ours - loss) <= 1e-10 * loss
        assert_same_gradients(gradients, {name: expected[name] for name in gradients}, 1e-10)
        assert ours == results[0][0]
        assert_same_bits(gradients, results[0][1])
        layers = sum(len(model.layers) for model in pipeline.models.values())
        sizes = [len(group.chunks) for group in plan.groups[0]]
        alone = sizes.count(1) if mode == "full" else 0
        counts.append((len(rows) - layers * (sum(sizes) + alone), any(result.kept_attention_bytes)))
    return counts


@pytest.mark.proves(
    "stages + keep_attention + kv_offload",
    "stages + keep_attention + kv_offload + selective",
    "virtual stages + keep_attention + kv_offload + full",
)
@pytest.mark.parametrize("mode, virtual", [("none", 1), ("selective", 1), ("full", 2)])
def test_stages_compute_attention_once(mode, virtual):
    for (none, nothing), *kept in run_ranks(on_stages, 2, mode, virtual, 1):
        assert none > 0 and not nothing and kept == [(0, True)] * 2


# ---------------------------------------------------------------------------------------------- the recipe


LENGTHS = [700, 20, 64, 5, 430, 31, 7, 90, 12]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 8}
    model = small_assets(tmp_path_factory.mktemp("model") / "model", **sizes)
    return [model, "--training.dtype=float64", "--training.steps=2", "--metrics.enable_tensorboard"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data, options):
    return train(tmp_path_factory.mktemp("reference"), "run", data, *options)


@pytest.mark.proves(
    "one process + keep_attention + full",
    "never + shared + keep_attention",
    "always + shared + keep_attention + kv_offload",
    "stages + keep_attention + selective",
)
@pytest.mark.parametrize(
    "processes, place, settings",
    [
        (1, "host", ["--activation_checkpoint.mode=full"]),
        (2, "device", ["--parallelism.fsdp_reshard_after_forward=never"]),
        (2, "host", ["--parallelism.fsdp_reshard_after_forward=always", "--chunkflow.kv_offload=host"]),
        (2, "host", ["--parallelism.pipeline_parallel_degree=2", "--activation_checkpoint.mode=selective"]),
    ],
)
def test_the_recipe_keeps_attention(tmp_path, data, options, reference, processes, place, settings):
    settings = [*options, f"--chunkflow.keep_attention={place}", *settings]
    rows = train(tmp_path, "run", data, *settings, processes=processes)
    assert_same_curves(rows, reference, 1e-8, 1e-8)
    if processes == 1:  # the same bits
        assert [row["loss"] for row in rows] == [row["loss"] for row in reference]
    elif "pipeline" not in settings[-2]:
        assert any(row["spread_sequences"] for row in rows)
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    assert all(event.value > 0 for event in events.Scalars("chunkflow/kept_attention(GiB)"))
