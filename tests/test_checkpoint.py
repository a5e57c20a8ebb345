"""Checkpoints through the recipes: exact resume on every layout, what is refused, what survives a failing
disk."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from chunkflow.storage import tensors
from tests.helpers.kill_loop import LAYOUTS, KillLoop, outcome
from tests.helpers.processes import (
    RECIPE,
    REPO,
    Job,
    assert_same_curves,
    end_processes,
    environment,
    patched_recipe,
    rows_of,
    small_assets,
    start,
    untimed,
    wait_for_rows,
    write_rows,
)

LENGTHS = [100, 20, 64, 5, 70, 31, 7, 12, 1, 48]


@pytest.fixture
def place(tmp_path):
    """A folder with data; `place.start` and `place.run` a recipe on it, saved after every second step."""

    class Place:
        path, data = tmp_path, write_rows(tmp_path / "rows.jsonl", LENGTHS)
        small = small_assets(tmp_path / "model")

        def options(self, name, *options):
            others = "--model.name", "--model.flavor", "--model.hf_assets_path", "--model.converters"
            model = [] if any(option.startswith(others) for option in options) else [self.small]
            return [
                *model, f"--job.dump_folder={tmp_path / name}", "--training.dataset=jsonl", f"--training.dataset_path={self.data}",
                "--training.global_batch_size=3", "--training.steps=6", "--lr_scheduler.warmup_steps=2", "--chunkflow.chunk_size=32",
                "--optimizer.lr=3e-3", "--metrics.log_freq=1", "--metrics.no_enable_tensorboard", "--checkpoint.enable",
                "--checkpoint.interval=2", *options,
            ]  # fmt: skip

        def start(self, name, *options, recipe=RECIPE, processes=1, **environ):
            self.log = tmp_path / f"{name}.log"
            self.log.unlink(missing_ok=True)
            options = self.options(name, *options)
            return start(recipe, options, environment(tmp_path, **environ), self.log, processes)

        def run(self, name, *options, status=0, **more):
            """What the run said."""
            statuses = self.start(name, *options, **more).wait(120)
            said = self.log.read_text()
            assert set(statuses) == {status}, said[-3000:]
            return said

        def recipe(self, before_step="", before_clipping=""):
            return patched_recipe(tmp_path, before_step, before_clipping)

        def steps(self, name):
            return sorted(
                int(path.name[5:])
                for path in (tmp_path / name / "checkpoint").glob("step-*")
                if path.name[5:].isdecimal()
            )

    return Place()


# ---- exact resume


@pytest.mark.proves("one process/always/stages/stages x ranks + resume")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_resumes_are_bitwise_the_undisturbed_run(tmp_path, layout):
    """Stopped by SIGTERM or SIGUSR1, on two ranks to run_train.sh in its second life, else to one of the
    processes. On two ranks TensorBoard's curves, too; with stages three resumes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, resumed = 16, tmp_path / "run"
    data, empty = write_rows(tmp_path / "rows.jsonl", LENGTHS), tmp_path / "empty.toml"
    empty.touch()
    processes, options = LAYOUTS[layout]
    log, environ = tmp_path / "log", environment(tmp_path)
    settings = [
        small_assets(tmp_path / "model"),
        "--training.dataset=jsonl", f"--training.dataset_path={data}", "--training.global_batch_size=3", f"--training.steps={steps}",
        "--lr_scheduler.warmup_steps=2", "--chunkflow.chunk_size=32", "--metrics.log_freq=1", "--checkpoint.enable",
        "--checkpoint.interval=100", *options,
    ]  # fmt: skip
    if layout != "two ranks":  # importing TensorBoard takes as long as all the rest
        settings.append("--metrics.no_enable_tensorboard")

    def forked(folder: Path) -> Job:
        return start(RECIPE, [f"--job.dump_folder={folder}", *settings], environ, log, processes)

    def stop_scripted(rows: int) -> int:
        command = [str(REPO / "run_train.sh"), f"--job.dump_folder={resumed}", *settings]
        script = {"NGPU": str(processes), "CONFIG_FILE": str(empty), "TRAIN_FILE": str(RECIPE)}
        with open(log, "a") as output:
            job = subprocess.Popen(command, env=environ | script, stdout=output, stderr=output)
        try:
            wait_for_rows(resumed, rows, lambda: job.poll() is None)
            job.send_signal(signal.SIGUSR1)
            return job.wait(120)
        finally:
            end_processes(str(resumed))

    assert set(forked(tmp_path / "undisturbed").wait(120)) == {0}, log.read_text()[-3000:]
    for turn in range(3 if "stages" in layout else 5):  # each start trains a step at least
        rows = len(rows_of(resumed)) + 1 if turn else 1
        if turn == 1 and layout == "two ranks":
            assert stop_scripted(rows) == 75, log.read_text()[-3000:]
        else:
            job = forked(resumed)
            wait_for_rows(resumed, rows, lambda: job.poll() is None)
            os.kill(job.pids[turn % processes], (signal.SIGTERM, signal.SIGUSR1)[turn // 2 % 2])
            assert set(job.wait(120)) == {75}, log.read_text()[-3000:]
    assert len(rows_of(resumed)) < steps, "it has come to the end too soon"
    assert set(forked(resumed).wait(120)) == {0}, log.read_text()[-3000:]
    got, expected = outcome(resumed, steps), outcome(tmp_path / "undisturbed", steps)
    assert got[0] == expected[0], "rows of metrics.jsonl"
    assert got[1] == expected[1], "ledger"
    assert got[2] == expected[2], "tensors of the last checkpoint"
    if layout != "two ranks":
        return
    events = EventAccumulator(str(resumed / "tb"))
    events.Reload()
    curve = events.Scalars("loss_metrics/global_avg_loss")
    assert [event.step for event in curve] == list(range(1, steps + 1)), "no step twice, none missing"
    assert [event.value for event in curve] == pytest.approx([row["loss"] for row in got[0]])


@pytest.mark.proves("one process/always/stages/stages x ranks + resume")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_come_to_the_undisturbed_run(tmp_path, layout):
    """SIGKILL for all processes at random moments, other ones each time, saves included; the rest of 200 is
    benchmarks/kill_loop.py's."""
    kills, seed = 5 if layout == "one process" else 3, random.randrange(1 << 32)
    print(f"seed {seed}")
    loop = KillLoop(tmp_path, 9, seed)
    loop.run(layout, kills)
    assert loop.kills == kills


@pytest.mark.proves("one process/stages/never + tied + other layout")
def test_another_layout_goes_on_with_the_next_sample(place):
    """In fp64: from two ranks to one process, to stages, to other chunks; tied embeddings, which two stages
    hold."""
    tied = small_assets(place.path / "tied", model_type="qwen3", tie_word_embeddings=True)
    options = ["--training.dtype=float64", tied]
    place.run("reference", *options)
    place.run(
        "two",
        *options,
        "--training.steps=6",
        recipe=place.recipe(STOP_AT_5),
        processes=2,
        status=75,
    )
    assert place.steps("two") == [2, 4, 5]
    others = {
        "one": {},
        "other_chunks": {"more": ["--chunkflow.chunk_size=20", "--chunkflow.k=2"]},
        "stages": {"recipe": RECIPE, "processes": 2, "more": ["--parallelism.pipeline_parallel_degree=2"]},
        "three": {"processes": 3, "more": ["--parallelism.fsdp_reshard_after_forward=never"]},
    }
    for name, how in others.items():
        shutil.copytree(place.path / "two", place.path / name)
        place.run(name, *options, *how.pop("more", []), **how)
        assert_same_curves(rows_of(place.path / name), rows_of(place.path / "reference"), 1e-8, 1e-8)
    # and back from stages to one process
    shutil.rmtree(place.path / "stages" / "checkpoint" / "step-6")
    place.run("stages", *options, "--checkpoint.load_step=5")
    assert_same_curves(rows_of(place.path / "stages"), rows_of(place.path / "reference"), 1e-8, 1e-8)


STOP_AT_5 = "step == 5 and rank == 0 and os.kill(os.getpid(), signal.SIGTERM)"


def test_a_crashed_rank_starts_again_by_itself(place):
    """torchrun's restarts, from the last checkpoint, to the same curve."""
    place.run("reference", processes=2)
    crash = f"""
if step == 4 and rank == 1 and not os.path.exists('{place.path}/crashed'):
    open('{place.path}/crashed', 'w').close()
    raise RuntimeError('rank 1 stumbles once')"""
    recipe = place.recipe(crash)
    (place.path / "empty.toml").touch()
    environ = environment(
        place.path,
        NGPU="2",
        CONFIG_FILE=str(place.path / "empty.toml"),
        TRAIN_FILE=str(recipe),
        MAX_RESTARTS="1",
        LOG_RANK="0,1",
    )
    try:
        done = subprocess.run(
            [str(REPO / "run_train.sh"), *place.options("run")],
            env=environ,
            timeout=180,
            capture_output=True,
            text=True,
        )
    finally:
        end_processes(str(place.path / "run"))
    assert done.returncode == 0 and "rank 1 stumbles once" in done.stdout + done.stderr, (
        done.stdout[-3000:] + done.stderr[-3000:]
    )
    assert untimed(rows_of(place.path / "run")) == untimed(rows_of(place.path / "reference"))


def test_a_second_signal_ends_at_once_and_nothing_is_lost(place):
    place.run("reference")
    slow = place.recipe("time.sleep(30 if step == 4 else 0)")
    job = place.start("run", recipe=slow)
    wait_for_rows(place.path / "run", 3, lambda: job.poll() is None)
    begin = time.monotonic()
    job.signal(signal.SIGTERM)
    time.sleep(0.3)
    job.signal(signal.SIGTERM)
    assert job.wait(60) == [128 + signal.SIGTERM] and time.monotonic() - begin < 25, "not after its step"
    assert place.steps("run") == [2]
    place.run("run")
    assert untimed(rows_of(place.path / "run")) == untimed(rows_of(place.path / "reference"))
    without = place.start("without", "--checkpoint.no_enable", recipe=slow)
    wait_for_rows(place.path / "without", 1, lambda: without.poll() is None)
    without.signal(signal.SIGUSR1)
    assert without.wait(90) == [128 + signal.SIGTERM] and "nothing was saved" in place.log.read_text()


# ---- the keys


def test_what_is_kept_and_what_is_loaded(place):
    place.run(
        "run",
        "--checkpoint.interval=1",
        "--checkpoint.keep_latest_k=2",
        "--checkpoint.async_mode=async",
        "--debug.seed=5",
    )
    assert place.steps("run") == [5, 6]
    manifest = json.loads((place.path / "run" / "checkpoint" / "step-6" / "manifest.json").read_text())
    assert (
        manifest["format"] == 1
        and manifest["torch"].startswith("2.")
        and manifest["config"]["training.steps"] == 6
    )
    assert set(manifest["files"]) == {
        path.name for path in (place.path / "run/checkpoint/step-6").iterdir()
    } - {"manifest.json"}

    # a finished run says so; with more steps it goes on, from an earlier step if it is told to
    assert "Training is complete: step 6 is saved" in place.run("run", "--debug.seed=5")
    constant = ["--debug.seed=5", "--lr_scheduler.min_lr_factor=1.0"]
    said = place.run("run", "--training.steps=7", "--checkpoint.load_step=5", *constant)
    assert "renamed it to step-6.superseded-1" in said and "Training starts at step 6" in said
    assert [row["step"] for row in rows_of(place.path / "run")] == [1, 2, 3, 4, 5, 6, 7]
    assert place.steps("run") == [5, 6, 7] and (place.path / "run/checkpoint/step-6.superseded-1").is_dir()

    # weights alone, into another run: the first loss is that of the trained model
    first, *_ = untimed(rows_of(place.path / "run"))
    load = f"--checkpoint.initial_load_path={place.path}/run/checkpoint/step-7"
    said = place.run("changed", load, "--training.steps=1", "--debug.seed=5", "--model.rope_theta=1e6")
    assert "Loading the checkpoint from" in said, "extending a context is no other model"
    place.run("other", load, "--training.steps=2", "--debug.seed=5", "--checkpoint.last_save_model_only")
    assert rows_of(place.path / "other")[0]["loss"] < first["loss"] - 0.15
    assert "Training is complete" in place.run(
        "other", load, "--training.steps=2", "--debug.seed=5", "--checkpoint.last_save_model_only"
    )
    said = place.run("other", "--debug.seed=5", status=2)
    assert "has the model only (checkpoint.last_save_model_only)" in said and said.count("\n") == 1

    # a checkpoint becomes a Hugging Face folder, which is read as one
    convert = [
        sys.executable,
        str(REPO / "recipes" / "convert.py"),
        f"{place.path}/run/checkpoint/step-7",
        f"{place.path}/hf",
    ]
    done = subprocess.run(
        [*convert, "--dtype", "float32"],
        env=environment(place.path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "Wrote llama3" in done.stdout, done.stderr
    said = place.run("wrong", f"--checkpoint.initial_load_path={place.path}/hf", status=2)
    assert "is a Hugging Face folder: set checkpoint.initial_load_in_hf" in said
    place.run(
        "exported",
        f"--model.hf_assets_path={place.path}/hf",
        "--training.steps=2",
        "--debug.seed=5",
        "--checkpoint.last_save_in_hf",
    )
    assert [row["loss"] for row in rows_of(place.path / "exported")] == [
        row["loss"] for row in rows_of(place.path / "other")
    ]
    assert (place.path / "exported/checkpoint/step-2-hf/model.safetensors").exists()


@pytest.mark.proves("always + AdamW8bit + resume", "never + int8 + resume", "HSDP + cpu_offload + resume")
@pytest.mark.parametrize("how", ["8-bit AdamW", "int8", "HSDP, offloaded"])
def test_other_states_resume_bitwise(place, how):
    """Two ranks, stopped after step 5 of 6."""
    options = {
        "8-bit AdamW": ["--optimizer.name=AdamW8bit", "--checkpoint.async_mode=async"],
        "int8": ["--model.converters=int8", "--parallelism.fsdp_reshard_after_forward=never"],
        "HSDP, offloaded": [
            "--parallelism.data_parallel_replicate_degree=2",
            "--training.enable_cpu_offload",
        ],
    }[how]
    environ = {"TORCH_COMPILE_DISABLE": "1"}
    place.run("reference", *options, processes=2, **environ)
    place.run(
        "run",
        *options,
        recipe=place.recipe(STOP_AT_5),
        processes=2,
        status=75,
        **environ,
    )
    place.run("run", *options, processes=2, **environ)
    assert untimed(rows_of(place.path / "run")) == untimed(rows_of(place.path / "reference"))
    assert outcome(place.path / "run", 6)[2] == outcome(place.path / "reference", 6)[2]


@pytest.mark.proves(
    "HSDP + always + resume",
    "HSDP + always + LoRA + resume",
    "always + other layout",
    "one process + LoRA + other layout",
)
@pytest.mark.parametrize("what", ["all", "LoRA"])
def test_replicas_of_shards_go_on_as_such_and_as_shards_alone(place, what):
    """In fp64, two replicas of two shards, stopped after step 5 of 6: then bit for bit as such, and to rounding
    on four shards, or in one process. There the digest of the base of adapters is the same: what is replicated
    counts once."""
    options = ["--training.dtype=float64", *(["--lora.rank=2"] if what == "LoRA" else [])]
    replicas, others = (
        [*options, "--parallelism.data_parallel_replicate_degree=2"],
        1 if what == "LoRA" else 4,
    )
    place.run("reference", *replicas, processes=4)
    place.run("run", *replicas, recipe=place.recipe(STOP_AT_5), processes=4, status=75)
    shutil.copytree(place.path / "run", place.path / "others")
    place.run("others", *options, processes=others)
    assert_same_curves(rows_of(place.path / "others"), rows_of(place.path / "reference"), 1e-8, 1e-8)
    place.run("run", *replicas, processes=4)
    assert outcome(place.path / "run", 6) == outcome(place.path / "reference", 6)
    if what == "LoRA":
        manifests = [
            json.loads((place.path / name / "checkpoint/step-6/manifest.json").read_text())
            for name in ("run", "others")
        ]
        assert manifests[0]["base"] == manifests[1]["base"]


def test_excluded_state_starts_anew_once(place):
    place.run("run", "--training.steps=2")
    rows = place.data.read_text()
    write_rows(place.data, LENGTHS[::-1], seed=3)
    said = place.run("run", status=1)
    assert (
        "was trained on other data: content (digest) was" in said
        and "checkpoint.exclude_from_loading" in said
    ), said
    options = ["--checkpoint.exclude_from_loading=dataloader,optimizer"]
    place.run("run", "--training.steps=4", *options)
    assert rows_of(place.path / "run")[2]["n_tokens_seen"] > rows_of(place.path / "run")[1]["n_tokens_seen"]
    # the same command again goes on instead of beginning the data again
    place.run("run", *options)
    shutil.copytree(place.path / "run", place.path / "plain")
    shutil.rmtree(place.path / "plain/checkpoint/step-6")
    place.run("plain")
    assert untimed(rows_of(place.path / "plain")) == untimed(rows_of(place.path / "run"))
    place.data.write_text(rows)


@pytest.mark.parametrize(
    "change, status, said",
    [
        (
            ["--model.hf_assets_path={path}/qwen2"],
            2,
            "of another model: model.name was 'llama3' there and is 'qwen2' here",
        ),
        (["--model.rope_theta=1e5"], 2, "of another model: model rope_theta was 10000.0 there"),
        (["--training.dtype=float64"], 2, "of another model: training.dtype was 'float32' there"),
        (["--debug.seed=9"], 1, "other data: debug.seed was 0 there and is 9 here"),
        (["--training.no_shuffle"], 1, "other data: training.shuffle was True there"),
        (["--checkpoint.load_step=4"], 2, "no complete checkpoint of that step (there are steps 2, 3)"),
        (["--checkpoint.no_enable", "--checkpoint.load_step=2"], 2, "not read without checkpoint.enable"),
        (["--checkpoint.async_mode=async_with_pinned_mem"], 2, "needs a GPU"),
        (["--checkpoint.exclude_from_loading=lr_scheduler"], 2, "the rate follows the step"),
        (
            ["--checkpoint.initial_load_path=/none", "--checkpoint.folder=other"],
            2,
            "/none/manifest.json cannot be read",
        ),
    ],
)
def test_refusals(tmp_path_factory, finished, change, status, said):
    log = tmp_path_factory.mktemp("refusal") / "log"
    change = [option.format(path=finished.path) for option in change]
    job = start(RECIPE, [*finished.options, "--training.steps=5", *change], finished.environ, log)
    assert job.wait(60) == [status], log.read_text()
    lines = log.read_text().splitlines()
    assert said in lines[-1] and lines[-1].startswith("error: ") and (status == 1 or len(lines) == 1), (
        log.read_text()
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 3 steps that saved steps 2 and 3; its options and environment."""

    class Finished:
        path = tmp_path_factory.mktemp("finished")
        environ = environment(path)
        data = write_rows(path / "rows.jsonl", LENGTHS)
        options = [
            f"--job.dump_folder={path / 'run'}", small_assets(path / "model"), "--training.dataset=jsonl",
            f"--training.dataset_path={data}", "--training.global_batch_size=3", "--chunkflow.chunk_size=32", "--checkpoint.enable", "--checkpoint.interval=2",
            "--metrics.no_enable_tensorboard", "--metrics.log_freq=1",
        ]  # fmt: skip

    small_assets(Finished.path / "qwen2", model_type="qwen2")
    assert start(
        RECIPE, [*Finished.options, "--training.steps=3"], Finished.environ, Finished.path / "log"
    ).wait(60) == [0]
    return Finished


# ---- damage


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


class Evil:
    def __reduce__(self):
        return os.system, ("touch ${CHUNKFLOW_CACHE}/executed",)


def evil_metadata(path: Path) -> None:
    """A pickle that runs a command, with a manifest that vouches for it."""
    import pickle

    from chunkflow.storage.files import checksum

    path.write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][".metadata"] = checksum(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "flipped byte": ("__0_0.distcp", flip_a_byte, 1, "is damaged, its checksum is another"),
    "truncated": (
        "__0_0.distcp",
        lambda path: os.truncate(path, 1000),
        1,
        "has 1,000 bytes, but was written with",
    ),
    "unreadable": (
        "__0_0.distcp",
        lambda path: (path.unlink(), path.mkdir()),
        1,
        "cannot be read (Is a directory)",
    ),
    "missing": ("__0_0.distcp", lambda path: path.unlink(), 1, "cannot be read (No such file or directory)"),
    "metadata that runs code": (".metadata", evil_metadata, 1, "system has no place in it"),
    "torn manifest": ("manifest.json", lambda path: os.truncate(path, 100), 2, "is damaged"),
    "later format": (
        "manifest.json",
        lambda path: path.write_text('{"format": 99}'),
        2,
        "has format 99, but this version reads 1",
    ),
}


def test_members_of_enumerations_are_read_as_any_python_3_11_pickles_them():
    """From 3.11.0 to 3.11.3 as getattr(enumeration, name); of anything else that would run code."""

    class Pickled:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return getattr, self.arguments

    def read(*arguments):
        return tensors._Unpickler(io.BytesIO(pickle.dumps(Pickled(*arguments)))).load()

    assert read(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT") is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    with pytest.raises(pickle.UnpicklingError, match="has no place in it"):
        read(torch.Size, "numel")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_it_is_there(tmp_path, finished, damage):
    file, spoil, status, said = DAMAGES[damage]
    shutil.copytree(finished.path / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint" / "step-3"
    spoil(newest / file)
    options = [*finished.options, f"--job.dump_folder={tmp_path / 'run'}", "--training.steps=4"]
    assert start(RECIPE, options, finished.environ, tmp_path / "log").wait(60) == [status], (
        tmp_path / "log"
    ).read_text()
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: ") and said in last and str(newest) in last, last
    assert not Path(finished.environ["CHUNKFLOW_CACHE"], "executed").exists()
    shutil.rmtree(newest)  # the remedy that the sentence names
    assert start(RECIPE, options, finished.environ, tmp_path / "log").wait(60) == [0]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_newest_is_by_step_whatever_clocks_say_and_leftovers_go(tmp_path, finished):
    """Folders without a manifest are no checkpoints; times of files are not looked at; events come in
    order."""
    run = tmp_path / "run"
    shutil.copytree(finished.path / "run", run)
    place = run / "checkpoint"
    os.utime(place / "step-2", (4e9, 4e9))
    os.utime(place / "step-3", (0, 0))
    for leftover in ("step-4.saving", "step-9.saving", "step-1.removing", "step-7"):
        (place / leftover).mkdir()
    (run / "tb").mkdir()
    options = [*finished.options, f"--job.dump_folder={run}", "--metrics.enable_tensorboard"]
    for steps in (4, 5):
        assert start(
            RECIPE, [*options, f"--training.steps={steps}"], finished.environ, tmp_path / "log"
        ).wait(60) == [0]
        for path in (run / "tb").glob(
            "*tfevents*"
        ):  # the clock is set back by a century before the next start
            path.rename(path.with_name(path.name.replace(path.name.split(".")[3], "4900000000")))
    assert "Loading the checkpoint from" in (tmp_path / "log").read_text()
    assert sorted(path.name for path in place.iterdir()) == ["step-2", "step-3", "step-4", "step-5", "step-7"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert start(RECIPE, [*options, "--training.steps=6"], finished.environ, tmp_path / "log").wait(60) == [0]
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("grad_norm")] == [4, 5, 6]


def test_two_runs_never_write_one_folder(place):
    slow = place.recipe("time.sleep(30)")
    first = place.start("run", recipe=slow)
    deadline = time.monotonic() + 60
    while not place.log.exists() or "Training starts" not in place.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    said = place.run("run", status=1)
    assert "another run is writing to job.dump_folder" in said
    first.kill()
    place.run("run", "--training.steps=1")


# ---- saves that fail


def limited(when: str) -> str:
    """Files may not grow beyond 256 KiB, as on a full disk, in steps of which `when` is true."""
    # a save in the background is wholly before this, or after
    return f"""
checkpoints.saving and checkpoints.saving.exception()
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18 if {when} else most, most))"""


@pytest.mark.parametrize("mode, processes", [("disabled", 1), ("async", 2)])
def test_a_full_disk_costs_saves_but_no_training(place, mode, processes):
    options = [f"--checkpoint.async_mode={mode}"]
    place.run("reference", processes=processes)
    # for a while: the save is tried again after the next step, until it goes
    said = place.run(
        "recovers", *options, recipe=place.recipe(limited("step in (2, 3)")), processes=processes
    )
    assert "could not be saved (File too large" in said and "tried again (attempt 2 of 3)" in said
    assert max(place.steps("recovers")) == 6 and 2 not in place.steps("recovers")
    assert untimed(rows_of(place.path / "recovers")) == untimed(rows_of(place.path / "reference"))
    # for good: the run stops, with the checkpoint before it
    said = place.run(
        "stops",
        *options,
        recipe=place.recipe(limited("step > 2 and (rank == 0 or rank == ranks - 1)")),
        processes=processes,
        status=1,
    )
    assert "3 attempts in a row failed: make room or restore the folder" in said
    assert place.steps("stops") == [2] and not list((place.path / "stops/checkpoint").glob("*.saving"))
    place.run("stops", processes=processes)
    assert untimed(rows_of(place.path / "stops")) == untimed(rows_of(place.path / "reference"))


def test_a_full_disk_costs_no_row(place):
    place.run("reference")
    (place.path / "run").mkdir()
    (place.path / "run" / "metrics.jsonl").write_text(
        json.dumps({"step": 0, "long": " " * 15_000}) + "\n"
    )  # the log is shorter
    small = """
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (16_300 if step in (3, 4, 5) else most, most))"""
    copy = place.recipe(small)
    said = place.run("run", "--checkpoint.interval=100", "--metrics.enable_tensorboard", recipe=copy)
    assert (
        "metrics.jsonl could not be written (File too large)" in said
        and "TensorBoard's events could not be written" in said
    )
    assert untimed(rows_of(place.path / "run"))[1:] == untimed(rows_of(place.path / "reference"))


def test_a_folder_that_vanishes_or_becomes_a_file(place):
    vanish = place.recipe("step == 4 and shutil.rmtree(folder / 'checkpoint')")
    place.run("vanishes", recipe=vanish)
    assert place.steps("vanishes") == [4, 6]
    file = """
if step == 4:
    shutil.rmtree(folder / "checkpoint")
    (folder / "checkpoint").touch()"""
    said = place.run("file", recipe=place.recipe(file), status=1)
    assert "could not be saved (Not a directory" in said and "3 attempts in a row" in said
    assert "is not a folder: remove it" in place.run("file", status=2)


def test_a_folder_that_may_not_be_written(place):
    """Taken away in the middle of the run, from a user who is not root."""
    take = """
if step == 4:
    os.chmod(folder / "checkpoint", 0o555)
    os.geteuid() or os.seteuid(65534)"""
    said = place.run("run", recipe=place.recipe(take), status=1)
    assert "could not be saved (Permission denied" in said and "3 attempts in a row failed" in said
    assert place.steps("run") == [2] and [row["step"] for row in rows_of(place.path / "run")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    (place.path / "run" / "checkpoint").chmod(0o755)
    place.run("reference")
    place.run("run")
    assert untimed(rows_of(place.path / "run")) == untimed(rows_of(place.path / "reference"))


# ---- steps that are not sound


def test_a_bad_step_is_not_applied_and_named(place):
    poison = "step in (3, 4) and gradients[0].mul_(math.inf)"
    said = place.run(
        "run", "--checkpoint.interval=1", recipe=place.recipe(before_clipping=poison), processes=2
    )
    assert said.count("are not finite, so it was not applied (1 in a row)") == 2, "each of two ranks says so"
    assert f"(2 in a row); its sequences are {place.data}:" in said
    tensors = {step: outcome(place.path / "run", step)[2] for step in (2, 3, 4, 5)}
    assert tensors[2] == tensors[3] == tensors[4] != tensors[5]
    rows = rows_of(place.path / "run")
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, True, False, False]
    manifest = json.loads((place.path / "run/checkpoint/step-6/manifest.json").read_text())
    assert manifest["progress"] == {
        "step": 6,
        "tokens_seen": rows[-1]["n_tokens_seen"],
        "bad_steps": 2,
        "bad_steps_in_a_row": 0,
    }


def test_too_many_bad_steps_end_the_run(place):
    """With a rate that throws the model out: really infinite. The count goes on over a resume."""
    options = [
        "--optimizer.lr=1e30",
        "--lr_scheduler.warmup_steps=0",
        "--training.max_bad_steps=2",
        "--checkpoint.interval=1",
    ]
    said = place.run("run", *options, status=1)
    assert (
        "error: 2 steps in a row, up to step 3, had a loss or gradients that are not finite"
        " (training.max_bad_steps = 2)" in said
    )
    assert place.steps("run") == [1, 2]
    assert "up to step 3" in place.run("run", *options, status=1), "one more is enough"


# ---- data


def test_a_file_that_changes_during_training_is_noticed(place):
    append = f"step == 3 and open('{place.data}', 'a').write('x')"
    said = place.run("run", recipe=place.recipe(append))
    assert said.count(f"{place.data} changed since this run read it") == 2, "at the saves after steps 4 and 6"
    said = place.run("run", "--training.steps=8", status=1)
    assert f"error: {place.data}:{len(LENGTHS) + 1}: not valid JSON" in said
    place.data.write_text(place.data.read_text()[:-1] + '{"input_ids": [1, 2, 3]}\n')
    said = place.run("run", "--training.steps=8", status=1)
    assert "was trained on other data: content (digest)" in said


# ---- a long run


def test_a_thousand_steps_do_not_grow(tmp_path):
    """Memory, file descriptors and threads stay as they are; the token ledger balances to the token."""
    data = write_rows(tmp_path / "rows.jsonl", [9, 40, 3, 17, 1, 5, 28, 60])
    options = [
        f"--job.dump_folder={tmp_path / 'run'}", small_assets(tmp_path / "model", num_hidden_layers=1), "--training.dataset=jsonl",
        f"--training.dataset_path={data}", "--training.seq_len=30", "--training.overlong=truncate", "--training.steps=1000",
        "--training.global_batch_size=3", "--chunkflow.chunk_size=24", "--metrics.log_freq=25", "--checkpoint.enable",
        "--checkpoint.interval=50", "--checkpoint.keep_latest_k=2", "--checkpoint.async_mode=async",
    ]  # fmt: skip
    job = start(RECIPE, options, environment(tmp_path), tmp_path / "log")
    (process,) = (Path(f"/proc/{pid}") for pid in job.pids)
    figures = {}
    for rows in (11, 21, 31, 40):  # of 25 steps each
        deadline = time.monotonic() + 180
        while not (tmp_path / "run/metrics.jsonl").exists() or len(rows_of(tmp_path / "run")) < rows:
            assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.05)
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        memory, threads = int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
        figures[rows] = memory, len(list((process / "fd").iterdir())), threads
    assert job.wait(60) == [0], (tmp_path / "log").read_text()[-2000:]
    assert figures[40][0] < figures[11][0] + 8, f"MiB, descriptors, threads: {figures}"
    assert figures[40][1] <= figures[11][1] + 2 and figures[40][2] <= figures[11][2] + 2, figures
    ledger = json.loads((tmp_path / "run/checkpoint/step-1000/manifest.json").read_text())["ledger"]
    assert ledger["read"] == ledger["trained"] + ledger["masked"] + ledger["truncated"] + ledger["dropped"]
    passes, rest = divmod(3 * 1000, 8)
    assert rest == 0 and ledger["read"] == passes * 163 and ledger["truncated"] == passes * (10 + 30)
