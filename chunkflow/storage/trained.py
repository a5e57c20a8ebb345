"""A trained model, for generation and evaluation: weights of a checkpoint or of a Hugging Face folder."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from chunkflow.execution.linear import fit_linear_layers
from chunkflow.settings.options import Config
from chunkflow.storage import hf_weights as hf
from chunkflow.storage.tensors import load_model_weights
from chunkflow.training import parallel
from chunkflow.training.build import activate_attention, check_cuda_dtype


def load_trained(
    config: Config, checkpoint: Path | None, family: ModuleType, args: Any, device: torch.device
) -> nn.Module:
    """The whole model in training.mixed_precision_param, with the weights of `checkpoint`, a run's folder
    such as step-100, or (None) of the folder that a run of this config would start from. ValueError, one
    sentence, where there are none, or they are another model's."""
    dtype = config.training.mixed_precision_param
    check_cuda_dtype(config.training)
    activate_attention(config)
    if checkpoint:
        if not checkpoint.is_dir():
            raise ValueError(
                f"--checkpoint = {checkpoint} is not a folder: name one such as outputs/checkpoint/step-100"
            )
    elif folder := hf.weights_folder(config.checkpoint, config.model.hf_assets_path):
        hf.check_weights(folder, family, args)
    else:
        raise ValueError(
            "there are no weights: set --model.hf_assets_path to a folder with safetensors, or --checkpoint"
        )
    # A checkpoint is read as it was written, in training.dtype; that may be more than the device holds.
    with torch.device("meta"), parallel.default_dtype(config.training.dtype if checkpoint else dtype):
        model = family.Transformer(args)
    model.to_empty(device="cpu" if checkpoint else device)
    if checkpoint:
        load_model_weights(model, checkpoint)
    else:
        hf.load_weights(model, family, folder)
    if device.type == "cpu" and dtype == "bfloat16":
        fit_linear_layers(model)
    return model.to(device, parallel.DTYPES[dtype])
