"""Writes a Hugging Face folder again, in another dtype: same model, same tokenizer, files of at most 5 GB.

    python recipes/convert.py my_model my_model_bf16 --dtype bfloat16

Weights pass through memory one file at a time; no process group, no device.
"""

import argparse
import sys
from pathlib import Path

from chunkflow.training import hf
from models import families


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("input", type=Path, help="Hugging Face folder with safetensors")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=tuple(hf.DTYPES), required=True, help="of the weights written")
    arguments = parser.parse_args()
    try:
        convert(arguments.input, arguments.output, arguments.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def convert(source: Path, target: Path, dtype: str) -> None:
    """Raises ValueError where the source is not a good folder of a model here, or the target exists."""
    if target.exists():
        raise ValueError(f"{target} exists: name another folder, or remove it")
    name, args = hf.model_of(source)
    sources = hf.check_weights(source, families[name], args)
    shapes = hf.parameter_shapes(families[name], args)
    tensors = hf.read_parameters(sources[parameter] for parameter in shapes)
    shapes = {hf.hf_name(parameter): shape for parameter, shape in shapes.items()}
    hf.write_folder(target, shapes, tensors, hf.DTYPES[dtype], hf.config_json(name, args, dtype, source), source)
    print(f"Wrote {name} with {sum(shape.numel() for shape in shapes.values()):,} parameters in {dtype} to {target}")


if __name__ == "__main__":
    main()
