"""Validation: the loss of whole sequences on every layout, by position, within its memory; training goes on
unchanged."""

import json
import random
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.chunks import Chunk, Segment
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_transfers import check_schedule
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import DUMMY, Kind
from chunkflow.reporting.metrics import MetricsLogger
from chunkflow.settings.config import ConfigError, load_config
from chunkflow.training import parallel
from chunkflow.training.build import open_data
from chunkflow.training.start import check_paths
from chunkflow.training.validation import LossByPosition, Validation
from models import families
from tests.helpers.clock import Clock
from tests.helpers.layouts import SMALL, Pipeline, join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run, run_ranks, train, write_rows
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    live_chunks,
    naive_attention,
    random_lengths,
    random_sequences,
    runner_of,
    whole_sequence,
    whole_sequence_gradients,
)

CPU = torch.device("cpu")
EDGES = [0, 1024, 4096, 16384]


def naive_losses(hidden_TC, weight_VC, chunk):
    return F.cross_entropy(hidden_TC @ weight_VC.t(), chunk.labels, reduction="none", ignore_index=-100)


def whole_sequence_losses(model, sequences):
    """Mean loss, and sum and count for each range of positions, of whole sequences one by one, by the naive
    functions."""
    module = sys.modules[type(model).__module__]
    sums, counts = [0.0] * 3, [0] * 3
    with (
        mock.patch.object(module, "chunk_attention", naive_attention),
        torch.no_grad(),
    ):
        for tokens, labels in sequences:
            losses = model(tokens, whole_sequence(tokens, labels, naive_losses))
            for place, (start, end) in enumerate(zip(EDGES, EDGES[1:])):
                sums[place] += losses[start:end].sum().item()
                counts[place] += int((labels[start:end] != -100).sum())
    return sum(sums) / max(sum(counts), 1), sums, counts


def assert_same_losses(losses, expected):
    mean, sums, counts = expected
    got, targets, by_position = losses.result()
    assert abs(got - mean) <= 1e-10 * mean and targets == sum(counts)
    names = ["up_to_1K", "up_to_4K", "up_to_16K"]
    assert {name: count for name, (_, count) in by_position.items()} == {
        n: c for n, c in zip(names, counts) if c
    }
    for name, total, count in zip(names, sums, counts):
        assert not count or abs(by_position[name][0] - total / count) <= 1e-10 * total / count


def some_lengths(seed: int) -> list[int]:
    """One sequence leaves other ranks without work; one reaches into the second range of positions."""
    return [[70], [1100, 40, 9], [15] * 12, random_lengths(random.Random(seed), 130)][seed]


# ------------------------------------------------------------------------------------------------ one process


@pytest.mark.proves("one process + validation")
@pytest.mark.parametrize("family", families)
def test_losses_and_memory_on_one_stage(family):
    model = small_model(family, tied_embeddings=family == "qwen3")
    for seed, chunk_size in enumerate((17, 100, 16, 8)):
        lengths = some_lengths(seed) + ([130, 90] if seed == 1 else [])
        sequences = random_sequences(lengths, 96, seed)
        plan = plan_step(
            lengths, PlanSettings(Cost.of_model(model.args), chunk_size=chunk_size, forward_only=True)
        )
        (groups,), ((program,),) = plan.groups, plan.programs.values()
        losses, saved = LossByPosition(max(lengths), CPU), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            tensors = chunk_tensors(groups, sequences)
            result = runner_of(model).evaluate(program, groups, tensors, losses.take)
        assert_same_losses(losses, whole_sequence_losses(model, sequences))
        assert not saved and all(parameter.grad is None for parameter in model.parameters()), (
            "no activations, no gradients"
        )
        assert plan.recomputed_chunks == live_chunks(program) == 0
        # K/V of one group in fp64, no gradients: 2 x tokens x G x D of each layer
        longest = max((group.tokens for group in groups if len(group.chunks) > 1), default=0)
        assert (
            result.state_bytes
            == 8 * 2 * longest * SMALL["n_kv_heads"] * SMALL["head_dim"] * SMALL["n_layers"]
        )
        assert all(chunk.state is None for group in tensors for chunk in group), (
            "a batch holds no K/V when it is done"
        )


def test_a_loss_belongs_to_the_position_that_predicts():
    positions = torch.tensor([0, 1023, 1024, 4095, 4096, 5000])
    chunk = ChunkTensors(
        Chunk((Segment(0, 0, 6),)), 0, positions, torch.tensor([1, 1, 1, 1, 1, -100]), positions
    )
    losses = LossByPosition(5001, CPU)
    losses.take(chunk, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 0.0]))
    assert losses.result() == (
        31 / 5,
        5,
        {"up_to_1K": (1.5, 2), "up_to_4K": (6.0, 2), "up_to_16K": (16.0, 1)},
    )
    assert LossByPosition(1024, CPU).names == ["up_to_1K"]
    assert LossByPosition(1 << 20, CPU).names[-2:] == ["up_to_256K", "up_to_1M"]
    assert LossByPosition(9, CPU).result() == (0.0, 0, {})


class Lengths:
    """A dataset without tokens to speak of."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def row(self, index, length):
        return torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64), None

    def weight(self, index):
        return 1.0

    def supervised(self, index, length):
        return length - 1, length - 1.0


@pytest.mark.parametrize(
    "overlong, expected",
    [("truncate", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]), ("drop", [[0, 1, 3, 4], [5, 7]])],
)
def test_every_sequence_comes_once(overlong, expected):
    loader = ChunkDataLoader(
        Lengths([5, 2, 40, 3, 7, 1, 50, 8, 60, 99]),
        PlanSettings(Cost(1.0, 0.0), chunk_size=4, forward_only=True),
        replica=0,
        global_batch_size=4,
        seq_len=10,
        overlong=overlong,
        shuffle=False,
        seed=0,
        once=True,
    )
    for _ in range(2):
        loader.cursor = 0
        assert [data.rows for data in loader] == expected


@pytest.mark.parametrize("steps, tokens", [(-1, 248), (1, 170), (2, 239), (9, 248)])
def test_all_of_the_data_or_so_many_batches(tmp_path, steps, tokens):
    valid = write_rows(tmp_path / "valid.jsonl", [150, 20, 64, 5, 9])
    options = [
        "--validation.enable",
        "--validation.dataset=jsonl",
        f"--validation.dataset_path={valid}",
        "--validation.freq=3",
    ]
    options += [
        f"--validation.steps={steps}",
        "--training.steps=7",
        "--training.global_batch_size=2",
        f"--job.dump_folder={tmp_path}",
    ]
    config = load_config(
        [*options, "--training.mixed_precision_param=float32", "--metrics.no_enable_tensorboard"]
    )
    with mock.patch.dict("os.environ", {"CHUNKFLOW_CACHE": str(tmp_path / "cache")}):
        model = small_model("llama3", torch.float32, vocab_size=2048)
        processes = join(config)
        plan, spec = (
            PlanSettings(Cost.of_model(model.args), chunk_size=16),
            SimpleNamespace(tokenizer=None, args=model.args),
        )
        data = open_data(config, spec, 1, "validation")
        validation = Validation(config.validation, config.training, data, plan, processes, 0)
    assert [step for step in range(1, 8) if validation.due(step)] == [3, 6, 7]
    try:
        parallel.apply_fsdp(model, processes.mesh, config.training, False)
        metrics = MetricsLogger(tmp_path, config.metrics, processes.device, torch.float32, validates=True)
        generator = torch.get_rng_state()
        with mock.patch("chunkflow.training.validation.plan_step", wraps=plan_step) as planned:
            for step in (3, 6):
                validation.run(step, metrics, [model], runner_of(model))
            assert planned.call_count <= 3, "plans are made once"
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), (
            "parameters are shards again"
        )
        assert torch.equal(generator, torch.get_rng_state())
        metrics.close()
    finally:
        dist.destroy_process_group()
    first, second = map(json.loads, (tmp_path / "validation.jsonl").read_text().splitlines())
    assert first["tokens"] == second["tokens"] == tokens and first["loss"] == second["loss"]


# ------------------------------------------------------------------------------------------- ranks and stages


def on_ranks():
    """Validation, then a training step: exact losses, the same number of forwards for all, gradients left
    alone and exact after."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    rank, ranks, checked = dist.get_rank(), dist.get_world_size(), 0
    for reshard in ("never", "always"):
        config = layout_config(reshard=reshard, mode="full" if reshard == "always" else "none")
        reference, model = small_model("llama3"), small_model("llama3")
        parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
        parallel.apply_fsdp(model, mesh, config.training, reshard == "always")
        trained = random_sequences([70, 9, 33], 96, 7)
        _, expected = whole_sequence_gradients(reference, trained)
        for seed in range(4):
            lengths = some_lengths(seed)
            sequences = random_sequences(lengths, 96, seed)
            options = {
                "chunk_size": (16, 200)[seed % 2],
                "lockstep": reshard == "always",
                "forward_only": True,
            }
            plan = plan_step(lengths, PlanSettings(Cost.of_model(model.args), ranks, **options))
            assert reshard == "never" or len({len(program) for (program,) in plan.programs.values()}) == 1
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 3.0)
            losses = LossByPosition(max(lengths), CPU)
            groups = plan.groups[rank]
            (program,) = plan.programs[rank]
            runner_of(model).evaluate(program, groups, chunk_tensors(groups, sequences), losses.take)
            model.reset_iter_state()
            dist.all_reduce(losses.figures)
            assert_same_losses(losses, whole_sequence_losses(reference, sequences))
            assert all((parameter.grad.to_local() == 3).all() for parameter in model.parameters())
            model.zero_grad()
            checked += 1
        _, got = sharded_gradients(model, [70, 9, 33], trained, config)
        assert_same_gradients(got, expected, 1e-10)
    return checked


def on_stages(shape, virtuals):
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp_shard"))
    checked = 0
    for virtual in virtuals:
        whole = small_model("qwen3", n_layers=5, tied_embeddings=True)
        pipeline = Pipeline("qwen3", mesh, virtual, whole)
        trained = random_sequences([70, 9, 33], 96, 7)
        _, expected = whole_sequence_gradients(whole, trained)
        for seed in range(4):
            lengths = some_lengths(seed)
            sequences = random_sequences(lengths, 96, seed)
            plan = pipeline.plan(lengths, 1, chunk_size=(16, 200)[seed % 2], forward_only=True)
            losses = LossByPosition(max(lengths), CPU)
            groups = plan.groups[pipeline.replica]
            program = pipeline.program(plan)
            result = pipeline.runner.evaluate(program, groups, chunk_tensors(groups, sequences), losses.take)
            for model in pipeline.models.values():
                model.reset_iter_state()
            dist.all_reduce(losses.figures)
            assert_same_losses(losses, whole_sequence_losses(whole, sequences))
            assert (
                max(result.live_chunks) == 0
                and max(result.stage_inputs) <= 2
                and result.receive_buffers <= 2 * virtual
            )
            for stage in pipeline.stages:
                assert not stage.fwd_cache and not stage.args_recv_info and not stage.bwd_cache
            longest = max((group.tokens for group in groups if len(group.chunks) > 1), default=0)
            own_layers = sum(len(model.layers) for model in pipeline.models.values())
            assert (
                result.state_bytes <= 8 * 2 * longest * SMALL["n_kv_heads"] * SMALL["head_dim"] * own_layers
            )
            checked += 1
        _, got, _ = pipeline.step(pipeline.plan([70, 9, 33], 1), trained)
        assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
    return checked


def on_layouts(*shapes):
    join()
    try:
        ranks = on_ranks() if dist.get_world_size() < 4 else 0
        return ranks + sum(on_stages(shape, virtuals) for shape, virtuals in shapes)
    finally:
        dist.destroy_process_group()


@pytest.mark.proves(
    "never + validation",
    "always + full + validation",
    "stages/virtual stages/stages x ranks + tied + validation",
)
@pytest.mark.parametrize(
    "world_size, shapes", [(1, []), (2, [((2, 1), (1, 2))]), (3, []), (4, [((2, 2), (1,))])]
)
def test_losses_on_ranks_and_stages(world_size, shapes):
    checked = on_layouts() if world_size == 1 else run_ranks(on_layouts, world_size, *shapes)[0]
    assert checked == (8 if world_size < 4 else 0) + sum(4 * len(virtuals) for _, virtuals in shapes)


@pytest.mark.parametrize("ranks, stages", [(2, 2), (4, 4), (3, 6)])
def test_programs_of_stages_are_checked_and_in_step(ranks, stages):
    lengths = [70, 9, 33, 20, 12, 1]
    cost = Cost(1.0, 0.01)
    # the first stages are much cheaper than the last: they must not run ahead
    costs = (Cost(1.0, 0.01),) * (stages - 1) + (Cost(50.0, 0.01),)
    options = {"stages": costs, "pipeline_ranks": ranks, "forward_only": True}
    plan = plan_step(lengths, PlanSettings(cost, chunk_size=16, **options))
    program, counts = plan.programs[0], [len(group.chunks) for group in plan.groups[0]]
    check_schedule(program, counts, 1, stages)
    for rank, entries in enumerate(program):
        for index in range(len(entries)):
            for mutated in (
                entries[:index] + entries[index + 1 :],
                entries[:index] + [entries[index]] + entries[index:],
            ):
                with pytest.raises(ValueError, match="of group"):
                    check_schedule(program[:rank] + [mutated] + program[rank + 1 :], counts, 1, stages)
        waiting = 0
        for entry in entries:  # inputs that have come and are not used yet
            received = not hasattr(entry, "kind") and not entry.send
            waiting += received - (hasattr(entry, "kind") and entry.stage > 0)
            assert 0 <= waiting <= 2 * stages // ranks


def test_ranks_without_chunks_still_take_part():
    for lockstep, expected in ((False, [5, 1, 1]), (True, [5, 5, 5])):
        plan = plan_step(
            [70], PlanSettings(Cost(1.0, 0.0), 3, chunk_size=16, lockstep=lockstep, forward_only=True)
        )
        actions = [program for (program,) in plan.programs.values()]
        assert list(map(len, actions)) == expected
        assert {action.kind for own in actions for action in own} == {Kind.EVALUATE}
        assert all(action.group == DUMMY for action in actions[1])


# ---------------------------------------------------------------------------------------- the log, the config


def test_an_interval_goes_on_after_validation_and_resume_takes_back_rows(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    def start(**more):
        config = load_config(
            [f"--job.dump_folder={tmp_path}", "--validation.enable", "--metrics.no_enable_tensorboard"]
        )
        return MetricsLogger(tmp_path, config.metrics, CPU, torch.float32, validates=True, **more)

    plan = plan_step([5], PlanSettings(Cost(1.0, 0.0)))
    metrics = start()
    for step in (2, 3):
        metrics.count(plan, 1e6, 0.0)
        clock.now += 0.1
        peak = torch.ones(1 << 25) if step == 2 else None  # 128 MiB, before validation
        del peak
        metrics.interrupt()
        clock.now += 0.3
        metrics.log_validation(
            step, loss=2.0, tokens=30, supervised_tokens=20, by_position={"up_to_1K": (2.0, 20)}
        )
    metrics.log(3, plan, loss=1.0, max_loss=1.0, grad_norm=1.0, lr=0.1, supervised_tokens=4)
    metrics.close()
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["seconds"] == pytest.approx(0.1, abs=0.02)
    path = tmp_path / "validation.jsonl"
    second, third = map(json.loads, path.read_text().splitlines())
    assert third["seconds"] == pytest.approx(0.3, abs=0.02) and third["tps"] == pytest.approx(
        30 / third["seconds"]
    )
    assert row["memory_gib"] > third["memory_gib"] + 0.1, (
        "the interval keeps the peak that it had before validation"
    )
    assert (
        second["step"],
        second["loss"],
        second["loss_up_to_1K"],
        second["supervised_tokens_up_to_1K"],
    ) == (2, 2.0, 2.0, 20)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    start(start_step=2).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--training.dataset=jsonl", "--training.dataset_path=x"], "set validation.dataset_path to a file"),
        (["--validation.dataset=jsonl"], 'validation.dataset = "jsonl" has no data'),
        (["--validation.dataset_path=x.jsonl"], 'is not read by validation.dataset = "python_stdlib"'),
        (
            ["--validation.dataset=synthetic", "--validation.dataset_path=x"],
            'set "lmsys", "llama3_sft", "agent", "prolong" or "preference"',
        ),
        (["--validation.dataset=c4_validation"], "set validation.dataset to their kind"),
        (["--validation.steps=0"], "or -1 for all of the data"),
        (["--validation.freq=0"], "of at least 1"),
        (["--validation.seq_len=5"], "training.seq_len counts for validation too"),
    ],
)
def test_wrong_settings_are_sentences(options, said):
    with pytest.raises(ConfigError) as error:
        load_config(["--validation.enable", *options])
    assert said in str(error.value)


def test_what_is_not_set_is_as_in_training():
    assert load_config(["--validation.enable"]).validation.dataset == "python_stdlib"
    options = ["--validation.enable", "--training.dataset=synthetic", "--training.dataset_path=llama3_sft"]
    validation = load_config(options).validation
    assert (validation.dataset, validation.dataset_path) == ("synthetic", "llama3_sft")
    assert load_config(["--training.dataset=jsonl", "--training.dataset_path=x"]).validation.dataset is None


def test_missing_and_overlong_validation_data_are_named(tmp_path):
    options = ["--validation.enable", "--validation.dataset=jsonl", f"--job.dump_folder={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"no.jsonl: no such file .* set validation.dataset_path"):
        check_paths(load_config([*options, f"--validation.dataset_path={tmp_path / 'no.jsonl'}"]))
    data = write_rows(tmp_path / "rows.jsonl", [30])
    valid = write_rows(tmp_path / "valid.jsonl", [30, 101])
    options += [
        "--training.dataset=jsonl",
        f"--training.dataset_path={data}",
        f"--validation.dataset_path={valid}",
    ]
    done = run(tmp_path, *options, "--training.seq_len=100")
    assert (
        done.returncode == 1
        and f"error: {valid}:2: 101 tokens, but training.seq_len admits 100" in done.stdout
    ), done.stdout


# ------------------------------------------------------------------------------------------------ the recipes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    train_rows = write_rows(folder / "rows.jsonl", [300, 20, 64, 5, 130, 31, 7, 90, 12, 1, 48, 200, 9])
    return train_rows, write_rows(folder / "valid.jsonl", [1100, 20, 64, 5, 130, 31, 7, 9], seed=5)


@pytest.mark.proves("always/stages + validation")
@pytest.mark.parametrize(
    "options", [[], ["--parallelism.pipeline_parallel_degree=2"]], ids=["two ranks", "two stages"]
)
def test_recipes_validate_and_train_on_unchanged(tmp_path, data, options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows, valid = data
    options = ["--training.mixed_precision_param=float32", "--training.steps=3", *options]
    validate = ["--validation.enable", f"--validation.dataset_path={valid}", "--validation.freq=2"]
    environ = {"processes": 2}
    plain = train(tmp_path, "plain", rows, *options, **environ)
    validate.append("--metrics.enable_tensorboard")
    validated = train(tmp_path, "validated", rows, *options, *validate, **environ)
    for name in ("loss", "grad_norm", "tokens", "n_tokens_seen"):
        assert [row[name] for row in validated] == [row[name] for row in plain], "bit for bit"
    assert not (tmp_path / "plain" / "validation.jsonl").exists()
    second, third = map(json.loads, (tmp_path / "validated" / "validation.jsonl").read_text().splitlines())
    assert (second["step"], third["step"]) == (2, 3) and third["tokens"] == 1366
    for row in (second, third):
        assert 5 < row["loss"] < 9
        assert (
            row["supervised_tokens"] == row["supervised_tokens_up_to_1K"] + row["supervised_tokens_up_to_4K"]
        )
        sums = [row[f"loss_{name}"] * row[f"supervised_tokens_{name}"] for name in ("up_to_1K", "up_to_4K")]
        assert sum(sums) == pytest.approx(row["loss"] * row["supervised_tokens"], rel=1e-12)
    assert third["loss"] != second["loss"]
    events = EventAccumulator(str(tmp_path / "validated" / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    tags = "loss throughput(tps) memory/max_reserved(GiB) loss_by_position/up_to_1K loss_by_position/up_to_4K"
    assert {f"validation_metrics/{tag}" for tag in tags.split()} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("validation_metrics/loss")] == [2, 3]
    assert events.Scalars("validation_metrics/loss")[1].value == pytest.approx(third["loss"])
