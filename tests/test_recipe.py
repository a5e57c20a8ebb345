"""recipes/finetune.py as its users run it: same curves on every layout, files it leaves, sentences for wrong
input."""

import json
import os
import signal
import subprocess

import pytest

from tests.helpers.processes import (
    RECIPE,
    REPO,
    assert_same_curves,
    end_processes,
    environment,
    patched_recipe,
    processes_of,
    run,
    small_assets,
    start,
    train,
    untimed,
    wait_for_rows,
    write_rows,
)

LENGTHS = [300, 20, 64, 5, 130, 31, 7, 90, 12, 1, 48, 200, 9, 77, 33]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    """The curve of whole sequences in one process, in fp64."""
    return train(
        tmp_path_factory.mktemp("reference"),
        "run",
        data,
        "--training.dtype=float64",
        "--chunkflow.enable=false",
    )


@pytest.mark.proves("one process + k > 1")
def test_chunks_have_the_curve_of_whole_sequences(tmp_path, data, reference):
    chunked = train(tmp_path, "run", data, "--training.dtype=float64", "--chunkflow.k=2")
    assert_same_curves(chunked, reference, 1e-8, 1e-8)
    assert (
        sum(row["recomputed_chunks"] for row in chunked)
        > 0
        == sum(row["recomputed_chunks"] for row in reference)
    )
    assert all(row["chunks"] == 6 for row in reference), "one whole sequence a micro-batch"


def test_fp32_for_twenty_steps(tmp_path, data):
    """As close to fp64 in chunks as whole: rounding grows from step to step, on each machine in its way."""
    options = [small_assets(tmp_path / "model"), "--training.steps=20", "--lr_scheduler.warmup_steps=20"]
    fp32 = [*options, "--training.mixed_precision_param=float32"]
    chunked = train(tmp_path, "chunks", data, *fp32)
    whole = train(tmp_path, "whole", data, *fp32, "--chunkflow.no_enable")
    judge = train(tmp_path, "judge", data, *options, "--chunkflow.no_enable", "--training.dtype=float64")
    for figure in ("loss", "grad_norm"):
        errors = [
            max(abs(row[figure] / exact[figure] - 1) for row, exact in zip(rows, judge))
            for rows in (chunked, whole)
        ]
        assert errors[0] <= 4 * errors[1] + 1e-6, (figure, errors)


@pytest.mark.proves(
    "never + chunks",
    "always + compile + selective",
    "always + full",
    "always + cpu_offload + k > 1",
    "HSDP + always + chunks",
)
@pytest.mark.parametrize(
    "processes, options",
    [
        (2, ["--parallelism.fsdp_reshard_after_forward=never"]),
        (2, ["--compile.enable", "--compile.backend=eager", "--activation_checkpoint.mode=selective"]),
        (2, ["--chunkflow.balance=tokens", "--activation_checkpoint.mode=full"]),
        (3, ["--chunkflow.k=3", "--training.enable_cpu_offload"]),
        (4, ["--parallelism.data_parallel_replicate_degree=2"]),
    ],
)
def test_ranks_have_the_curve_of_one_process(tmp_path, data, reference, processes, options):
    rows = train(tmp_path, "run", data, "--training.dtype=float64", *options, processes=processes)
    assert_same_curves(rows, reference, 1e-8, 1e-8)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in reference]


def test_bf16_learns_and_two_runs_are_bitwise_equal(tmp_path, data):
    options = [
        "--debug.seed=2",
        "--debug.deterministic",
        "--training.steps=12",
        "--optimizer.lr=1e-2",
        small_assets(tmp_path / "model", model_type="qwen3"),
    ]
    first, second = (train(tmp_path, name, data, *options, processes=2) for name in ("first", "second"))
    assert first[-1]["loss"] < 0.9 * first[0]["loss"]
    assert untimed(first) == untimed(second)


def test_what_a_run_leaves(tmp_path, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train(
        tmp_path,
        "run",
        data,
        "--metrics.enable_tensorboard",
        "--training.mixed_precision_param=float32",
        "--profiling.enable_profiling",
        "--profiling.profile_freq=2",
    )
    contract = (
        "step loss grad_norm lr tokens supervised_tokens seconds tps chunks padding_percent recomputed_chunks"
    )
    assert set(contract.split()) | {"dp_imbalance_percent", "memory_gib"} <= set(rows[0])
    assert [row["lr"] for row in rows] == pytest.approx([4e-4, 8e-4, 8e-4, 4e-4])
    events = EventAccumulator(str(tmp_path / "run" / "tb"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "grad_norm",
        "lr",
        "throughput(tps)",
        "tflops",
    } <= set(tags["scalars"])
    assert {
        "chunkflow/chunks", "chunkflow/padding(%)", "chunkflow/recomputed(%)", "chunkflow/live_chunks_peak",
        "chunkflow/kv_state(GiB)", "chunkflow/kv_on_device(GiB)", "chunkflow/waiting(%)/rank_0",
        "chunkflow/template_overhead(%)", "chunkflow/dp_imbalance(%)", "time_metrics/data_loading(%)", "data/dropped_tokens",
    } <= set(tags["scalars"])  # fmt: skip
    assert [event.value for event in events.Scalars("loss_metrics/global_avg_loss")] == pytest.approx(
        [row["loss"] for row in rows]
    )
    pictures = ["data/lengths", "chunkflow/plan of step 1", "chunkflow/memory of step 1"]
    assert tags["images"] == pictures
    assert (tmp_path / "run" / "profile_traces" / "iteration_2" / "rank0_trace.json").stat().st_size > 1000
    # the saved config is the run: started from it, the same curve comes out
    again = run(
        tmp_path,
        f"--job.config_file={tmp_path / 'run' / 'config.toml'}",
        f"--job.dump_folder={tmp_path / 'again'}",
    )
    assert again.returncode == 0, again.stdout
    assert "tensorboard --logdir" in again.stdout and "Training completed" in again.stdout
    repeated = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in repeated] == [row["loss"] for row in rows]


def test_the_ledger_balances_and_overlong_sequences_are_named(tmp_path, data):
    options = [
        "--training.dataset=jsonl",
        f"--training.dataset_path={data}",
        "--training.seq_len=100",
        "--training.steps=1",
        small_assets(tmp_path / "model"),
    ]
    options += ["--training.global_batch_size=15", f"--job.dump_folder={tmp_path / 'run'}"]
    failed = run(tmp_path, *options)
    assert (
        failed.returncode == 1
        and f"error: {data}:1: 300 tokens, but training.seq_len admits 100" in failed.stdout
    )
    assert "Traceback" not in failed.stdout and "step:" not in failed.stdout
    for policy, said, tokens in (
        ("truncate", "truncated 3 sequences (330 tokens)", "truncated 330, dropped 0"),
        ("drop", "dropped 3 sequences (630 tokens)", "truncated 0, dropped 630"),
    ):
        done = run(
            tmp_path,
            *options,
            f"--training.overlong={policy}",
            "--training.global_batch_size=12",
            "--training.no_shuffle",
        )
        assert said in done.stdout, done.stdout[-2000:]
        assert policy == "truncate" or tokens in done.stdout


def test_a_step_without_targets_updates_nothing(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [30, 40, 20], masked=1.1)
    rows = train(tmp_path, "run", data, "--training.steps=2")
    assert [row["loss"] for row in rows] == [0, 0] and [row["grad_norm"] for row in rows] == [0, 0]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--training.batch_size=3"], "set training.global_batch_size and chunkflow.chunk_size"),
        (["--model.flavor=8b"], 'did you mean "8B"?'),
        (["--training.seq_len=200000"], "131,072 positions"),
        (["--training.dataset=jsonl", "--training.dataset_path=/no/such.jsonl"], "/no/such.jsonl"),
        (["--parallelism.data_parallel_replicate_degree=2"], "the number of processes"),
        (["--model.tokenizer_path=/no/tokenizer.model"], "/no/tokenizer.model"),
        (["--job.dump_folder=/proc/none"], "/proc/none"),
    ],
)
def test_wrong_config_is_a_sentence_and_status_2(tmp_path, options, said):
    done = run(tmp_path, *options)
    assert done.returncode == 2 and said in done.stdout and done.stdout.count("\n") == 1, done.stdout


def test_fake_backend(tmp_path, data):
    options = [
        "--training.dataset=jsonl",
        f"--training.dataset_path={data}",
        f"--job.dump_folder={tmp_path / 'run'}",
    ]
    done = run(tmp_path, *options, "--comm.mode=fake_backend", NGPU="64")
    assert done.returncode == 0 and "Rank 0 of 64 can run this step" in done.stdout, done.stdout[-2000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "nothing is measured, nothing is overwritten"


def test_a_rank_that_raises_ends_the_job_with_its_own_message(tmp_path, data):
    recipe = patched_recipe(tmp_path, 'assert rank != 1 or step < 2, "rank 1 stumbles"')
    done = run(
        tmp_path, small_assets(tmp_path / "model"), "--training.dataset=jsonl", f"--training.dataset_path={data}",
        f"--job.dump_folder={tmp_path / 'run'}", "--comm.train_timeout_seconds=20", processes=2, TRAIN_FILE=str(recipe), seconds=100,
    )  # fmt: skip
    assert done.returncode != 0 and "rank 1 stumbles" in done.stdout, done.stdout[-3000:]


def long_run(tmp_path, data):
    """Options of a run on two ranks that is ended from outside."""
    return [
        small_assets(tmp_path / "model"), "--training.dataset=jsonl", f"--training.dataset_path={data}",
        f"--job.dump_folder={tmp_path / 'run'}", "--training.steps=100000", "--comm.train_timeout_seconds=5",
        "--metrics.log_freq=1", "--metrics.no_enable_tensorboard",
    ]  # fmt: skip


def test_a_rank_that_dies_ends_the_job(tmp_path, data):
    (tmp_path / "empty.toml").touch()
    log = open(tmp_path / "log", "w+")
    job = subprocess.Popen(
        [str(REPO / "run_train.sh"), *long_run(tmp_path, data)],
        env=environment(tmp_path, NGPU="2", CONFIG_FILE=str(tmp_path / "empty.toml")),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for_rows(tmp_path / "run", 3, lambda: job.poll() is None)
        (victim,) = (pid for pid, environ in processes_of(str(tmp_path)).items() if "RANK=1" in environ)
        os.kill(victim, signal.SIGKILL)
        assert job.wait(timeout=60) != 0
    finally:
        end_processes(str(tmp_path))
    log.seek(0)
    said = log.read()
    assert "SIGKILL" in said, said[-3000:]


def test_a_rank_that_hangs_ends_those_that_wait_for_it(tmp_path, data):
    """torchrun, which then ends the job, would first give the one that hangs half a minute."""
    log = tmp_path / "log"
    job = start(RECIPE, long_run(tmp_path, data), environment(tmp_path), log, processes=2)
    wait_for_rows(tmp_path / "run", 3, lambda: job.poll() is None)
    os.kill(job.pids[1], signal.SIGSTOP)
    statuses = job.wait(60, until_failure=True)
    assert statuses[0] not in (0, None) and statuses[1] is None, log.read_text()[-3000:]
    assert "imed out" in log.read_text()
