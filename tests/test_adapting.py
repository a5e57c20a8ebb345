"""A k of each group, and steps that are planned again for less memory: they fit, and change no gradient."""

import random

import pytest

from chunkflow.planning.balance import split_layers
from chunkflow.planning.cost import Cost
from chunkflow.planning.host_memory import host_parts
from chunkflow.planning.memory import with_kv_offload
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import DUMMY, Kind, lockstep
from chunkflow.settings.config import load_config
from chunkflow.training import build, choice, parallel
from tests.helpers.layouts import Pipeline, join, layout_config, room_of, sharded_gradients, small_model
from tests.helpers.processes import rows_of, run, run_ranks, small_assets, write_rows
from tests.helpers.reference import (
    assert_same_gradients,
    chunked_gradients,
    live_chunks,
    random_lengths,
    random_sequences,
    whole_sequence_gradients,
)

BOTH = frozenset(("k", "kv_offload"))
SIZE = 16  # tokens of a chunk


def a_room(
    model_args, longest, chunks_more, layers=None, reshard="never", adapts=BOTH, replicas=1, size=SIZE
):
    """For a sequence of `longest` tokens with k = 1, and the activations of so many chunks more."""
    config = layout_config(reshard=reshard)
    config.chunkflow.chunk_size = size
    room = room_of(model_args, config, layers, replicas, adapts)
    least = room.excess(1, -(-longest // size), 1, "none")
    room.budgets = [int(least + chunks_more * room.of_chunk)] * len(room.budgets)
    room._known.clear()
    return room


def settings_of(args, room, replicas=1, stages=1, **more):
    costs = ()
    if stages > 1:
        layers = split_layers(args.n_layers, 0.5, stages)
        costs = tuple(Cost.of_layers(args, count, head=s == stages - 1) for s, count in enumerate(layers))
        more["pipeline_ranks"] = stages
    return PlanSettings(Cost.of_model(args), replicas, chunk_size=SIZE, stages=costs, room=room, **more)


# -------------------------------------------------------------------------------------------------- pure plans


@pytest.mark.quick
def test_the_k_of_a_group_is_the_largest_that_fits():
    args = small_model("llama3").args
    room, kept = a_room(args, 400, 3.5), {}
    for chunks in range(2, 26):
        fit = [k for k in range(1, chunks + 1) if room.excess(k, chunks, 1, "none") <= 0]
        kept[chunks] = room.kept(chunks, 1, "none")
        assert min(kept[chunks], chunks) == max(fit)
        assert room.excess(kept[chunks], chunks, 1, "none") <= 0
    assert 4 <= kept[25] <= 5 and kept[2] > kept[10] > kept[25], "K/V of short sequences leave room"
    assert room.kept(25, 4, "none") <= kept[25] and room.kept(60, 1, "none") == 0
    plan = plan_step([400, 160, 30, 5, 5], settings_of(args, room))
    assert plan.k[0][:2] == [kept[25], kept[10]]
    assert plan.recomputed_chunks == 25 - kept[25] + max(0, 10 - kept[10])
    only = plan_step([400, 160, 30, 5, 5], settings_of(args, room, replicas=3, lockstep=True))
    assert sorted({k for own in only.k for k in own}) != [1]


@pytest.mark.quick
@pytest.mark.parametrize("how", ["never", "always", "stages"])
@pytest.mark.parametrize("adapts", [BOTH, frozenset(("kv_offload",)), frozenset(("k",)), frozenset()])
def test_random_steps_fit_or_say_so(how, adapts):
    """By the whole program of every replica; and all ranks make the same plan."""
    args, noticed, offloaded, shared, ks = small_model("llama3", n_layers=6).args, 0, 0, 0, set()
    for seed in range(25):
        rng = random.Random(f"{how}{seed}")
        lengths = [rng.randint(1, 400 if rng.random() < 0.3 else 40) for _ in range(rng.randint(3, 24))]
        stages, replicas = (2, rng.randint(1, 3)) if how == "stages" else (1, rng.randint(1, 4))
        more = {"lockstep": how == "always", "k": rng.choice([1, 2, 4])}
        layers = [range(3), range(3, 6)] if stages > 1 else None
        reshard = "always" if how == "always" else "never"
        room = a_room(args, 250, rng.choice([0, 1.5, 4, 9]), layers, reshard, adapts)
        spread = rng.choice([1, replicas])
        more |= {"spread_over": spread, "kv_tokens": rng.choice([0, 100])}
        settings = settings_of(args, room, replicas, stages, **more)
        plan = plan_step(lengths, settings)
        for own, limits in zip(plan.groups, plan.k):
            shared += sum(group.spread is not None and len(group.chunks) > k for group, k in zip(own, limits))
        over = max(
            room.over(rank, plan.groups[replica], program, plan.kv_offload)
            for replica, programs in plan.programs.items()
            for rank, program in enumerate(programs)
        )
        assert over <= 0 or "still too much" in plan.notice or "too much" in plan.notice and not adapts, seed
        only = plan_step(lengths, settings, [replicas - 1])
        assert (only.k, only.kv_offload, only.notice) == (plan.k, plan.kv_offload, plan.notice)
        assert only.programs == {replicas - 1: plan.programs[replicas - 1]}
        assert plan.kv_offload == "none" or "kv_offload" in adapts and "in host memory" in plan.notice
        assert "k" in adapts or {k for own in plan.k for k in own} <= {more["k"]}
        noticed, offloaded = noticed + bool(plan.notice), offloaded + (plan.kv_offload == "host")
        ks |= {k for own in plan.k for k in own}
    assert shared, "some that replicas share are computed again"
    assert noticed and (offloaded > 0) == ("kv_offload" in adapts)
    assert len(ks) > 3 or "k" not in adapts or how == "stages"


@pytest.mark.quick
def test_lockstep_with_a_k_of_each_group():
    for seed in range(200):
        rng, ranks = random.Random(seed), 3
        counts = [[rng.randint(1, 6) for _ in range(rng.randint(0, 5))] for _ in range(ranks)]
        ks = [[rng.randint(1, 5) for _ in own] for own in counts]
        for own, limits, actions in zip(counts, ks, lockstep(counts, ks)):
            assert live_chunks(actions) <= min(limits, default=1)
            again = sum(max(0, count - min(limits)) for count in own)  # K/V of all are there together
            assert sum(action.kind is Kind.RECOMPUTE for action in actions) == again
            done = [action for action in actions if action.kind is Kind.BACKWARD and action.group != DUMMY]
            assert len(done) == sum(own)


# -------------------------------------------------------------------------------------------------- exactness


@pytest.mark.proves("one process + k by group")
@pytest.mark.quick
@pytest.mark.parametrize("seed", range(8))
def test_a_k_of_each_group_is_exact(seed):
    rng, model = random.Random(seed), small_model("llama3")
    lengths = [rng.randint(60, 150), rng.randint(30, 60), *random_lengths(rng, 60)]
    room = a_room(model.args, rng.choice([90, 150]), rng.choice([0.2, 1.5, 4]))
    plan = plan_step(lengths, settings_of(model.args, room, k=rng.choice([1, 3])))
    sequences = random_sequences(lengths, 96, seed)
    loss, expected = whole_sequence_gradients(model, sequences)
    ((program,),), groups, (ks,) = plan.programs.values(), plan.groups[0], plan.k
    offload = plan.kv_offload == "host"
    ours, got, result = chunked_gradients(model, sequences, groups, None, program, kv_offload=offload)
    assert abs(ours - loss) <= 1e-10 * loss
    assert_same_gradients(got, expected, 1e-10)
    of_groups = [min(k, len(group.chunks)) for k, group in zip(ks, groups)]
    assert max(result.live_chunks) == max(of_groups)
    for number, limit in enumerate(of_groups):
        assert live_chunks([action for action in program if action.group == number]) == limit


def on_ranks():
    """Two ranks, sharing some sequences, with parameters gathered once and layer by layer; two stages."""
    processes, checked, shared, notices, ks = join(), 0, 0, set(), set()
    reference = small_model("llama3")
    for reshard in ("never", "always"):
        config, model = layout_config(reshard=reshard), small_model("llama3")
        parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
        for seed in range(4):
            rng = random.Random(f"{reshard}/{seed}")
            lengths = [rng.randint(90, 160), rng.randint(30, 60), *random_lengths(rng, 60)]
            sequences = random_sequences(lengths, 96, seed)
            room = a_room(model.args, rng.choice([60, 120, 160]), rng.choice([0, 1.5, 3]), None, reshard)
            more = {
                "room": room,
                "spread_over": 2,
                "kv_tokens": rng.choice([0, 90]),
                "blocks": processes.blocks,
            }
            k = rng.choice([1, 2])
            loss, expected = whole_sequence_gradients(reference, sequences)
            settings = settings_of(model.args, room, 2, lockstep=reshard == "always", k=k)
            plan = plan_step(lengths, settings._replace(spread_over=2, kv_tokens=more["kv_tokens"]), [])
            shared += plan.spread_sequences
            ks |= {limit for own in plan.k for limit in own}
            notices.add(plan.notice[-12:])
            ours, got = sharded_gradients(model, lengths, sequences, config, k, **more)
            assert abs(ours - loss) <= 1e-10 * loss
            assert_same_gradients(got, expected, 1e-10)
            checked += 1
    return checked, len(ks) > 2, len(notices) > 1, shared > 1


@pytest.mark.proves("never/always + shared + k by group")
def test_ranks_with_a_k_of_each_group_are_exact():
    assert run_ranks(on_ranks, 2) == [(8, True, True, True)] * 2


def on_stages():
    config = layout_config()
    config.parallelism.pipeline_parallel_degree = 2
    mesh, whole, seen = join(config).mesh, small_model("llama3", n_layers=6), set()
    pipeline = Pipeline("llama3", mesh, 1, whole)
    for seed in range(4):
        rng = random.Random(seed)
        lengths = [rng.randint(90, 160), rng.randint(60, 90), *random_lengths(rng, 60)]
        room = a_room(whole.args, 90, (0, 0.5, 3, 9)[seed], pipeline.layers)
        plan = pipeline.plan(lengths, 4, room=room)
        sequences = random_sequences(lengths, 96, seed)
        loss, expected = whole_sequence_gradients(whole, sequences)
        ours, got, result = pipeline.step(plan, sequences, kv_offload=plan.kv_offload == "host")
        assert abs(ours - loss) <= 1e-10 * loss
        assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
        (k,) = {limit for own in plan.k for limit in own}
        assert result.live_chunks[0] <= k + 1 - pipeline.rank
        assert (result.device_state_bytes < result.state_bytes) == (plan.kv_offload == "host")
        seen.add((k, plan.kv_offload))
    return len(seen)


@pytest.mark.proves("stages + k by group + kv_offload")
def test_stages_with_another_k_in_some_steps_are_exact():
    assert min(run_ranks(on_stages, 2)) > 1


# ------------------------------------------------------------------------------------------------- host memory


@pytest.mark.quick
@pytest.mark.parametrize("keep", ["none", "host"])
@pytest.mark.parametrize("k", [1, 3])
def test_bytes_in_host_memory(keep, k):
    """K/V, their gradients and results of attention, against what the runner counts."""
    model = small_model("qwen2", n_layers=4)
    lengths = [93, 40, 12, 10]
    config = layout_config()
    config.chunkflow.chunk_size, config.chunkflow.keep_attention = SIZE, keep
    room = room_of(model.args, config)
    plan = plan_step(lengths, settings_of(model.args, None, k=k))
    ((program,),), groups = plan.programs.values(), plan.groups[0]
    _, _, result = chunked_gradients(
        model, random_sequences(lengths, 96, 0), groups, k, program, kv_offload=True, keep_attention=keep
    )
    (sizes,) = with_kv_offload(room.sizes["none"], "host")
    parts = host_parts(sizes, groups, program, pinned=False)
    assert parts["shards"] == 0
    # The runner counts K/V after each backward, when the chunk's own may be gone.
    assert parts["kv"] + parts["kv_gradients"] >= result.state_bytes
    assert parts["kv"] == 4 * groups[0].tokens * 2 * 2 * 8 * 8
    assert parts["kv_gradients"] == (4 * groups[0].chunks[-1].prefix * 2 * 2 * 8 * 8 if k else 0)
    if keep == "host":
        discarded = sum(chunk.tokens for chunk in groups[0].chunks[:-k])
        assert parts["kept_attention"] == discarded * 3 * 4 * (8 + 1) * 8 == result.kept_attention_bytes[1]
    pinned = host_parts(sizes, groups, program, pinned=True)
    each = groups[0].tokens * 2 * 2 * 8 * 8
    assert pinned["kv"] == 4 * (1 << (each - 1).bit_length())
    (plain,) = room.sizes["none"]
    assert keep == "host" or not any(host_parts(plain, groups, program, pinned=True).values())


# -------------------------------------------------------------------------------------------------- the recipe


def test_the_recipe_adapts_single_steps_and_a_resume_goes_on_alike(tmp_path, monkeypatch):
    """Two stages have the K/V of several groups: a budget that the start's step keeps, and the next, with more
    long sequences, does not."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    lengths = [300, 20, 20, 20], [290, 280, 270, 20]
    data = write_rows(tmp_path / "rows.jsonl", [length for step in lengths for length in step])
    options = [
        small_assets(tmp_path / "model", num_hidden_layers=8, num_key_value_heads=2),
        "--training.dataset=jsonl", f"--training.dataset_path={data}", "--training.seq_len=1000",
        "--training.global_batch_size=4", "--training.no_shuffle",
        "--training.dtype=float64", "--lr_scheduler.warmup_steps=1", "--metrics.log_freq=1",
        "--metrics.no_enable_tensorboard", "--checkpoint.enable", "--checkpoint.interval=1",
        "--parallelism.pipeline_parallel_degree=2", "--chunkflow.chunk_size=32", "--debug.deterministic",
    ]  # fmt: skip
    config = load_config([*options, "--chunkflow.k=2"])
    spec = build.model_spec(config)
    dataset = build.open_data(config, spec, 0)
    predicted = choice.forecaster(config, spec, dataset, 0, 2, "cpu")

    def peak(of):
        predicted.lengths = list(of)
        return predicted.row(32, 2, 2, "default").peak_gib

    first, second = map(peak, lengths)
    assert first < 0.98 * second
    auto = [
        "--chunkflow.k=2",
        "--chunkflow.kv_offload=auto",
        f"--chunkflow.memory_budget_gib={(first + second) / 2}",
    ]

    def train(name, *more):
        done = run(
            tmp_path, *options, *more, f"--job.dump_folder={tmp_path / name}", processes=2, forked=True
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    log = train("auto", *auto, "--training.steps=2")
    lines = [line for line in log.splitlines() if "too much" in line]
    assert len(lines) == 2, "one of each rank, of which people see the first"
    for line in lines:
        assert "step 2: with a sequence of 290 tokens it would take" in line
        assert line.endswith("so it is run with K/V in host memory")
    assert (
        load_config(["--job.config_file", str(tmp_path / "auto/config.toml")]).chunkflow.kv_offload == "none"
    )
    assert "too much" not in train("resumed", *auto, "--training.steps=1")
    assert "it is run with K/V in host memory" in train("resumed", *auto, "--training.steps=2")
    fixed = train("fixed", "--chunkflow.k=2", "--training.steps=2", auto[-1])
    assert "step 2: with a sequence of 290 tokens it would take" in fixed and "it is run with" not in fixed
    names = ("step", "loss", "grad_norm", "tokens")
    ours, resumed, plain = (
        [[row[name] for name in names] for row in rows_of(tmp_path / run)]
        for run in ("auto", "resumed", "fixed")
    )
    assert ours == resumed == plain, "to the bit"
