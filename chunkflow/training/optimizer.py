"""The optimizer and torchtitan's learning-rate schedule: warm-up, stable, decay."""

import logging
import math
import os
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from chunkflow.settings import options
from chunkflow.training.parallel import to_local

logger = logging.getLogger(__name__)


def check_optimizer(
    settings: options.Optimizer, compiling: options.Compile, training: options.Training, fake: bool
) -> None:
    """ValueError, one sentence, where the optimizer cannot run on this machine (`fake`: the fake backend)."""
    if settings.name == "AdamW8bit":
        if training.dtype == "float64":
            raise ValueError(
                'optimizer.name = "AdamW8bit" computes in float32, which contradicts training.dtype ='
                ' "float64": set "AdamW"'
            )
        if settings.implementation != "fused":
            raise ValueError(
                f'optimizer.implementation = "{settings.implementation}" is for AdamW, optimizer.name ='
                ' "AdamW8bit" has its own kernels: remove one'
            )
        if fake:
            raise ValueError(
                'optimizer.name = "AdamW8bit" reads its tensors, which have no content with comm.mode ='
                ' "fake_backend": set "AdamW" for this check'
            )
    compiled = {
        'optimizer.name = "AdamW8bit"': settings.name == "AdamW8bit",
        "compile.enable = true": compiling.enable and compiling.backend == "inductor",
    }
    on_cpu = not torch.cuda.is_available() or training.enable_cpu_offload
    if not fake and on_cpu and any(compiled.values()) and not _compiles_nothing():
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError(
                f"{next(name for name, used in compiled.items() if used)} compiles for the CPU, but there is"
                " no C++ compiler: install g++ (or name one in CXX), or set TORCH_COMPILE_DISABLE=1 in the"
                " environment to run slower without"
            ) from None


def _compiles_nothing() -> bool:
    return os.environ.get("TORCH_COMPILE_DISABLE") == "1"


def build_optimizer(model: nn.Module, settings: options.Optimizer) -> Optimizer:
    """AdamW, or torchao's AdamW8bit; weight decay applies to all that is trained, as in torchtitan."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments = {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "AdamW8bit":
        return _adamw_8bit(model, trained, arguments)
    arguments |= {name: settings.implementation == name for name in ("fused", "foreach")}
    # In a group, since the list of a stage of frozen parameters is empty.
    return torch.optim.AdamW([{"params": trained}], **arguments)


def _adamw_8bit(model: nn.Module, trained: list[nn.Parameter], arguments: dict) -> Optimizer:
    """Moments in 8 bits with a scale for each block of 256; shards of fewer than 4096 elements, or of no
    whole blocks, have theirs in float32. torchao is imported only here: it takes seconds, and it warns."""
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    @OptimState8bit.implements(torch.ops.aten._to_copy.default)
    def to_copy(function, types, given, named):
        """torchao 0.18's returns the state's own parts where they are on the device already."""
        (state,), dtype = given, named.pop("dtype", given[0].dtype)
        parts = [function(part, **named) for part in (state.codes, state.scale, state.qmap)]
        return OptimState8bit(*parts, state.signed, dtype=dtype)

    optimizer = AdamW8bit([{"params": trained}], **arguments)
    tensors = optimizer_tensors(optimizer, dict(model.named_parameters()))
    moments = [to_local(state) for name, state in tensors.items() if not name.endswith(".step")]
    parts = []
    for state in moments:
        parts += [state.codes, state.scale, state.qmap] if hasattr(state, "codes") else [state]
    logger.info(
        f"AdamW8bit keeps this rank's moments in {sum(part.nbytes for part in parts):,} bytes, AdamW would"
        f" take {4 * sum(state.numel() for state in moments):,}"
    )
    if _compiles_nothing():  # torchao asks for one whole graph, which is then an error
        torch.compiler.set_stance("force_eager")
    else:
        logger.info("AdamW8bit compiles its update in the first step, which takes up to a minute")
    return optimizer


def optimizer_tensors(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """State of the optimizer as "optimizer.NAME.KEY", for the given parameters; zeros before the first step.

    The tensors themselves, sharded like their parameters: torch.distributed.checkpoint saves them and loads
    into them. Another number of ranks may load them, except where it would cut an 8-bit block of 256
    elements: torchao then raises ValueError (rows with a multiple of 256 elements are never cut).
    """
    tensors = {}
    for group in optimizer.param_groups:
        trained = {id(parameter) for parameter in group["params"]}
        for name, parameter in parameters.items():
            if id(parameter) not in trained or not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            if not state:  # as the first step would make it
                step_device = parameter.device if group.get("fused") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
                # torchao's optimizers choose their dtype
                zeros = getattr(optimizer, "_new_buffer", lambda like, signed: torch.zeros_like(like))
                state |= {"exp_avg": zeros(parameter, True), "exp_avg_sq": zeros(parameter, False)}
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return tensors


def _factor(step: int, steps: int, schedule: options.LrScheduler) -> float:
    warmup, decay_ratio = min(schedule.warmup_steps, steps), schedule.decay_ratio
    decay = steps - warmup if decay_ratio is None else min(round(steps * decay_ratio), steps - warmup)
    if step <= warmup:
        return step / warmup
    done = step - 1 - (steps - decay)
    if done < 0:
        return 1.0
    progress = done / decay
    remaining = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[schedule.decay_type]
    return schedule.min_lr_factor + (1 - schedule.min_lr_factor) * remaining


def set_learning_rate(
    optimizer: Optimizer, step: int, rate: float, schedule: options.LrScheduler, steps: int
) -> float:
    """Sets and returns the learning rate of `step` (from 1), of a run of `steps` with the full rate `rate`.

    Linear warm-up, then the full rate, then decay over the last decay_ratio of all steps (unset: over all
    after warm-up) towards min_lr_factor of the full rate.
    """
    rate *= _factor(step, steps, schedule)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's: a new rate then compiles nothing anew
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rate
