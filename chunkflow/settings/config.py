"""A run's settings: a TOML file and the command line become one checked Config, or one sentence that says
what is wrong.

What can be set stands in options.py; types, --help, suggestions and saving are read off its fields.
"""

from __future__ import annotations

import difflib
import gc
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from chunkflow.settings.answers import ANSWERS, LATER, VALUE_ANSWERS
from chunkflow.settings.options import Config


class ConfigError(ValueError):
    """One sentence: value, rule, remedy."""


class Key(NamedTuple):
    field: Field
    type: type
    optional: bool  # None means unset


# What a value of each type is called, and an example of one.
_KINDS = {
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
            optional = type(None) in get_args(kind)
            kind = get_args(kind)[0] if optional else kind
            yield name, Key(item, get_origin(kind) or kind, optional)


KEYS: dict[str, Key] = dict(_keys(Config))
SECTIONS = {name[:place] for name in KEYS for place, letter in enumerate(name) if letter == "."}


def load_config(argv: list[str]) -> Config:
    """The config of a command line: its overrides, over the file of --job.config_file, over the defaults.

    Raises ConfigError for anything that the file and the command line alone can tell. --help prints all keys
    and exits.
    """
    overrides = _parse_command_line(argv)
    path = overrides.get("job.config_file", "")
    values = {**(_read_toml(path) if path else {}), **overrides}
    config = Config()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        setattr(_section(config, section), name, value)
    _check_combinations(config, values)
    if config.model.hf_assets_path:
        from chunkflow.storage.hf_weights import (
            model_of,
        )  # here, since it imports torch: a mistyped key is answered at once

        try:
            config.model.name, _ = model_of(config.model.hf_assets_path)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        config.model.flavor = Path(config.model.hf_assets_path).expanduser().resolve().name
    return config


def flat(config: Config) -> dict[str, Any]:
    """The value of every key: {"training.steps": 100, ...}."""
    return {name: attrgetter(name)(config) for name in KEYS}


def _section(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


# -------------------------------------------------------------------------------------------- the two sources


def _parse_command_line(argv: list[str]) -> dict[str, Any]:
    """--section.key value, --section.key=value, --section.flag, --section.no_flag."""
    values, arguments = {}, list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            print(help_text())
            raise SystemExit(0)
        if not argument.startswith("--"):
            raise ConfigError(
                f"{argument!r} is not an option: write --section.key value, and lists with commas"
            )
        name, equals, text = argument[2:].partition("=")
        section, _, last = name.rpartition(".")
        positive = f"{section}.{last.removeprefix('no_')}"
        if name not in KEYS and positive in KEYS and KEYS[positive].type is bool:
            if equals:
                raise ConfigError(
                    f"--{name} takes no value, but got {text!r}: write --{name} or --{positive}={text}"
                )
            values[positive] = False
            continue
        key = _known(name, "--")
        if not equals:
            following = arguments[0] if arguments else None
            if key.type is bool and (following is None or following.lower() not in ("true", "false")):
                values[name] = True
                continue
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{name} has no value: write --{name}=VALUE, with {_KINDS[key.type][0]}")
            text = arguments.pop(0)
        values[name] = _checked(name, _from_text(name, text))
    return values


def _from_text(name: str, text: str) -> Any:
    key = KEYS[name]
    if key.optional and text.lower() == "none":
        return None
    if key.type is str:
        return text
    if key.type is list:
        return [item.strip() for item in text.split(",")] if text else []
    try:
        if key.type in (int, float):
            return key.type(text)
        return tomllib.loads(f"value = {text.lower() if key.type is bool else text}")["value"]
    except ValueError:
        raise _wrong_type(name, text, key.type) from None


def _read_toml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"job.config_file = {_show(path)} cannot be read ({error.strerror}): name a TOML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{path}{':' + line[1] if line else ''}: not valid TOML: {error}") from None

    values: dict[str, Any] = {}

    def read(table: dict[str, Any], prefix: str) -> None:
        for name, value in table.items():
            name = prefix + name
            line = _line_of(name, text)
            where = f"{path}:{line}: " if line else f"{path}: "
            if name in SECTIONS and isinstance(value, dict):
                read(value, name + ".")
                continue
            _known(name, "", where, inside=value if isinstance(value, dict) else ())
            if name == "job.config_file":
                raise ConfigError(
                    f"{where}job.config_file belongs on the command line, where it selects this file: remove"
                    " it here"
                )
            values[name] = _checked(name, value, where)

    read(tables, "")
    return values


def _line_of(name: str, text: str) -> int | None:
    """Where a TOML text sets `name`, or opens it as a section; None for unusual spellings."""
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[+\s*([^\]]*?)\s*\]", line):
            table = header[1] + "."
            if table == name + ".":
                return number
        elif (assigned := re.match(r"\s*([\w.-]+)\s*=", line)) and table + assigned[1] == name:
            return number
    return None


# ---------------------------------------------------------------------------------------------------- one key


def answer(name: str) -> str | None:
    """What to say to a key that users know from elsewhere or that comes later; its section may answer for
    it."""
    parts = name.split(".")
    paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((answers[path] for answers in (LATER, ANSWERS) for path in paths if path in answers), None)


def _known(name: str, dashes: str, where: str = "", inside: Any = ()) -> Key:
    """The key of that name, or the sentence that helps most. `inside`: the names in it, if it is a TOML
    table."""
    if name in KEYS:
        return KEYS[name]
    for key in [*(f"{name}.{inner}" for inner in inside), name]:
        if sentence := answer(key):
            raise ConfigError(f"{where}{dashes}{key} {sentence}")
    if name in SECTIONS:
        example = next(key for key in KEYS if key.startswith(name + "."))
        raise ConfigError(
            f"{where}{dashes}{name} is a section: set one of its keys, such as {dashes}{example}"
        )
    same = [key for key in KEYS if key.rpartition(".")[2] == name.rpartition(".")[2]]
    close = same[:1] or difflib.get_close_matches(name, SECTIONS if inside else KEYS, n=1)
    remedy = f"did you mean {dashes}{close[0]}?" if close else "see --help for all keys"
    raise ConfigError(f"{where}unknown {'section' if inside else 'key'} {dashes}{name}: {remedy}")


def _checked(name: str, value: Any, where: str = "") -> Any:
    """The value in the key's type, if the key admits it."""
    key = KEYS[name]
    if value is None and key.optional:
        return None
    value = _typed(name, value, key.type, where)
    rule, choices, entries = (key.field.metadata[kind] for kind in ("rule", "choices", "entries"))
    if rule and not rule.holds(value):
        raise ConfigError(f"{where}{name} = {_show(value)} is out of range: choose a value {rule.words}")
    if entries:
        for inner in value:
            if inner not in entries:
                raise ConfigError(f"{where}unknown key {name}.{inner}: {_suggest(inner, entries)}")
        return {inner: _typed(f"{name}.{inner}", value[inner], entries[inner], where) for inner in value}
    for item in (value if key.type is list else [value]) if choices else []:
        if item not in choices:
            sentence = VALUE_ANSWERS.get(f"{name}={item}") or VALUE_ANSWERS.get(f"{name}=*")
            sentence = sentence or f"is not admitted: {_suggest(item, choices)}"
            raise ConfigError(f"{where}{name} = {_show(item)} {sentence}")
    return value


def _typed(name: str, value: Any, kind: type, where: str) -> Any:
    """The value, if it has the type. A whole number is a good float; nothing else changes its type."""
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    good = type(value) is kind and (kind is not float or math.isfinite(value))
    if not good or (kind is list and not all(type(item) is str for item in value)):
        raise _wrong_type(name, _show(value), kind, where)
    return value


def _wrong_type(name: str, shown: str, kind: type, where: str = "") -> ConfigError:
    words, example = _KINDS[kind]
    return ConfigError(f"{where}{name} = {shown} is not {words}: write it like {name} = {example}")


def _suggest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    meant = f" (did you mean {_show(close[0])}?)" if close else ""
    return f"choose {'one of ' if len(choices) > 1 else ''}{', '.join(map(_show, choices))}{meant}"


def _show(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_show(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, str):  # JSON escapes all that TOML does, save for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


# --------------------------------------------------------------- several keys, the processes, the file system


def _check_combinations(config: Config, given: dict[str, Any]) -> None:
    """Rules between keys. fp64 training computes and reduces in fp64 throughout: the resolved config says
    so."""
    training, validation = config.training, config.validation
    if training.dtype == "float64":
        if given.get("training.mixed_precision_param") == "bfloat16":
            raise ConfigError(
                'training.mixed_precision_param = "bfloat16" contradicts training.dtype = "float64", which'
                " computes in float64:"
                " remove one of the two"
            )
        training.mixed_precision_param = training.mixed_precision_reduce = "float64"
    for name in ("mixed_precision_param", "mixed_precision_reduce"):
        if training.dtype != "float64" and getattr(training, name) == "float64":
            raise ConfigError(
                f'training.{name} = "float64" needs training.dtype = "float64": set that, or "float32" here'
            )
    _check_dataset("training", training.dataset, training.dataset_path)
    if validation.enable:
        if validation.dataset is None:
            validation.dataset = training.dataset
            if training.dataset == "synthetic":
                validation.dataset_path = validation.dataset_path or training.dataset_path
        _check_dataset("validation", validation.dataset, validation.dataset_path)
    if config.model.rope_scaling is not None and "rope_type" not in config.model.rope_scaling:
        raise ConfigError(
            f"model.rope_scaling = {_show(config.model.rope_scaling)} has no rope_type: add one, such as"
            ' { rope_type = "yarn", factor = 4.0 }'
        )
    checkpoint = config.checkpoint
    if checkpoint.initial_load_in_hf and not (checkpoint.initial_load_path or config.model.hf_assets_path):
        raise ConfigError(
            "checkpoint.initial_load_in_hf = true has no folder: set checkpoint.initial_load_path or"
            " model.hf_assets_path to one"
        )
    if checkpoint.load_step != -1 and not checkpoint.enable:
        raise ConfigError(
            f"checkpoint.load_step = {checkpoint.load_step} is not read without checkpoint.enable: set that"
            " too"
        )
    selective = config.activation_checkpoint.selective_ac_option
    if not selective.isdecimal() or int(selective) < 1:
        raise ConfigError(
            f"activation_checkpoint.selective_ac_option = {_show(selective)} is not a whole number of at"
            " least 1 in quotes: set"
            ' "2" to recompute every second layer'
        )


def _check_dataset(section: str, dataset: str, path: str) -> None:
    if dataset == "jsonl" and not path:
        raise ConfigError(
            f'{section}.dataset = "jsonl" has no data: set {section}.dataset_path to a file, a folder or a'
            " glob"
        )
    if dataset == "synthetic" and path not in ("", "lmsys", "llama3_sft"):
        raise ConfigError(
            f'{section}.dataset_path = {_show(path)} is not known to {section}.dataset = "synthetic": set'
            ' "lmsys" or "llama3_sft"'
        )
    if dataset == "python_stdlib" and path:
        raise ConfigError(
            f'{section}.dataset_path = {_show(path)} is not read by {section}.dataset = "python_stdlib":'
            " remove the path, or set"
            f' {section}.dataset = "jsonl"'
        )


def check_processes(config: Config, processes: int) -> None:
    """That the parallel degrees make as many ranks as there are processes."""
    parallel = config.parallelism
    shards = parallel.data_parallel_shard_degree
    others = parallel.data_parallel_replicate_degree * parallel.pipeline_parallel_degree
    named = (
        f"parallelism.data_parallel_replicate_degree = {parallel.data_parallel_replicate_degree} x"
        f" pipeline_parallel_degree = {parallel.pipeline_parallel_degree}"
    )
    if shards == -1 and processes % others:
        raise ConfigError(
            f"{named} does not divide {processes}, the number of processes: set NGPU to a multiple of"
            f" {others}"
        )
    if shards != -1 and others * shards != processes:
        raise ConfigError(
            f"{named} x data_parallel_shard_degree = {shards} is not {processes}, the number of processes:"
            f" set data_parallel_shard_degree = -1, or NGPU = {others * shards}"
        )


def check_paths(config: Config) -> None:
    """That named files exist and that the run can write its folder. Leaves nothing behind."""
    tokenizer = config.model.tokenizer_path
    if tokenizer and not Path(tokenizer).exists():
        raise ConfigError(
            f"model.tokenizer_path = {_show(tokenizer)} does not exist: name a tokenizer.json, a"
            " sentencepiece model, or a folder with one"
        )
    sections = {"training": config.training} | (
        {"validation": config.validation} if config.validation.enable else {}
    )
    for name, section in sections.items():
        if section.dataset == "jsonl":
            from chunkflow.data.dataset import (
                jsonl_files,
            )  # here, since it imports torch: a mistyped key is answered at once

            jsonl_files(section.dataset_path, name)
    folder = Path(config.job.dump_folder).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise ConfigError(
            f"job.dump_folder = {_show(config.job.dump_folder)} cannot be written ({folder}:"
            f" {error.strerror}): name another folder"
        ) from None


# ------------------------------------------------------------------------------------------------ for recipes


def main_config(
    argv: list[str] | None = None, check: Callable[[Config], Any] | None = None, planned: bool = False
) -> Config:
    """The first line of a recipe: the checked config, or `error: ...` on stderr and exit status 2.

    `check` adds the recipe's own rules: it raises ValueError, one sentence. With --check on the command line
    the checks are all that runs. `planned`: the recipe asks about NGPU x NNODES processes instead of being
    one of them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    only_check = "--check" in argv
    first = os.environ.get("RANK", "0") == "0"  # one voice, one look at the file system
    try:
        config = load_config([argument for argument in argv if argument != "--check"])
        if first:
            check_paths(config)
        if check:
            check(config)
        check_processes(config, _processes(planned or only_check or config.comm.mode == "fake_backend"))
    except ValueError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if only_check:
        print("config and paths are good")
        gc.freeze()  # a second less: the interpreter ends without looking at all of torch
        raise SystemExit(0)
    if first and config.job.print_config:
        print(to_toml(config))
    return config


@contextmanager
def user_errors():
    """What is wrong with the data or the model ends the run with its sentence on rank 0, exit status 1,
    instead of a traceback.

    Other ranks raise it: it may be theirs alone, and torchrun then reports it.
    """
    try:
        yield
    except (
        OSError
    ) as error:  # a disk that is full or gone: as much a sentence, with what the system says of which file
        if os.environ.get("RANK", "0") != "0":
            raise
        print(
            f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _processes(planned: bool) -> int:
    """torchrun's processes; without it one, or as many as run_train.sh is about to start."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    count = 1
    for name in ("NGPU", "NNODES") if planned else ():
        text = os.environ.get(name) or "1"
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(
                f"{name} = {text} in the environment is not a whole number of at least 1: set {name}=1"
            )
        count *= int(text)
    return count


def to_toml(config: Config) -> str:
    """All settings as TOML; unset ones are left out. Loads as an equal config."""
    lines, section = [], ""
    for name in KEYS:
        path, _, last = name.rpartition(".")
        value = getattr(_section(config, path), last)
        if value is None or name == "job.config_file":
            continue
        if path != section:
            lines += ["", f"[{path}]"]
            section = path
        lines.append(f"{last} = {_show(value)}")
    return "\n".join(lines[1:]) + "\n"


def help_text() -> str:
    """Every key with its default, what it means and what it admits."""
    lines = [
        "Options, over the values of --job.config_file FILE.toml, over the defaults shown. --check: stop"
        " after the checks."
    ]
    defaults, section = Config(), ""
    for name, key in KEYS.items():
        path, _, last = name.rpartition(".")
        if path != section:
            lines += ["", f"[{path}]"]
            section = path
        rule, choices = key.field.metadata["rule"], key.field.metadata["choices"]
        default = getattr(_section(defaults, path), last)
        admitted = ", ".join(map(_show, choices)) or (
            f"a value {rule.words}" if rule else _KINDS[key.type][0]
        )
        lines.append(f"  --{name} ({'unset' if default is None else _show(default)})")
        lines.append(f"        {key.field.metadata['doc']} [{admitted}]")
    return "\n".join(lines)
