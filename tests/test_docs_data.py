"""docs/data.md: each row becomes what is written below it, each config is read, each refusal is said."""

import argparse
import html
import json
import logging
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from chunkflow.data.files import SUFFIXES, find_files
from chunkflow.data.messages import ROLES
from chunkflow.data.rows import CHATS, PAIRS
from chunkflow.data.shipped_templates import SHIPPED
from chunkflow.settings.config import load_config
from chunkflow.settings.options import COLUMNS
from chunkflow.training import build
from recipes import plan, preview
from tests.helpers.documents import BLOCK
from tests.helpers.hugging_face import raw_tokenizer
from tests.helpers.processes import REPO
from tests.test_chat import QWEN3

pytestmark = pytest.mark.quick

DOCUMENT = (REPO / "docs" / "data.md").read_text()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TOKEN = re.compile(r'<i( class=loss)? title="id (\d+)[^"]*">(.*?)</i>', re.DOTALL)


class Example(NamedTuple):
    """Rows, the settings below them, and what the document says becomes of them."""

    line: int
    rows: list[dict]
    settings: str
    kind: str  # how the result is shown: "", "ids" or "preview"
    becomes: str


def examples() -> list[Example]:
    found, rows, settings, line = [], [], "", 0
    for block in BLOCK.finditer(DOCUMENT):
        language, kind, text = block.groups()
        if language == "json":
            rows, settings, line = objects(text), "", DOCUMENT.count("\n", 0, block.start()) + 1
        elif language == "toml":
            settings += text
        elif language == "text" and rows:
            found.append(Example(line, rows, settings, kind or "", text))
            rows = []
    return found


def objects(text: str) -> list[dict]:
    """JSON objects, one after the other."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while rest := text[place:].lstrip():
        value, place = decoder.raw_decode(text, len(text) - len(rest))
        found.append(value)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tokenizers: one with ChatML's tokens and no template, as the document's rows have it, and one
    with a template in the manner of Qwen3's own. The document's words are tokens."""
    folder = tmp_path_factory.mktemp("models")
    texts = [text for language, _, text in BLOCK.findall(DOCUMENT) if language in ("json", "text")]
    raw = raw_tokenizer("bytes", SPECIAL, ADDED, texts * 2, 4000)
    for name, more in {"my_model": {}, "assets/Qwen3-8B": {"chat_template": QWEN3}}.items():
        (folder / name).mkdir(parents=True)
        raw.save(str(folder / name / "tokenizer.json"))
        config = {"eos_token": "<|endoftext|>", **more}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def checkout(models, tmp_path, monkeypatch, caplog):
    """The working folder, with the models at the places that the document names."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("NGPU", raising=False)
    caplog.set_level(logging.INFO)
    return tmp_path


def write(rows: list[dict], kind: str, path: str) -> None:
    """Rows as files of a kind that a dataset_path names: parquet's each in one of its own, since a file's rows
    have the same columns."""
    for index, row in enumerate(rows):
        name = path.replace("*", str(index)) if SUFFIXES[kind][0] in path else f"{path}/{index}.{kind}"
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), name)
        else:
            with open(name, "a") as file:
                file.write(json.dumps(row) + "\n")


def options_of(example: Example) -> list[str]:
    """The command line for an example, whose rows are written to where its settings say they are."""
    Path("my.toml").write_text(example.settings)
    options = ["--job.config_file=my.toml", f"--training.global_batch_size={max(2, len(example.rows))}"]
    options += ["--training.no_shuffle"]
    if "dataset_path" not in example.settings:
        name = "my_rows.jsonl" if example.kind == "preview" else "rows.jsonl"
        options += ["--training.dataset=jsonl", f"--training.dataset_path={name}"]
    if "tokenizer_path" not in example.settings:
        options += ["--model.tokenizer_path=my_model"]
    training = load_config(options).training
    write(example.rows, training.dataset, training.dataset_path)
    return options


def shown(example: Example, capsys, caplog) -> str:
    """What preview.py makes of an example, as the document has it: what is logged of its keys, then each
    sequence with « » around what has a loss, under a title where there are weights; or the error."""
    options = options_of(example)
    if example.kind == "preview":
        preview.main([option for option in options if option != "--training.no_shuffle"])
        return capsys.readouterr().out
    try:
        preview.main([*options, "--html=page.html"])
    except SystemExit:
        return "error: " + capsys.readouterr().err.partition("error: ")[2]
    said = [f"log: {message}\n" for message in caplog.messages if re.search("not read: |it is not$", message)]
    parts = []
    for sequence in Path("page.html").read_text().split("<h2>")[1:]:
        title = html.unescape(sequence.partition("</h2>")[0])
        marked, before = "", ""
        for loss, number, text in TOKEN.findall(sequence):
            text = f"{number} " if example.kind == "ids" else html.unescape(text)
            marked += ("«" if loss and not before else "»" if before and not loss else "") + text
            before = loss
        marked = marked.rstrip("\n") + "»" * bool(before)
        marked = marked.replace(" »", "» ").rstrip() if example.kind == "ids" else marked
        parts.append(f"{title}\n{marked}\n" if "of weight" in title else f"{marked}\n")
    return "".join(said) + "\n".join(parts)


def matches(text: str, pattern: str) -> bool:
    """Whether a text is what the document has, in which `...` alone on a line stands for any lines."""
    parts = map(re.escape, pattern.split("\n...\n"))
    return bool(re.fullmatch("\n(?:.*\n)*?".join(parts), text))


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"line {example.line}")
def test_a_row_becomes_what_is_written_below_it(example, checkout, capsys, caplog):
    made = shown(example, capsys, caplog)
    assert matches(made, example.becomes), made


def test_a_mixture_is_logged_as_written(checkout, caplog):
    [(settings, said)] = re.findall(
        r"```toml\n([^`]*sources[^`]*)```.*?```text mixture\n(.*?)```", DOCUMENT, re.DOTALL
    )
    Path("my.toml").write_text(settings)
    config = load_config(["--job.config_file=my.toml", "--model.tokenizer_path=my_model"])
    chat, code = config.training.sources
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    write([row] * 300, chat.dataset, chat.dataset_path)
    table = pyarrow.Table.from_pylist([{"source": 9 * "def add(a, b):\n    return a + b\n"}] * 800)
    Path(code.dataset_path).mkdir()
    pyarrow.parquet.write_table(table, f"{code.dataset_path}/0.parquet")
    build.open_data(config, build.model_spec(config), 0)
    assert [message for message in caplog.messages if message.startswith("Source ")] == said.splitlines()


def test_the_retention_curve_is_as_written():
    options, said = re.search(
        r"\(`([^`]*dataset_path=agent[^`]*)`\):\n\n```text plan\n(.*?)```", DOCUMENT, re.DOTALL
    ).groups()
    config = load_config(options.split())
    lengths = build.open_data(config, build.model_spec(config), 0).lengths
    assert matches(plan.lengths_table(lengths, config), said)


def test_all_that_is_read_is_named():
    named = set(re.findall(r"`\"?([\w.-]+)\"?`", DOCUMENT))
    assert named >= {*CHATS, *(key for pair in PAIRS for key in pair), "text", "content", "input_ids"}
    assert named >= SHIPPED.keys()
    [ours] = re.findall(r"^Ours are (.*?)\.$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert set(re.split(r", | and |,?\n", ours)) == COLUMNS.keys()
    roles = [
        line.strip("| \n").split(" | ")
        for line in DOCUMENT.splitlines()
        if re.match(r"\| (system|user|assistant|tool)\b", line)
    ]
    table = {other: role.partition(",")[0] for role, others in roles for other in others.split(", ")}
    assert table == {other: role for other, role in ROLES.items() if other != role}


def test_the_picture_is_drawn(tmp_path, monkeypatch):
    assert "](pictures/masks.png)" in DOCUMENT
    monkeypatch.setattr(sys, "argv", ["draw_masks.py", str(tmp_path / "masks.png")])
    drawn = runpy.run_path(str(REPO / "docs" / "draw_masks.py"), run_name="__main__")
    with (
        Image.open(tmp_path / "masks.png") as image,
        Image.open(REPO / "docs" / "pictures" / "masks.png") as committed,
    ):
        assert image.size == committed.size
    assert [{"messages": drawn["CHAT"]}] in [example.rows for example in examples()]


def test_downloads_lie_where_the_configs_look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    parser.add_argument("repository")
    parser.add_argument("file", nargs="?")
    for name in ("--repo-type", "--include", "--local-dir"):
        parser.add_argument(name)
    sections = DOCUMENT.partition("## Public data sets")[2].split("\n### ")[1:]
    assert len(sections) >= 5
    for section in sections:
        [settings] = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
        Path("my.toml").write_text(settings)
        training = load_config(["--job.config_file=my.toml"]).training
        for command in re.findall(r"^hf download (.*)$", section, re.MULTILINE):
            given = parser.parse_args(shlex.split(command))
            assert given.repo_type == "dataset" and given.repository.count("/") == 1
            name = (given.file or given.include).replace("*", "train-00000-of-00001")
            file = Path(given.local_dir, name if "." in name else f"{name}.{training.dataset}")
            file.parent.mkdir(parents=True)
            file.touch()
            assert str(file) in find_files(training.dataset, training.dataset_path)
