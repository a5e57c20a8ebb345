"""A whole step in chunks against whole sequences one by one (chunkflow.enable = false), on this machine.

    python benchmarks/step.py              # time, on a long-tailed mix: ratio, and the share of what bare
    kernels reach python benchmarks/step.py --dim 256 --layers 4 --vocab 2048 --precision float32    # the
    debug model python benchmarks/step.py --memory     # peak memory while the longest sequence grows from 4K
    to 64K tokens
    python benchmarks/step.py --profile    # where the time of a step goes; under torchrun: of a rank

What chunks gain depends on the model: every micro-batch makes and adds up a gradient as large as the weights,
which costs a whole sequence of 300 tokens (the mix's median) as much as a chunk of 2048, and matrices of few
rows multiply slowly. So the default is what the recipe runs, bf16 with fp32 sums under FSDP2 (on a mesh of
one), and a model as small as still has the proportions of real ones: matrices too large for a cache, most of
the work in the layers. In the debug model, with matrices that fit a cache, both are small.

Time: medians of interleaved runs. "Bare kernels" are the step's own matrix products and flash attention
calls, same shapes and dtypes (logits are fp32 always), run in a row with nothing around them; their time over
the step's time is the last column. On a machine that others use at the same time: OMP_NUM_THREADS=1 and
--cpu-time. Memory: each figure in a fresh process. Profile: shares of one step as a rank runs it (plan, data,
chunks with the first k, update), by torch.profiler, which slows small operations; backward counts where its
forward does.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import statistics
import time
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from attention import one_call
from result_files import new_parser, parse_args
from torch.autograd.profiler_util import FunctionEvent
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile, record_function

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.execution.loss import loss_sum
from chunkflow.execution.norm import RMSNorm
from chunkflow.execution.rotary import Rotary
from chunkflow.execution.runner import Runner, StepResult
from chunkflow.execution.stage import WholeModel
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.chunks import build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import linear_schedule
from chunkflow.reporting.device import peak_memory, reset_peak_memory
from chunkflow.settings.options import Config
from chunkflow.training import parallel
from chunkflow.training.optimizer import build_optimizer
from models import llama

CPU = torch.device("cpu")


def make_model(precision: str, **changes) -> llama.Transformer:
    """`precision`: a dtype for everything, or "recipe": bf16 with fp32 sums, under FSDP2."""
    model = llama.Transformer(dataclasses.replace(llama.flavors["debugmodel"], **changes))
    if precision == "recipe":
        config = Config()
        processes = parallel.init_processes(config.comm, config.parallelism)
        parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard=False)
    parallel.init_weights(model, 0)
    return model if precision == "recipe" else model.to(getattr(torch, precision))


def sizes(dim: int, layers: int, vocabulary: int) -> dict[str, int]:
    """Llama's proportions: heads of 64, a quarter of them (two at least) for keys and values, a feed-forward
    of 8/3 the width."""
    heads = dim // 64
    return {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": max(2, heads // 4),
        "hidden_dim": -(-8 * dim // 48) * 16,
        "vocab_size": vocabulary,
    }


def tensors(groups, vocabulary: int) -> list[list[ChunkTensors]]:
    return [
        [
            ChunkTensors(
                chunk,
                index,
                torch.randint(vocabulary, (chunk.tokens,)),
                torch.randint(vocabulary, (chunk.tokens,)),
                torch.cat([torch.arange(s.start, s.start + s.length) for s in chunk.segments]),
                shared=group.spread is not None,
            )
            for index, chunk in enumerate(group.chunks)
        ]
        for group in groups
    ]


def step(model, groups, data, k: int) -> StepResult:
    actions = linear_schedule([len(group.chunks) for group in groups], k)
    model.zero_grad()
    sharded = isinstance(model, FSDPModule)
    if sharded:
        parallel.begin_step(model, reshard=False)
    before_last = parallel.before_last_backward if sharded else lambda model: None
    runner = Runner([WholeModel(model, before_last)], CPU)
    return runner.step(actions, groups, data, sum(group.tokens for group in groups))


def bare_kernels(args: llama.ModelArgs, groups, k: int, dtype: torch.dtype, clock) -> float:
    """Seconds of the step's matrix products and attention calls alone: forward, backward, and the forwards of
    recomputation."""
    attention = args.n_heads * args.head_dim
    keys = args.n_kv_heads * args.head_dim
    layer = [
        (args.dim, attention),
        *[(args.dim, keys)] * 2,
        (attention, args.dim),
        *[(args.dim, args.hidden_dim)] * 2,
    ]
    layer.append((args.hidden_dim, args.dim))
    products = [shape for shape in layer for _ in range(args.n_layers)]
    weights = {shape: torch.randn(*shape, dtype=dtype) for shape in {*products, (args.dim, args.vocab_size)}}
    rows = max(chunk.tokens for group in groups for chunk in group.chunks)
    inputs = {width: torch.randn(rows, width, dtype=dtype) for shape in weights for width in shape}
    head = args.dim, args.vocab_size
    logits_dtype = torch.promote_types(dtype, torch.float32)
    wide_weight, wide_x = weights[head].to(logits_dtype), inputs[args.dim].to(logits_dtype)
    seconds = 0.0
    for group in groups:
        for index, chunk in enumerate(group.chunks):
            forwards = 2 if index < len(group.chunks) - k else 1
            start = clock()
            for width, columns in products:
                weight, x, y = (
                    weights[width, columns],
                    inputs[width][: chunk.tokens],
                    inputs[columns][: chunk.tokens],
                )
                for _ in range(forwards):
                    x @ weight
                y @ weight.t(), x.t() @ y
            x, y = inputs[args.dim][: chunk.tokens], inputs[args.vocab_size][: chunk.tokens]
            wide_x[: chunk.tokens] @ wide_weight
            y @ weights[head].t(), x.t() @ y
            seconds += clock() - start
    # Attention: each sequence once, whole, in one call; its forward counts again for the share that is
    # recomputed.
    longest = max(group.tokens for group in groups)
    q, k_, v, dout = (
        torch.randn(longest, heads, args.head_dim, dtype=dtype)
        for heads in (args.n_heads, *[args.n_kv_heads] * 2, args.n_heads)
    )
    for group in groups:
        ends: dict[int, int] = {}
        for chunk in group.chunks:
            for s in chunk.segments:
                ends[s.sequence] = s.start + s.length
        for length in ends.values():
            start = clock()
            one_call(*(x[:length] for x in (q, k_, v, dout)))
            seconds += args.n_layers * (clock() - start)
        repeated = group.chunks[max(0, len(group.chunks) - k)].prefix
        if repeated:
            start = clock()
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            flash(*(x[:repeated].transpose(0, 1).unsqueeze(0) for x in (q, k_, v)), 0.0, True)
            seconds += args.n_layers * (clock() - start)
    return seconds


def compare_time(arguments) -> None:
    dtype = torch.bfloat16 if arguments.precision == "recipe" else getattr(torch, arguments.precision)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    model = make_model(arguments.precision, **sizes(arguments.dim, arguments.layers, arguments.vocab))
    lengths = [
        min(length, arguments.longest)
        for length in synthetic_lengths(arguments.mix, arguments.sequences, arguments.seed)
    ]
    cost = Cost.of_model(model.args)
    useful = sum(cost.training(length) for length in lengths)
    print(
        f"dim {arguments.dim}, {arguments.layers} layers, vocabulary {arguments.vocab};"
        f" {arguments.precision}, {torch.get_num_threads()} threads; {len(lengths)} sequences,"
        f" {sum(lengths):,} tokens, longest {max(lengths):,}",
        flush=True,
    )
    ways = {"whole sequences": (whole_sequences(lengths), 1)}
    for k in arguments.k:
        ways[f"chunks of {arguments.chunk_size}, k = {k}"] = build_groups(lengths, arguments.chunk_size), k
    data = {name: tensors(groups, model.args.vocab_size) for name, (groups, _) in ways.items()}
    seconds, bare = {name: [] for name in ways}, {name: [] for name in ways}
    for run in range(arguments.runs + 1):
        for name, (groups, k) in ways.items():
            start = clock()
            step(model, groups, data[name], k)
            if run:  # the first round warms up
                seconds[name].append(clock() - start)
                bare[name].append(bare_kernels(model.args, groups, k, dtype, clock))
    base = statistics.median(seconds["whole sequences"])
    for name in ways:
        median = statistics.median(seconds[name])
        print(
            f"{name:28}: {median:6.2f} s  {base / median:5.2f} x as fast  {useful / median / 1e9:5.0f} useful"
            f" GFLOP/s  {statistics.median(bare[name]) / median:.2f} of bare kernels"
        )


def measure_memory(longest: int, chunk_size: int | None, results) -> None:
    """Peak of one step above what the process held before it, and the K/V state's share of it, in MiB."""
    model = make_model("float32", n_layers=2, dim=128, n_heads=2, n_kv_heads=1, hidden_dim=344)
    lengths = [longest, *[400] * 10]
    groups = build_groups(lengths, chunk_size) if chunk_size else whole_sequences(lengths)
    step(model, build_groups([256], 256), tensors(build_groups([256], 256), 2048), 1)  # gradients exist
    data = tensors(groups, model.args.vocab_size)
    reset_peak_memory(CPU)
    before = peak_memory(CPU).active_gib
    result = step(model, groups, data, 1)
    results.put((1024 * (peak_memory(CPU).active_gib - before), result.state_bytes / 2**20))


def compare_memory(arguments) -> None:
    context = multiprocessing.get_context("spawn")
    for longest in arguments.memory_lengths:
        figures = []
        for chunk_size in (arguments.chunk_size, None) if longest <= 16384 else (arguments.chunk_size,):
            results = context.Queue()
            process = context.Process(target=measure_memory, args=(longest, chunk_size, results))
            process.start()
            peak, state = results.get()
            process.join()
            figures.append(
                f"chunks of {chunk_size}: {peak:6.0f} MiB, of which K/V {state:4.0f} (rest"
                f" {peak - state:5.0f})"
                if chunk_size
                else f"whole: {peak:6.0f} MiB"
            )
        print(f"longest {longest:6}:  " + ";  ".join(figures), flush=True)


# ---- profile

LABELS = "planning", "data", "attention", "norms and rotary", "loss", "optimizer", "waiting for other ranks"
PRODUCTS, ELEMENTWISE, SUMS = "matrix products", "elementwise, embeddings", "sums of gradients over chunks"
COMMUNICATION, REST = "FSDP2 and communication", "not attributed: Python, autograd's engine"
PRODUCT_NAMES = {"aten::mm", "aten::addmm", "aten::matmul", "aten::linear", "aten::bmm"}


def labelled(label: str, function):
    @functools.wraps(function)
    def run(*arguments, **options):
        with record_function(label):
            return function(*arguments, **options)

    return run


def shares(events: list[FunctionEvent]) -> tuple[float, Counter[str]]:
    """Seconds of the range "step", and of each category in it; they add up to the whole."""
    (step,) = (event for event in events if event.name == "step")
    forward = {  # number of a node of autograd's graph -> the operation that made it: the last that has it
        event.sequence_nr: event for event in sorted(events, key=lambda event: event.time_range.start)
        if event.sequence_nr >= 0 and event.scope == 0
    }  # fmt: skip

    def category(event: FunctionEvent, through_backward: bool = True) -> str:
        found = REST
        while event is not None and event is not step:
            if event.name in LABELS:
                return event.name
            if event.name.startswith(("torch::autograd::AccumulateGrad", "FSDP::post_backward_accumulate")):
                return SUMS
            if event.name.startswith(("FSDP::", "c10d::", "gloo:")):
                return COMMUNICATION
            if event.name in PRODUCT_NAMES:
                found = PRODUCTS
            elif event.name.startswith("aten::") and found == REST:
                found = ELEMENTWISE
            if event.scope == 1 and through_backward and event.sequence_nr in forward:
                label = category(forward[event.sequence_nr], through_backward=False)
                if label in LABELS:
                    return label
            event = event.cpu_parent
        return found

    seconds: Counter[str] = Counter()
    for event in events:
        inside = event.thread == step.thread and event is not step
        if inside and step.time_range.start <= event.time_range.start < step.time_range.end:
            seconds[category(event)] += event.self_cpu_time_total / 1e6
    whole = step.cpu_time_total / 1e6
    seconds[REST] = whole - sum(amount for name, amount in seconds.items() if name != REST)
    return whole, seconds


def profile_step(arguments) -> None:
    """One step of this rank as the recipe runs it, in bf16 ("recipe") or fp32, both under FSDP2."""
    config = Config()
    if arguments.precision != "recipe":
        config.training.mixed_precision_param = config.training.dtype = arguments.precision
    processes = parallel.init_processes(config.comm, config.parallelism)
    args = dataclasses.replace(
        llama.flavors["debugmodel"], **sizes(arguments.dim, arguments.layers, arguments.vocab)
    )
    with parallel.default_dtype(config.training.dtype):
        model = llama.Transformer(args)
    parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard=False)
    parallel.init_weights(model, 0)
    optimizer = build_optimizer(model, config.optimizer)

    def meet(model) -> None:
        if processes.replicas > 1:
            with record_function("waiting for other ranks"):
                dist.barrier()
        parallel.before_last_backward(model)

    runner = Runner([WholeModel(model, meet)], CPU, labelled("loss", loss_sum))
    settings = PlanSettings(
        Cost.of_model(args), replicas=processes.replicas, chunk_size=arguments.chunk_size, k=arguments.k[0]
    )
    everything = synthetic_lengths(arguments.mix, arguments.sequences, arguments.seed)
    lengths = [min(length, arguments.longest) for length in everything]

    def run() -> None:
        with record_function("planning"):
            plan = plan_step(lengths, settings, [processes.replica])
        groups, (program,) = plan.groups[processes.replica], plan.programs[processes.replica]
        with record_function("data"):
            data = tensors(groups, arguments.vocab)
        parallel.begin_step(model, reshard=False)
        runner.step(program, groups, data, sum(lengths))
        with record_function("optimizer"):
            parallel.clip_grad_norm([model], 1.0, processes.mesh)
            optimizer.step()
            optimizer.zero_grad()

    patches = [(llama, "chunk_attention", "attention"), (llama, "store_keys_values", "attention")]
    patches += [(RMSNorm, "forward", "norms and rotary"), (Rotary, "__call__", "norms and rotary")]
    for owner, name, label in patches:
        mock.patch.object(owner, name, labelled(label, getattr(owner, name))).start()
    run()  # warms up
    start = time.perf_counter()
    run()
    unprofiled = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step"):
        run()
    whole, seconds = shares(list(profiler.events()))
    mock.patch.stopall()
    if processes.rank == 0:
        print(
            f"dim {arguments.dim}, {arguments.layers} layers, vocabulary {arguments.vocab};"
            f" {arguments.precision}, {torch.get_num_threads()} threads, {processes.count} ranks;"
            f" {len(lengths)} sequences, {sum(lengths):,} tokens, in chunks of {arguments.chunk_size},"
            f" k = {arguments.k[0]}; rank 0: {whole:.2f} s, without the profiler {unprofiled:.2f} s"
        )
        for name in (*LABELS[:2], PRODUCTS, *LABELS[2:6], SUMS, COMMUNICATION, LABELS[6], ELEMENTWISE, REST):
            print(f"{name:44}{seconds[name]:9.3f} s{seconds[name] / whole:8.1%}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--mix", default="lmsys", choices=("lmsys", "llama3_sft"))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--longest", type=int, default=16384, help="longer ones are cut to this")
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", default="recipe", choices=("recipe", "float32", "float64"))
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds instead of wall time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parse_args(parser)
    if arguments.profile:
        profile_step(arguments)
    elif arguments.memory:
        compare_memory(arguments)
    else:
        compare_time(arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
