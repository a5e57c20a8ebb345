"""Hugging Face folders in and out: sizes from config.json, weights from safetensors into shards and stages,
and back.

Nothing in a folder is executed. The package safetensors (extra `hf`) is imported only where weights are read
or written.

A config.json means here what transformers takes it to mean, keys that it leaves out included. What the models
cannot do is refused by the key's name, never ignored.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.hub import tqdm  # the real one where it is installed, else torch's small stand-in

from chunkflow.settings import options
from chunkflow.settings.config import Config
from chunkflow.storage import files
from chunkflow.training import parallel
from models import families

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_FILE_BYTES = 5 * 10**9
ASSETS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Family(NamedTuple):
    name: str  # in models.families
    architecture: str
    defaults: dict[str, Any]  # transformers' values of keys that a config.json leaves out


_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
FAMILIES = {
    "llama": Family("llama3", "LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _QWEN),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _QWEN | {"head_dim": 128}),
}

# key -> the values that the models have, what another one asks for. An absent key is good.
_FIXED: dict[str, tuple[tuple, str]] = {
    "hidden_act": (("silu",), "another activation"),
    "attention_bias": ((False, None), "biases in attention"),
    "mlp_bias": ((False, None), "biases in the MLP"),
    "attention_dropout": ((0, None), "dropout"),
    "partial_rotary_factor": ((1, None), "heads that are rotated in part"),
    "use_mrope": ((False, None), "multimodal rotary angles"),
    "num_experts": ((0, None), "a mixture of experts"),
    "num_local_experts": ((0, None), "a mixture of experts"),
    "quantization_config": ((None,), "quantised weights"),
    "compression_config": ((None,), "quantised weights"),
    "auto_map": ((None, {}), "code of its own, which is never run"),
}
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
}

_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(parameter: str) -> str:
    """What Hugging Face calls a parameter of models/*.py."""
    module, _, kind = parameter.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"model.layers.{layer}.{_BLOCK[module]}.{kind}"


# ------------------------------------------------------------------------------------------------ config.json


def model_of(folder: str | Path) -> tuple[str, Any]:
    """The family's name and the sizes that a folder's config.json describes (transformers 4 or 5).

    Raises ValueError that names the key where the file is not good, or asks for what the models don't do.
    """
    path = Path(folder).expanduser() / "config.json"
    config = _read_json(path, "name a Hugging Face model folder")
    try:
        return _model_of(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model_of(config: dict[str, Any]) -> tuple[str, Any]:
    kind, architectures = config.get("model_type"), config.get("architectures")
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type = {kind!r} is not one of the models here: use a folder of {', '.join(FAMILIES)}"
            " (dense)"
        )
    family = FAMILIES[kind]
    if architectures and architectures != [family.architecture]:
        raise ValueError(
            f"architectures = {architectures} is not a language model here: it has to be"
            f" [{family.architecture!r}]"
        )
    for key, (values, meaning) in _FIXED.items():
        if key == "attention_bias" and kind == "qwen2":
            continue  # its biases are where they always are, and transformers does not read the key
        if key in config and config[key] not in values:
            raise ValueError(
                f"{key} = {config[key]!r} asks for {meaning}, which the models here don't have: use another"
                " model"
            )
    layers, heads, dim = (
        _size(config, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    _refuse_sliding_window(config, family.defaults, layers)
    config = family.defaults | config
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}: correct"
            " one"
        )
    if config.get("head_dim") is None and dim % heads:
        raise ValueError(
            f"hidden_size = {dim} is not a multiple of num_attention_heads = {heads}: set head_dim"
        )
    head_dim = dim // heads if config.get("head_dim") is None else _size(config, "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} is odd, but rotary positions turn pairs: correct it")
    positions = _size(config, "max_position_embeddings")
    theta, scaling = _rope(config)
    return family.name, families[family.name].ModelArgs(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        norm_eps=_positive(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=positions,
        tied_embeddings=_flag(config, "tie_word_embeddings"),
    )


def _refuse_sliding_window(config: dict[str, Any], defaults: dict[str, Any], layers: int) -> None:
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        others = sorted(set(kinds) - {"full_attention"})
        raise ValueError(
            f"layer_types has {others}: attention here is never cut, use a model with full_attention only"
        )
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", defaults.get("use_sliding_window", True))
    first = config.get("max_window_layers", defaults.get("max_window_layers", 0))
    if kinds is None and window is not None and used and first < layers:
        raise ValueError(
            f"sliding_window = {window} limits attention in layers from {first} on, but attention here is"
            " never cut: use another model, or set use_sliding_window to false if it was trained without"
        )


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """theta and rope_scaling (None: plain), from transformers 4's rope_theta and rope_scaling or 5's
    rope_parameters."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise ValueError("rope_scaling and rope_parameters are both there and differ: remove one of them")
    key, rope = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{key} = {rope} is not one set of rotary angles for all layers: use another model")
    if unknown := set(rope) - _ROPE_KEYS:
        raise ValueError(
            f"{key} has {sorted(unknown)[0]!r}, which the models here don't know: use another model, or"
            " remove it"
        )
    for name, value in rope.items():
        if name not in ("rope_type", "type", "truncate", "rope_theta") and value is not None:
            if type(value) not in (int, float) or not 0 < value < float("inf"):  # nan, too
                raise ValueError(f"{key} has {name} {value!r}, which is not a number above 0: correct it")
    if rope.get("partial_rotary_factor") not in (1, None):
        factor = rope["partial_rotary_factor"]
        raise ValueError(
            f"{key} has partial_rotary_factor {factor}: heads are rotated whole, use another model"
        )
    theta = _positive(rope, "rope_theta", config.get("rope_theta") or 10000.0)
    elsewhere = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in elsewhere and value is not None}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return theta, None
    if (
        "original_max_position_embeddings" in config
    ):  # beside the table instead of in it: transformers then prefers that
        scaling["original_max_position_embeddings"] = _size(config, "original_max_position_embeddings")
    return theta, scaling


def _size(config: dict[str, Any], key: str) -> int:
    if key not in config:
        raise ValueError(f"{key} is missing: add it")
    if type(config[key]) is not int or config[key] < 1:
        raise ValueError(f"{key} = {config[key]!r} is not a whole number of at least 1: correct it")
    return config[key]


def _positive(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{key} = {value!r} is not a number above 0: correct it")
    return float(value)


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if type(value) is not bool:
        raise ValueError(f"{key} = {value!r} is not true or false: correct it")
    return value


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: copy it again")
    return content


def end_tokens(folder: str | Path) -> list[int]:
    """The ids that end a generated text: eos_token_id of generation_config.json or, without that file, of
    config.json."""
    path = Path(folder).expanduser() / "generation_config.json"
    if not path.is_file():
        path = path.with_name("config.json")
    given = _read_json(path, "copy the folder again").get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int for number in ids):
        raise ValueError(
            f"{path}: eos_token_id = {given!r} is neither a token id nor a list of them: correct it"
        )
    return ids


def config_json(name: str, args: Any, dtype: str, source: str | Path | None = None) -> dict[str, Any]:
    """The config.json of a model: that of the folder `source` where there is one, with this dtype and these
    rotary angles."""
    if source:
        config = _read_json(Path(source).expanduser() / "config.json", "name a Hugging Face model folder")
        _, before = _model_of(config)
    else:
        kind = next(kind for kind, family in FAMILIES.items() if family.name == name)
        before = None
        config = {
            "architectures": [FAMILIES[kind].architecture],
            "model_type": kind,
            "hidden_act": "silu",
            "hidden_size": args.dim,
            "intermediate_size": args.hidden_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "vocab_size": args.vocab_size,
            "rms_norm_eps": args.norm_eps,
            "max_position_embeddings": args.max_positions,
            "tie_word_embeddings": args.tied_embeddings,
        }
    if before is None or (before.rope_theta, before.rope_scaling) != (args.rope_theta, args.rope_scaling):
        for key in ("rope_parameters", "original_max_position_embeddings"):
            config.pop(key, None)
        scaling = args.rope_scaling
        if args.rope_type in ("yarn", "llama3"):
            scaling = {"original_max_position_embeddings": args.max_positions} | scaling
        config |= {
            "rope_theta": args.rope_theta,
            "rope_scaling": scaling,
        }  # transformers 5 and others read these keys too
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config


# ------------------------------------------------------------------------------------------------ weights, in


class Source(NamedTuple):
    file: Path
    tensor: str
    twin: tuple[Path, str] | None = None  # a second copy of tied embeddings, which has to be equal


def weights_folder(settings: options.Checkpoint, hf_assets_path: str) -> str:
    """The folder that initial weights are read from; "" where they start random.

    checkpoint.initial_load_path (with initial_load_in_hf), else model.hf_assets_path if it has any
    safetensors: who names a model wants it. initial_load_in_hf insists on them. ValueError where the folder
    has weights only in a format that can run code.
    """
    if settings.initial_load_path:
        return settings.initial_load_path if settings.initial_load_in_hf else ""
    folder = Path(hf_assets_path).expanduser()
    if not hf_assets_path or settings.initial_load_in_hf or any(folder.glob("*.safetensors*")):
        return hf_assets_path
    for file in folder.iterdir():
        if file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"):
            raise ValueError(
                f"{file}: weights are read from safetensors only: save the model as safetensors, or remove"
                " the file"
            )
    logger.info(f"There are no weights in {hf_assets_path}: parameters start random")
    return ""


def check(config: Config, family: ModuleType, args: Any) -> None:
    """What file names and headers alone can tell about the weights that a run will read and write. Raises
    ValueError."""
    if folder := weights_folder(config.checkpoint, config.model.hf_assets_path):
        check_weights(folder, family, args)
    if config.checkpoint.last_save_in_hf:
        _safetensors()


def parameter_shapes(family: ModuleType, args: Any) -> dict[str, torch.Size]:
    """Of the whole model; the head that is the embeddings' weight is not listed again."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in family.Transformer(args).named_parameters()}


def check_weights(folder: str | Path, family: ModuleType, args: Any) -> dict[str, Source]:
    """The file and tensor of each parameter of the whole model. Reads headers only.

    Raises ValueError that names the tensor where one is missing, extra, misshapen, or of a type that is not
    read, and the file where one is missing or truncated.
    """
    folder = Path(folder).expanduser()
    tensors = _tensors(folder)
    sources = {}
    for parameter, shape in parameter_shapes(family, args).items():
        tied = parameter == "tok_embeddings.weight" and args.tied_embeddings
        names = [hf_name(parameter), "lm_head.weight"] if tied else [hf_name(parameter)]
        copies = [(tensors[name][0], name) for name in names if name in tensors]
        for file, name in copies:
            _, size, dtype = tensors.pop(name)
            if size != list(shape):
                raise ValueError(
                    f"{file}: {name} has shape {size}, but the model needs {list(shape)}: its config.json is"
                    " another model's"
                )
            if dtype not in ("F32", "BF16", "F16"):
                raise ValueError(
                    f"{file}: {name} is of type {dtype}: only bfloat16, float16 and float32 are read, convert"
                    " it"
                )
        if not copies:
            raise ValueError(
                f"{folder} has no tensor {names[0]}, which its model needs: copy the folder again"
            )
        sources[parameter] = Source(*copies[0], *copies[1:])
    # Llama's first files carry each layer's rotary frequencies, which follow from config.json.
    extra = sorted(name for name in tensors if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(
            f"{tensors[extra[0]][0]}: {extra[0]}{more} is no tensor of the model: its config.json is another"
            " model's"
        )
    return sources


def _tensors(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """File, shape and type of every tensor in a folder, from the files' headers."""
    safetensors = _safetensors()
    index, listed = folder / "model.safetensors.index.json", {}
    if index.is_file():
        listed = _read_json(index, "copy the folder again").get("weight_map")
        names = listed.values() if isinstance(listed, dict) else [None]
        if not all(type(name) is str and Path(name).name == name for name in names):
            raise ValueError(f"{index} has no weight_map of file names: copy it again")
    remedy = "name a folder with model.safetensors or model.safetensors.index.json"
    found = {}
    for file in [folder / name for name in sorted(set(listed.values())) or ["model.safetensors"]]:
        try:
            with safetensors.safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  it is no mapping
                    part = content.get_slice(name)
                    found[name] = file, part.get_shape(), part.get_dtype()
        except OSError:
            raise ValueError(
                f"{file} cannot be read: {'copy the folder again' if listed else remedy}"
            ) from None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): copy it again") from None
    for name, file in listed.items():
        if name not in found or found[name][0].name != file:
            raise ValueError(
                f"{folder / file} has no tensor {name}, though {index.name} says so: copy the folder again"
            )
    return found


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(
            "Hugging Face weights need the package safetensors: pip install safetensors, or chunkflow[hf]"
        ) from None
    return safetensors


@torch.no_grad()
def load_weights(model: nn.Module, family: ModuleType, folder: str | Path) -> None:
    """Fills a model, or the stage of one, from a folder. Each rank reads the rows of its shards, one
    parameter at a time.

    Raises what check_weights does, and ValueError with the name of a tensor that is not finite.
    """
    sources, parameters = check_weights(folder, family, model.args), parallel.named_parameters([model])
    local = {name: parallel.to_local(parameter) for name, parameter in parameters.items()}
    logger.info(
        f"Reading weights from {folder}: {sum(part.numel() for part in local.values()):,} parameters are this"
        " rank's"
    )
    quiet = dist.is_initialized() and dist.get_rank() > 0
    bar = tqdm(total=len(local), unit="tensor", desc="reading weights", mininterval=1, disable=quiet)
    with bar:
        for name in sorted(local, key=lambda name: sources[name][:2]):  # file by file
            local[name].copy_(read(sources[name], parallel.local_rows(parameters[name])))
            bar.update(1)


def read(source: Source, rows: slice = slice(None)) -> torch.Tensor:
    """These rows of a tensor. ValueError where they are not finite, or differ from a second copy's."""
    safe_open = _safetensors().safe_open
    with safe_open(source.file, "pt") as tensors:
        part = tensors.get_slice(source.tensor)[rows]
    _check_finite(part, f"{source.file}: {source.tensor}")
    if source.twin:
        file, tensor = source.twin
        with safe_open(file, "pt") as tensors:
            equal = torch.equal(part, tensors.get_slice(tensor)[rows])
        if not equal:
            raise ValueError(
                f"{file}: {tensor} differs from {source.tensor}, but config.json ties them: set"
                " tie_word_embeddings to false, or remove the tensor"
            )
    return part


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite: use a folder without them")


# ----------------------------------------------------------------------------------------------- weights, out


def save_model(
    target: Path,
    models: Iterable[nn.Module],
    family: ModuleType,
    settings: options.Model,
    dtype: str,
    device: torch.device,
) -> None:
    """Writes a folder that transformers loads; every rank calls it, with its model or its stages.

    Parameters come to rank 0 one at a time, which holds those of one file. config.json and tokenizer are
    model.hf_assets_path's.
    """
    models = list(models)
    args, assets = models[0].args, settings.hf_assets_path
    shapes = parameter_shapes(family, args)
    wholes = gathered_parameters(models, shapes, DTYPES[dtype], device)
    if dist.get_rank() == 0:
        config = config_json(settings.name, args, dtype, assets)
        write_folder(target, shapes, wholes, DTYPES[dtype], config, assets)
        logger.info(f"Saved the model in {dtype} as a Hugging Face folder: {target}")
    for _ in wholes:  # on the other ranks: each parameter is a collective
        pass
    dist.barrier()


@torch.no_grad()
def gathered_parameters(
    models: Iterable[nn.Module], shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor | None]:
    """The whole parameters of `shapes`, in that order: on the CPU of rank 0, None elsewhere. A collective at
    each step."""
    parameters = parallel.named_parameters(models)
    names_of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names_of_ranks, list(parameters))
    rank = dist.get_rank()
    for name, shape in shapes.items():
        whole, sender = None, next(rank for rank, names in enumerate(names_of_ranks) if name in names)
        if name in parameters:
            whole = parameters[name].to(device, dtype)
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if rank == sender != 0:
            dist.send(whole, dst=0)
        if rank == 0 != sender:
            whole = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(whole, src=sender)
        yield whole.cpu() if rank == 0 else None


def write_folder(
    target: Path,
    shapes: dict[str, torch.Size],
    tensors: Iterator[torch.Tensor],
    dtype: torch.dtype,
    config: dict[str, Any],
    assets: str | Path | None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes `tensors` (the parameters of `shapes`, in that order) as `dtype`, and config.json; the
    tokenizer's files are copied from the folder `assets`. Holds one file's tensors at a time.

    The folder appears whole or not at all: it is written under another name, synced and renamed. One that
    exists is replaced. Raises ValueError with the name of a tensor that is not finite, or not so in `dtype`.
    """
    save_file = _safetensors().torch.save_file
    groups, size, weight_map = [[]], 0, {}  # the names of each file, the bytes of the last
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    for parameter, shape in shapes.items():
        if groups[-1] and size + shape.numel() * dtype.itemsize > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(hf_name(parameter))
        size += shape.numel() * dtype.itemsize
    temporary = target.with_name(target.name + ".tmp")
    try:
        files.make_empty(temporary)
        with tqdm(total=len(shapes), unit="tensor", desc="writing weights", mininterval=1) as bar:
            for number, names in enumerate(groups, 1):
                part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
                content = {}
                for name in names:
                    content[name] = next(tensors).to(dtype).contiguous()
                    _check_finite(content[name], f"{name}, written as {str(dtype)[6:]},")
                    bar.update(1)
                save_file(content, temporary / f"model{part}.safetensors", metadata={"format": "pt"})
                weight_map |= dict.fromkeys(names, f"model{part}.safetensors")
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(temporary / "model.safetensors.index.json", index)
        _write_json(temporary / "config.json", config)
        for file in [Path(assets).expanduser() / name for name in ASSETS] if assets else []:
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
        files.publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
