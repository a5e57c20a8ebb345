"""The rates of this device with a config's model, measured: steps of a few chunks, as training runs them."""

import copy
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from chunkflow.execution.linear import fit_linear_layers
from chunkflow.execution.loss import loss_sum
from chunkflow.execution.runner import Runner
from chunkflow.execution.shared_state import all_gather, reduce_scatter
from chunkflow.execution.stage import WholeModel
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.balance import NODE
from chunkflow.planning.chunks import Chunk
from chunkflow.planning.planner import Plan, plan_step
from chunkflow.planning.step_time import Pass, Rates, StepTime
from chunkflow.settings import options
from chunkflow.settings.config import Config
from chunkflow.training import build, parallel, prediction
from chunkflow.training.converters import convert_model
from chunkflow.training.lora import apply_lora
from chunkflow.training.rates import PASSES, analytic, device_of, save

logger = logging.getLogger(__name__)

LAYERS = 4  # at most, of the model that is run: its layers are all alike
VOCABULARY = 16384  # at most, of its head: a large one would take a CPU minutes
# Tokens of a sequence and chunk_size, with k = 1; a longer sequence is cut to training.seq_len.
STEPS = (64, 256), (1024, 256), (2048, 512), (4096, 1024), (8192, 2048), (8192, 8192), (16384, 2048)
SHARED = 2048  # tokens for each rank of the sequence that all share, in two chunks
ROUNDS = 12  # of all steps: an action's fastest counts, since other work of the machine only slows it
SECONDS = 45  # after which no other step is begun, nor one that would probably end later
BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # that are moved to see how fast; ten times
FREE, FAST = Pass(0.0, 0.0, 0.0), 1e30
NOTHING = Rates(FREE, FREE, 0.0, FAST, FAST, FAST, FAST)
# Devices on which but one thing takes time: a second for each FLOP, layer or element.
UNITS = [
    *(
        NOTHING._replace(**{name: Pass(*(float(each == field) for each in Pass._fields))})
        for name in PASSES
        for field in Pass._fields
    ),
    NOTHING._replace(head=1.0),
]
MEETING = NOTHING._replace(latency=1.0)


class Work(NamedTuple):
    """An action that was run, and the seconds it took."""

    amounts: tuple[float, ...]  # of what each of UNITS is the time of
    seconds: float


class Planned(NamedTuple):
    """A step of one sequence."""

    plan: Plan
    time: Callable[[Rates], StepTime]  # by other rates

    def amounts(self, devices: Sequence[Rates], replica: int = 0) -> list[tuple[float, ...]]:
        """Of each action of a replica, the seconds on each of these devices."""
        (program,), groups = self.plan.programs[replica], self.plan.groups[replica]
        times = [self.time(device) for device in devices]
        return [tuple(time.action(action, groups) for time in times) for action in program]


def calibrate(config: Config, spec: build.ModelSpec) -> str:
    """Measures and keeps the rates of this device; returns what it found, one line. Under torchrun all ranks
    measure what goes between them; all but rank 0 end here."""
    name = device_of(config, planned=False)
    comm = dataclasses.replace(config.comm, mode=options.Comm().mode)
    processes = parallel.init_processes(comm, options.Parallelism(), config.training.enable_cpu_offload)
    rates, count = measured_rates(config, spec, name, processes.blocks)
    dist.destroy_process_group()
    if processes.rank:
        raise SystemExit(0)
    path = save(rates, spec.name, spec.args, config.training.mixed_precision_param, name)
    products, attention = (f"{1e-12 / seconds:.3g}" if seconds else "any" for seconds in rates.forward[:2])
    between = ""
    if processes.count > 1:
        speed = rates.gather if processes.count <= NODE else rates.network
        between = f", {speed / 1e9:.3g} GB/s and {1e6 * rates.latency:.3g} us between ranks"
    return (
        f"{name}: {products} TFLOP/s in products, {attention} in attention,"
        f" {1e6 * rates.forward.layer:.3g} us a layer{between}, from {count} actions; kept in {path}"
    )


def measured_rates(
    config: Config, spec: build.ModelSpec, name: str, blocks: dict[range, dist.ProcessGroup]
) -> tuple[Rates, int]:
    """The rates of the device with this `name`, and from how many actions. All ranks call; `blocks`: as
    `Processes.blocks`, of a layout in which each rank is a replica."""
    device = torch.device("cpu" if name == "cpu" else f"cuda:{torch.cuda.current_device()}")
    assumed, steps = analytic(name), Steps(config, spec, device, name, blocks)
    works = steps.alone(assumed)
    rates = fitted(works, assumed)._replace(**_bandwidths(device))
    return rates._replace(latency=steps.latency(rates)), len(works)


class Steps:
    """Steps of one sequence that a model like the config's runs, with a few of its layers."""

    def __init__(
        self,
        config: Config,
        spec: build.ModelSpec,
        device: torch.device,
        name: str,
        blocks: dict[range, dist.ProcessGroup],
    ):
        args = spec.args
        layers, vocabulary = min(LAYERS, args.n_layers), min(VOCABULARY, args.vocab_size)
        args = dataclasses.replace(args, n_layers=layers, vocab_size=vocabulary)
        self.spec, self.name = spec._replace(args=args, layers=[range(layers)]), name
        self.config = copy.deepcopy(config)
        self.config.parallelism, self.config.chunkflow = options.Parallelism(), options.ChunkFlow()
        self.config.parallelism.fsdp_reshard_after_forward = "never"
        self.runner = _runner(self.config, self.spec, device, blocks)

    def alone(self, assumed: Rates) -> list[Work]:
        """What the actions of STEPS took, at the same time on all ranks. Steps that do not fit into memory or
        take too long are left out: as those `assumed` rates have it, and how far off they were before."""
        lengths = [min(length, self.config.training.seq_len) for length, _ in STEPS]
        sizes = {(length, min(size, length)) for length, (_, size) in zip(lengths, STEPS)}
        steps = [self._planned(*each, replicas=1) for each in sorted(sizes)]
        guesses = [step.time(assumed).step(step.plan) for step in steps]
        for step in steps[:2]:  # kernels are compiled, and chosen
            self._run(step.plan)
        fastest: dict[int, list[float]] = {}
        start, spent, expected = time.perf_counter(), 0.0, 0.0
        for number in list(range(len(steps))) * ROUNDS:
            begin = time.perf_counter()
            if fastest and begin - start + guesses[number] * spent / expected > SECONDS:
                continue
            try:
                seconds = self._run(steps[number].plan)
            except torch.OutOfMemoryError:
                logger.info(
                    f"a step of {steps[number].plan.tokens:,} tokens does not fit into memory: left out"
                )
                continue
            spent, expected = spent + time.perf_counter() - begin, expected + guesses[number]
            fastest[number] = list(map(min, seconds, fastest.get(number, seconds)))
        return [
            Work(*work)
            for number, seconds in fastest.items()
            for work in zip(steps[number].amounts(UNITS), seconds)
        ]

    def latency(self, rates: Rates) -> float:
        """Seconds of a collective, from what the actions of a sequence that all ranks share take beyond what
        they would by these `rates`, if that is known."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        length = min(SHARED * ranks, self.config.training.seq_len)
        step = self._planned(length, max(1, length // (2 * ranks)), ranks)
        if not step.plan.spread_sequences:
            return rates.latency
        seconds = map(min, zip(*(self._run(step.plan, rank) for _ in range(ROUNDS))))
        meetings, without = zip(*step.amounts((MEETING, rates._replace(latency=0.0)), rank))
        beyond = sum(seconds) - sum(without)
        return max(0.0, beyond / sum(meetings)) if sum(meetings) else rates.latency

    def _planned(self, length: int, chunk_size: int, replicas: int) -> Planned:
        self.config.chunkflow.chunk_size, spec = chunk_size, self.spec
        settings = build.plan_settings(self.config, spec, replicas, self.name)._replace(room=None)
        layout = spec.family, spec.args, spec.layers, replicas, self.name
        sizes = prediction.stage_sizes(self.config, *layout)
        return Planned(plan_step([length], settings), functools.partial(StepTime, settings, sizes))

    def _run(self, plan: Plan, replica: int = 0) -> list[float]:
        """Seconds of each action of a replica."""
        (program,), groups = plan.programs[replica], plan.groups[replica]
        chunks = [
            [self._chunk(chunk, index, group.spread is not None) for index, chunk in enumerate(group.chunks)]
            for group in groups
        ]
        timeline = self.runner.step(program, groups, chunks, 1.0).clock.timeline()
        return [end - begin for _, begin, end in timeline]

    def _chunk(self, chunk: Chunk, index: int, shared: bool) -> ChunkTensors:
        """A chunk of any tokens."""
        positions = torch.cat([torch.arange(each.start, each.start + each.length) for each in chunk.segments])
        ids = torch.randint(self.spec.args.vocab_size, (chunk.tokens,))
        return ChunkTensors(chunk, index, ids, ids, positions, shared)


def _runner(
    config: Config, spec: build.ModelSpec, device: torch.device, blocks: dict[range, dist.ProcessGroup]
) -> Runner:
    """Of the model as the recipe builds it, whole on each rank."""
    training, ranks = config.training, dist.get_world_size()
    compute = parallel.DTYPES[training.mixed_precision_param]
    build.activate_attention(config)
    with torch.device("meta"), parallel.default_dtype(training.dtype):
        model = spec.family.Transformer(spec.args)
    convert_model(model, config.model.converters, config.quantize.linear.float8)
    apply_lora(model, config.lora, spec.family, training)
    parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
    parallel.apply_compile(model, config.compile)
    if device.type == "cpu" and compute == torch.bfloat16 and not config.compile.enable:
        fit_linear_layers(model)
    alone = init_device_mesh(device.type, (ranks, 1), mesh_dim_names=("all", "alone"))["alone"]
    parallel.apply_fsdp(model, alone, training, reshard=False)
    model.to_empty(device="cpu" if training.enable_cpu_offload else device)
    parallel.init_weights(model, 0)
    parallel.begin_step(model, reshard=False)
    return Runner([WholeModel(model, lambda model: None)], device, loss_sum, blocks)


def fitted(works: Sequence[Work], rates: Rates) -> Rates:
    """`rates` with those of UNITS that explain the works best: least squares of relative errors, none below
    0."""
    rows = torch.tensor([work.amounts for work in works], dtype=torch.float64)
    seconds = torch.tensor([work.seconds for work in works], dtype=torch.float64)
    *found, head = _least_squares(rows / seconds[:, None])
    fields = len(Pass._fields)
    return rates._replace(forward=Pass(*found[:fields]), backward=Pass(*found[fields:]), head=head)


def _least_squares(rows: torch.Tensor) -> list[float]:
    """The x of at least 0 for which rows @ x is nearest to 1 (Lawson and Hanson, 1974)."""
    scale = rows.norm(dim=0).clamp_min(1e-300)
    rows, ones = rows / scale, rows.new_ones(len(rows), 1)
    x, used = rows.new_zeros(rows.size(1)), []
    for _ in range(3 * rows.size(1)):
        slopes = rows.t() @ (ones[:, 0] - rows @ x)
        slopes[used] = 0.0
        if slopes.max() <= 1e-9 * len(rows):
            break
        used.append(int(slopes.argmax()))
        while used:
            solved = torch.linalg.lstsq(rows[:, used], ones, driver="gelsd").solution[:, 0]
            if solved.min() > 0:
                break
            old = x[used]
            step = min(a / max(a - b, 1e-300) for a, b in zip(old.tolist(), solved.tolist()) if b <= 0)
            x[used] = old + step * (solved - old)
            used = [column for column in used if x[column] > 1e-12]
            x[[column not in used for column in range(len(x))]] = 0.0
        x[used] = solved
    return (x / scale).tolist()


def _bandwidths(device: torch.device) -> dict[str, float]:
    """Bytes a second of memory; on a GPU to and from the host; under torchrun between ranks."""
    nbytes = BYTES[device.type]
    some, other = (torch.ones(nbytes // 4, device=device) for _ in range(2))

    def fastest(move: Callable[[], object]) -> float:
        seconds = []
        for _ in range(10):
            start = _now(device)
            move()
            seconds.append(_now(device) - start)
        return min(seconds)

    rates = {"memory": 3 * nbytes / fastest(lambda: some.add_(other))}
    if device.type == "cuda":
        host = torch.ones(nbytes // 4, pin_memory=True)
        rates["host"] = nbytes / fastest(lambda: some.copy_(host, non_blocking=True))
    ranks = dist.get_world_size()
    if ranks == 1:
        return rates
    shard = some[: some.numel() // ranks]
    whole = other[: shard.numel() * ranks]

    def meet() -> None:
        all_gather(whole, shard)
        reduce_scatter(shard, whole)

    # What each rank sends, and receives.
    rates["gather" if ranks <= NODE else "network"] = 2 * 4 * shard.numel() * (ranks - 1) / fastest(meet)
    return rates


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
