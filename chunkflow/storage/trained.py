"""A trained model, for generation and evaluation: weights of a checkpoint or of a Hugging Face folder."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from chunkflow.execution.linear import fit_linear_layers
from chunkflow.settings.options import Config
from chunkflow.storage import adapters, manifest
from chunkflow.storage import hf_weights as hf
from chunkflow.storage.tensors import load_model_weights
from chunkflow.training import lora, parallel
from chunkflow.training.build import activate_attention, check_cuda_dtype


def load_trained(
    config: Config, checkpoint: Path | None, family: ModuleType, args: Any, device: torch.device
) -> nn.Module:
    """The whole model in training.mixed_precision_param, with the weights of `checkpoint`, a run's folder
    such as step-100 or a PEFT adapter such as step-100-hf, or (None) of what a run of this config would start
    from. ValueError, one sentence, where there are none, or they are another model's."""
    dtype = config.training.mixed_precision_param
    check_cuda_dtype(config.training)
    activate_attention(config)
    settings, content = config.lora, None
    if checkpoint:
        if not checkpoint.is_dir():
            raise ValueError(
                f"--checkpoint = {checkpoint} is not a folder: name one such as outputs/checkpoint/step-100"
            )
        if (checkpoint / lora.ADAPTER_CONFIG).is_file():
            settings, checkpoint = lora.read_adapter_config(checkpoint), None
        else:
            content = manifest.read_manifest(checkpoint)
            settings = manifest.adapters_of(content)
    elif settings.rank and not settings.adapter_path:
        raise ValueError("there are no adapters: set --checkpoint, or --lora.adapter_path")
    start = adapters.choose_base(config.checkpoint, config.model.hf_assets_path)
    if start.kind == "hf":
        hf.check_weights(start.folder, family, args)
    elif not checkpoint:
        base = " of the adapters' base" if settings.rank else ", or --checkpoint"
        raise ValueError(
            f"there are no weights: set --model.hf_assets_path to a folder with safetensors{base}"
        )
    # A checkpoint is read as it was written, in training.dtype; that may be more than the device holds.
    with torch.device("meta"), parallel.default_dtype(config.training.dtype if checkpoint else dtype):
        model = family.Transformer(args)
        lora.apply_lora(model, settings, family, config.training)
    model.to_empty(device="cpu" if checkpoint else device)
    if settings.rank:
        base = adapters.load_base([model], family, start, config.debug.seed or 0)
        if checkpoint:
            adapters.check_base(content, base, checkpoint)
        else:
            adapters.load_adapter(model, family, settings)
    elif not checkpoint:
        hf.load_weights(model, family, start.folder)
    if checkpoint:
        load_model_weights(model, checkpoint)
    if device.type == "cpu" and dtype == "bfloat16":
        fit_linear_layers(model)
    return model.to(device, parallel.DTYPES[dtype])
