"""Kernels and bytes of a layer and of the loss on CUDA, counted on fake tensors, as upper bounds; memory of the
loss against its prediction; and the same branches run for real on a CPU, against plain ones.

Kernels of attention are not counted here: they replace nothing below and have tests of their own.
"""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from chunkflow.execution import loss, norm
from chunkflow.execution.rotary import Rotary, rotary_frequencies
from chunkflow.planning import memory
from models import qwen2
from tests.helpers.counts import Launches, cuda_branches, fake_cuda
from tests.helpers.reference import naive_cross_entropy, whole_sequence
from tests.test_memory import LiveBytes

pytestmark = pytest.mark.quick
BF16 = torch.bfloat16
GIB = 2**30


def inputs(tokens, vocabulary, width, dtype=BF16):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    labels[::3] = -100
    chunk = whole_sequence(labels, labels, loss.loss_sum)
    chunk.loss_gradient = 1 / tokens
    return hidden, weight, chunk


def count_loss(tokens, vocabulary, width, at_once=True):
    """Launches of loss and gradients, and the most bytes that lived, without the inputs."""
    with fake_cuda():
        hidden, weight, chunk = inputs(tokens, vocabulary, width)
        chunk.loss_gradient = 1 / tokens if at_once else None
        with LiveBytes(hidden, weight, chunk.labels) as live, Launches() as launches:
            result = loss.loss_sum(hidden, weight, chunk)
            dhidden, dweight = torch.autograd.grad(result, (hidden, weight), torch.ones_like(result))
        assert result.dtype == torch.float32 and dhidden.dtype == dweight.dtype == BF16
        assert dhidden.shape == hidden.shape and dweight.shape == weight.shape
    return launches, live.peak


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("vocabulary, width", [(152064, 3584), (32000, 4096)])
def test_the_gradients_of_the_head_are_one_product_each(vocabulary, width, tokens, at_once):
    launches, _ = count_loss(tokens, vocabulary, width, at_once)
    slices = -(-tokens // loss.slice_tokens("cuda", vocabulary))
    passes = 1 if at_once else 2  # over the logits
    assert len(launches.products) == passes * slices + 2
    # Nothing but that product reads or writes what is as large as the weight.
    (dweight,) = [launch for launch in launches.all if (vocabulary, width) in launch.results]
    assert dweight.name == "mm"
    assert dweight.bytes == 2 * (tokens * vocabulary + tokens * width + vocabulary * width)
    # log_softmax and exp_ read and write fp32, mul reads fp32 and writes bf16.
    logits = tokens * vocabulary * (8 + 8 + 6) + (0 if at_once else tokens * vocabulary * 8)
    assert launches.other_bytes <= logits + 200 * tokens
    assert len(launches.all) <= slices * (7 if at_once else 9) + 24


def test_a_long_sequence_is_multiplied_in_blocks():
    tokens, vocabulary, width = 20000, 152064, 3584
    launches, _ = count_loss(tokens, vocabulary, width)
    slices = sum(-(-block // 512) for block in (8192, 8192, 20000 - 2 * 8192))
    assert len(launches.products) == slices + 2 * 3
    sums = [launch for launch in launches.all if (vocabulary, width) in launch.results]
    # Products that add to the fp32 sum; it is made of zeros and narrowed once.
    assert sorted(launch.name for launch in sums) == ["_to_copy", "addmm", "addmm", "addmm", "zeros_like"]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("vocabulary, width", [(152064, 3584), (32000, 4096)])
@pytest.mark.parametrize("tokens", [300, 2048, 8192, 20000])
def test_memory_of_the_loss_is_what_was_predicted(tokens, vocabulary, width, at_once):
    _, peak = count_loss(tokens, vocabulary, width, at_once)
    args = dataclasses.replace(qwen2.flavors["7B"], vocab_size=vocabulary, dim=width)
    shapes = {"norm.weight": (width,), "output.weight": (vocabulary, width)}
    layout = memory.Layout(slice_tokens=loss.slice_tokens("cuda", vocabulary))
    predicted = memory.StageSizes(args, shapes, layout).head_temporaries(tokens)
    assert 0 <= peak - predicted <= 100 * tokens  # what each token has: targets, their logits, factors
    assert predicted < 6 * GIB + 2 * tokens * width  # whatever the sequence's length


def count_layer(tokens):
    """Launches of a layer of Qwen2.5-7B, attention aside: forward, then backward."""
    args = qwen2.flavors["7B"]
    with fake_cuda(), pytest.MonkeyPatch.context() as patch:
        # Reads queries, keys and values, and sends each a gradient.
        patch.setattr(qwen2, "chunk_attention", lambda q, k, v, chunk, layer: _NoAttention.apply(q, k, v))
        patch.setattr(qwen2, "begin_attention", lambda chunk, layer: None)
        patch.setattr(torch.nn.Linear, "reset_parameters", lambda linear: None)
        layer = qwen2.TransformerBlock(args)
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.to(BF16)))
        x = torch.empty(tokens, args.dim, dtype=BF16, requires_grad=True)
        frequencies = rotary_frequencies(args.head_dim, args.rope_theta, None, args.max_positions, x.device)
        rotary = Rotary(frequencies, torch.arange(tokens), torch.float32)
        with Launches() as forward:
            y = layer(x, rotary, SimpleNamespace(parts=[]), 0, False)
        dy = torch.empty_like(y)
        with Launches() as backward:
            gradients = torch.autograd.grad(y, (x, *layer.parameters()), dy)
        assert {tensor.dtype for tensor in (y, *gradients)} == {BF16}
    return forward, backward


class _NoAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THD, k_TGD, v_TGD):
        ctx.save_for_backward(q_THD, k_TGD, v_TGD)
        return torch.empty_like(q_THD)

    @staticmethod
    def backward(ctx, dout_THD):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def test_a_layer_launches_no_more_than_this():
    """Of norms CUDA runs 2 kernels backward, counted as one. torch.compile fuses most of the rest."""
    forward, backward = count_layer(2048)
    assert len(forward.products) == 7 and len(backward.products) == 14
    assert len(forward.all) <= 31 and len(backward.all) <= 47
    assert forward.other_bytes + backward.other_bytes <= 1.18e6 * 2048


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("block_tokens", [128, 1024])
@pytest.mark.parametrize("branches", [nullcontext, cuda_branches])
def test_blocks_add_up_to_the_gradients_of_the_whole(branches, block_tokens, at_once, monkeypatch):
    monkeypatch.setattr(loss, "HEAD_BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(loss, "_LEAST_TOKENS", 48)
    monkeypatch.setattr(loss, "_SLICE_ELEMENTS", {"cpu": 1, "cuda": 1})
    hidden, weight, chunk = inputs(300, 96, 16, torch.float64)
    chunk.loss_gradient = 0.3 if at_once else None
    with branches():
        ours = loss.loss_sum(hidden, weight, chunk)
        gradients = torch.autograd.grad(0.3 * ours, (hidden, weight))
        losses = loss.token_losses(hidden, weight, chunk)
    theirs = naive_cross_entropy(hidden, weight, chunk)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.sum(), theirs.detach(), rtol=1e-12, atol=0)
    assert not losses[chunk.labels == -100].any()
    for a, b in zip(gradients, torch.autograd.grad(0.3 * theirs, (hidden, weight))):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.fixture
def narrow_products():
    """CUDA's products of narrow matrices with a wide result, which have no CPU kernels. Yields their names."""
    calls = []

    def mm(a, b, out_dtype, *, out):
        calls.append("mm")
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    def addmm(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        calls.append("addmm")
        assert c.dtype == out_dtype == out.dtype and a.dtype == b.dtype == BF16 and beta == alpha == 1
        return out.copy_(c + a.to(out_dtype) @ b.to(out_dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        yield calls


@pytest.mark.parametrize("block_tokens, sums", [(8192, 0), (128, 3)])
@pytest.mark.parametrize("branches", [nullcontext, cuda_branches])
def test_bf16_gradients_are_rounded_once(branches, block_tokens, sums, narrow_products, monkeypatch):
    monkeypatch.setattr(loss, "HEAD_BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(loss, "_LEAST_TOKENS", 48)
    monkeypatch.setattr(loss, "_SLICE_ELEMENTS", {"cpu": 1, "cuda": 1})
    hidden, weight, chunk = inputs(300, 96, 64)
    with branches():
        ours = loss.loss_sum(hidden, weight, chunk)
        got = torch.autograd.grad(ours / 300, (hidden, weight))
    on_cuda = branches is cuda_branches
    assert narrow_products.count("addmm") == (sums if on_cuda else 0)
    assert narrow_products.count("mm") == (7 if on_cuda else 0)  # slices of at most 48 tokens
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    theirs = naive_cross_entropy(*wide, chunk)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    # Gradients of logits are rounded to bf16 (each by 2^-9 of itself at most), and so are the results.
    for a, b in zip(got, torch.autograd.grad(theirs / 300, wide)):
        assert (a.double() - b).norm() <= 2 * 2**-9 * b.norm()


def test_the_norm_of_cuda_is_that_of_the_cpu():
    module = norm.RMSNorm(64, 1e-6).double()
    torch.nn.init.normal_(module.weight)
    x, dy = torch.randn(30, 64, dtype=torch.float64, requires_grad=True), torch.randn(30, 64).double()
    results = []
    for branches in (nullcontext, cuda_branches):
        with branches(), mock.patch.object(F, "rms_norm", wraps=F.rms_norm) as called:
            y = module(x)
        assert called.call_count == (branches is cuda_branches)
        results.append((y, *torch.autograd.grad(y, (x, module.weight), dy)))
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-13 * theirs.norm()


@torch.no_grad()
def logits_of(hidden, weight):
    return loss._Head(hidden, weight).logits()


def test_bf16_logits_are_sums_of_exact_products():
    """On every CPU: bf16 products are exact in fp32, so only the sums round, C times at most."""
    hidden, weight, _ = inputs(128, 1024, 256)
    exact = hidden.double() @ weight.double().t()
    size = hidden.double().abs() @ weight.double().abs().t()
    ours = logits_of(hidden, weight)
    assert ours.dtype == torch.float32
    assert ((ours.double() - exact).abs() <= 256 * 2**-23 * size).all()


@pytest.mark.parametrize(
    "dtype, weight_dtype",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        (BF16, torch.float32),  # weights that bf16 would round
        (torch.float32, BF16),
    ],
)
def test_other_logits_are_plain_products(dtype, weight_dtype):
    hidden, weight = torch.randn(128, 256, dtype=dtype), torch.randn(1024, 256, dtype=weight_dtype)
    compute = torch.promote_types(dtype, torch.float32)
    assert torch.equal(logits_of(hidden, weight), hidden.to(compute) @ weight.to(compute).t())


def test_the_precision_of_other_products_is_left_alone():
    x, y = torch.randn(256, 256), torch.randn(256, 256)
    before, product = torch.get_float32_matmul_precision(), x @ y
    logits_of(*inputs(128, 1024, 256)[:2])
    with pytest.raises(ZeroDivisionError), loss._bf16_products():
        1 / 0  # noqa: B018
    assert torch.equal(x @ y, product) and torch.get_float32_matmul_precision() == before
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
