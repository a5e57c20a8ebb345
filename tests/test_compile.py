"""torch.compile and recomputation of what is cheap: whole graphs, a fixed number of them, no product twice, and
the gradients of layers without either."""

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow.execution.loss import loss_sum
from chunkflow.planning.chunks import build_groups
from chunkflow.planning.memory import Layout, StageSizes
from chunkflow.settings.config import Config
from chunkflow.training import parallel
from models import families
from tests.helpers.layouts import join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    chunked_gradients,
    random_sequences,
    whole_sequence_gradients,
)

every_family = pytest.mark.parametrize("family", families)
# Before attention: with gradients, without, and for keys and values only; after it: with and without.
GRAPHS = 5


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def prepared(model, mode, backend=None):
    """`mode`: activation_checkpoint.mode, or the option of "selective"."""
    config = Config()
    config.activation_checkpoint.mode = mode if mode in ("none", "full") else "selective"
    config.activation_checkpoint.selective_ac_option = mode if mode in ("op", "2") else "op"
    config.compile.enable, config.compile.backend = backend is not None, backend
    parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
    parallel.apply_compile(model, config.compile)
    return model


def graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# (lengths, k): dependent chunks and packed ones; a recomputed first chunk; a last chunk of one token; a dummy
PLANS = [
    ([60, 9, 12], 1),
    ([60, 9, 12], 2),
    ([33, 16, 20, 1], 1),
    ([49, 7], 9),
    ([13], 1),
]


@pytest.mark.proves("one process + compile + k > 1", "one process + compile + full/selective")
@pytest.mark.parametrize(
    "family, mode, backend",
    [
        ("llama3", "op", "aot_eager"),
        ("qwen2", "op", "aot_eager"),
        ("qwen3", "op", "aot_eager"),
        ("qwen2", "none", "aot_eager"),
        ("llama3", "full", "eager"),
    ],
)
def test_compiled_layers_are_exact_in_a_fixed_number_of_graphs(family, mode, backend):
    reference, model = small_model(family), prepared(small_model(family), mode, backend)
    seen = []
    for seed, (lengths, k) in enumerate(PLANS):
        sequences = random_sequences(lengths, 96, seed)
        loss, expected = whole_sequence_gradients(reference, sequences)
        got_loss, got, _ = chunked_gradients(model, sequences, build_groups(lengths, 16), k)
        assert abs(got_loss - loss) <= 1e-10 * abs(loss)
        assert_same_gradients(got, expected, 1e-10)
        seen.append(graphs())
    assert seen == [GRAPHS] * len(PLANS), "of all three layers"


def compiled_ranks():
    mesh = join().mesh
    lengths, seen = [40, 20, 33], []
    sequences = random_sequences(lengths, 96, 0)
    loss, expected = whole_sequence_gradients(small_model("qwen3", n_layers=2), sequences)
    for reshard, mode, backend in [
        ("always", "op", "aot_eager"),
        ("never", "full", "eager"),
        ("always", "op", None),
    ]:
        torch._dynamo.reset()
        counters.clear()
        config = layout_config(reshard=reshard)
        model = prepared(small_model("qwen3", n_layers=2), mode, backend)
        parallel.apply_fsdp(model, mesh, config.training, reshard == "always")
        for k in (1, 2):
            got_loss, got = sharded_gradients(model, lengths, sequences, config, k)
            assert abs(got_loss - loss) <= 1e-10 * loss
            assert_same_gradients(got, expected, 1e-10)
            seen.append(graphs() if backend else 0)
    return seen


@pytest.mark.proves("always + compile + selective + k > 1", "never + compile + full + k > 1")
def test_compiled_layers_under_fsdp():
    for seen in run_ranks(compiled_ranks, 2):
        assert seen == [GRAPHS] * 4 + [0] * 2


class Products(TorchDispatchMode):
    """Counts operations while it is on."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return self.count["mm"] + self.count["addmm"]


def step(model, lengths, k):
    """(gradients, matrix products, attention's forwards) of a step."""
    sequences = random_sequences(lengths, 96, 0)
    with Products() as counted:
        _, gradients, _ = chunked_gradients(model, sequences, build_groups(lengths, 16), k)
    flash = [count for name, count in counted.count.items() if name.endswith("attention_for_cpu")]
    return gradients, counted.products, sum(flash)


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2])
def test_what_is_cheap_is_recomputed_bit_for_bit_and_no_product_is(family, dtype, k):
    expected, *counts = step(small_model(family, dtype), [60, 9, 12], k)
    got, *counts_op = step(prepared(small_model(family, dtype), "op"), [60, 9, 12], k)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert counts_op == counts and min(counts) > 0
    _, products, _ = step(prepared(small_model(family, dtype), "full"), [60, 9, 12], k)
    assert products > counts[0], "the count sees what is recomputed"


def kept_bytes(loss, model):
    """Bytes of all that the graph behind `loss` keeps, each storage once, parameters aside."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept, seen, nodes = {}, set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        saved = getattr(node, "saved_tensors", None)
        for tensor in saved or [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]:
            if isinstance(tensor, torch.Tensor):
                kept[tensor.untyped_storage()._cdata] = tensor
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)


@pytest.mark.parametrize(
    "family, backend",
    [("llama3", "aot_eager"), ("qwen2", "aot_eager"), ("qwen3", "aot_eager"), ("qwen2", "inductor")],
)
def test_compiled_layers_keep_what_is_predicted_and_repeat_no_product(family, backend):
    tokens = 100
    chunk = chunk_tensors(build_groups([tokens], 128), random_sequences([tokens], 96, 0))[0][0]
    chunk.end = loss_sum
    products = []
    for model in (small_model(family), prepared(small_model(family), "op", backend)):
        loss = model(chunk.tokens, chunk)
        loss.backward()  # compiles backward
        loss = model(chunk.tokens, chunk)
        kept = kept_bytes(loss, model)
        with Products() as counted:
            loss.backward()
        products.append(counted.products)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stage = StageSizes(model.args, shapes, Layout(compute=8, recompute_cheap=True))
    assert kept == stage.activations(tokens, True)
    assert products[0] == products[1] > 0
