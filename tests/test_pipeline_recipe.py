"""recipes/finetune.py on pipeline stages: the curves of one process on every layout, what it leaves, sentences."""

import json

import pytest

from tests.helpers.processes import assert_same_curves, run, small_assets, train, write_rows

LENGTHS = [300, 20, 64, 5, 130, 31, 7, 90, 12, 1, 48, 200, 9, 77, 33]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options for small models of two families, by name."""
    folder = tmp_path_factory.mktemp("models")
    types = {"llama3": "llama", "qwen3": "qwen3"}
    return {
        name: small_assets(folder / name, model_type=kind, num_hidden_layers=4)
        for name, kind in types.items()
    }


@pytest.fixture(scope="module")
def references(tmp_path_factory, data, models):
    """The curves of whole sequences in one process, in fp64, by recipes/finetune.py."""
    options = ["--training.dtype=float64", "--chunkflow.enable=false"]
    return {
        name: train(tmp_path_factory.mktemp(name), "run", data, *options, model)
        for name, model in models.items()
    }


@pytest.mark.proves(
    "stages + selective + k > 1",
    "virtual stages + chunks",
    "stages x ranks + cpu_offload",
    "stages + no_enable",
)
@pytest.mark.parametrize(
    "name, processes, options",
    [
        ("llama3", 2, ["--chunkflow.k=2", "--activation_checkpoint.mode=selective"]),
        (
            "qwen3",
            2,
            ["--parallelism.pipeline_parallel_schedule=Interleaved1F1B", "--chunkflow.balance=tokens"],
        ),
        ("qwen3", 4, ["--training.enable_cpu_offload"]),
        ("llama3", 2, ["--chunkflow.no_enable", "--parallelism.pipeline_parallel_layers_per_stage=3"]),
    ],
)
def test_pipelines_have_the_curve_of_one_process(
    tmp_path, data, models, references, name, processes, options
):
    options = [
        "--training.dtype=float64",
        "--parallelism.pipeline_parallel_degree=2",
        models[name],
        *options,
    ]
    rows = train(tmp_path, "run", data, *options, processes=processes)
    assert_same_curves(rows, references[name], 1e-8, 1e-8)
    for key in ("tokens", "supervised_tokens", "lr", "n_tokens_seen"):
        assert [row[key] for row in rows] == [row[key] for row in references[name]]


def test_what_a_run_leaves(tmp_path, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = [
        "--parallelism.pipeline_parallel_degree=2",
        "--metrics.enable_tensorboard",
        "--profiling.enable_profiling",
        "--profiling.profile_freq=2",
    ]
    rows = train(tmp_path, "run", data, *options, processes=2)
    assert rows[-1]["loss"] < rows[0]["loss"] < 9
    events = EventAccumulator(str(tmp_path / "run" / "tb"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert {"chunkflow/plan of step 1", "chunkflow/timeline"} <= set(events.Tags()["images"])
    assert [image.step for image in events.Images("chunkflow/timeline")] == [1, 2, 4]
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("simulated", "stage_0", "stage_1"):
        assert all(0 < value < 100 for value in values[f"chunkflow/bubble(%)/{tag}"])
    assert max(values["chunkflow/live_chunks_peak"]) == 2  # k + stages - 1 on the first
    assert max(values["chunkflow/kv_state(GiB)"]) > 0 < max(values["chunkflow/stage_inputs_peak"])
    trace = json.loads((tmp_path / "run" / "timeline_step_2.json").read_text())["traceEvents"]
    per_process = [
        [event for event in trace if event["ph"] == "X" and event["pid"] == process] for process in (0, 1)
    ]
    planned, measured = (sorted((event["tid"], event["name"]) for event in events) for events in per_process)
    assert planned == measured and {rank for rank, _ in planned} == {0, 1}
    assert (tmp_path / "run" / "profile_traces" / "iteration_2" / "rank1_trace.json").exists()


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_fake_backend(tmp_path, data, name):
    settings = [
        f"--job.dump_folder={tmp_path}/fake",
        "--training.dataset=jsonl",
        f"--training.dataset_path={data}",
    ]
    options = ["--parallelism.pipeline_parallel_degree=4", f"--model.name={name}", "--comm.mode=fake_backend"]
    done = run(tmp_path, *settings, *options, NGPU="8")
    assert done.returncode == 0 and "Rank 0 of 8 can run this step" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--parallelism.pipeline_parallel_degree=2", "--parallelism.fsdp_reshard_after_forward=always"],
            '"default" or "never"',
        ),
        (["--parallelism.pipeline_parallel_degree=8"], "8 stages, but llama3 debugmodel has 4 layers"),
        (
            [
                "--parallelism.pipeline_parallel_degree=2",
                "--parallelism.pipeline_parallel_layers_per_stage=1",
            ],
            "needs 2",
        ),
        (
            [
                "--parallelism.pipeline_parallel_degree=2",
                "--parallelism.pipeline_parallel_layers_per_stage=2",
                "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
            ],
            "a multiple of 2, at least 4",
        ),
    ],
)
def test_refusals(tmp_path, options, words):
    done = run(tmp_path, "--check", f"--job.dump_folder={tmp_path}/x", *options, NGPU="2")
    assert done.returncode == 2 and done.stdout.count("\n") == 1, done.stdout
    assert done.stdout.startswith("error: parallelism.") and words in done.stdout
