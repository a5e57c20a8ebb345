"""Every preset in train_configs/: at its full size and number of ranks on the fake backend; its comment is
what plan.py prints."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from chunkflow.settings.config import load_config
from recipes import plan
from tests.helpers.processes import REPO, environment, run, write_rows

PRESETS = {
    path.stem: path
    for path in sorted((REPO / "train_configs").glob("*.toml"))
    if not path.stem.startswith("debug_")
}
GIB_OF_AN_80_GB_GPU = 79.2
every_preset = pytest.mark.parametrize("name", PRESETS)


def comment(name) -> tuple[dict[str, str], list[str], str]:
    """Of a preset's first comment: the environment and arguments of its command, and what it is said to
    print."""
    lines = [line[2:] for line in PRESETS[name].read_text().split("\n\n[job]")[0].rstrip().split("\n")]
    first = next(number for number, line in enumerate(lines) if "recipes/plan.py" in line)
    words = shlex.split(lines[first].rstrip("\\") + lines[first + 1])
    ranks = words.pop(0).split("=")
    assert words[:2] == ["python", "recipes/plan.py"] and ranks[0] == "NGPU"
    return dict([ranks]), words[2:], "\n".join(lines[first + 3 :])


def test_there_are_presets():
    assert set(PRESETS) == {
        "qwen2_5_7b_32k",
        "qwen2_5_7b_256k",
        "qwen2_5_72b_256k",
        "llama3_8b_64k",
        "llama3_1_8b_128k",
        "llama3_1_8b_128k_pipeline",
        "llama3_1_8b_256k",
        "llama3_1_8b_dpo_64k",
        "qwen3_8b_64k",
        "qwen3_8b_lora_64k",
        "qwen3_8b_128k",
        "qwen3_8b_256k",
        "qwen3_32b_128k",
    }


@every_preset
def test_the_comment_is_what_plan_prints(name, monkeypatch, capsys):
    environ, arguments, printed = comment(name)
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("NGPU", environ["NGPU"])
    plan.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert plan.table(report).split("\n") == printed.split("\n")
    config = load_config(["--job.config_file", str(PRESETS[name])])
    assert (
        report["longest_sequence"]["longest"] == config.training.seq_len
    )  # the longest that the preset admits
    for memory in (report["memory"], report["memory_longest_sequence"]):
        assert sum(memory["parts_gib"].values()) == pytest.approx(memory["total_gib"])
        assert memory["total_gib"] == max(memory["pipeline_ranks_gib"])
        spare = GIB_OF_AN_80_GB_GPU - memory["total_gib"] - memory["cuda_gib"]
        assert spare >= 6, "for what the allocator cannot use again"
    assert report["mean"]["imbalance_percent"] <= 5
    assert (
        sum(report["stage_layers"])
        == {"7B": 28, "32B": 64, "72B": 80, "8B": 32 if "llama" in name else 36}[config.model.flavor]
    )


# One of each family and kind; the others differ from them in sizes.
FULL_SIZE = ("llama3_1_8b_128k_pipeline", "qwen3_8b_256k", "qwen2_5_72b_256k")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_fake_backend_runs_it_at_full_size(name, tmp_path):
    """As its users will run it, but for the data: a sequence of k + 1 chunks, so that one is recomputed, and
    short ones."""
    config = load_config(["--job.config_file", str(PRESETS[name])])
    assert config.training.dataset == "jsonl"
    data = write_rows(
        tmp_path / "rows.jsonl", [config.chunkflow.k * config.chunkflow.chunk_size + 100, 300, 200, 100]
    )
    options = [
        f"--training.dataset_path={data}",
        "--training.global_batch_size=4",
        f"--job.config_file={PRESETS[name]}",
        f"--job.dump_folder={tmp_path / 'run'}",
        "--comm.mode=fake_backend",
        "--optimizer.name=AdamW",  # the 8-bit one reads its tensors, which have no content here
    ]
    environ, _, _ = comment(name)
    done = run(tmp_path, *options, **environ)
    said = f"Rank 0 of {environ['NGPU']} can run this step"
    assert done.returncode == 0 and said in done.stdout, done.stdout[-3000:]


@every_preset
def test_its_comment_says_how_to_start_it(name):
    environ, _, _ = comment(name)
    first = PRESETS[name].read_text().split("\n")[1]
    started = dict(re.findall(r"(\w+)=(\S+)", first))
    assert int(started["NGPU"]) * int(started.get("NNODES", 1)) == int(environ["NGPU"])
    assert started["CONFIG_FILE"] == f"train_configs/{name}.toml"
    assert started.get("TRAIN_FILE") == ("recipes/dpo.py" if "dpo" in name else None)


def test_plan_as_a_command(tmp_path, monkeypatch, capsys):
    options = [
        "--training.dataset=synthetic",
        "--training.overlong=drop",
        "--chunkflow.no_enable",
        "--training.enable_cpu_offload",
    ]
    done = subprocess.run(
        [sys.executable, str(REPO / "recipes" / "plan.py"), "--steps=1", *options],
        cwd=tmp_path, env=environment(tmp_path, NGPU="2"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "whole sequences" in done.stdout and "in host memory" in done.stdout, (
        done.stderr
    )
    assert not list(tmp_path.glob("outputs*")), "nothing is left behind"
    monkeypatch.setenv("NGPU", "2")
    for wrong, said in (
        (["--steps=0"], "error: --steps = 0 is not a whole number"),
        (["--steps"], "is not a whole number"),
        (["--training.stepz=1"], "did you mean --training.steps?"),
        (["--parallelism.pipeline_parallel_degree=3"], "the number of processes"),
        (
            ["--parallelism.pipeline_parallel_degree=2", "--parallelism.fsdp_reshard_after_forward=always"],
            '"default" or "never"',
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            plan.main([*options, *wrong])
        text = capsys.readouterr().err
        assert stopped.value.code == 2 and said in text and text.count("\n") == 1, text
