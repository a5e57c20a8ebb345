"""Hugging Face's config.json and parameter names, in and out.

A config.json is read as transformers reads it, defaults of missing keys included. What the models cannot do
is refused by the key's name, never ignored. Each family's file has what only that family needs: HUGGING_FACE.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from chunkflow.execution.rotary import rope_type
from models import families

# key -> the values that the models support, what any other value asks for. The key may be missing.
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
_ROPE_KEYS = {"rope_type", "type", "truncate", "rope_theta", "factor", "original_max_position_embeddings"}
_ROPE_KEYS |= {"low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"}
_ROPE_KEYS |= {"mscale", "mscale_all_dim", "partial_rotary_factor"}

# module of a model here -> Hugging Face's; HUGGING_FACE["modules"] has those that only one family has
_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(parameter: str, family: ModuleType) -> str:
    """Hugging Face's name of a parameter of a family's model."""
    module, _, kind = parameter.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"model.layers.{layer}.{(_BLOCK | family.HUGGING_FACE.get('modules', {}))[module]}.{kind}"


def model_of(folder: str | Path) -> tuple[str, Any]:
    """The family's name and the ModelArgs that a folder's config.json describes (transformers 4 or 5).

    Raises ValueError, with the key, where the file is wrong or asks for what the models do not have.
    """
    path = Path(folder).expanduser() / "config.json"
    config = read_json(path, "name a Hugging Face model folder")
    try:
        return _model_of(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model_of(config: dict[str, Any]) -> tuple[str, Any]:
    kind, architectures = config.get("model_type"), config.get("architectures")
    kinds = [family.HUGGING_FACE["model_type"] for family in families.values()]
    if kind not in kinds:
        use = f"use a folder of {', '.join(kinds)} (dense)"
        raise ValueError(f"model_type = {kind!r} is not one of the models here: {use}")
    name = list(families)[kinds.index(kind)]
    dialect = families[name].HUGGING_FACE
    known = [dialect["architecture"]]
    if architectures and architectures != known:
        raise ValueError(
            f"architectures = {architectures} is not a language model here: it has to be {known}"
        )
    for key, (values, meaning) in _FIXED.items():
        if key in config and key not in dialect.get("unread", ()) and config[key] not in values:
            raise ValueError(
                f"{key} = {config[key]!r} asks for {meaning}, which the models here don't have: use another"
                " model"
            )
    layers, heads, dim = (
        _size(config, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    config = dialect["defaults"] | config
    _refuse_sliding_window(config, layers)
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    if heads % kv_heads:
        both = f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        raise ValueError(f"{both}: correct one")
    if config.get("head_dim") is None and dim % heads:
        raise ValueError(
            f"hidden_size = {dim} is not a multiple of num_attention_heads = {heads}: set head_dim"
        )
    head_dim = dim // heads if config.get("head_dim") is None else _size(config, "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} is odd, but rotary positions turn pairs: correct it")
    positions = _size(config, "max_position_embeddings")
    theta, scaling = _rope(config)
    sizes = dim, layers, heads, kv_heads, head_dim, _size(config, "intermediate_size")
    return name, families[name].ModelArgs(
        *sizes,
        vocab_size=_size(config, "vocab_size"),
        norm_eps=_positive(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=positions,
        tied_embeddings=_flag(config, "tie_word_embeddings"),
    )


def _refuse_sliding_window(config: dict[str, Any], layers: int) -> None:
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        others = sorted(set(kinds) - {"full_attention"})
        raise ValueError(
            f"layer_types has {others}: attention here is never cut, use a model with full_attention only"
        )
    window, first = config.get("sliding_window"), config.get("max_window_layers", 0)
    if kinds is None and window is not None and config.get("use_sliding_window", True) and first < layers:
        raise ValueError(
            f"sliding_window = {window} limits attention in layers from {first} on, but attention here is"
            " never cut: use another model, or set use_sliding_window to false if it was trained without"
        )


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """theta and rope_scaling (None: plain). transformers 4 has two keys for them, 5 has rope_parameters."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise ValueError("rope_scaling and rope_parameters are both there and differ: remove one of them")
    key, rope = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{key} = {rope} is not one set of rotary angles for all layers: use another model")
    if unknown := sorted(set(rope) - _ROPE_KEYS):
        remedy = "use another model, or remove it"
        raise ValueError(f"{key} has {unknown[0]!r}, which the models here don't know: {remedy}")
    for name, value in rope.items():
        if name not in ("rope_type", "type", "truncate", "rope_theta") and value is not None:
            if type(value) not in (int, float) or not 0 < value < float("inf"):  # nan, too
                raise ValueError(f"{key} has {name} {value!r}, which is not a number above 0: correct it")
    if (part := rope.get("partial_rotary_factor")) not in (1, None):
        raise ValueError(
            f"{key} has partial_rotary_factor {part}: heads are rotated whole, use another model"
        )
    theta = _positive(rope, "rope_theta", config.get("rope_theta") or 10000.0)
    others = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in others and value is not None}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return theta, None
    original = "original_max_position_embeddings"
    if original in config:  # beside the table instead of in it: transformers then prefers that
        scaling[original] = _size(config, original)
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


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. ValueError where the file cannot be read (its sentence ends with `remedy`),
    is not JSON, or not an object."""
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
    """eos_token_id, as a list, of generation_config.json or, without that file, of config.json."""
    path = Path(folder).expanduser() / "generation_config.json"
    if not path.is_file():
        path = path.with_name("config.json")
    given = read_json(path, "copy the folder again").get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int for number in ids):
        raise ValueError(
            f"{path}: eos_token_id = {given!r} is neither a token id nor a list of them: correct it"
        )
    return ids


def config_json(name: str, args: Any, dtype: str, source: str | Path | None = None) -> dict[str, Any]:
    """The config.json of a model of the family `name`: that of the folder `source` if one is given, with
    the rotary positions of `args` and this dtype."""
    before = None
    if source:
        config = read_json(Path(source).expanduser() / "config.json", "name a Hugging Face model folder")
        _, before = _model_of(config)
    else:
        dialect = families[name].HUGGING_FACE
        config = {
            "architectures": [dialect["architecture"]],
            "model_type": dialect["model_type"],
            "hidden_act": "silu",
            "hidden_size": args.dim,
            "intermediate_size": args.hidden_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "vocab_size": args.vocab_size,
            "rms_norm_eps": args.norm_eps,
            "tie_word_embeddings": args.tied_embeddings,
        }
    if before is None or (before.rope_theta, before.rope_scaling) != (args.rope_theta, args.rope_scaling):
        for key in ("rope_parameters", "original_max_position_embeddings"):
            config.pop(key, None)
        scaling = args.rope_scaling
        if rope_type(scaling) in ("yarn", "llama3"):
            scaling = {"original_max_position_embeddings": args.max_positions} | scaling
        config |= {"rope_theta": args.rope_theta, "rope_scaling": scaling}  # read by transformers 5, too
    config["max_position_embeddings"] = args.max_positions
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config
