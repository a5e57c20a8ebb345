"""Writes a Hugging Face folder from a checkpoint of a run, or from another Hugging Face folder, in any dtype.

    python recipes/convert.py outputs/checkpoint/step-100 my_model --dtype bfloat16 --assets original_model
    python recipes/convert.py my_model my_model_bf16 --dtype bfloat16
    python recipes/convert.py outputs/checkpoint/step-100-hf my_model --dtype bfloat16 --merge --base original

Files have at most 5 GB; no process group, no device. A folder's weights pass through memory one file at a
time, a checkpoint's at once. --assets names the folder that config.json and the tokenizer are copied from;
unset, it is the one that the weights came from. A run's training.chat_template comes along. --merge adds the
low-rank adapters of a run's checkpoint, or of a PEFT folder, to their base, which is --base or where they say
that it was.
"""

import argparse
import sys
from pathlib import Path

import torch

from chunkflow.data.shipped_templates import template_text
from chunkflow.storage import adapters, manifest
from chunkflow.storage import hf_weights as hf
from chunkflow.storage.tensors import load_model_weights
from chunkflow.training import parallel
from chunkflow.training.lora import ADAPTER_CONFIG
from models import families
from models.hf_config import config_json, hf_name, model_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="checkpoint folder, or Hugging Face folder with safetensors")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    dtype = {"choices": tuple(hf.DTYPES), "default": "float32"}
    parser.add_argument("--dtype", **dtype, help="of the weights written (%(default)s)")
    parser.add_argument("--assets", type=Path, help="Hugging Face folder of the same model")
    parser.add_argument("--merge", action="store_true", help="add adapters to their base")
    parser.add_argument("--base", type=Path, help="with --merge: Hugging Face folder of the base")
    arguments = parser.parse_args()
    try:
        if arguments.base and not arguments.merge:
            raise ValueError(f"--base = {arguments.base} is for --merge: add that, or remove it")
        convert(*vars(arguments).values())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def convert(
    source: Path,
    target: Path,
    dtype: str,
    assets: Path | None = None,
    merge: bool = False,
    base: Path | None = None,
) -> None:
    """ValueError where `source` is not a complete folder of a supported model, or `target` exists."""
    if target.exists():
        raise ValueError(f"{target} exists: name another folder, or remove it")
    saved = (source / "manifest.json").exists()
    content = manifest.read_manifest(source) if saved else {}
    template = template_text(content["config"].get("training.chat_template", "")) if saved else ""
    if merge:
        merged = adapters.merge(source, base)
        name, args, assets = merged.name, merged.args, assets or merged.assets
        tensors = iter(merged.parameters.values())
    elif (saved and manifest.adapters_of(content).rank) or (source / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{source} has low-rank adapters only: add --merge for a whole model")
    elif saved:
        assets = assets or content["config"]["model.hf_assets_path"] or None
        name, args = manifest.model_of(content)
        with torch.device("meta"), parallel.default_dtype(content["config"]["training.dtype"]):
            model = families[name].Transformer(args)
        model.to_empty(device="cpu")
        load_model_weights(model, source)
        tensors = (parameter.detach() for parameter in model.parameters())
    else:
        assets = assets or source
        name, args = model_of(source)
        tensors = map(hf.read, hf.check_weights(source, families[name], args).values())
    config, shapes = config_json(name, args, dtype, assets), hf.parameter_shapes(families[name], args)
    shapes = {hf_name(parameter, families[name]): shape for parameter, shape in shapes.items()}
    hf.write_folder(target, shapes, tensors, hf.DTYPES[dtype], config, assets, template)
    count = sum(shape.numel() for shape in shapes.values())
    print(f"Wrote {name} with {count:,} parameters in {dtype} to {target}")


if __name__ == "__main__":
    main()
