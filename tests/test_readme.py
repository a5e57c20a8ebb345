"""The commands of README.md and docs/ do what is written there, in a checkout with a tiny model and little data."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from chunkflow.data.tokenizer import Tokenizer
from tests.helpers.documents import commands_of, pages
from tests.helpers.hugging_face import CHATML, raw_tokenizer, theirs
from tests.helpers.processes import REPO, end_processes, environment, start, write_rows

ONE_STEP = (
    "--training.steps=1 --training.seq_len=256 --training.global_batch_size=2 --metrics.no_enable_tensorboard"
)
MINUTES = "takes minutes; tests/test_benchmarks.py runs it with tiny sizes"
SIMULATE = "python -m chunkflow.planning.simulate --stages 4 --lengths 1,1,2,4 --chunk-size 2 --k 2"
PIPELINE = "CONFIG_FILE=train_configs/debug_pipeline.toml ./run_train.sh"

# Command -> what is added to it here, so that it takes little time.
RUN = {
    "./run_train.sh": ONE_STEP,
    "NGPU=2 ./run_train.sh --training.dataset=jsonl --training.dataset_path=my_rows.jsonl --training.seq_len=8192": "--training.steps=1",
    "./run_train.sh --training.dataset=parquet --training.dataset_path=data/alpaca --training.steps=20": "--training.steps=1",
    "python recipes/needle.py --model.hf_assets_path=my_model --chat --lengths 4096,16384": "--lengths=512 --depths=50 --trials=1 --metrics.no_enable_tensorboard",
    "python recipes/preview.py --model.tokenizer_path=my_model --training.dataset=jsonl --training.dataset_path=my_rows.jsonl --training.global_batch_size=2": "",
    "CONFIG_FILE=train_configs/debug_model.toml ./run_train.sh --training.steps=20 --chunkflow.k=2": ONE_STEP,
    PIPELINE: ONE_STEP,
    "TRAIN_FILE=my_recipe.py ./run_train.sh": ONE_STEP,
    "./run_train.sh --chunkflow.no_enable --job.dump_folder=outputs_whole": ONE_STEP,
    "./run_train.sh --check": "",
    "./run_train.sh --help": "",
    "./run_train.sh --checkpoint.enable --checkpoint.interval=50": ONE_STEP,
    "./run_train.sh --validation.enable --validation.dataset=jsonl --validation.dataset_path=valid.jsonl --validation.freq=50": ONE_STEP,
    "NGPU=8 python recipes/plan.py --job.config_file train_configs/qwen2_5_7b_256k.toml --training.dataset=synthetic --training.dataset_path=lmsys --training.overlong=truncate": "--steps=1",
    "python recipes/convert.py outputs/checkpoint/step-100 my_model --dtype bfloat16": "",
    "python recipes/preview.py --job.config_file my.toml": "",
    "COMM_MODE=fake_backend NGPU=64 ./run_train.sh": "--training.seq_len=256",
    SIMULATE: "",
    "python -m chunkflow.settings.keys > docs/configuration.md": "",
    "MAX_RESTARTS=3 ./run_train.sh": "--check",
    'NGPU=2 CUDA_VISIBLE_DEVICES="" ./run_train.sh': "--check",
    "./run_train.sh --model.converters=int8": "--check",
    "./run_train.sh --model.converters=float8 --quantize.linear.float8.emulate": "--check",
    "./run_train.sh --optimizer.name=AdamW8bit": "--check",
}
# Commands of a block run together, as they stand; the tests are named here.
BLOCKS = {"## Your own model": "test_your_own_model"}
NOT_RUN = {
    **dict.fromkeys(
        [
            "python benchmarks/attention.py",
            "python benchmarks/step.py --memory",
            "python benchmarks/step.py --runs 2",
            "python benchmarks/step.py --dim 256 --layers 4 --vocab 2048 --precision float32",
            "python benchmarks/data_parallel.py --steps 8",
            "python benchmarks/data_parallel.py --measure --runs 2 --sequences 12",
            "python benchmarks/pipeline.py --steps 0 --train-steps 3 --seq-len 8192",
            "python benchmarks/pipeline.py --train-steps 0 --steps 6",
            "python benchmarks/kill_loop.py --kills 200",
            "python benchmarks/versus.py --runs 1",
            "python benchmarks/planner.py --quick",
            "python benchmarks/gpu.py",
            "python benchmarks/paper.py --picture docs/pictures/paper.png",
            "python benchmarks/paper.py --checks",
            "python benchmarks/paper.py --sensitivity --batches 4",
            "python benchmarks/paper.py --setups 1 --replicas 8",
        ],
        MINUTES,
    ),
    "NGPU=8 python -m chunkflow.settings.from_torchtitan their.toml > mine.toml": "test_from_torchtitan.py has such files",
    "./run_tests.sh": "runs this",
    "./run_tests.sh -m quick": "runs a part of this",
    "./run_tests.sh tests/test_converters.py": "is a test",
    "./run_tests.sh tests/test_checkpoint.py": "is a test",
    "./run_tests.sh tests/test_cuda_attention.py tests/test_cuda_counts.py": "are tests",
    "NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 ./run_train.sh": "needs two machines; test_scripts.py has two launchers",
    "tensorboard --logdir .": "serves until it is stopped; test_dashboard.py does the same in a browser",
    "TRAIN_FILE=recipes/dpo.py ./run_train.sh --training.dataset=jsonl --training.dataset_path=pairs.jsonl": "test_dpo_recipe.py has such rows",
    "python recipes/convert.py outputs/checkpoint/step-30-hf whole --merge": "test_adapters.py has such a folder",
    "sbatch train_configs/multinode.slurm": "needs SLURM",
}


def documents() -> dict[str, str]:
    return {str(path.relative_to(REPO)): path.read_text() for path in pages()}


def block_after(heading: str) -> str:
    section = documents()["README.md"].partition(f"{heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return block


def test_every_command_is_run_or_has_a_reason_not_to():
    """Of the README; test_docs.py looks at those of docs/, which run here where they are in RUN."""
    known = RUN.keys() | NOT_RUN.keys()
    for heading in BLOCKS:
        known = known | set(commands_of(f"```bash\n{block_after(heading)}```"))
    for command in commands_of(documents()["README.md"]):
        if command.startswith("hf download "):
            continue  # needs the network; test_docs_data.py compares them with the configs
        assert command in known, f"{command}: say in RUN or NOT_RUN what its test is"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This repository by links; a model, rows, a recipe and a config of the names that the README
    uses."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        if (REPO / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(REPO / name)
    (folder / "my_recipe.py").write_text((REPO / "recipes" / "finetune.py").read_text())
    (folder / "my.toml").write_text((REPO / "train_configs" / "debug_model.toml").read_text())
    write_rows(folder / "valid.jsonl", [20, 30, 200])
    with open(folder / "my_rows.jsonl", "w") as rows:
        for length in (1, 2, 3, 1, 40, 2, 1, 200):
            messages = [
                {"role": "user", "content": "What is a chunk?"},
                {"role": "assistant", "content": "A part. " * length},
            ]
            rows.write(json.dumps({"messages": messages}) + "\n")
    (folder / "data/alpaca/data").mkdir(parents=True)
    alpaca = {"instruction": "Add the numbers.", "input": "1, 2", "output": "3", "text": "Below is"}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([alpaca] * 40), folder / "data/alpaca/data/train-00000-of-00001.parquet"
    )
    model = folder / "my_model"
    model.mkdir()
    tokenizer = raw_tokenizer("bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [])
    tokenizer.save(str(model / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "chat_template": CHATML}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = Tokenizer(str(model)).vocab_size
    theirs("qwen2", vocab_size=vocabulary, max_position_embeddings=4096).save_pretrained(model)
    return folder


@pytest.mark.parametrize("command", sorted(RUN.keys() & set(commands_of("\n".join(documents().values())))))
def test_command(checkout, tmp_path, command):
    """Through recipes in forks, with the arguments that run_train.sh gives them; tests/test_scripts.py has what
    run_train.sh does besides."""
    words = shlex.split(f"{command} {RUN[command]}")
    environ = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *arguments = words[len(environ) :]
    processes = 1
    if program == "./run_train.sh":
        config = environ.get("CONFIG_FILE", "train_configs/debug_model.toml")
        dump = [] if "--help" in arguments else [f"--job.dump_folder={tmp_path / 'outputs'}"]
        arguments = ["--job.config_file", config, *arguments, *dump]
        recipe = environ.get("TRAIN_FILE", "recipes/finetune.py")
        if "COMM_MODE" in environ:
            arguments += [f"--comm.mode={environ['COMM_MODE']}", "--training.steps=1"]
        elif not {"--check", "--help"} & set(arguments):
            processes = int(environ.get("NGPU", 2 if "pipeline" in config else 1))
    elif arguments[0] == "-m":
        done = subprocess.run(
            [sys.executable, *arguments], cwd=REPO, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stdout, done.stderr
        return
    else:
        recipe, *arguments = arguments
    if recipe.endswith("convert.py"):
        arguments = convert_arguments(checkout, tmp_path, arguments)
    environ = environment(checkout, **environ)
    job = start(checkout / recipe, arguments, environ, tmp_path / "log", processes, folder=checkout)
    statuses = job.wait(240)
    assert set(statuses) == {0}, (tmp_path / "log").read_text()[-3000:]
    said = (tmp_path / "log").read_text()
    trains = program == "./run_train.sh" and not {"--check", "--help"} & set(arguments)
    if trains and "COMM_MODE" not in environ:
        assert "Training completed" in said and (tmp_path / "outputs" / "metrics.jsonl").exists(), said
    elif "--check" not in arguments:
        assert said.strip()


def convert_arguments(checkout: Path, tmp_path: Path, arguments: list[str]) -> list[str]:
    """The checkpoint and the folder that the command names are those of a short run."""
    options = (
        f"--job.config_file my.toml {ONE_STEP} --checkpoint.enable --job.dump_folder={tmp_path / 'saved'}"
    )
    log = tmp_path / "saved.log"
    job = start(
        checkout / "recipes/finetune.py", shlex.split(options), environment(checkout), log, folder=checkout
    )
    assert job.wait(120) == [0], log.read_text()[-3000:]
    assert arguments[:2] == ["outputs/checkpoint/step-100", "my_model"]
    return [str(tmp_path / "saved/checkpoint/step-1"), str(tmp_path / "converted"), *arguments[2:]]


def test_your_own_model(checkout):
    """From a folder and a JSONL to a folder that answers, as the README has it, by run_train.sh."""
    commands = block_after("## Your own model")
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    before = transformers.AutoModelForCausalLM.from_pretrained(checkout / "my_model")
    try:
        done = subprocess.run(
            ["bash", "-e", "-c", commands],
            cwd=checkout, env=environment(checkout, PATH=path), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    finally:
        end_processes(str(checkout))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer = done.stdout.partition("Training completed\n")[2]
    assert len(answer.strip()) > 10, done.stdout
    outputs = checkout / "outputs"
    losses = [json.loads(line)["loss"] for line in (outputs / "metrics.jsonl").read_text().splitlines()]
    assert f"--training.steps={len(losses)}" in commands and sum(losses[-4:]) < sum(losses[:4])
    (saved,) = (outputs / "checkpoint").glob("step-*-hf")
    after = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert after.dtype == torch.bfloat16 and saved.name in commands
    moved = (after.lm_head.weight.float() - before.lm_head.weight.bfloat16().float()).abs().max()
    assert 0 < moved < 0.1
    assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == CHATML
