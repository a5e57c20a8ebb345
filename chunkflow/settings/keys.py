"""Every key, by its full name, from the fields of options.py; and configs as text: TOML, --help, and the
reference in docs/: python -m chunkflow.settings.keys > docs/configuration.md"""

import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import Field, asdict, fields, is_dataclass
from itertools import groupby
from operator import attrgetter
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from chunkflow.settings.options import Config, Rule


class Key(NamedTuple):
    field: Field
    type: type
    optional: bool  # None means unset
    words: tuple[str, ...] = ()  # that it admits beside values of its type


# What messages call a value of each type, and an example of one.
KINDS = {
    bool: ("true or false", "true"),
    int: ("a whole number", "10"),
    float: ("a finite number", "1e-3"),
    str: ("a string", '"text"'),
    list: ("a list of strings", '["a", "b"]'),
    dict: ("a table", '{ name = "text" }'),
}


def _keys(section: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    hints = get_type_hints(section)
    for item in fields(section):
        name, kind = prefix + item.name, hints[item.name]
        if is_dataclass(kind):
            yield from _keys(kind, name + ".")
        else:
            kinds = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
            words = [word for each in kinds if get_origin(each) is Literal for word in get_args(each)]
            yield name, Key(item, get_origin(kinds[0]) or kinds[0], type(None) in kinds, tuple(words))


KEYS: dict[str, Key] = dict(_keys(Config))
TABLES = {  # a key that is a list of tables -> the keys of each table
    name: dict(_keys(key.field.metadata["admits"]))
    for name, key in KEYS.items()
    if is_dataclass(key.field.metadata["admits"])
}
SECTIONS = {name[:end] for name in KEYS for end, letter in enumerate(name) if letter == "."}


def flat(config: Config) -> dict[str, Any]:
    """The value of every key: {"training.steps": 100, ...}; tables are dicts, without the keys unset."""
    values = {name: attrgetter(name)(config) for name in KEYS}
    for name in TABLES:
        values[name] = [
            {key: value for key, value in asdict(table).items() if value is not None}
            for table in values[name]
        ]
    return values


def split(key: str) -> tuple[str, str]:
    """Section and name of a key: training.steps is ("training", "steps")."""
    section, _, name = key.rpartition(".")
    return section, name


def show(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {show(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, str):  # JSON escapes all that TOML does, save for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_toml(config: Config) -> str:
    """All settings as TOML, which loads as an equal config; keys without a value are omitted."""
    values = {name: value for name, value in flat(config).items() if value is not None}
    omitted = {"job.config_file", *TABLES}
    if config.training.sources:
        omitted |= {"training.dataset", "training.dataset_path"}
    parts: list[tuple[str, dict[str, Any]]] = []  # header, then the values below it
    for section, names in _by_section(values):
        kept = {split(name)[1]: values[name] for name in names if name not in omitted}
        parts.append((f"[{section}]", kept))
        for name in TABLES:
            if split(name)[0] == section:
                parts += [(f"[[{name}]]", table) for table in values[name]]
    return "\n".join(
        "\n".join([header, *(f"{name} = {show(value)}" for name, value in table.items())]) + "\n"
        for header, table in parts
    )


USAGE = """\
usage: [NGPU=N] [CONFIG_FILE=FILE.toml] ./run_train.sh [--section.key=VALUE ...]
       python RECIPE.py [--job.config_file FILE.toml] [--section.key=VALUE ...]

  ./run_train.sh --training.steps=20
        the small model of the default config, for 20 steps
  NGPU=8 CONFIG_FILE=my.toml ./run_train.sh --chunkflow.chunk_size=8192 --checkpoint.enable
        your settings on 8 processes, with changes; the same command again goes on from the last checkpoint
  ./run_train.sh --training.dataset=jsonl --training.dataset_path=my_rows.jsonl --training.seq_len=32768
        your data
  NGPU=8 CONFIG_FILE=my.toml ./run_train.sh --check
        stops after the checks of settings and paths

Options go over the values of the file, and these over the defaults shown in brackets. A flag is
--section.key or --section.no_key; a list has commas; "none" unsets a key that can be unset."""


def help_text() -> str:
    """Usage and examples, then every key with its default, what it means and what it admits."""
    lines, defaults = [USAGE], flat(Config())
    for section, names in _by_section(KEYS):
        lines += ["", f"[{section}]"]
        for name in names:
            if name in TABLES:
                lines += [f"  [[{name}]]", f"        {KEYS[name].field.metadata['doc']}"]
                for inner, key in TABLES[name].items():
                    lines += _help_of(f"    {inner}", key, key.field.default)
            else:
                lines += _help_of(f"  --{name}", KEYS[name], defaults[name])
    return "\n".join(lines)


def _help_of(name: str, key: Key, default: Any) -> list[str]:
    lines, admitted = _wrapped(key.field.metadata["doc"]), f"[{_admitted(key)}]"
    if len(lines[-1]) + len(admitted) < 100:
        lines[-1] += f" {admitted}"
    else:
        lines += _wrapped(admitted)
    return [f"{name} ({'unset' if default is None else show(default)})", *lines]


def _wrapped(text: str) -> list[str]:
    indent = " " * 8
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _admitted(key: Key) -> str:
    """What a key admits, in words."""
    admits, words = key.field.metadata["admits"], KINDS[key.type][0]
    if isinstance(admits, Rule):
        words = f"a value {admits.words}"
    elif isinstance(admits, tuple):
        words = ", ".join(map(show, admits))
    elif isinstance(admits, dict):
        words = f"a table of {', '.join(admits)}"
    return " or ".join([words, *map(show, key.words)])


def reference() -> str:
    """docs/configuration.md: every key by section, in tables."""
    lines = [REFERENCE]
    defaults = flat(Config())
    for section, names in _by_section(KEYS):
        below, rows = [], []
        for name in names:
            if name in TABLES:
                own = {inner: (key, key.field.default) for inner, key in TABLES[name].items()}
                below += ["", f"## [[{name}]]", "", f"{_sentence(KEYS[name])}", "", *_table(own)]
            else:
                rows.append(name)
        own = {split(name)[1]: (KEYS[name], defaults[name]) for name in rows}
        lines += ["", f"## [{section}]", "", *_table(own), *below]
    return "\n".join(lines) + "\n"


REFERENCE = """\
# Every setting

Made by `python -m chunkflow.settings.keys > docs/configuration.md`; a test holds it to the options.

`[training] steps = 20` in a TOML file is `--training.steps=20` on the command line, which goes over the
file. An unset key is left out of the file (`--section.key=none` on the command line). An unknown key, a value
that is not admitted, or values that contradict each other end with exit status 2 before any process starts,
all of them said at once."""


def _table(keys: dict[str, tuple[Key, Any]]) -> list[str]:
    lines = ["| key | default | admits | what it does |", "|---|---|---|---|"]
    for name, (key, default) in keys.items():
        shown = "unset" if default is None else f"`{show(default)}`"
        lines.append(f"| `{name}` | {shown} | {_admitted(key)} | {_sentence(key)} |")
    return lines


def _sentence(key: Key) -> str:
    doc = key.field.metadata["doc"].replace("|", "\\|")
    return f"{doc[0].upper()}{doc[1:]}."


def _by_section(names: Iterable[str]) -> Iterator[tuple[str, Iterator[str]]]:
    return groupby(names, key=lambda name: split(name)[0])


if __name__ == "__main__":
    print(reference(), end="")
