"""run_train.sh and run_tests.sh: which arguments, files and exit statuses go through them, and which Python
they find."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RECIPE = """
import json, os, sys
import chunkflow
from chunkflow.training.start import main_config

config = main_config()
rank = os.environ.get("RANK", "")
names = ("RANK", "WORLD_SIZE", "NGPU", "OMP_NUM_THREADS")
seen = {name: os.environ.get(name) for name in names}
seen.update(argv=sys.argv[1:], description=config.job.description, package=chunkflow.__file__, folder=os.getcwd())
with open(f"seen{rank}.json", "w") as file:
    json.dump(seen, file)
print(f"recipe ran on rank {rank}")
sys.exit(3 if config.job.description == "fails" else 0)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Somewhere else than the repository, its name unfriendly to sloppy quoting."""
    place = tmp_path / "some where"
    place.mkdir()
    (place / "my recipe.py").write_text(RECIPE)
    (place / "my config.toml").write_text('[job]\ndescription = "from my config"\n')
    return place


def environment(**more: str) -> dict[str, str]:
    """Only what matters: the tests may themselves run under torchrun's or a user's variables."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return {**kept, "PATH": path, "PIP_NO_INDEX": "1", "NGPU": "1", "TRAIN_FILE": "my recipe.py", **more}


def train(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "run_train.sh"), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def seen(folder: Path, rank: str = "") -> dict:
    return json.loads((folder / f"seen{rank}.json").read_text())


def test_two_ranks_get_the_arguments_as_they_were_given(folder):
    description = """two  words, 'quotes', "more", $HOME `id` * \\ é"""
    run = train(folder, "--job.description", description, "--optimizer.lr=-0.0", NGPU="2", LOG_RANK="1")
    assert run.returncode == 0, run.stderr
    for rank in "01":
        there = seen(folder, rank)
        assert there["argv"][2:] == ["--job.description", description, "--optimizer.lr=-0.0"]
        assert there["description"] == description
        assert (there["RANK"], there["WORLD_SIZE"], there["NGPU"]) == (rank, "2", "2")
        assert there["package"] == str(ROOT / "chunkflow" / "__init__.py")
        assert there["folder"] == str(folder)
    assert "[rank1]:recipe ran on rank 1" in run.stdout and "rank 0" not in run.stdout


def test_a_failing_recipe_fails_the_script(folder):
    run = train(folder, "--job.description=fails")
    assert run.returncode not in (0, 2)
    assert "[rank0]:recipe ran" in run.stdout and "ChildFailedError" in run.stderr, "torchrun's report"


def test_a_sentence_of_any_rank_is_all_that_is_said(folder):
    """Rank 0 waits for another that has found something wrong: no traceback, and the sentence once."""
    (folder / "my recipe.py").write_text(
        """
import os, time
from chunkflow.training.start import main_config, user_errors

main_config()
with user_errors():
    if os.environ["RANK"] == "1":
        raise ValueError("data.jsonl:3: text is 3: it must be a string")
time.sleep(5)
"""
    )
    run = train(folder, NGPU="2")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: data.jsonl:3: text is 3: it must be a string\n"


@pytest.mark.parametrize(
    "arguments, more, sentence",
    [
        (["--training.stepz=3"], {}, "error: unknown key --training.stepz: did you mean --training.steps?"),
        (
            ["--training.steps=0"],
            {},
            "error: training.steps = 0 is out of range: choose a value of at least 1",
        ),
        (
            [],
            {"CONFIG_FILE": "none.toml"},
            'error: job.config_file = "none.toml" cannot be read (No such file or directory)',
        ),
        ([], {"TRAIN_FILE": "none.py"}, "error: TRAIN_FILE = none.py does not exist: name a recipe"),
        ([], {"NGPU": "two"}, "error: NGPU = two in the environment is not a whole number"),
        ([], {"NNODES": "2"}, "error: NNODES = 2 needs RDZV_ENDPOINT"),
        ([], {"COMM_MODE": "local_tensor"}, 'error: comm.mode = "local_tensor" is not there'),
        (
            ["--parallelism.data_parallel_shard_degree=2"],
            {"NGPU": "3"},
            "error: parallelism.data_parallel_replicate_degree = 1 x",
        ),
        (["--training.dataset=jsonl", "--training.dataset_path=none.jsonl"], {}, "error: none.jsonl: "),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2_before_any_process(folder, arguments, more, sentence):
    run = train(folder, *arguments, **more)
    assert run.returncode == 2
    assert run.stderr.startswith(sentence) and run.stderr.count("\n") == 1
    assert run.stdout == ""
    assert not list(folder.glob("seen*"))


def test_check_and_help_start_nothing(folder):
    run = train(folder, "--check")
    assert (run.returncode, run.stderr, run.stdout) == (0, "", "config and paths are good\n")
    run = train(folder, "--help")
    assert (run.returncode, run.stderr) == (0, "") and "--training.steps (100)" in run.stdout
    assert not list(folder.glob("seen*"))


def test_the_fake_backend_is_one_process_for_many(folder):
    run = train(
        folder,
        "--parallelism.data_parallel_shard_degree=32",
        "--training.steps=9",
        COMM_MODE="fake_backend",
        NGPU="32",
    )
    assert run.returncode == 0, run.stderr
    assert seen(folder)["argv"][-2:] == ["--comm.mode=fake_backend", "--training.steps=1"]
    assert (seen(folder)["RANK"], seen(folder)["NGPU"]) == (None, "32")


def test_files_are_looked_for_at_the_caller_first_and_then_in_the_repository(folder):
    fake = {"COMM_MODE": "fake_backend"}
    assert train(folder, CONFIG_FILE="my config.toml", **fake).returncode == 0
    assert seen(folder)["description"] == "from my config"
    assert train(folder, CONFIG_FILE="train_configs/debug_model.toml", **fake).returncode == 0
    assert seen(folder)["argv"][1] == str(ROOT / "train_configs" / "debug_model.toml")
    (folder / "train_configs").mkdir()
    shutil.copy(folder / "my config.toml", folder / "train_configs" / "debug_model.toml")
    assert train(folder, **fake).returncode == 0
    assert seen(folder)["description"] == "from my config"
    run = train(folder, "--check", TRAIN_FILE="recipes/finetune.py", CONFIG_FILE="my config.toml")
    assert run.returncode == 0, run.stderr


def test_two_machines_meet(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    places = [folder / "first", folder / "second"]
    for place in places:
        place.mkdir()
    recipe = str(folder / "my recipe.py")
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(
                train, place, TRAIN_FILE=recipe, NNODES="2", NODE_RANK=str(node), RDZV_ENDPOINT=endpoint
            )
            for node, place in enumerate(places)
        ]
    assert [run.result().returncode for run in runs] == [0, 0], runs[0].result().stderr
    assert sorted(file.name for place in places for file in place.glob("seen*")) == [
        "seen0.json",
        "seen1.json",
    ]


def test_gpus_that_torch_cannot_see_end_the_script_unless_the_cpu_is_asked_for(folder):
    """A driver too old for this torch, or a torch for the CPU."""
    programs = folder / "programs"
    programs.mkdir()
    nvidia = programs / "nvidia-smi"
    nvidia.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'; echo 'GPU 1: H100 (UUID: GPU-2)'\n")
    nvidia.chmod(0o755)
    path, hidden = f"{programs}:{environment()['PATH']}", {"CUDA_VISIBLE_DEVICES": ""}
    for more in ({}, {"NGPU": "", **hidden}):
        run = train(folder, PATH=path, **more)
        assert run.returncode == 2 and not list(folder.glob("seen*")), (more, run.stdout)
        assert run.stderr.startswith("error: nvidia-smi lists 2 GPUs and torch 2.13.0"), run.stderr
        assert run.stderr.count("\n") == 1 and ("hides them" in run.stderr) == ("NGPU" in more)
    assert train(folder, PATH=path, **hidden).returncode == 0
    assert seen(folder, "0")["WORLD_SIZE"] == "1"
    assert train(folder, PATH=path, COMM_MODE="fake_backend").returncode == 0, "checks a layout anywhere"
    nvidia.write_text("#!/bin/sh\necho 'No devices found'; exit 6\n")
    assert train(folder, PATH=path).returncode == 0


RESTARTED = """
import os, sys
import torch.distributed as dist
from chunkflow.training.start import main_config

main_config()
store, rank, ranks = next(dist.rendezvous("env://"))
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
with open("attempts", "a") as file:
    file.write(f"{attempt} {store.check(['exception_dump'])}\\n")
store.set("exception_dump", "of NCCL's watchdog")
sys.exit(attempt == "0")
"""


def test_a_restart_gets_a_store_without_the_failure_of_the_last_attempt(folder):
    """NCCL's watchdog leaves the key in the store itself, below any prefix, and ends a process that finds it."""
    (folder / "my recipe.py").write_text(RESTARTED)
    run = train(folder, MAX_RESTARTS="1")
    assert run.returncode == 0, run.stderr
    assert (folder / "attempts").read_text() == "0 False\n1 False\n"


# --- Which Python. In a copy of the scripts, with stand-ins for interpreters that write down what they are
# asked to do.

BARE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*) exit 0 ;;
    "-m venv") echo "$@" >>"$LOG"; mkdir -p "$4/bin"; rm -f "$4/.installing" "$4/installed"; cp "$VENV_PYTHON" "$4/bin/python" ;;
    *) exit 1 ;;
esac
"""
VENV_PYTHON = """#!/bin/bash
venv=$(dirname "$(dirname "$0")")
case "$*" in
    "- "*) [ -e "$venv/installed" ] && [ ! -e "$venv/.installing" ] && echo "$0" ;;
    "-m pip --version") exit 0 ;;
    "-m pip install"*--dry-run) exit ${DRY_STATUS:-0} ;;
    "-m pip install"*) echo "pip install ${@: -1}" >>"$LOG"; sleep 0.3; [ -z "$KILLED" ] || kill -9 $PPID; touch "$venv/installed"; printf "$PIP_SAYS"; printf "$PIP_WARNS" >&2 ;;
    "-m pytest"*) echo "tests ran:" "${@:3}" ;;
esac
"""


@pytest.fixture
def copy(tmp_path):
    """run_tests.sh in a repository of its own; calling it returns (status, stdout, stderr, what was installed
    meanwhile)."""
    repo, log = tmp_path / "a copy", tmp_path / "log"
    (repo / ".ci").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name in ("run_tests.sh", "pyproject.toml", ".ci/environment.sh", ".ci/run"):
        shutil.copy(ROOT / name, repo / name)
    for place, text in ((tmp_path / "bin" / "python3", BARE_PYTHON), (tmp_path / "venv_python", VENV_PYTHON)):
        place.write_text(text)
        place.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(
        "python3"
    )  # no other Python of this machine is to be found first

    def call(*arguments: str, script: str = "run_tests.sh", path: str = "", **more: str):
        log.write_text("")
        paths = f"{path or tmp_path / 'bin'}:/bin:/usr/bin"
        run = subprocess.run(
            ["bash", str(repo / script), *arguments],
            env={"PATH": paths, "LOG": str(log), "VENV_PYTHON": str(tmp_path / "venv_python"), **more},
            cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return run.returncode, run.stdout, run.stderr, log.read_text().splitlines()

    call.repo = repo
    return call


def test_the_active_python_is_used_where_it_has_everything(copy):
    status, out, err, installed = copy("--version", path=str(Path(sys.executable).parent))
    assert status == 0 and "pytest" in out + err and installed == []
    assert not (copy.repo / ".venv").exists()


def test_a_python_that_lacks_something_is_passed_over(copy):
    pyproject = copy.repo / "pyproject.toml"
    text = pyproject.read_text()
    for wrong in (
        text.replace("torch==", "torch==1."),
        text.replace("pytest>=", "pytest>=1000."),
        text.replace("tqdm", "tqdm-of-old"),
    ):
        assert wrong != text
        pyproject.write_text(wrong)
        shutil.rmtree(copy.repo / ".venv", ignore_errors=True)
        # .venv is then looked for; there is none, and pip would have to install what does not exist
        (copy.repo / ".venv" / "bin").mkdir(parents=True)
        stand_in = copy.repo / ".venv" / "bin" / "python"
        stand_in.write_text(VENV_PYTHON)
        stand_in.chmod(0o755)
        (copy.repo / ".venv" / "installed").touch()
        status, out, err, installed = copy("tests", path=str(Path(sys.executable).parent))
        assert (status, out, installed) == (0, "tests ran: tests\n", [])


def test_a_bare_machine_gets_an_environment_once(copy):
    status, out, err, installed = copy("-x", "a  b", script=".ci/run")
    assert status == 0, err
    first, second = out.splitlines()
    assert first.startswith("No active Python environment has this project's packages: installing them into")
    assert second == "tests ran: -x a  b"
    assert installed == [f"-m venv --clear {copy.repo}/.venv", f"pip install {copy.repo}[test]"]
    assert copy() == (0, "tests ran:\n", "", [])


def test_installing_says_what_it_fetches(copy):
    says = (
        r"Collecting torch==2.13.0\n  Downloading torch-2.13.0-cp311-none-any.whl.metadata (30 kB)\n"
        r"Downloading https://host/simple/torch-2.13.0-cp311-none-any.whl (530.1 MB)\n"
        r"  Downloading tqdm-4.67-py3-none-any.whl (78 kB)\nUsing cached six-1.17-py3.whl (11 kB)\n"
        r"Installing collected packages: torch, tqdm\nSuccessfully installed\n"
    )
    warns = r"WARNING: Retrying\nERROR: no\n  such file\nDEPRECATION: old\n"
    status, out, err, _ = copy(PIP_SAYS=says, PIP_WARNS=warns)
    assert (status, err) == (0, "ERROR: no\n  such file\n")
    lines = ["  torch 2.13.0 (530.1 MB)", "  tqdm 4.67 (78 kB)", "  everything is here: installing it"]
    assert out.splitlines()[1:] == [*lines, "tests ran:"]


def test_an_interrupted_install_begins_anew(copy):
    status, _, _, installed = copy(KILLED="1")
    assert status != 0 and len(installed) == 2
    assert (copy.repo / ".venv" / ".installing").exists()
    status, out, _, installed = copy()
    assert status == 0 and out.endswith("tests ran:\n")
    assert installed == [f"-m venv --clear {copy.repo}/.venv", f"pip install {copy.repo}[test]"]
    assert copy()[3] == []


def test_a_good_environment_survives_what_cannot_be_had(copy):
    copy()
    (copy.repo / ".venv" / "installed").unlink()  # something new is asked for
    status, _, err, installed = copy(DRY_STATUS="7")
    assert status == 7 and installed == []
    assert err.startswith("error: installing into ") and err.count("\n") == 1
    assert not (copy.repo / ".venv" / ".installing").exists()
    assert copy()[3] == [f"pip install {copy.repo}[test]"], "and is completed when it can be"


def test_two_starts_at_once_install_once(copy):
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(copy) for _ in range(2)]
    assert [run.result()[0] for run in runs] == [0, 0]
    assert sum("installing them" in run.result()[1] for run in runs) == 1


# --- CHUNKFLOW_PYTHON: an interpreter as it is.


def test_a_named_interpreter_is_used_as_it_is_and_told_what_it_lacks(folder):
    """Here it finds the description of another torch before the installed one's, as importlib.metadata reads."""
    described = folder / "site" / "torch-2.11.0+cu130.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+cu130\n")
    old = folder / "old python"
    old.write_text(f"""#!/bin/sh\nPYTHONPATH='{described.parent}' exec '{sys.executable}' "$@"\n""")
    old.chmod(0o755)
    run = train(folder, "--check", CHUNKFLOW_PYTHON=str(old))
    assert (run.returncode, run.stdout) == (0, "config and paths are good\n"), run.stderr
    first, torch = run.stderr.splitlines()
    assert first == f"{sys.executable} is used as it is (CHUNKFLOW_PYTHON), without these of pyproject.toml:"
    assert torch.startswith("  torch==2.13.0 is 2.11.0+cu130: ") and "no validation and no pipeline" in torch
    run = train(folder, "--check", CHUNKFLOW_PYTHON="python")
    assert (run.returncode, run.stdout, run.stderr) == (0, "config and paths are good\n", "")


@pytest.mark.parametrize(
    "python, sentence",
    [("no python", "no python is no Python 3.10 or newer"), ("bare", "lacks pip: install it")],
)
def test_a_named_interpreter_that_will_not_do_is_one_sentence(folder, python, sentence):
    bare = folder / "bare"
    bare.write_text(f"""#!/bin/sh\nexec '{sys.executable}' -S "$@"\n""")
    bare.chmod(0o755)
    run = train(folder, CHUNKFLOW_PYTHON=str(bare) if python == "bare" else python)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ") and sentence in run.stderr and run.stderr.count("\n") == 1, (
        run.stderr
    )


def test_a_named_interpreter_runs_the_tests_it_can_and_nothing_is_installed(copy):
    pyproject = copy.repo / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("tqdm", "tqdm-of-old"))
    path = str(Path(sys.executable).parent)
    status, out, err, installed = copy("--version", path=path, CHUNKFLOW_PYTHON="python")
    assert status == 0 and "pytest" in out + err and installed == [] and not (copy.repo / ".venv").exists()
    assert "\n  tqdm-of-old is missing\n" in err
