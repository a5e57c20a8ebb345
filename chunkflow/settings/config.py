"""Turns a TOML file and the command line into a checked Config, or into a sentence that says what is wrong.
Types, rules and suggestions follow from the fields of options.py."""

import difflib
import math
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from chunkflow.settings.answers import ANSWERS, VALUE_ANSWERS
from chunkflow.settings.keys import KEYS, KINDS, SECTIONS, TABLES, Key, help_text, show, split
from chunkflow.settings.options import Config, Lora, Rule, Source, Training, Validation


class ConfigError(ValueError):
    """A setting is wrong. The message is one sentence: value, rule, remedy."""


def load_config(argv: list[str]) -> Config:
    """The config of a command line: its overrides, over the file of --job.config_file, over the defaults.
    ConfigError for all that is wrong in these alone. --help prints all keys and exits."""
    overrides = _parse_command_line(argv)
    path = overrides.get("job.config_file", "")
    values = (_read_toml(path) if path else {}) | overrides
    config = Config()
    for key, value in values.items():
        section, name = split(key)
        setattr(attrgetter(section)(config), name, value)
    _check_combinations(config, values)
    return config


def data_sections(config: Config, section: str = "training") -> dict[str, Training | Validation | Source]:
    """What has the keys dataset and dataset_path, by its name: each of training.sources, else the section."""
    sources = config.training.sources if section == "training" else []
    return {f"{section}.sources[{index}]": source for index, source in enumerate(sources)} or {
        section: getattr(config, section)
    }


# ----------------------------------------------------------------------------------- command line and file


def _parse_command_line(argv: list[str]) -> dict[str, Any]:
    """Key -> value of --section.key value, --section.key=value, --section.flag and --section.no_flag."""
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
        section, last = split(name)
        positive = f"{section}.{last.removeprefix('no_')}"
        if name not in KEYS and positive in KEYS and KEYS[positive].type is bool:
            if equals:
                raise ConfigError(
                    f"--{name} takes no value, but got {text!r}: write --{name} or --{positive}={text}"
                )
            values[positive] = False
            continue
        if tables := next(filter(name.startswith, TABLES), None):
            remedy = f"write [[{tables}]] and its keys below in the file of --job.config_file"
            raise ConfigError(f"--{name} has no place on the command line: {remedy}")
        key = _known(name, "--")
        if not equals:
            following = arguments[0] if arguments else None
            if key.type is bool and (following is None or following.lower() not in ("true", "false")):
                values[name] = True
                continue
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{name} has no value: write --{name}=VALUE, with {KINDS[key.type][0]}")
            text = arguments.pop(0)
        values[name] = _checked(name, _from_text(name, text))
    return values


def _from_text(name: str, text: str) -> Any:
    key = KEYS[name]
    if key.optional and text.lower() == "none":
        return None
    if key.type is str or text in key.words:
        return text
    if key.type is list:
        return [item.strip() for item in text.split(",")] if text else []
    try:
        if key.type in (int, float):
            return key.type(text)
        return tomllib.loads(f"value = {text.lower() if key.type is bool else text}")["value"]
    except ValueError:
        raise _wrong_type(name, text, key.type, "", key.words) from None


def _read_toml(path: str) -> dict[str, Any]:
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
            where = _place(path, _line_of(name, text))
            if name in SECTIONS and isinstance(value, dict):
                read(value, name + ".")
                continue
            _known(name, "", where, inside=value if isinstance(value, dict) else ())
            if name == "job.config_file":
                raise ConfigError(
                    f"{where}job.config_file belongs on the command line, where it selects this file: remove"
                    " it here"
                )
            values[name] = (
                _tables(name, value, path, text) if name in TABLES else _checked(name, value, where)
            )

    read(tables, "")
    return values


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
                raise ConfigError(f"{where}unknown key {shown}: {_suggest(inner, keys)}")
            values[inner] = _checked(shown, value, where, keys[inner])
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


# ---------------------------------------------------------------------------------------------------- one key


def answer(name: str) -> str | None:
    """The answer to a key of torchtitan's or of a later version, else that to its section, else None."""
    while name and name not in ANSWERS:
        name = split(name)[0]
    return ANSWERS.get(name)


def _known(name: str, dashes: str, where: str = "", inside: Any = ()) -> Key:
    """The key of that name; else ConfigError with the most helpful sentence. `where`: file and line.
    `inside`: the names in it, if it is a table of the file."""
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
    same = [key for key in KEYS if split(key)[1] == split(name)[1]]
    close = same[:1] or difflib.get_close_matches(name, SECTIONS if inside else KEYS, n=1)
    remedy = f"did you mean {dashes}{close[0]}?" if close else "see --help for all keys"
    raise ConfigError(f"{where}unknown {'section' if inside else 'key'} {dashes}{name}: {remedy}")


def _checked(name: str, value: Any, where: str = "", key: Key | None = None) -> Any:
    """The value in the key's type; ConfigError if the key does not admit it. `key`: if not the name's."""
    key = key or KEYS[name]
    if value is None and key.optional:
        return None
    if value in key.words:
        return value
    value = _typed(name, value, key.type, where, key.words)
    admits = key.field.metadata["admits"]
    if isinstance(admits, Rule):
        if not admits.holds(value):
            raise ConfigError(f"{where}{name} = {show(value)} is out of range: choose a value {admits.words}")
    elif isinstance(admits, dict):
        for inner in value:
            if inner not in admits:
                raise ConfigError(f"{where}unknown key {name}.{inner}: {_suggest(inner, admits)}")
        return {inner: _typed(f"{name}.{inner}", value[inner], admits[inner], where) for inner in value}
    elif admits:
        for item in value if key.type is list else [value]:
            if item not in admits:
                sentence = VALUE_ANSWERS.get(f"{name}={item}") or VALUE_ANSWERS.get(f"{name}=*")
                sentence = sentence or f"is not admitted: {_suggest(item, admits)}"
                raise ConfigError(f"{where}{name} = {show(item)} {sentence}")
    return value


def _typed(name: str, value: Any, kind: type, where: str, words: tuple[str, ...] = ()) -> Any:
    """The value; ConfigError if it is of another type, which with `words` is not all that the key admits. A
    whole number becomes a float where one is due."""
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    good = type(value) is kind and (kind is not float or math.isfinite(value))
    if not good or (kind is list and not all(type(item) is str for item in value)):
        raise _wrong_type(name, show(value), kind, where, words)
    return value


def _wrong_type(
    name: str, shown: str, kind: type, where: str = "", words: tuple[str, ...] = ()
) -> ConfigError:
    called, example = KINDS[kind]
    nor, others = ("neither ", " nor " + " nor ".join(map(show, words))) if words else ("not ", "")
    return ConfigError(f"{where}{name} = {shown} is {nor}{called}{others}: write it like {name} = {example}")


def _suggest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    meant = f" (did you mean {show(close[0])}?)" if close else ""
    return f"choose {'one of ' if len(choices) > 1 else ''}{', '.join(map(show, choices))}{meant}"


# ----------------------------------------------------------------------------------------------- several keys


def _refuse_if(broken: Any, sentence: str) -> None:
    if broken:
        raise ConfigError(sentence)


def _check_combinations(config: Config, given: dict[str, Any]) -> None:
    """Checks rules between keys, and sets keys that follow from others: fp64 training computes and reduces in
    fp64, validation reads training's dataset. `given`: the values of the file and the command line."""
    training, validation, checkpoint = config.training, config.validation, config.checkpoint
    if training.dtype == "float64":
        _refuse_if(
            given.get("training.mixed_precision_param") == "bfloat16",
            'training.mixed_precision_param = "bfloat16" contradicts training.dtype = "float64", which'
            " computes in float64: remove one of the two",
        )
        training.mixed_precision_param = training.mixed_precision_reduce = "float64"
    for name in ("mixed_precision_param", "mixed_precision_reduce"):
        _refuse_if(
            training.dtype != "float64" and getattr(training, name) == "float64",
            f'training.{name} = "float64" needs training.dtype = "float64": set that, or "float32" here',
        )
    _check_sources(training, given)
    for name, section in data_sections(config).items():
        _check_dataset(name, section.dataset, section.dataset_path)
    if validation.enable:
        if validation.dataset is None:
            _refuse_if(
                training.sources,
                "validation.dataset is unset, and with training.sources there is no one dataset to take for"
                " it: set validation.dataset and validation.dataset_path",
            )
            validation.dataset = training.dataset
            if training.dataset == "synthetic":
                validation.dataset_path = validation.dataset_path or training.dataset_path
        _check_dataset("validation", validation.dataset, validation.dataset_path)
    _check_lora(config.lora)
    scaling, selective = config.model.rope_scaling, config.activation_checkpoint.selective_ac_option
    _refuse_if(
        scaling is not None and "rope_type" not in scaling,
        f"model.rope_scaling = {show(scaling)} has no rope_type: add one, such as"
        ' { rope_type = "yarn", factor = 4.0 }',
    )
    _refuse_if(
        checkpoint.initial_load_in_hf and not (checkpoint.initial_load_path or config.model.hf_assets_path),
        "checkpoint.initial_load_in_hf = true has no folder: set checkpoint.initial_load_path or"
        " model.hf_assets_path to one",
    )
    _refuse_if(
        checkpoint.load_step != -1 and not checkpoint.enable,
        f"checkpoint.load_step = {checkpoint.load_step} is not read without checkpoint.enable: set that too",
    )
    _refuse_if(
        selective != "op" and (not selective.isdecimal() or int(selective) < 1),
        f'activation_checkpoint.selective_ac_option = {show(selective)} is neither "op" nor a whole number of'
        ' at least 1 in quotes: set "op", or "2" to recompute every second layer',
    )


def _check_lora(lora: Lora) -> None:
    if lora.rank or lora.adapter_path:
        return
    for key, default in (("alpha", None), ("target_modules", []), ("base", "compute")):
        value = getattr(lora, key)
        _refuse_if(
            value != default,
            f"lora.{key} = {show(value)} is not read without adapters: set lora.rank, too, such as 16",
        )


def _check_sources(training: Training, given: dict[str, Any]) -> None:
    """Checks training.sources, and names those that have no name."""
    for key in ("dataset", "dataset_path") if training.sources else ():
        _refuse_if(
            f"training.{key}" in given,
            f"training.{key} = {show(getattr(training, key))} is not read beside training.sources: remove it,"
            " or the tables",
        )
    names: dict[str, int] = {}
    for index, source in enumerate(training.sources):
        _refuse_if(
            source.dataset is None,
            f'training.sources[{index}] has no dataset: set one in it, such as dataset = "jsonl"',
        )
        source.name = source.name or Path(source.dataset_path).name or source.dataset
        _refuse_if(
            source.name in names,
            f"training.sources[{index}] and training.sources[{names.get(source.name)}] are both called"
            f" {show(source.name)}: give one of them another name",
        )
        names[source.name] = index


def _check_dataset(section: str, dataset: str, path: str) -> None:
    shown = f"{section}.dataset_path = {show(path)}"
    _refuse_if(
        dataset in ("jsonl", "parquet") and not path,
        f"{section}.dataset = {show(dataset)} has no data: set {section}.dataset_path to a file, a folder or"
        " a glob",
    )
    _refuse_if(
        dataset == "synthetic" and path not in ("", "lmsys", "llama3_sft", "agent", "prolong", "preference"),
        f'{shown} is not known to {section}.dataset = "synthetic": set "lmsys", "llama3_sft", "agent",'
        ' "prolong" or "preference"',
    )
    _refuse_if(
        dataset == "python_stdlib" and path,
        f'{shown} is not read by {section}.dataset = "python_stdlib": remove the path, or set'
        f' {section}.dataset = "jsonl"',
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
    _refuse_if(
        shards == -1 and processes % others,
        f"{named} does not divide {processes}, the number of processes: set NGPU to a multiple of {others}",
    )
    _refuse_if(
        shards != -1 and others * shards != processes,
        f"{named} x data_parallel_shard_degree = {shards} is not {processes}, the number of processes: set"
        f" data_parallel_shard_degree = -1, or NGPU = {others * shards}",
    )
