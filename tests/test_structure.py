"""What holds the house together: rooms import downwards, recipes stay short, the README names what exists."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

REPO = Path(__file__).parent.parent
GROUND = {"chunkflow.planning", "chunkflow.settings"}
FLOORS = {  # room -> the project's rooms that it may import
    "chunkflow.planning": {"chunkflow.planning"},
    "chunkflow.settings": {"chunkflow.settings"},
    "chunkflow.execution": {"chunkflow.planning", "chunkflow.execution"},
    "models": {"chunkflow.execution", "models"},
    "chunkflow.data": GROUND | {"chunkflow.execution", "chunkflow.data"},
    "chunkflow.reporting": GROUND | {"chunkflow.execution", "chunkflow.reporting"},
    "chunkflow.training": GROUND
    | {"chunkflow.execution", "chunkflow.data", "chunkflow.reporting", "chunkflow.training", "models"},
    "chunkflow.storage": GROUND
    | {"chunkflow.execution", "chunkflow.data", "chunkflow.training", "chunkflow.storage", "models"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", FLOORS)
def test_lower_floors_never_import_higher_ones(room):
    paths = list((REPO / room.replace(".", "/")).glob("*.py"))
    assert paths
    for path in paths:
        for name in imports(path):
            if name.split(".")[0] in ("chunkflow", "models", "recipes", "tests", "benchmarks"):
                allowed = any(name == floor or name.startswith(floor + ".") for floor in FLOORS[room])
                assert allowed, f"{path.relative_to(REPO)} imports {name}"
            if room == "chunkflow.planning":
                assert name.split(".")[0] not in ("torch", "numpy"), f"{path.name} imports {name}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def test_nothing_imports_in_a_circle():
    """Neither modules, by what they import when they are loaded, nor rooms, by all imports."""
    paths = [path for room in FLOORS for path in (REPO / room.replace(".", "/")).glob("*.py")]
    modules = {module_name(path): path for path in paths}
    loaded, rooms = {}, {room: set() for room in FLOORS}
    for module, path in modules.items():
        loaded[module] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                loaded[module] |= {alias.name for alias in node.names}
            elif isinstance(
                node, ast.ImportFrom
            ):  # names of modules count as modules, others as the module's
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                loaded[module] |= names & modules.keys() or {node.module}
        loaded[module] &= modules.keys() - {module}
        room = module if module in FLOORS else module.rpartition(".")[0]
        for name in imports(path):
            rooms[room] |= {other for other in FLOORS if other != room and f"{name}.".startswith(f"{other}.")}
    for graph in (loaded, rooms):
        graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_files_are_short_and_recipes_copyable():
    for folder in ("recipes", "chunkflow", "models"):
        paths = list((REPO / folder).rglob("*.py"))
        assert paths
        for path in paths:
            lines = len(path.read_text().splitlines())
            assert lines < 300 if path.parent.name == "recipes" else lines <= 450, f"{path}: {lines}"
            if folder == "recipes":
                rooms = {name.split(".")[0] for name in imports(path)}
                assert not rooms & {"recipes", "tests"}, f"{path} could not be copied"


@pytest.mark.parametrize("arguments", ["format --check", "check"])
def test_code_is_formatted_and_free_of_what_ruff_finds(arguments):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", *arguments.split(), "--no-cache", "."]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_file_tree_names_what_exists():
    page = (REPO / "docs/files.md").read_text()
    tree = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    folder, named = "", set()
    for line in tree.splitlines():
        entry = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        folder = folder if line.startswith(" ") else (entry if entry.endswith("/") else "")
        path = REPO / (folder + entry if line.startswith(" ") else entry)
        assert path.exists(), f"the file tree names {path}"
        named.add(str(path.relative_to(REPO)))
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    for file in listed:
        if file.split("/")[0] in (
            "recipes",
            "chunkflow",
            "models",
            "train_configs",
            "benchmarks",
            "docs",
        ) and not file.endswith("__init__.py"):
            # one file is like the other
            alike = Path(file).parent.name in ("templates", "runs", "results")
            of_a_folder = str(Path(file).parent) in named and alike
            assert file in named or of_a_folder, f"docs/files.md lacks {file}"
    readme = (REPO / "README.md").read_text()
    for path in re.findall(
        r"(?:train_configs|recipes|benchmarks|docs|tests|chunkflow)/[\w/.]+\.(?:py|toml|md|slurm)", readme
    ):
        assert (REPO / path).exists(), f"the README names {path}"


def test_reliability_names_tests_that_exist():
    """docs/reliability.md puts a test behind every promise: a part of its name, or its file."""
    table = [
        line.split("|")[-2]
        for line in (REPO / "docs" / "reliability.md").read_text().splitlines()
        if line.startswith("|")
    ][2:]
    assert len(table) > 12
    functions = re.findall(
        r"^def (test_\w+)", (REPO / "tests" / "test_checkpoint.py").read_text(), re.MULTILINE
    )
    for cell in table:
        names = [name for name in re.findall(r"`([^`]+)`", cell) if not name.startswith("python ")]
        assert names, cell
        for name in names:
            assert (
                (REPO / name).exists() if "/" in name else any(name in function for function in functions)
            ), name
