"""recipes/finetune.py on rows with weights: loss and gradient norm are their definition on whole sequences, on
every layout, in training and validation; loss by source."""

from __future__ import annotations

import json
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from chunkflow.execution.runner import StepResult
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.reporting.step_figures import RankFigures, gather_over_ranks, losses_by_source, rank_figures
from chunkflow.settings.config import load_config
from chunkflow.training import build, parallel
from tests.helpers.layouts import join
from tests.helpers.processes import assert_same_curves, rows_of, run, run_ranks, small_assets, train
from tests.helpers.reference import whole_sequence_gradients

LENGTHS = [1100, 20, 64, 5, 430, 31, 7, 90, 12, 1]
# Of a layer's work little is traffic of keys and values, so that it pays to share a sequence.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 8}


def weighted_rows() -> list[dict]:
    """Of any weights at least 0, of tokens and rows; one row has a weight of 0."""
    rng, rows = random.Random(0), []
    for number, length in enumerate(LENGTHS):
        start, step = rng.randrange(2000), rng.randrange(1, 4)
        ids = [(start + step * place) % 2000 for place in range(length)]
        mask = [rng.choice([0, 1, 1, round(rng.uniform(0, 4), 3)]) for _ in ids]
        rows.append({"input_ids": ids, "loss_mask": mask, "weight": [1, 2.5, 0.3, 1, 0][number % 5]})
        if number % 5 == 3:
            del rows[-1]["weight"]
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def targets(row) -> list[float]:
    """What each token counts as a target, without the row's weight: the first is nobody's target."""
    return [0.0, *map(float, row["loss_mask"][1:])]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the rows and a model; `options` are those of all runs: each step has all rows, in fp64."""

    class Place:
        path = tmp_path_factory.mktemp("place")
        rows = weighted_rows()
        data = write(path / "rows.jsonl", rows)
        options = [
            small_assets(path / "model", **SIZES), "--training.dtype=float64", "--training.steps=3",
            f"--training.global_batch_size={len(LENGTHS)}", "--debug.seed=3",
        ]  # fmt: skip
        validates = ["--validation.enable", "--validation.freq=1", f"--validation.dataset_path={data}"]

    return Place


@pytest.fixture(scope="module")
def curves(tmp_path_factory, place):
    """Of whole sequences in one process, by what counts the same in the loss."""
    return {
        weighting: train(
            tmp_path_factory.mktemp(weighting), "run", place.data, *place.options, "--chunkflow.no_enable",
            f"--training.loss_weighting={weighting}",
        )
        for weighting in ("token", "sequence")
    }  # fmt: skip


def by_definition(place, weighting) -> tuple[float, float]:
    """Loss and gradient norm of the initial weights, by the naive functions."""
    spec = build.model_spec(load_config(place.options))
    with parallel.default_dtype("float64"):
        model = spec.family.Transformer(spec.args)
    parallel.init_weights(model, seed=3)
    sequences, weights, denominator = [], [], 0.0
    for row in place.rows:
        tokens, weight, counts = torch.tensor(row["input_ids"]), row.get("weight", 1), targets(row)
        sequences.append((tokens, torch.cat([tokens[1:], torch.tensor([-100])])))
        total = sum(counts)
        scale = weight / total if weighting == "sequence" and total else weight
        weights.append(scale * torch.tensor([*counts[1:], 0.0], dtype=torch.float64))
        denominator += (weight if total else 0.0) if weighting == "sequence" else weight * total
    loss, gradients = whole_sequence_gradients(model, sequences, weights, denominator)
    return loss, float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


# These read "loss_mask" and "weight" of JSONL rows.


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_the_first_step_is_the_definition(place, curves, weighting):
    first, (loss, grad_norm) = curves[weighting][0], by_definition(place, weighting)
    assert first["loss"] == pytest.approx(loss, rel=1e-9)
    assert first["grad_norm"] == pytest.approx(grad_norm, rel=1e-9)
    supervised = sum(weight > 0 for row in place.rows if row.get("weight", 1) for weight in targets(row))
    assert first["supervised_tokens"] == supervised
    assert first["global_max_loss"] == pytest.approx(loss, rel=1e-9), "on one rank"
    assert abs(curves["token"][0]["loss"] / curves["sequence"][0]["loss"] - 1) > 1e-4, "they are two losses"


# Layouts see weights alone, however they were made: one takes them by token.
@pytest.mark.proves(
    "always + shared + weights + validation",
    "one process + weights + validation + k > 1",
    "never + weights + validation",
    "stages + weights + validation + compile",
    "stages x ranks + shared + weights + validation + k > 1",
)
@pytest.mark.parametrize(
    ("weighting", "processes", "most", "options"),
    [
        ("token", 2, 2, []),
        ("sequence", 1, 1, ["--chunkflow.k=2"]),
        (
            "sequence",
            2,
            1,
            ["--parallelism.context_parallel_degree=1", "--parallelism.fsdp_reshard_after_forward=never"],
        ),
        (
            "sequence",
            2,
            1,
            ["--parallelism.pipeline_parallel_degree=2", "--compile.enable", "--compile.backend=eager"],
        ),
        ("sequence", 4, 2, ["--parallelism.pipeline_parallel_degree=2", "--chunkflow.k=2"]),
    ],
    ids=["shared", "one", "ranks", "stages", "stages_shared"],
)
def test_every_layout_has_the_curve_of_whole_sequences(
    tmp_path, place, curves, weighting, processes, most, options
):
    """In training and in validation, whose rows are those of the next step."""
    options = [*place.options, *place.validates, *options, f"--training.loss_weighting={weighting}"]
    rows = train(tmp_path, "run", place.data, *options, processes=processes)
    assert_same_curves(rows, curves[weighting], 1e-8, 1e-8)
    assert max(row["most_ranks_of_a_sequence"] for row in rows) == most
    assert {row["supervised_tokens"] for row in rows} == {curves[weighting][0]["supervised_tokens"]}
    validated = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    for validation, following in zip(map(json.loads, validated), rows[1:]):
        assert validation["loss"] == pytest.approx(following["loss"], rel=1e-8)
        assert validation["supervised_tokens"] == following["supervised_tokens"]


def test_rows_of_weight_0_update_nothing(tmp_path, place):
    data = write(tmp_path / "rows.jsonl", [row | {"weight": 0} for row in place.rows])
    rows = train(tmp_path, "run", data, *place.options)
    assert {(row["loss"], row["grad_norm"], row["supervised_tokens"]) for row in rows} == {(0, 0, 0)}


# ---- loss by source


def figures_of_ranks():
    join()
    rank, result = dist.get_rank(), StepResult(torch.device("cpu"), 1, sequences=4)
    result.loss_of_sequences += torch.tensor([[1.0, 2.0, 0.0, 8.0], [0.0, 1.0, 4.0, 0.0]][rank])
    result.clock.marks.append((None, 0.0, 1.0))
    simulation = plan_step([3], PlanSettings(Cost(1.0, 0.0))).simulations[0]
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    with mock.patch("chunkflow.reporting.step_figures.useful_time", lambda timeline: 0.0):
        own = rank_figures(result, simulation, weights, [0, 1, 1, 0], 3)
    return gather_over_ranks(own, torch.device("cpu"))


def test_the_loss_of_a_source_is_that_of_its_sequences_on_all_ranks():
    for figures in run_ranks(figures_of_ranks, 2):
        assert [rank.loss_of_sources for rank in figures] == [(9.0, 4.0, 0.0), (0.0, 4.0, 0.0)]
        losses = losses_by_source(figures, ["a", "b", "none"], [0, 1, 1, 0], [3.0, 1.0, 4.0, 0.0])
        assert losses == {"a": 9 / 3, "b": 8 / 5}
    assert losses_by_source([RankFigures(*[0.0] * 8)], [], [], [1.0]) == {}


@pytest.mark.parametrize(
    "weighting, processes, options",
    [("token", 2, []), ("sequence", 1, []), ("sequence", 2, ["--parallelism.pipeline_parallel_degree=2"])],
)
def test_the_loss_of_a_source_is_that_of_a_run_on_it_alone(tmp_path, place, weighting, processes, options):
    """At the first step, of the same initial weights. Needs [[training.sources]]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    halves = {"short": place.rows[1:4], "long": [place.rows[0], *place.rows[5:]]}
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in halves.items()}
    tables = [
        f'[[training.sources]]\ndataset = "jsonl"\ndataset_path = "{path}"\nname = "{name}"\n'
        for name, path in files.items()
    ]
    (tmp_path / "mixed.toml").write_text("\n".join(tables))
    plain = [
        *place.options,
        "--training.steps=1",
        f"--training.loss_weighting={weighting}",
        "--chunkflow.chunk_size=64",
    ]
    counts = {name: f"--training.global_batch_size={len(rows)}" for name, rows in halves.items()}
    alone = {name: train(tmp_path, name, files[name], *plain, counts[name])[0] for name in files}
    together = [f"--job.config_file={tmp_path / 'mixed.toml'}", f"--job.dump_folder={tmp_path / 'mixed'}"]
    together += [f"--training.global_batch_size={sum(map(len, halves.values()))}", "--training.no_shuffle"]
    done = run(tmp_path, *plain, *together, *options, processes=processes, forked=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (mixed,) = rows_of(tmp_path / "mixed")
    events = EventAccumulator(str(tmp_path / "mixed" / "tb"))
    events.Reload()
    for name, row in alone.items():
        assert mixed[f"loss_of_{name}"] == pytest.approx(row["loss"], rel=1e-9)
        (event,) = events.Scalars(f"loss_by_source/{name}")
        assert event.value == pytest.approx(row["loss"], rel=1e-6)
