"""Turns a TOML file and the command line into a checked Config, or into sentences that say what is wrong.
Types, rules and suggestions follow from the fields of options.py."""

import os
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from chunkflow.settings.faults import ConfigError, add, collected, refuse
from chunkflow.settings.keys import KEYS, KINDS, SECTIONS, TABLES, help_text, show, split
from chunkflow.settings.options import Config, Lora, Source, Training, Validation
from chunkflow.settings.values import answer, asks_for_nothing, checked, from_text, known, suggest, toml_value

Faults = dict[str, str]  # as in faults.py: sentence -> the key at fault


def load_config(argv: list[str], faults: Faults | None = None) -> Config:
    """The config of a command line: its overrides, over the file of --job.config_file, over the defaults.
    ConfigError for all that is wrong in these alone; with `faults`, that goes there, and keys at fault have
    their defaults (a file that cannot be read still raises). --help prints all keys and exits."""
    found: Faults = {} if faults is None else faults
    overrides = _parse_command_line(argv, found)
    path, values = overrides.get("job.config_file", ""), {}
    try:
        values = (_read_toml(path, found) if path else {}) | overrides
    except ConfigError as error:
        refuse(found | {str(error): ""})
    config = Config()
    for key, value in values.items():
        section, name = split(key)
        setattr(attrgetter(section)(config), name, value)
    for key, sentence in _contradictions(config, values):
        add(found, sentence, key, follows=True)
    if faults is None:
        refuse(found)
    return config


def data_sections(config: Config, section: str = "training") -> dict[str, Training | Validation | Source]:
    """What has the keys dataset and dataset_path, by its name: each of training.sources, else the section."""
    sources = config.training.sources if section == "training" else []
    return {f"{section}.sources[{index}]": source for index, source in enumerate(sources)} or {
        section: getattr(config, section)
    }


def all_data_sections(config: Config) -> dict[str, Training | Validation | Source]:
    """`data_sections` of training and, where it is enabled, of validation."""
    validation = data_sections(config, "validation") if config.validation.enable else {}
    return data_sections(config) | validation


def asked_processes(ngpu: str = "1") -> int:
    """NGPU (`ngpu` if it is unset) x NNODES (1) of the environment. ConfigError where these are not whole
    numbers of at least 1."""
    count = 1
    for name, default in (("NGPU", ngpu), ("NNODES", "1")):
        text = os.environ.get(name) or default
        if not text.isdecimal() or int(text) < 1:
            rule = "is not a whole number of at least 1"
            raise ConfigError(f"{name} = {text} in the environment {rule}: set {name}={default}")
        count *= int(text)
    return count


# ----------------------------------------------------------------------------------- command line and file


def _parse_command_line(argv: list[str], faults: Faults) -> dict[str, Any]:
    """Key -> value of --section.key value, --section.key=value, --section.flag and --section.no_flag."""
    values, arguments = {}, list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            print(help_text())
            raise SystemExit(0)
        with collected(faults, argument[2:].partition("=")[0]):
            values |= _option(argument, arguments)
    return values


def _option(argument: str, following: list[str]) -> dict[str, Any]:
    """Key and value of one argument, which takes its value off `following` where it needs one."""
    if not argument.startswith("--"):
        raise ConfigError(f"{argument!r} is not an option: write --section.key value, and lists with commas")
    name, equals, text = argument[2:].partition("=")
    section, last = split(name)
    positive = f"{section}.{last.removeprefix('no_')}"
    if name not in KEYS and positive in KEYS and KEYS[positive].type is bool:
        if equals:
            raise ConfigError(
                f"--{name} takes no value, but got {text!r}: write --{name} or --{positive}={text}"
            )
        return {positive: False}
    if tables := next(filter(name.startswith, TABLES), None):
        remedy = f"write [[{tables}]] and its keys below in the file of --job.config_file"
        raise ConfigError(f"--{name} has no place on the command line: {remedy}")
    has_next = bool(following) and not following[0].startswith("--")
    if name not in KEYS:
        if not equals:
            text = following.pop(0) if has_next else "true"
        negative = last.startswith("no_") and asks_for_nothing(positive, False)
        if not negative and not asks_for_nothing(name, toml_value(text)):
            known(name, "--")
        return {}
    key = KEYS[name]
    if not equals:
        if key.type is bool and (not following or following[0].lower() not in ("true", "false")):
            return {name: True}
        if not has_next:
            raise ConfigError(f"--{name} has no value: write --{name}=VALUE, with {KINDS[key.type][0]}")
        text = following.pop(0)
    return {name: checked(name, from_text(name, text))}


def _read_toml(path: str, faults: Faults) -> dict[str, Any]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"job.config_file = {show(path)} cannot be read ({error.strerror}): name a TOML file"
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
            is_table = isinstance(value, dict)
            if is_table and (name in SECTIONS or (name not in KEYS and _answered(name, value))):
                if name in SECTIONS or not any(value.get(key) is False for key in ("enable", "enabled")):
                    read(value, name + ".")  # of a section that is not there, each key is answered
                continue
            with collected(faults, name):
                where = _place(path, _line_of(name, text))
                if name not in KEYS and asks_for_nothing(name, value):
                    continue
                known(name, "", where, is_table)
                if name == "job.config_file":
                    raise ConfigError(
                        f"{where}job.config_file belongs on the command line, where it selects this file:"
                        " remove it here"
                    )
                values[name] = (
                    _tables(name, value, path, text) if name in TABLES else checked(name, value, where)
                )

    read(tables, "")
    foreign = [key for key in faults.values() if answer(key)]
    if len(foreign) > 1:
        faults[
            f"{path}: if this file is torchtitan's, python -m chunkflow.settings.from_torchtitan {path}"
            " translates it"
        ] = ""
    return values


def _answered(name: str, table: dict[str, Any]) -> bool:
    """Whether there is an answer to this table of a file, or to a key in it."""
    return any(answer(f"{name}.{inner}") for inner in table) or answer(name) is not None


def _tables(name: str, tables: Any, path: str, text: str) -> list:
    """The objects of a list of tables, [[name]] in the TOML text; ConfigError for what they do not admit."""
    if type(tables) is not list or not all(type(table) is dict for table in tables):
        rule = f"is not a list of tables: write [[{name}]] above the keys of each"
        raise ConfigError(f"{_place(path, _line_of(name, text))}{name} {rule}")
    lines, keys, made = text.split("\n"), TABLES[name], []
    header = re.compile(rf"\s*\[\[\s*{re.escape(name)}\s*\]\]")
    begins = [number for number, line in enumerate(lines) if header.match(line)]
    for index, table in enumerate(tables):
        values, first, own_text = {}, 0, ""
        if len(begins) == len(tables):  # else they are written as { ... } in a list
            first, end = [*begins, len(lines)][index : index + 2]
            own_text = "\n".join(lines[first:end])
        for inner, value in table.items():
            line = _line_of(f"{name}.{inner}", own_text)
            where = _place(path, first + line if line else _line_of(name, text))
            shown = f"{name}[{index}].{inner}"
            if inner not in keys:
                raise ConfigError(f"{where}unknown key {shown}: {suggest(inner, keys)}")
            values[inner] = checked(shown, value, where, keys[inner])
        made.append(KEYS[name].field.metadata["admits"](**values))
    return made


def _place(path: str, line: int | None) -> str:
    return f"{path}:{line}: " if line else f"{path}: "


def _line_of(name: str, text: str) -> int | None:
    """The line, from 1, where a TOML text sets a key or opens a section; None if it is spelt unusually."""
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[+\s*([^\]]*?)\s*\]", line):
            table = header[1] + "."
            if table == name + ".":
                return number
        elif (assigned := re.match(r"\s*([\w.-]+)\s*=", line)) and table + assigned[1] == name:
            return number
    return None


# ----------------------------------------------------------------------------------------------- several keys


def _contradictions(config: Config, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between keys: the key that has to change, and the sentence. Sets keys that follow from
    others: fp64 training computes and reduces in fp64, validation reads training's dataset. `given`: the
    values of the file and the command line."""
    training, validation, checkpoint = config.training, config.validation, config.checkpoint
    if training.dtype == "float64":
        if given.get("training.mixed_precision_param") == "bfloat16":
            yield (
                "training.mixed_precision_param",
                'training.mixed_precision_param = "bfloat16" contradicts training.dtype = "float64", which'
                " computes in float64: remove one of the two",
            )
        training.mixed_precision_param = training.mixed_precision_reduce = "float64"
    for name in ("mixed_precision_param", "mixed_precision_reduce"):
        if training.dtype != "float64" and getattr(training, name) == "float64":
            yield (
                f"training.{name}",
                f'training.{name} = "float64" needs training.dtype = "float64": set that, or "float32" here',
            )
    yield from _of_sources(training, given)
    for name, section in data_sections(config).items():
        yield from _of_dataset(name, section.dataset, section.dataset_path)
    if validation.enable:
        if validation.dataset is None:
            if training.sources:
                yield (
                    "validation.dataset",
                    "validation.dataset is unset, and with training.sources there is no one dataset to take"
                    " for it: set validation.dataset and validation.dataset_path",
                )
            validation.dataset = training.dataset
            if training.dataset == "synthetic":
                validation.dataset_path = validation.dataset_path or training.dataset_path
        yield from _of_dataset("validation", validation.dataset, validation.dataset_path)
    yield from _of_lora(config.lora)
    scaling, selective = config.model.rope_scaling, config.activation_checkpoint.selective_ac_option
    if scaling is not None and "rope_type" not in scaling:
        yield (
            "model.rope_scaling",
            f"model.rope_scaling = {show(scaling)} has no rope_type: add one, such as"
            ' { rope_type = "yarn", factor = 4.0 }',
        )
    if checkpoint.initial_load_in_hf and not (checkpoint.initial_load_path or config.model.hf_assets_path):
        yield (
            "checkpoint.initial_load_path",
            "checkpoint.initial_load_in_hf = true has no folder: set checkpoint.initial_load_path or"
            " model.hf_assets_path to one",
        )
    if checkpoint.load_step != -1 and not checkpoint.enable:
        yield (
            "checkpoint.load_step",
            f"checkpoint.load_step = {checkpoint.load_step} is not read without checkpoint.enable: set that"
            " too",
        )
    if selective != "op" and (not selective.isdecimal() or int(selective) < 1):
        yield (
            "activation_checkpoint.selective_ac_option",
            f'activation_checkpoint.selective_ac_option = {show(selective)} is neither "op" nor a whole'
            ' number of at least 1 in quotes: set "op", or "2" to recompute every second layer',
        )


def _of_lora(lora: Lora) -> Iterator[tuple[str, str]]:
    """As _contradictions, of keys that are not read without adapters."""
    for key, default in (("alpha", None), ("target_modules", []), ("base", "compute")):
        value = getattr(lora, key)
        if not (lora.rank or lora.adapter_path) and value != default:
            yield (
                f"lora.{key}",
                f"lora.{key} = {show(value)} is not read without adapters: set lora.rank, too, such as 16",
            )


def _of_sources(training: Training, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """As _contradictions, of training.sources; names those that have no name."""
    for key in ("dataset", "dataset_path") if training.sources else ():
        if f"training.{key}" in given:
            yield (
                f"training.{key}",
                f"training.{key} = {show(getattr(training, key))} is not read beside training.sources: remove"
                " it, or the tables",
            )
    names: dict[str, int] = {}
    for index, source in enumerate(training.sources):
        if source.dataset is None:
            yield (
                f"training.sources[{index}].dataset",
                f'training.sources[{index}] has no dataset: set one in it, such as dataset = "jsonl"',
            )
            continue
        source.name = source.name or Path(source.dataset_path).name or source.dataset
        if source.name in names:
            yield (
                f"training.sources[{index}].name",
                f"training.sources[{index}] and training.sources[{names[source.name]}] are both called"
                f" {show(source.name)}: give one of them another name",
            )
        names[source.name] = index


def _of_dataset(section: str, dataset: str | None, path: str) -> Iterator[tuple[str, str]]:
    key = f"{section}.dataset_path"
    if dataset in ("jsonl", "parquet") and not path:
        yield (
            key,
            f"{section}.dataset = {show(dataset)} has no data: set {key} to a file, a folder or a glob",
        )
    if dataset == "synthetic" and path not in ("", "lmsys", "llama3_sft", "agent", "prolong", "preference"):
        yield (
            key,
            f'{key} = {show(path)} is not known to {section}.dataset = "synthetic": set "lmsys",'
            ' "llama3_sft", "agent", "prolong" or "preference"',
        )
    if dataset == "python_stdlib" and path:
        yield (
            key,
            f'{key} = {show(path)} is not read by {section}.dataset = "python_stdlib": remove the path, or'
            f' set {section}.dataset = "jsonl"',
        )


def check_processes(config: Config, processes: int) -> None:
    """ConfigError unless the parallel degrees make as many ranks as there are processes."""
    parallel = config.parallelism
    shards, replicas = parallel.data_parallel_shard_degree, parallel.data_parallel_replicate_degree
    others = replicas * parallel.pipeline_parallel_degree
    named = (
        f"parallelism.data_parallel_replicate_degree = {replicas} x pipeline_parallel_degree ="
        f" {parallel.pipeline_parallel_degree}"
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
