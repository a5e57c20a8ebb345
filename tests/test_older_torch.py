"""Training in one process, and generating, on machines whose torch is 2.11 and cannot be replaced."""

import ast
import subprocess
import sys

import pytest
import torch

from chunkflow.settings.config import ConfigError, load_config
from chunkflow.training import build
from tests.helpers.processes import REPO, environment, rows_of, small_assets, write_rows

# What is there in 2.13 and was not in 2.11, by the name of its owner: torch's own code may use it.
NEWER = {
    "torch.distributed": ("all_gather_single", "reduce_scatter_single", "gather_single"),
    "torch.distributed.fsdp.FSDPModule": (
        "reset_iter_state", "set_reduce_scatter_max_input_buffers", "set_reduce_scatter_unused_params", "set_separate_reduce_scatter_group",
    ),
}  # fmt: skip
ELSEWHERE = (
    "torch.distributed.pipelining",
    "torchao",
    "safetensors",
    "tokenizers",
    "matplotlib",
    "torch.utils.tensorboard",
)

AS_ON_2_11 = """
import importlib.abc, operator, runpy, sys
import torch.distributed.fsdp

NEWER, ELSEWHERE, REPO = {newer!r}, {elsewhere!r}, {repo!r}


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ELSEWHERE:
            raise AssertionError(f"{{name}} is imported")


def refused(name, function):
    def call(*arguments, **options):
        assert not sys._getframe(1).f_code.co_filename.startswith(REPO), f"{{name}} is not in torch 2.11"
        return function(*arguments, **options)
    return call


sys.meta_path.insert(0, Refuse())
assert not set(ELSEWHERE) & set(sys.modules)
for owner, names in NEWER.items():
    owner = operator.attrgetter(owner.removeprefix("torch."))(torch)
    for name in names:
        if hasattr(owner, name):
            setattr(owner, name, refused(name, getattr(owner, name)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def run(tmp_path):
    preamble = tmp_path / "as_on_2_11.py"
    preamble.write_text(AS_ON_2_11.format(newer=NEWER, elsewhere=ELSEWHERE, repo=str(REPO)))

    def call(recipe: str, *options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(preamble), str(REPO / "recipes" / recipe), *options]
        return subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=120)

    return call


def test_one_process_trains_saves_goes_on_and_generates(tmp_path, run):
    data, folder = write_rows(tmp_path / "rows.jsonl", [100, 20, 64, 5, 70]), tmp_path / "run"
    options = [
        small_assets(tmp_path / "model"), f"--job.dump_folder={folder}", "--training.dataset=jsonl",
        f"--training.dataset_path={data}", "--training.global_batch_size=3", "--chunkflow.chunk_size=32", "--metrics.log_freq=1",
        "--metrics.no_enable_tensorboard", "--checkpoint.enable", "--checkpoint.async_mode=async",
    ]  # fmt: skip
    for steps in (2, 3):
        done = run("finetune.py", *options, f"--training.steps={steps}")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3]
    shipped = str(REPO / "chunkflow" / "data" / "python_2048.model")
    done = run(
        "generate.py", options[0], f"--model.tokenizer_path={shipped}", "--checkpoint", str(folder / "checkpoint" / "step-3"),
        "--prompt", "def a():", "--max-new-tokens=4",
    )  # fmt: skip
    assert done.returncode == 0 and "4 written" in done.stderr, done.stderr[-2000:]


def test_the_guard_finds_what_it_guards_against(tmp_path, run):
    recipe = tmp_path / "uses.py"
    recipe.write_text(f"""
import torch
for use in ("import torch.distributed.pipelining", "torch.distributed.all_gather_single()"):
    try:
        exec(compile(use, {str(REPO / "recipes" / "a.py")!r}, "exec"))
    except AssertionError as error:
        print(error)
""")
    done = run(str(recipe))
    expected = ["torch.distributed.pipelining is imported", "all_gather_single is not in torch 2.11"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_only_validation_and_stages_name_what_is_newer():
    """A file names it by an attribute; the way of one process has no such file."""
    names = {name for owned in NEWER.values() for name in owned}
    allowed = {"chunkflow/training/validation.py", "chunkflow/training/preference.py"}
    allowed.add("chunkflow/execution/pipeline_stage.py")
    for room in ("chunkflow", "models", "recipes"):
        for path in (REPO / room).rglob("*.py"):
            used = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert not used & names or str(path.relative_to(REPO)) in allowed, f"{path}: {used & names}"


@pytest.mark.parametrize("option", ["--validation.enable", "--parallelism.pipeline_parallel_degree=2"])
def test_what_needs_a_newer_torch_is_refused_before_anything_starts(monkeypatch, option):
    settings = ["--validation.dataset=synthetic", option]
    build.check(load_config(settings))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(
        ConfigError, match=rf"{option[2:].split('=')[0]} needs torch 2.13, but this is 2.11.0\+cu130"
    ):
        build.check(load_config(settings))
    build.check(load_config(settings[:1]))
