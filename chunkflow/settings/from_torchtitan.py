"""Prints a config of torchtitan's as one of this project, each change with its reason as a comment:

    NGPU=8 python -m chunkflow.settings.from_torchtitan their.toml > mine.toml

Reads torchtitan's last TOML version (February 2026) and older spellings. NGPU (8, the default of torchtitan's
run_train.sh) and NNODES (1) say how many ranks it was for: the global batch follows from them. torchtitan's
defaults are written where ours differ. What has no place here is a comment; so is the dataset, which nobody
can translate: the comment says what to set. A model that is not here ends with exit status 2.
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from chunkflow.settings.config import asked_processes
from chunkflow.settings.faults import ConfigError
from chunkflow.settings.keys import KEYS, KINDS, show, split
from chunkflow.settings.torchtitan import (
    DEFAULTS,
    DEGREES,
    FLAVORS,
    HF_ASSETS_PATH,
    LOCAL_BATCH_SIZE,
    NGPU,
    OLDER,
    SCHEDULES,
)
from chunkflow.settings.values import answer, asks_for_nothing, checked


class Translation:
    """Settings of ours, key -> (value, reason, "" if there is none), and notes: key -> what becomes of it."""

    def __init__(self, theirs: dict[str, Any], ranks: int):
        """`theirs`: the value of each key, such as training.steps; `ranks`: how many processes it was for.
        ConfigError for a model that is not here, or degrees that do not fit the ranks."""
        self.settings: dict[str, tuple[Any, str]] = {}
        self.notes: dict[str, str] = {}
        self.theirs, self.reasons = _last_spelling(theirs)
        self._model()
        self._ranks(ranks)
        self._data("training")
        self._validation()
        self._rest_of_the_changes()
        for key, value in self.theirs.items():
            self._carry(key, value)
        for key, value in DEFAULTS.items():
            if key not in self.settings and key not in self.notes:
                self._set(key, value, "torchtitan's default")

    def toml(self) -> str:
        """All of it as TOML: settings by section, the notes of a section below them."""
        sections = dict.fromkeys(split(key)[0] for key in KEYS if key in self.settings)
        sections |= dict.fromkeys(split(key)[0] for key in self.notes)
        parts = []
        for section in sections:
            lines = []
            for key in KEYS:
                if split(key)[0] == section and key in self.settings:
                    value, reason = self.settings[key]
                    line = f"{split(key)[1]} = {show(value)}"
                    if reason and len(line) + len(reason) > 100:
                        lines += [*_comment(reason), line]
                    else:
                        lines.append(line + (f"  # {reason}" if reason else ""))
            header = [f"[{section}]"] if lines else []
            for key, note in self.notes.items():
                if split(key)[0] == section:
                    lines += _comment(note)
            parts.append("\n".join(header + lines) + "\n")
        return "\n".join(parts)

    def _set(self, key: str, value: Any, reason: str = "") -> None:
        self.settings[key] = value, "; ".join(filter(None, (self.reasons.pop(key, ""), reason)))

    def _take(self, key: str, default: Any = None) -> Any:
        """Their value, which is then done with. ConfigError if it is not of the type of the default."""
        value = self.theirs.pop(key, default)
        if default is not None and type(value) is not type(default):
            raise ConfigError(f"{key} = {show(value)} is not {KINDS[type(default)][0]}: correct it")
        return value

    def _carry(self, key: str, value: Any) -> None:
        """A key whose meaning is the same, if it is one."""
        if key in KEYS:
            try:
                self._set(key, checked(key, value))
            except ConfigError as error:
                self.notes[key] = f"left out: {error}"
        elif not asks_for_nothing(key, value):
            sentence = answer(key) or "is not known here"
            self.notes[key] = f"left out: {key} = {show(value)} {sentence}"

    def _model(self) -> None:
        name = self._take("model.name", "llama3")
        if name not in FLAVORS:
            choices = ", ".join(map(show, FLAVORS))
            raise ConfigError(f"model.name = {show(name)} is not one of the models here: there are {choices}")
        self._set("model.name", name)
        flavor = self._take("model.flavor", "debugmodel")
        plain = re.sub(r"_(flex|varlen|sdpa)(_\w+)?$", "", flavor)
        if plain not in FLAVORS[name]:
            choices = ", ".join(map(show, FLAVORS[name]))
            raise ConfigError(
                f"model.flavor = {show(flavor)} is not one of the {name} models here: there are {choices}"
            )
        reason = f"was {show(flavor)}: attention is the same for all" if plain != flavor else ""
        if plain == "debugmodel":
            reason = "a small model of other sizes than torchtitan's"
        self._set("model.flavor", plain, reason)

        folder, tokenizer = self._take("model.hf_assets_path", ""), self._take("model.tokenizer_path", "")
        if folder == HF_ASSETS_PATH and not Path(folder).exists():  # a part of torchtitan's own tests
            folder = ""
        if folder and (Path(folder).expanduser() / "config.json").is_file():
            weights = any(Path(folder).expanduser().glob("*.safetensors"))
            loads = any(self.theirs.get(f"checkpoint.initial_load_{how}") for how in ("in_hf", "path"))
            reason = "its config.json says name, flavor and sizes"
            if weights and not loads:
                reason += "; its weights are where training begins (in torchtitan with initial_load_in_hf)"
            self._set("model.hf_assets_path", folder, reason)
            folder = ""
        if folder and not tokenizer:
            here = Path(folder).expanduser().exists()
            reason = "was hf_assets_path: there is no config.json in it"
            self._set("model.tokenizer_path", folder, reason if here else f"{reason}, nor is it here yet")
        elif tokenizer:
            reason = "a folder with tokenizer.json, or a sentencepiece model; tiktoken's are not read"
            self._set("model.tokenizer_path", tokenizer, reason)
        elif "model.hf_assets_path" not in self.settings and plain != "debugmodel":
            self.notes["model.tokenizer_path"] = (
                "no tokenizer is named: set tokenizer_path to the model's own"
            )

    def _ranks(self, ranks: int) -> None:
        """Degrees, and the global batch that follows from them."""
        degree = {kind: self.theirs.get(f"parallelism.{kind}_degree", 1) for kind in DEGREES}
        shard = self.theirs.get("parallelism.data_parallel_shard_degree", -1)
        if any(type(each) is not int or each < 1 for each in degree.values()) or type(shard) is not int:
            raise ConfigError("a parallel degree of the file is not a whole number of at least 1: correct it")
        others = degree["tensor_parallel"] * degree["pipeline_parallel"] * degree["context_parallel"]
        replicas, shown = degree["data_parallel_replicate"] * shard, ""
        if shard == -1:
            others_and_replicas = others * degree["data_parallel_replicate"]
            if ranks % others_and_replicas:
                raise ConfigError(
                    f"the degrees of the file do not divide {ranks}, the number of processes: set NGPU to a"
                    f" multiple of {others_and_replicas}"
                )
            replicas, shown = ranks // others, f" of {ranks} processes"
        elif degree["tensor_parallel"] * degree["context_parallel"] > 1:
            reason = "the ranks of tensor and context parallelism share data here"
            self._take("parallelism.data_parallel_shard_degree")
            self._set("parallelism.data_parallel_shard_degree", -1, reason)

        local = self._take("training.local_batch_size", LOCAL_BATCH_SIZE)
        batch, reason = self._take("training.global_batch_size", -1), ""
        if batch == -1:
            batch = local * replicas
            reason = f"local_batch_size = {local} x {replicas} data-parallel ranks{shown}"
            self.reasons["training.global_batch_size"] = self.reasons.pop("training.local_batch_size", "")
        self._set("training.global_batch_size", batch, "; ".join(filter(None, (reason, "counts sequences"))))

        if "parallelism.context_parallel_degree" in self.theirs:
            given = self._take("parallelism.context_parallel_degree")
            self.notes["parallelism.context_parallel_degree"] = (
                f"context_parallel_degree = {given} is left to the planner: long sequences are shared by as"
                " many ranks as balance and memory ask for"
            )
        if degree["pipeline_parallel"] == 1:
            self._take("parallelism.pipeline_parallel_schedule")
            self._take("parallelism.pipeline_parallel_layers_per_stage")
        elif schedule := self._take("parallelism.pipeline_parallel_schedule", ""):
            plain = re.sub(r"\W|_", "", schedule).lower()
            ours = SCHEDULES.get(plain, "Interleaved1F1B")
            reason = "" if ours == schedule else f"was {show(schedule)}"
            self._set("parallelism.pipeline_parallel_schedule", ours, reason)
        if degree["pipeline_parallel"] > 1:
            if self.theirs.get("parallelism.fsdp_reshard_after_forward") == "always":
                self._take("parallelism.fsdp_reshard_after_forward")
                reason = 'was "always", which a pipeline of unequal plans cannot have'
                self._set("parallelism.fsdp_reshard_after_forward", "default", reason)

    def _data(self, section: str) -> None:
        """The dataset of training or validation: a local path is kept, a name of the hub cannot be."""
        name, path = self._take(f"{section}.dataset", "c4_test"), self._take(f"{section}.dataset_path", "")
        place = Path(path).expanduser()
        parquet = path and (place.suffix == ".parquet" or any(place.glob("**/*.parquet")))
        kind = "parquet" if parquet else "jsonl"
        self._set(f"{section}.dataset", kind, f"was {show(name)}")
        if path:
            self._set(f"{section}.dataset_path", path, "JSONL or parquet files, whose rows are sequences")
        else:
            self.notes[f"{section}.dataset_path"] = (
                f"dataset = {show(name)} is not read by that name: save it as JSONL or parquet (hf download"
                f" --repo-type dataset), and set dataset_path to it, and dataset to its kind. A row is one"
                " sequence; torchtitan cuts all text into rows of seq_len"
            )

    def _validation(self) -> None:
        keys = [key for key in self.theirs if split(key)[0] == "validation"]
        if self.theirs.get("validation.enable"):
            self._data("validation")
        else:
            for key in keys:
                self._take(key)

    def _rest_of_the_changes(self) -> None:
        self._take("job.config_file")
        for section in ("fault_tolerance", "memory_estimation"):
            if not (self.theirs.get(f"{section}.enable") or self.theirs.get(f"{section}.enabled")):
                for key in [key for key in self.theirs if split(key)[0] == section]:
                    self._take(key)
        if "training.seq_len" in self.theirs:
            self._set("training.seq_len", self._take("training.seq_len"), "the longest admissible sequence")
        if self.theirs.get("optimizer.name") == "Adam":
            self._take("optimizer.name")
            self._take("optimizer.weight_decay")
            self._set("optimizer.name", "AdamW", 'was "Adam"')
            self._set("optimizer.weight_decay", 0.0, "which AdamW is without decay")
        if "compile.components" in self.theirs:
            parts = _list(self._take("compile.components"))
            if "model" in parts:
                reason = "the loss runs in slices of tokens, uncompiled" if "loss" in parts else ""
                self._set("compile.components", ["model"], reason)
            else:
                self._take("compile.enable")
                self._set("compile.enable", False, "components has no model, and the loss is not compiled")
        if "model.converters" in self.theirs:
            names = _list(self._take("model.converters"))
            ours = [name.removeprefix("quantize.linear.") for name in names]
            kept = [name for name in ours if name == "float8"]
            reason = f"was {show(names)}" if kept != names else ""
            self._set("model.converters", kept, reason)
        if "quantize.linear.float8.filter_fqns" in self.theirs:
            layers = _list(self._take("quantize.linear.float8.filter_fqns"))
            self._set("quantize.linear.float8.filter_fqns", layers)
        if "checkpoint.exclude_from_loading" in self.theirs:
            names = _list(self._take("checkpoint.exclude_from_loading"))
            kept = [name for name in names if name in ("optimizer", "dataloader")]
            reason = f"was {show(names)}: the others are not saved" if kept != names else ""
            self._set("checkpoint.exclude_from_loading", kept, reason)
        if self.theirs.get("checkpoint.interval_type", "steps") != "steps":
            self._take("checkpoint.interval")
            self.notes["checkpoint.interval"] = "interval is in steps: set it, 500 is the default"
        if not self.theirs.get("checkpoint.enable"):
            self._take("checkpoint.load_step")


def _list(value: Any) -> list[str]:
    """A list; older files have strings with commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _last_spelling(theirs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by the keys of torchtitan's last version, and by key what it was called."""
    found, reasons = {}, {}
    for key, value in theirs.items():
        new, change = OLDER.get(key, (key, None))
        if key.startswith("float8.") and new == key:
            new = f"quantize.linear.{key}"
        if new != key and new in theirs:
            continue  # written in both ways: the new one counts
        found[new] = change(value) if change else value
        if new != key:
            reasons[new] = f"was {key}"
    return found, reasons


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 105, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__)
        raise SystemExit(0 if argv in (["-h"], ["--help"]) else 2)
    try:
        theirs, ranks = tomllib.loads(Path(argv[0]).read_bytes().decode()), asked_processes(NGPU)
        text = Translation(dict(_flat(theirs)), ranks).toml()
    except OSError as error:
        reason = f"{argv[0]} cannot be read ({error.strerror}): name a TOML file of torchtitan's"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = f"{argv[0]}: not valid TOML: {error}"
    except ConfigError as error:
        reason = f"{argv[0]}: {error}"
    else:
        print(f"# From {argv[0]}, for {ranks} processes.\n\n{text}", end="")
        return
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
