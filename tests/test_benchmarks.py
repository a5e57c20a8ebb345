"""Every benchmark runs, with tiny sizes: what it prints is not judged here."""

import shlex
import subprocess
import sys

import pytest

from tests.helpers.processes import REPO, environment

SMALL = "--dim 128 --layers 1 --vocab 256 --sequences 3 --runs 1"
ROWS = "'transformers, padded batches of 4' 'transformers, FSDP2, 2 ranks' 'ChunkFlow, 2 ranks' 'ChunkFlow, 2 stages'"
COMMANDS = {
    "attention": "attention.py --tokens 64 --chunk-sizes 16 --runs 1",
    "data_parallel": "data_parallel.py --steps 1",
    "data_parallel measured": "data_parallel.py --measure --runs 1 --sequences 4 --longest 200",
    "gpu": "gpu.py --cpu --only 1 4 7",
    "gpu's parts": "gpu_kernels.py attention --cpu --one",
    "gpu's model": "gpu_kernels.py model --cpu",
    "kill_loop": "kill_loop.py --kills 1 --steps 4 --layouts 'one process'",
    "pipeline simulated": "pipeline.py --train-steps 0 --steps 1 --stages 4",
    "pipeline measured": "pipeline.py --steps 0 --train-steps 2 --seq-len 64 --sequences 2 --kinds 'whole sequences'",
    "step": f"step.py {SMALL} --longest 128 --chunk-size 64",
    "step in fp32": f"step.py {SMALL} --longest 64 --precision float32 --cpu-time",
    "step's memory": "step.py --memory --memory-lengths 64 --chunk-size 512",
    "versus": f"versus.py --quick --precision float32 --threads 1 --markdown --rows {ROWS}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_benchmark(name, tmp_path):
    script, *options = shlex.split(COMMANDS[name])
    command = [sys.executable, str(REPO / "benchmarks" / script), *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stdout + done.stderr


def test_no_benchmark_is_left_out():
    scripts = {path.name for path in (REPO / "benchmarks").glob("*.py")}
    assert scripts == {command.split()[0] for command in COMMANDS.values()}
