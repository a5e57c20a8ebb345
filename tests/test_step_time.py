"""The model of a step's time against numbers made by hand; what changes it, and in which direction; the fit of
measured points."""

import collections
import dataclasses
import itertools

import pytest
import torch

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.planning.cost import Cost
from chunkflow.planning.forecast import Row, candidates, forecast, powers, ranked
from chunkflow.planning.memory import Layout, StageSizes, peak_parts
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.step_time import LOSS_ALONE, Pass, Rates, StepTime
from chunkflow.settings.config import load_config
from chunkflow.training import build, calibration, prediction, rates
from models import families

ARGS = dataclasses.replace(
    families["llama3"].flavors["debugmodel"], dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4,
    hidden_dim=16, vocab_size=32,
)  # fmt: skip
FREE = Pass(0.0, 0.0, 0.0)
FAST = 1e18  # bytes a second


def sizes_of(args, **layout):
    with torch.device("meta"):
        model = families["llama3"].Transformer(args)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return [{0: StageSizes(args, shapes, Layout(**layout))}]


def seconds(lengths, forward=FREE, backward=FREE, head=0.0, layout=None, **settings):
    """Of a step whose rates are these, all else taking no time."""
    layout = layout or {}
    made = PlanSettings(Cost.of_model(ARGS), **{"chunk_size": 10, **settings})
    time = Rates(forward, backward, head, FAST, FAST, layout.pop("host", FAST), FAST)
    return StepTime(made, sizes_of(ARGS, **layout), time).step(plan_step(lengths, made))


# Elements of a layer's and of the head's weight matrices, and FLOPs of a pair in attention.
LAYER, HEAD, PAIR = 8 * (2 * 8 + 2 * 4 + 3 * 16), 8 * 32, 4 * 8


def test_a_step_by_hand():
    """25 tokens in chunks of 10, 10 and 5, k = 1: the first two are forwarded for their keys and values
    only, without the head and the last layer, and once more."""
    linear, attention, layer = Pass(1.0, 0.0, 0.0), Pass(0.0, 1.0, 0.0), Pass(0.0, 0.0, 1.0)
    tokens, pairs = 25, 25 * 26 / 2
    again_tokens, again_pairs = 20, 20 * 21 / 2
    assert seconds([25], forward=linear) == pytest.approx(
        2 * (tokens * 2 * LAYER + again_tokens * LAYER), rel=1e-6
    )
    assert seconds([25], forward=attention) == pytest.approx(PAIR * (2 * pairs + again_pairs), rel=1e-6)
    assert seconds([25], forward=layer) == pytest.approx(2 * 3 + 1 * 2, rel=1e-6)
    assert seconds([25], backward=linear) == pytest.approx(2 * tokens * 2 * LAYER, rel=1e-6)
    assert seconds([25], backward=layer) == pytest.approx(2 * 3, rel=1e-6)
    assert seconds([25], forward=layer, k=3) == pytest.approx(2 * 3, rel=1e-6), "nothing is computed again"


def test_the_loss_by_hand():
    """Its gradients are made from its logits where the backward is the next action, else from others."""
    for k, alone in ((1, 0), (2, 10), (3, 20)):
        tokens = 25 + LOSS_ALONE * alone
        assert seconds([25], head=1.0, k=k) == pytest.approx(2 * tokens * HEAD, rel=1e-6)


def test_recomputation_of_layers_counts():
    """With full checkpointing every backward runs the layers' forward, without the head: a discarded chunk
    is forwarded three times."""
    linear, full = Pass(1.0, 0.0, 0.0), {"checkpoint_every": 1}
    for k in (1, 3):
        more = seconds([25], forward=linear, layout=dict(full), k=k) - seconds([25], forward=linear, k=k)
        assert more == pytest.approx(2 * 25 * 2 * LAYER, rel=1e-6)
    half = seconds([25], forward=linear, layout={"checkpoint_every": 2}) - seconds([25], forward=linear)
    assert half == pytest.approx(2 * 25 * LAYER, rel=1e-6)


def test_kept_attention_is_computed_once():
    attention = Pass(0.0, 1.0, 0.0)
    for layout in ({}, {"checkpoint_every": 1}):
        kept = seconds([25], forward=attention, layout={**layout, "keep_attention": "device"})
        assert kept == pytest.approx(2 * PAIR * 25 * 26 / 2, rel=1e-6)
    assert seconds([25], forward=attention) > kept


def test_copies_to_the_host_count_only_where_they_take_longer():
    forward = Pass(1.0, 1.0, 1.0)
    none = seconds([25], forward=forward)
    assert seconds([25], forward=forward, layout={"kv_offload": "host"}) == none
    slow = {"kv_offload": "host", "host": 1e-3}
    kv = 2 * 2 * 4 * 2  # bytes of a token's: two layers, keys and values of one head of 4, bf16
    ends, again = [10, 20, 25], [10, 20]  # forwards read what is before them and write their own
    gradients = sum(2 * 2 * kv * before for before in (0, 10, 20))  # fp32, there and back
    moved = kv * (2 * sum(ends) + sum(again)) + gradients
    assert seconds([25], layout=slow) == pytest.approx(moved / 1e-3, rel=1e-6)


def test_ranks_in_lockstep_wait_in_every_slot():
    layer = Pass(0.0, 0.0, 1.0)
    # One rank has a chunk of 10 tokens, the other of 1: each slot takes as long as the longer chunk.
    linear = Pass(1.0, 0.0, 0.0)
    both = seconds([10, 1], forward=linear, replicas=2, lockstep=True)
    assert both == pytest.approx(2 * 10 * 2 * LAYER, rel=1e-6)
    # Gathers of 2 layers over 2 ranks at a byte a second, hidden by nothing, and of the first layer alone.
    made = PlanSettings(Cost.of_model(ARGS), chunk_size=10, replicas=2, lockstep=True)
    sizes = sizes_of(ARGS, shards=2, reshard=True)
    (stage,) = sizes[0].values()
    time = Rates(layer, layer, 0.0, 1.0, 1.0, FAST, FAST)
    gathers, reduces = 2 * stage.layer_gathered / 2, 2 * stage.layer_reduced / 2
    once = (stage.root_gathered + stage.root_reduced) / 2
    plan = plan_step([10, 10], made)
    expected = 1.5 * gathers + 1.5 * (gathers + reduces) + once
    assert StepTime(made, sizes, time).step(plan) == pytest.approx(expected)
    # Where ranks gather by computing, chunks of two layers a pass wait for it.
    slow = time._replace(overlaps=False)
    expected = gathers + (gathers + reduces) + once + 2 * 2
    assert StepTime(made, sizes, slow).step(plan) == pytest.approx(expected)
    # A collective for each layer of a forward, two of a backward, and the root's two.
    late = Rates(FREE, FREE, 0.0, FAST, FAST, FAST, FAST, latency=1.0, overlaps=False)
    assert StepTime(made, sizes, late).step(plan) == pytest.approx(2 + 4 + 2)


def test_collectives_of_a_sequence_that_ranks_share():
    """Two chunks on two ranks, in two layers: each forward gathers the chunk's keys and values, and those
    before it if there are any; each backward sends gradients of both, too."""
    cost = Cost.of_model(ARGS)._replace(per_gathered=0.0)
    made = PlanSettings(cost, chunk_size=10, replicas=2, spread_over=2)
    plan = plan_step([40], made)
    assert plan.spread_sequences == 1 and len(plan.groups[0][0].chunks) == 2
    late = Rates(FREE, FREE, 0.0, FAST, FAST, FAST, FAST, latency=1.0)
    shared = 2 * (1 + 2 + 4 + 1 + 2)  # first chunk's K/V, second forward and backward, first again and back
    once = 2 * (2 + 1)
    sizes = sizes_of(ARGS, shards=2)
    assert StepTime(made, sizes, late).step(plan) == pytest.approx(shared + once)


def test_more_work_takes_longer_and_faster_devices_less():
    args = families["qwen2"].flavors["7B"]
    lengths = [min(length, 65536) for length in synthetic_lengths("lmsys", 64, 0)]

    def predicted(lengths, device="H100", chunk_size=4096, k=1, **layout):
        settings = PlanSettings(Cost.of_model(args), 8, chunk_size=chunk_size, k=k, lockstep=True)
        sizes = sizes_of(args, shards=8, reshard=True, **layout)
        return forecast(lengths, settings, sizes, rates.analytic(device)).seconds

    base = predicted(lengths)
    assert predicted([*lengths, 65536]) > base
    assert predicted(lengths, "B200") < base < predicted(lengths, "A100")
    assert predicted(lengths, checkpoint_every=1) > base
    long = [131072] * 8
    assert predicted(long, k=1) > predicted(long, k=8) > predicted(long, k=32)
    assert predicted(long, keep_attention="device") < predicted(long)
    useful = sum(3 * Cost.of_model(args).forward(length) for length in lengths) / 8
    assert base > useful / 989e12, "no faster than the device's peak"


def test_replicas_that_are_planned():
    """Of many the fullest: the slowest's time and the longest sequence's memory are among them."""
    lengths = [min(length, 65536) for length in synthetic_lengths("lmsys", 1024, 1)]
    args = families["qwen2"].flavors["7B"]
    settings = PlanSettings(Cost.of_model(args), 64, chunk_size=2048)
    sizes, of = sizes_of(args, shards=64), rates.analytic("H100")
    some, every = (forecast(lengths, settings, sizes, of, most) for most in (8, 64))
    assert len(some.kv) == 8 and len(every.kv) == 64
    assert some.seconds == pytest.approx(every.seconds, rel=0.01)
    assert max(some.kv) == max(every.kv) > 0


# ---- memory of what lives elsewhere


def test_memory_of_kv_in_host_memory_and_of_kept_attention():
    args = dataclasses.replace(ARGS, n_layers=6)
    made = PlanSettings(Cost.of_model(args), chunk_size=10)
    plan = plan_step([100], made)
    (program,), groups = plan.programs[0], plan.groups[0]

    def parts(**layout):
        return peak_parts(sizes_of(args, **layout)[0], groups, program)

    here, host = parts(), parts(kv_offload="host")
    assert host["kv"] == here["kv"] / 3 and 0 < host["kv_gradients"] <= here["kv_gradients"] / 3
    kept = parts(keep_attention="device")
    # Of nine discarded chunks, in five layers: output in bf16, log-sum-exp in fp32; when the first of them
    # is computed again its own are among its activations.
    assert kept["kept_attention"] in (9 * 5 * 10 * (8 * 2 + 2 * 4), 8 * 5 * 10 * (8 * 2 + 2 * 4))
    assert sum(kept.values()) > sum(parts(keep_attention="host").values()) > sum(here.values())


# ---- the choice


def row(chunk_size, k, seconds, gib, fits=True):
    return Row(chunk_size, k, 1, False, seconds, 1.0, gib, 0.0, 0.0, 0.0, 10.0, fits)


def test_candidates_find_the_best():
    """Of a plausible surface the search finds what trying everything finds."""

    def evaluate(chunk_size, k):
        chunks = -(-8192 // chunk_size)
        again = max(0, chunks - k)
        seconds = 8192 * (3 + again / chunks) + 100 * (chunks + again)
        gib = chunk_size * k / 1024
        return row(chunk_size, k, seconds, gib, gib <= 4)._replace(recomputed_percent=100 * again / chunks)

    sizes = powers(256, 32768)
    found = ranked(candidates(evaluate, 8192, sizes))
    every = ranked(evaluate(size, k) for size, k in itertools.product(sizes, powers(1, 32)))
    assert found[0] == every[0] and found[0].fits
    assert [each.k for each in candidates(evaluate, 8192, [2048], [3])] == [3]


def test_ranked_takes_the_smaller_of_equals_and_nothing_that_does_not_fit():
    rows = [
        row(512, 2, 1.0, 9.0),
        row(512, 1, 1.0, 8.0),
        row(256, 1, 0.5, 99.0, False),
        row(1024, 1, 2.0, 1.0),
    ]
    assert [each[:2] for each in ranked(rows)] == [(512, 1), (512, 2), (1024, 1)]
    assert powers(256, 100) == [100] and powers(256, 1500) == [256, 512, 1024]


# ---- rates


def test_the_fit_gives_back_what_made_the_works():
    drawn = torch.Generator().manual_seed(0)
    made = Pass(3e-9, 5e-9, 2e-6, 0.0), Pass(6e-9, 14e-9, 0.0, 2e-9), 4e-9
    amounts = torch.rand(30, len(calibration.UNITS), generator=drawn, dtype=torch.float64) * 1e6
    took = amounts @ torch.tensor([*made[0], *made[1], made[2]], dtype=torch.float64)
    works = [calibration.Work(tuple(of), seconds) for of, seconds in zip(amounts.tolist(), took.tolist())]
    found = calibration.fitted(works, rates.analytic("H100"))
    assert found.forward == pytest.approx(made[0], abs=1e-14)
    assert found.backward == pytest.approx(made[1], abs=1e-14) and found.head == pytest.approx(made[2])
    assert found.gather == rates.analytic("H100").gather


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_of_nothing_below_0(seed):
    """No choice of columns fits better, of those whose own fit is at least 0."""
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    ones = torch.ones(12, 1, dtype=torch.float64)
    found = torch.tensor(calibration._least_squares(rows), dtype=torch.float64)
    assert found.min() >= 0 < found.max()
    errors = []
    for count in range(1, 6):
        for columns in itertools.combinations(range(5), count):
            x = torch.linalg.lstsq(rows[:, columns], ones).solution
            if x.min() >= 0:
                errors.append((rows[:, columns] @ x - ones).norm().item())
    assert (rows @ found - ones[:, 0]).norm().item() == pytest.approx(min(errors))


def test_a_device_is_known_by_its_name():
    for name, share in (("NVIDIA H100 80GB HBM3", 989e12), ("a100", 312e12), ("NVIDIA H100 PCIe", 756e12)):
        assert rates.analytic(name).forward.linear == 1 / (rates.LINEAR * share)
    assert rates.analytic("cpu").forward.linear > rates.analytic("A100").forward.linear
    assert rates.analytic("h200").memory > rates.analytic("H100").memory
    with pytest.raises(ValueError, match="--device = TPU is not known: name one of A100, .*, or cpu"):
        rates.analytic("TPU")
    assert rates.memory_gib("cpu") is None and rates.memory_gib("NVIDIA H200") > rates.memory_gib("H100")


def test_a_gpu_without_a_known_data_sheet(monkeypatch):
    """Training on it must not end because of its name: what it reaches is tried."""
    name = "NVIDIA GeForce RTX 4090"
    with pytest.raises(ValueError, match="RTX 4090 is not known"):
        rates.analytic(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: name)
    monkeypatch.setattr(rates, "peak_flops", lambda device, dtype: 165e12)
    found = rates.analytic(name)
    assert found.forward.linear == 1 / (rates.LINEAR * 165e12) and found.overlaps
    assert found[3:7] == rates.OTHER_BANDWIDTHS


def test_calibration_on_this_machine(tmp_path, monkeypatch):
    """What was measured is kept and used, and puts the chunks in the order that they had."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "STEPS", ((16, 16), (1024, 512)))
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    config = load_config(["--training.seq_len=4096", "--training.mixed_precision_param=float32"])
    spec = build.model_spec(config)
    spec = spec._replace(args=dataclasses.replace(spec.args, dim=64, hidden_dim=128, n_layers=2, n_heads=4))
    named = spec.name, spec.args, "float32", "cpu"
    assert rates.rates_of(*named) == (rates.analytic("cpu"), False)
    said = calibration.calibrate(config, spec)
    # A chunk is run forward and backward; of two, one more forward leaves keys and values.
    assert said.startswith("cpu: ") and "from 7 actions" in said and said.count("\n") == 0
    assert not torch.distributed.is_initialized()
    measured, calibrated = rates.rates_of(*named)
    assert calibrated and measured != rates.analytic("cpu")
    assert min(*measured.forward, *measured.backward, measured.head) >= 0 and measured.memory > 0

    def of(tokens):
        settings = build.plan_settings(config, spec, 1)
        sizes = prediction.stage_sizes(config, spec.family, spec.args, spec.layers, 1, "cpu")
        return forecast([tokens], settings, sizes, measured).seconds

    assert of(16) < of(1024) < of(4096)
    assert rates.rates_of(spec.name, spec.args, "bfloat16", "cpu") == (rates.analytic("cpu"), False)


def test_rates_with_other_fields_are_not_read(monkeypatch):
    """An earlier version's, whose head had two numbers, would be taken for these."""
    named = "llama3 debugmodel", ARGS, "cpu", "float32"
    now = rates.calibration_file(*named)
    assert rates.calibration_file(*named) == now
    monkeypatch.setattr(rates, "Rates", collections.namedtuple("Rates", "forward backward head"))
    assert rates.calibration_file(*named) != now
