"""docs/: every page can be reached, every link leads somewhere, every command and key that is named exists."""

import importlib
import json
import re
import runpy
import shlex
import sys
from itertools import takewhile

import pytest
from PIL import Image

from chunkflow.planning import simulate
from chunkflow.settings.config import check_processes, load_config
from chunkflow.settings.keys import KEYS, SECTIONS, TABLES
from tests.helpers.documents import BLOCK, DOCS, REPO, commands_of, pages

pytestmark = pytest.mark.quick

TEXTS = {path.relative_to(REPO).as_posix(): path.read_text() for path in pages()}
PAGES = {name: text for name, text in TEXTS.items() if name.startswith("docs/")}
every_page = pytest.mark.parametrize("name", PAGES)
# Other people's programs.
FOREIGN = {"tensorboard", "hf", "lm_eval", "vllm", "diff", "py-spy"}
PYTHON = "python -c "
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def links(name: str) -> list[tuple[str, str]]:
    """Of a page: the files it links to, and the heading in each."""
    folder = (REPO / name).parent
    found = [pair for pair in LINK.findall(prose(PAGES[name])) if "://" not in pair[0]]
    paths = [((folder / path).resolve() if path else REPO / name, heading) for path, heading in found]
    return [(path.relative_to(REPO).as_posix(), heading) for path, heading in paths]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_index():
    reached, new = set(), {"docs/README.md"}
    while new:
        reached |= new
        new = {path for name in new for path, _ in links(name) if path in PAGES} - reached
    assert reached == PAGES.keys()
    direct = {path for path, _ in links("docs/README.md")}
    assert {name for name in PAGES if name.count("/") == 1} - {"docs/README.md"} <= direct


@every_page
def test_every_link_leads_somewhere(name):
    for path, heading in links(name):
        assert (REPO / path).exists(), f"{name} links to {path}"
        assert not heading or heading in anchors((REPO / path).read_text()), f"{name}: {path}#{heading}"


def is_key(name: str) -> bool:
    section, _, key = name.rpartition(".")
    return {name, f"{section}.{key.removeprefix('no_')}"} & KEYS.keys() != set() or name in SECTIONS


@every_page
def test_every_key_exists(name):
    """Whatever looks like one, in code blocks and between backticks."""
    text = PAGES[name]
    if name == "docs/coming_from.md":  # the first column has others' keys
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    code = "\n".join(
        [*(block for *_, block in BLOCK.findall(text)), *re.findall(r"`([^`\n]+)`", prose(text))]
    )
    sections = "|".join(sorted({section.split(".")[0] for section in SECTIONS}))
    tables = {f"{table}.{key}" for table, keys in TABLES.items() for key in keys}
    for found in re.findall(rf"(?<![\w./-])(?:--)?((?:{sections})(?:\.\w+)+)", code):
        file = found.endswith((".jsonl", ".toml", ".py", ".json", ".md"))
        module = any((REPO / found.replace(".", "/")).parent.glob(found.split(".")[-1] + "*"))
        assert file or module or is_key(found) or found in tables, f"{name} names the key {found}"


def test_every_command_can_be_given(monkeypatch):
    """Its script, module, tests and flags are there, and a config takes its settings."""
    monkeypatch.chdir(REPO)
    seen = 0
    for name, text in PAGES.items():
        for command in commands_of(text):
            try:
                seen += given(command)
            except (AssertionError, ValueError) as error:
                raise AssertionError(f"{name}: {command}: {error}") from None
    assert seen > 40


def given(command: str) -> bool:
    """Checks one command; False for another's program."""
    if command.startswith(PYTHON):
        compile(shlex.split(command)[2], command, "exec")
        return True
    words = shlex.split(command, comments=True)
    environ = dict(word.split("=", 1) for word in takewhile(re.compile("[A-Z_]+=").match, words))
    program, *arguments = words[len(environ) :]
    if program in FOREIGN:
        return False
    if program == "./run_tests.sh":
        assert all((REPO / path).exists() for path in arguments if path.startswith("tests/")), arguments
        return True
    if program == "sbatch":
        assert (REPO / arguments[0]).exists()
        return True
    if program == "./run_train.sh":
        script = environ.get("TRAIN_FILE", "recipes/finetune.py")
        script = "recipes/finetune.py" if script == "my_recipe.py" else script  # a copy of it
        config = environ.get("CONFIG_FILE", "train_configs/debug_model.toml")
        arguments = [f"--job.config_file={config}", *arguments]
    elif arguments[0] == "-m":
        script = arguments[1].replace(".", "/") + ".py"
        arguments = arguments[2:]
    else:
        assert program == "python", "no program that is known"
        script, *arguments = arguments
    assert (REPO / script).exists(), f"{script} does not exist"
    source = (REPO / script).read_text()
    if script.startswith("benchmarks/"):
        source += (REPO / "benchmarks" / "result_files.py").read_text()
    settings, rest = [], iter(arguments)
    for word in rest:
        flag, has_value, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        if "." not in flag:
            assert f'"{flag}"' in source or flag in ("--check", "--help"), f"{script} has no {flag}"
            continue
        assert is_key(flag[2:]), f"{flag} is no key"
        if flag == "--job.config_file":
            value = value if has_value else next(rest)
            assert value.startswith(("my", "outputs/")) or (REPO / value).exists(), f"{value} does not exist"
            settings += [f"{flag}={value}"] if (REPO / value).exists() else []
        else:
            settings.append(word)
    if script.startswith("recipes/") and "convert" not in script:
        ranks = int(environ.get("NGPU", 2)) * int(environ.get("NNODES", 1))
        check_processes(load_config(settings), ranks)
    return True


def simulations() -> list[tuple[str, str]]:
    """Simulations in consoles, with what they are said to print."""
    found = []
    for text in PAGES.values():
        for language, _, block in BLOCK.findall(text):
            if language == "console":
                for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
                    if "-m chunkflow.planning.simulate" in command:
                        found.append((command, output))
    return found


def test_simulations_print_what_is_written_below_them(capsys):
    assert len(simulations()) >= 4
    for command, output in simulations():
        simulate.main(shlex.split(command)[3:])
        assert capsys.readouterr().out == output, command


def test_the_table_of_schedules_is_what_they_come_to(capsys):
    text = PAGES["docs/schedule.md"]
    lengths = re.search(r"--lengths (32,\S+)", text)[1]
    rows = re.findall(r"^\|.*?`(--.*?)` \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| (\d+)", text, re.MULTILINE)
    assert len(rows) == 9
    for options, *figures in rows:
        simulate.main(["--stages=4", f"--lengths={lengths}", *options.split(), "--json"])
        found = json.loads(capsys.readouterr().out)
        shown = [f"{found['makespan']}", *(f"{100 * found[name]:.1f}" for name in ("bubble", "idle"))]
        assert shown + [str(max(found["peak_kept_chunks"]))] == figures, options


def test_every_preset_has_its_page_with_what_is_predicted_for_it():
    presets = {path.stem for path in (REPO / "train_configs").glob("*.toml")}
    assert presets == {path.stem for path in (DOCS / "runs").glob("*.md")} - {"README"}
    predicted = runpy.run_path(str(DOCS / "write_runs.py"))["predicted"]
    for preset in presets:
        text = PAGES[f"docs/runs/{preset}.md"]
        assert f"train_configs/{preset}.toml" in text or preset == "debug_model"
        assert len(text.splitlines()) <= 60
        if not preset.startswith("debug_"):
            assert predicted(preset) in text, f"{preset}: run `python docs/write_runs.py`"


def test_pictures_are_drawn_as_they_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_concepts.py", str(tmp_path)])
    runpy.run_path(str(DOCS / "draw_concepts.py"), run_name="__main__")
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(drawn) >= 5
    shown = {path for name in PAGES for path, _ in links(name)}
    for file in drawn:
        committed = DOCS / "pictures" / file
        assert f"docs/pictures/{file}" in shown and committed.stat().st_size < 60_000, file
        with Image.open(tmp_path / file) as image, Image.open(committed) as other:
            assert image.size == other.size, file


def test_the_tested_combinations_are_what_tests_say(monkeypatch):
    """Else: python docs/write_tested.py"""
    monkeypatch.syspath_prepend(str(REPO / "docs"))
    combinations = importlib.import_module("write_tested")
    for test in combinations.all_tests():
        assert test.combinations or not test.compares, f"{test.name}: mark it with pytest.mark.proves"
        for words in test.combinations:
            assert words <= combinations.WORDS.keys() and words & combinations.LAYOUTS.keys(), test.name
            for word in words:
                assert re.search(combinations.WORDS[word], test.code), f"{test.name} has no {word}"
    assert combinations.PAGE.read_text() == combinations.page()
