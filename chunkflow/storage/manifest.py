"""Which checkpoints a run has, what their manifests say, and what the run starts from."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chunkflow.settings import options
from chunkflow.settings.config import Config, ConfigError
from chunkflow.settings.keys import flat
from chunkflow.storage.hf_weights import weights_folder
from chunkflow.training import lora
from models import families

FORMAT = 1  # to be raised whenever an older manifest or its tensors would be misread


def checkpoint_folder(settings: options.Checkpoint, dump_folder: str) -> Path:
    """The folder of a run's checkpoints."""
    return Path(dump_folder) / settings.folder


def hf_folder(settings: options.Checkpoint, dump_folder: str, steps: int) -> Path:
    """Where checkpoint.last_save_in_hf writes the last step."""
    return checkpoint_folder(settings, dump_folder) / f"step-{steps}-hf"


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint, oldest first."""
    found = {
        path.parent.name.removeprefix("step-"): path.parent for path in folder.glob("step-*/manifest.json")
    }
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdecimal()))


def resume_folder(settings: options.Checkpoint, dump_folder: str) -> Path | None:
    """The checkpoint that a run continues; None if it starts at step 1. ValueError if checkpoint.load_step is
    not among the checkpoints."""
    if not settings.enable:
        return None
    folder, wanted = checkpoint_folder(settings, dump_folder), settings.load_step
    found = complete_checkpoints(folder)
    if wanted == -1:
        return found[max(found)] if found else None
    if wanted not in found:
        steps = f"there are steps {', '.join(map(str, found))}" if found else "there is none"
        missing = f"{folder} has no complete checkpoint of that step ({steps})"
        raise ValueError(f"checkpoint.load_step = {wanted}: {missing}: choose another, or -1 for the newest")
    return found[wanted]


class Start(NamedTuple):
    """What a run starts from: "checkpoint" (all its state), "checkpoint weights" (only its model), "hf" (a
    Hugging Face folder) or "random" (no folder)."""

    kind: str
    folder: Path | None = None


def choose_start(settings: options.Checkpoint, dump_folder: str, hf_assets_path: str) -> Start:
    """The run's checkpoint, else checkpoint.initial_load_path, else the weights in model.hf_assets_path."""
    if folder := resume_folder(settings, dump_folder):
        return Start("checkpoint", folder)
    return initial_start(settings, hf_assets_path)


def initial_start(settings: options.Checkpoint, hf_assets_path: str) -> Start:
    """What a run starts from at step 1."""
    if settings.initial_load_path and not settings.initial_load_in_hf:
        return Start("checkpoint weights", Path(settings.initial_load_path).expanduser())
    weights = weights_folder(settings, hf_assets_path)
    return Start("hf", Path(weights)) if weights else Start("random")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest.json. ValueError where it is missing, damaged or of another format."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        format = manifest["format"]
    except OSError as error:
        remedy = "name a checkpoint folder, such as checkpoint/step-100"
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove {folder} to go on from an earlier checkpoint") from None
    if format != FORMAT:
        reads = f"this version reads {FORMAT}: use the version that wrote it"
        raise ValueError(f"{path} has format {format}, but {reads}")
    return manifest


def saved_settings(settings: options.Checkpoint, dump_folder: str) -> dict[str, Any]:
    """The value of every key in the checkpoint that a run continues; empty if there is none."""
    folder = resume_folder(settings, dump_folder)
    return read_manifest(folder)["config"] if folder else {}


def finished(settings: options.Checkpoint, dump_folder: str, steps: int) -> bool:
    """Whether the run's last step is saved, and with checkpoint.last_save_in_hf its export too."""
    folder = resume_folder(settings, dump_folder)
    if folder is None or read_manifest(folder)["progress"]["step"] < steps:
        return False
    return not settings.last_save_in_hf or hf_folder(settings, dump_folder, steps).exists()


def model_identity(config: dict[str, Any], args: Any) -> dict[str, Any]:
    """The keys and sizes that must agree for tensors to fit and to mean the same. `config`: the value of
    every key."""
    sizes = {f"model {name}": value for name, value in dataclasses.asdict(args).items()}
    named = ("model.name", "model.converters", "training.dtype", "optimizer.name", "lora.rank")
    settings, adapters = lora_settings(config), {}
    if settings.rank:
        adapters["lora.alpha"] = lora.alpha(settings)
        adapters["lora.target_modules"] = lora.target_modules(settings, families[config["model.name"]], args)
    return {name: config[name] for name in named} | adapters | sizes


def lora_settings(config: dict[str, Any]) -> options.Lora:
    """The section of a config given as the value of every key."""
    names = [field.name for field in dataclasses.fields(options.Lora)]
    return options.Lora(**{name: config[f"lora.{name}"] for name in names})


def adapters_of(manifest: dict[str, Any]) -> options.Lora:
    """The adapters that a checkpoint has instead of all parameters; with rank 0, none."""
    found = [manifest["model"].get(f"lora.{key}") for key in ("rank", "alpha", "target_modules")]
    return options.Lora(found[0] or 0, found[1], found[2] or [])


def model_of(manifest: dict[str, Any]) -> tuple[str, Any]:
    """The family's name and the ModelArgs of a checkpoint's model."""
    model = manifest["model"]
    sizes = {name[len("model ") :]: model[name] for name in model if name.startswith("model ")}
    return model["model.name"], families[model["model.name"]].ModelArgs(**sizes)


def excluded(settings: options.Checkpoint, manifest: dict[str, Any]) -> set[str]:
    """Parts of a checkpoint that are not loaded; checkpoints saved under the same exclusion load whole."""
    return set(settings.exclude_from_loading) - set(manifest["excluded"])


def check_data(manifest: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    """ValueError if the run's data (`identity`) is not what the checkpoint was trained on."""
    added = dict.fromkeys(sorted(identity.keys() - manifest["data"].keys()))
    if difference := _difference(manifest["data"] | added, identity):
        excluding = 'set checkpoint.exclude_from_loading = ["dataloader"] to begin this data from its start'
        raise ValueError(f"{folder} was trained on other data: {difference}: restore it, or {excluding}")


def _difference(recorded: dict[str, Any], now: dict[str, Any]) -> str:
    for name, value in recorded.items():
        if now.get(name) != value:
            there, here = ("unset" if each is None else repr(each) for each in (value, now.get(name)))
            return f"{name} was {there} there and is {here} here"
    return ""


def check(config: Config, args: Any) -> None:
    """ValueError if the config and the manifests show that a run cannot start from its checkpoint."""
    settings, steps = config.checkpoint, config.training.steps
    with_gpu = torch.cuda.is_available() or config.comm.mode == "fake_backend"
    if settings.async_mode == "async_with_pinned_mem" and not with_gpu:
        needs = 'needs a GPU, whose memory it copies faster: set "async"'
        raise ConfigError(f'checkpoint.async_mode = "async_with_pinned_mem" {needs}')
    checkpoints = checkpoint_folder(settings, config.job.dump_folder)
    if settings.enable and checkpoints.exists() and not checkpoints.is_dir():
        raise ConfigError(f"checkpoint.folder: {checkpoints} is not a folder: remove it, or name another")
    kind, folder = choose_start(settings, config.job.dump_folder, config.model.hf_assets_path)
    if kind not in ("checkpoint", "checkpoint weights"):
        return
    if (folder / "config.json").exists() and not (folder / "manifest.json").exists():
        remedy = "set checkpoint.initial_load_in_hf, too"
        raise ConfigError(
            f"checkpoint.initial_load_path = {str(folder)!r} is a Hugging Face folder: {remedy}"
        )
    manifest = read_manifest(folder)
    if kind == "checkpoint":
        may_differ = {"optimizer.name"} if "optimizer" in excluded(settings, manifest) else set()
        remedy = "set it back, or choose another job.dump_folder to start anew"
    else:  # weights alone, whose context may be extended
        may_differ = {"optimizer.name", "model.converters"}
        may_differ |= {"model rope_theta", "model rope_scaling", "model max_positions"}
        remedy = "name a checkpoint of this model"
        own, theirs = config.lora, adapters_of(manifest)
        if not theirs.rank:
            may_differ.add("lora.rank")  # it is the base
        elif not own.rank:
            raise ValueError(
                f"{folder} has low-rank adapters only (lora.rank = {theirs.rank}): set lora.rank, too, or"
                " make a whole model of it by recipes/convert.py --merge, and name that"
            )
        elif own.adapter_path:
            raise ValueError(
                f"checkpoint.initial_load_path = {str(folder)!r} and lora.adapter_path ="
                f" {own.adapter_path!r} are two adapters to start from: remove one"
            )
    identity = json.loads(json.dumps(model_identity(flat(config), args)))
    recorded = {"lora.rank": 0} | manifest["model"]  # of before there were adapters
    recorded = {name: value for name, value in recorded.items() if name not in may_differ}
    if difference := _difference(recorded, identity):
        raise ValueError(f"{folder} is of another model: {difference}: {remedy}")
    if kind == "checkpoint" and not manifest["complete"] and manifest["progress"]["step"] < steps:
        raise ValueError(
            f"{folder} has the model only (checkpoint.last_save_model_only), so training cannot go on to"
            f" training.steps = {steps}: start in another job.dump_folder with"
            f" checkpoint.initial_load_path = {str(folder)!r}"
        )
