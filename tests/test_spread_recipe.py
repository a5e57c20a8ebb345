"""recipes/finetune.py where ranks share long sequences: the curve of one process, exact resume, validation,
the fake backend, and how a memory budget decides."""

import json
import shutil

import pytest

from chunkflow.settings.config import load_config
from chunkflow.training import build
from tests.helpers.kill_loop import outcome
from tests.helpers.processes import (
    RECIPE,
    assert_same_curves,
    environment,
    patched_recipe,
    rows_of,
    run,
    small_assets,
    start,
    train,
    write_rows,
)

LENGTHS = [700, 20, 64, 5, 430, 31, 7, 90, 12, 880, 48, 1, 9, 77, 33, 610, 15, 100]
# Of a layer's work little is traffic of keys and values, so that it pays to share.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 8}
ALONE = "--parallelism.context_parallel_degree=1"

# In the way of `{0}`, a method of Runner: how many of its groups this rank shares goes to a file.
COUNT = """
if not hasattr(recipe["Runner"], "counted"):
    original = recipe["Runner"].counted = recipe["Runner"].{0}
    def counted(self, program, groups, *more, **others):
        with open(folder / f"shared_{{rank}}", "a") as file:
            print(sum(group.spread is not None for group in groups), file=file)
        return original(self, program, groups, *more, **others)
    recipe["Runner"].{0} = counted
"""


def shared_groups(folder, rank: int) -> list[int]:
    return [int(line) for line in (folder / f"shared_{rank}").read_text().split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a model; `place.options` are those of all runs: an epoch in three steps, fp64."""

    class Place:
        path = tmp_path_factory.mktemp("place")
        data = write_rows(path / "rows.jsonl", LENGTHS)
        model = small_assets(path / "model", **SIZES)
        options = [model, "--training.dtype=float64", "--training.steps=3", "--metrics.no_enable_tensorboard"]

    return Place


@pytest.fixture(scope="module")
def reference(tmp_path_factory, place):
    """The curve of one process, in chunks."""
    rows = train(tmp_path_factory.mktemp("reference"), "run", place.data, *place.options)
    assert not any(row["spread_sequences"] for row in rows)
    return rows


@pytest.mark.proves(
    "always + shared + chunks",
    "never + shared + k > 1",
    "always + shared + cpu_offload",
    "HSDP + always + shared + k > 1",
    "stages x ranks + shared + selective",
    "always + no_enable",
    "stages x ranks + chunks",
)
@pytest.mark.parametrize(
    ("processes", "most", "options"),
    [
        (2, 2, []),
        (2, 2, ["--parallelism.fsdp_reshard_after_forward=never", "--chunkflow.k=2"]),
        (3, 3, ["--training.enable_cpu_offload"]),
        (3, 3, ["--parallelism.fsdp_reshard_after_forward=never"]),
        (4, 4, ["--parallelism.data_parallel_replicate_degree=2", "--chunkflow.k=2"]),
        (4, 2, ["--parallelism.fsdp_reshard_after_forward=never", "--parallelism.context_parallel_degree=2"]),
        (4, 2, ["--parallelism.pipeline_parallel_degree=2", "--activation_checkpoint.mode=selective"]),
        (2, 1, [ALONE]),
        (2, 1, ["--chunkflow.no_enable"]),
        (4, 1, ["--parallelism.pipeline_parallel_degree=2", ALONE]),
    ],
)
def test_who_shares_sequences_has_the_curve_of_one_process(
    tmp_path, place, reference, processes, most, options
):
    """In fp64: every layout adds the same numbers in another order. `most`: ranks of a sequence."""
    rows = train(tmp_path, "run", place.data, *place.options, *options, processes=processes)
    assert_same_curves(rows, reference, 1e-8, 1e-8)
    for key in ("tokens", "supervised_tokens", "n_tokens_seen"):
        assert [row[key] for row in rows] == [row[key] for row in reference]
    assert max(row["most_ranks_of_a_sequence"] for row in rows) == most
    assert (sum(row["spread_sequences"] for row in rows) > 0) == (most > 1)
    for row in rows:
        assert (row["most_ranks_of_a_sequence"] > 1) == (row["spread_sequences"] > 0)


def test_in_fp32_ranks_that_share_differ_by_rounding(tmp_path, place, reference):
    options = ["--training.dtype=float32", "--training.mixed_precision_param=float32"]
    runs = [
        train(tmp_path, f"on_{ranks}", place.data, *place.options, *options, processes=ranks)
        for ranks in (1, 2)
    ]
    assert runs[1][-1]["most_ranks_of_a_sequence"] == 2
    for figure in ("loss", "grad_norm"):
        errors = [
            max(abs(row[figure] / exact[figure] - 1) for row, exact in zip(rows, reference)) for rows in runs
        ]
        assert errors[1] <= 4 * errors[0] + 1e-5, (figure, errors)


# ---- stopped, killed, resumed


class Saved:
    """Runs of six steps that save after each second one."""

    def __init__(self, place, tmp_path):
        self.path, self.place, self.log = tmp_path, place, tmp_path / "log"

    def run(self, name: str, processes: int, before_step: str = "") -> list[int]:
        """Exit statuses. `before_step`: as in `patched_recipe`."""
        options = [
            *self.place.options, f"--job.dump_folder={self.path / name}", "--training.dataset=jsonl",
            f"--training.dataset_path={self.place.data}", "--training.global_batch_size=6", "--training.steps=6",
            "--lr_scheduler.warmup_steps=2", "--chunkflow.chunk_size=64", "--metrics.log_freq=1", "--checkpoint.enable",
            "--checkpoint.interval=2", "--comm.train_timeout_seconds=60",
        ]  # fmt: skip
        self.log.unlink(missing_ok=True)
        recipe = patched_recipe(self.path, before_step) if before_step else RECIPE
        job = start(recipe, options, environment(self.path), self.log, processes)
        return job.wait(100)

    def finish(self, name: str, processes: int) -> None:
        assert self.run(name, processes) == [0] * processes, self.log.read_text()[-3000:]


STOP = "step == {0} and rank == 0 and os.kill(os.getpid(), signal.SIGTERM)"
KILL = "step == {0} and rank == 1 and os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.proves("always + shared + resume", "always + shared + other layout")
def test_resumed_runs_that_share_sequences(tmp_path, place):
    """On two ranks: stopped, then one rank killed while the other waits for its keys and values; bitwise the
    undisturbed run. On 4, then 3 ranks: the same curve to rounding."""
    runs = Saved(place, tmp_path)
    runs.finish("undisturbed", 2)
    undisturbed = rows_of(tmp_path / "undisturbed")
    shared = [row["step"] for row in undisturbed if row["spread_sequences"]]
    assert len(shared) >= 3, "most steps share sequences"

    assert set(runs.run("run", 2, STOP.format(3))) == {75}, runs.log.read_text()[-3000:]
    shutil.copytree(tmp_path / "run", tmp_path / "other_ranks")
    killed = next(step for step in shared if step > 3)
    statuses = runs.run("run", 2, KILL.format(killed))
    assert statuses[1] == -9 and statuses[0] not in (0, 75), "who waits for a dead rank ends, too"
    assert len(rows_of(tmp_path / "run")) == killed - 1
    runs.finish("run", 2)
    got, expected = (outcome(tmp_path / name, 6) for name in ("run", "undisturbed"))
    assert got[0] == expected[0], "rows of metrics.jsonl"
    assert got[1] == expected[1], "ledger"
    assert got[2] == expected[2], "tensors of the last checkpoint"

    assert set(runs.run("other_ranks", 4, STOP.format(5))) == {75}, runs.log.read_text()[-3000:]
    runs.finish("other_ranks", 3)
    rows = rows_of(tmp_path / "other_ranks")
    assert_same_curves(rows, undisturbed, 1e-8, 1e-8)
    most = [row["most_ranks_of_a_sequence"] for row in rows]
    assert max(most[:3]) == 2 and max(most[3:5]) == 4 and most[5] in (1, 3)


# ---- validation, the fake backend


def validation_rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


@pytest.mark.proves("always/stages x ranks + shared + validation")
@pytest.mark.parametrize(
    "processes, options",
    [(2, []), (4, ["--parallelism.pipeline_parallel_degree=2"])],
    ids=["ranks", "stages"],
)
def test_validation_shares_sequences_too(tmp_path, place, reference, processes, options):
    valid = write_rows(tmp_path / "valid.jsonl", [1100, 20, 64, 9], seed=5)
    validate = ["--validation.enable", f"--validation.dataset_path={valid}", "--validation.freq=2"]
    train(tmp_path, "alone", place.data, *place.options, *validate)
    folder = tmp_path / "run"
    settings = [
        f"--job.dump_folder={folder}", "--training.dataset=jsonl", f"--training.dataset_path={place.data}",
        "--training.global_batch_size=6", "--lr_scheduler.warmup_steps=2", "--chunkflow.chunk_size=64",
        "--metrics.log_freq=1", *place.options, *validate, *options,
    ]  # fmt: skip
    recipe = str(patched_recipe(tmp_path, COUNT.format("evaluate")))
    done = run(tmp_path, *settings, processes=processes, forked=True, TRAIN_FILE=recipe)
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(sum(shared_groups(folder, rank)) > 0 for rank in range(processes))
    assert_same_curves(rows_of(folder), reference, 1e-8, 1e-8)
    expected, got = validation_rows(tmp_path / "alone"), validation_rows(folder)
    assert [row["step"] for row in got] == [2, 3] and got[0]["tokens"] == 1193
    for ours, theirs in zip(got, expected):
        for key in theirs.keys() - {"seconds", "tps", "memory_gib"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-8), key


@pytest.mark.parametrize(
    "options",
    [[], ["--parallelism.fsdp_reshard_after_forward=never"], ["--parallelism.pipeline_parallel_degree=2"]],
    ids=["always", "never", "stages"],
)
def test_the_fake_backend_runs_shared_sequences(tmp_path, place, options):
    folder = tmp_path / "fake"
    settings = [
        f"--job.dump_folder={folder}", "--training.dataset=jsonl", f"--training.dataset_path={place.data}",
        "--training.global_batch_size=6", "--chunkflow.chunk_size=64", place.model, "--comm.mode=fake_backend", *options,
    ]  # fmt: skip
    recipe = str(patched_recipe(tmp_path, COUNT.format("step")))
    done = run(tmp_path, *settings, NGPU="8", TRAIN_FILE=recipe)
    assert done.returncode == 0 and "Rank 0 of 8 can run this step" in done.stdout, done.stdout[-3000:]
    (groups,) = shared_groups(folder, 0)
    assert groups > 0


# ---- what a rank can hold


@pytest.mark.proves("always + shared + chunks")
def test_a_memory_budget_decides_how_many_ranks_share(tmp_path, place):
    """Eight equal sequences on four ranks are even without sharing. If a rank can hold the K/V of half of
    one, two share it, if of a quarter, all; the curve is the same."""
    data = write_rows(tmp_path / "rows.jsonl", [250] * 8)
    options = [
        *place.options,
        "--training.steps=2",
        "--training.global_batch_size=8",
        "--lr_scheduler.warmup_steps=1",
    ]

    def held(gib: float) -> int:
        """Tokens whose K/V a rank can hold, by the recipe's arithmetic."""
        more = ["--chunkflow.chunk_size=64", "--training.dataset=jsonl", f"--training.dataset_path={data}"]
        config = load_config([*options, *more, f"--chunkflow.memory_budget_gib={gib}"])
        return build.plan_settings(config, build.model_spec(config), replicas=4).kv_tokens

    def budget(least: int, most: int) -> list[str]:
        low, high = 0.0001, 64.0
        while held(half := (low + high) / 2) not in range(least, most):
            low, high = (half, high) if held(half) < least else (low, half)
        return [f"--chunkflow.memory_budget_gib={half}"]

    budgets = {"none": [], "half": budget(125, 250), "tiny": budget(65, 125)}
    runs = {
        name: train(tmp_path, name, data, *options, *budget, processes=4) for name, budget in budgets.items()
    }
    for name, ranks in (("none", 1), ("half", 2), ("tiny", 4)):
        assert {row["most_ranks_of_a_sequence"] for row in runs[name]} == {ranks}, name
        assert {row["spread_sequences"] for row in runs[name]} == {8 if ranks > 1 else 0}
        assert_same_curves(runs[name], runs["none"], 1e-8, 1e-8)
