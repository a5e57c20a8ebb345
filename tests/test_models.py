"""The models alone: sizes, precision, rotary angles, stages, initialisation; numbers from transformers 5.23
as goldens."""

import dataclasses
import inspect
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow.execution import linear
from chunkflow.execution.linear import fit_linear_layers
from chunkflow.execution.loss import last_logits, loss_sum
from chunkflow.execution.norm import RMSNorm
from chunkflow.execution.rotary import Rotary, rotary_frequencies
from chunkflow.execution.state import KeyValueState
from chunkflow.planning.chunks import build_groups
from models import families, llama
from tests.helpers.reference import chunk_tensors, random_sequences, whole_sequence

pytestmark = pytest.mark.quick

SMALL = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "hidden_dim": 48,
    "vocab_size": 96,
}
every_family = pytest.mark.parametrize("family", families)


def small_model(family, dtype=torch.float64, **changes):
    model = families[family].Transformer(
        dataclasses.replace(families[family].flavors["debugmodel"], **{**SMALL, **changes})
    )
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(number)
            model.init_parameter(name, parameter, generator)
            parameter.mul_(8).add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.to(dtype)


def standalone_chunk(length=20):
    return whole_sequence(*random_sequences([length], SMALL["vocab_size"], 0)[0], loss_sum)


def record_calls(model):
    """Names of the modules that run from now on, and the dtypes they return."""
    calls = {}

    def record(name):
        def call(module, inputs, output):
            output = output[-1] if isinstance(output, tuple) else output
            calls[name] = getattr(output, "dtype", None)

        return call

    for name, module in model.named_modules():
        module.register_forward_hook(record(name))
    return calls


# Sizes


PARAMETERS = {
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "3B"): 3_212_749_824,
    ("qwen2", "0.5B"): 494_032_768,
    ("qwen2", "1.5B"): 1_543_714_304,
    ("qwen2", "3B"): 3_085_938_688,
    ("qwen2", "7B"): 7_615_616_512,
    ("qwen2", "14B"): 14_770_033_664,
    ("qwen2", "32B"): 32_763_876_352,
    ("qwen2", "72B"): 72_706_203_648,
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
}


def test_published_parameter_counts():
    counts = {}
    for family, module in families.items():
        for flavor in set(module.flavors) - {"debugmodel"}:
            with torch.device("meta"):
                model = module.Transformer(module.flavors[flavor])
            assert all(parameter.is_meta for parameter in model.parameters())
            counts[family, flavor] = sum(parameter.numel() for parameter in model.parameters())
    assert counts == PARAMETERS


@every_family
def test_debug_model(family):
    args = families[family].flavors["debugmodel"]
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.vocab_size) == (256, 4, 4, 2, 2048)
    assert args.max_positions == 131072 and args.tied_embeddings == (family != "llama3")
    assert (args.head_dim != args.dim // args.n_heads) == (family == "qwen3")


def test_families_share_names_and_common_parts():
    """Duplication is by design; silent divergence is not."""
    for module in families.values():
        assert [field.name for field in dataclasses.fields(module.ModelArgs)] == [
            field.name for field in dataclasses.fields(llama.ModelArgs)
        ]
        for part in ("Transformer", "TransformerBlock", "FeedForward"):
            assert inspect.getsource(getattr(module, part)) == inspect.getsource(getattr(llama, part)), part


@every_family
def test_names_and_biases(family):
    model = small_model(family)
    names = {
        name.removeprefix("layers.1.") for name, _ in model.named_parameters() if name.startswith("layers.1.")
    }
    expected = {f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")}
    expected |= {f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")} | {
        "attention_norm.weight",
        "ffn_norm.weight",
    }
    if family == "qwen2":
        expected |= {f"attention.{name}.bias" for name in ("wq", "wk", "wv")}
    if family == "qwen3":
        expected |= {"attention.q_norm.weight", "attention.k_norm.weight"}
    assert names == expected
    assert list(model.layers) == ["0", "1", "2"] and not list(model.buffers())


# Numbers from transformers


GOLDEN_SCALING = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "qwen2": {"rope_type": "linear", "factor": 2.0},
    "qwen3": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
GOLDEN_LOSS_AND_LOGITS = {
    "llama3": (118.115647131, [0.846062581, -1.344881918, -1.657483618, -0.613373564]),
    "qwen2": (116.232308424, [1.529485386, 1.138384601, -2.671533260, 0.804811367]),
    "qwen3": (120.123706509, [1.673333032, 0.310680007, -0.241609752, -0.116585983]),
}


@every_family
def test_loss_and_logits_are_those_of_transformers(family):
    """LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM with the weights below (their norms and angles are
    in fp32)."""
    module = families[family]
    args = module.ModelArgs(
        **{**SMALL, "n_layers": 2, "head_dim": 16 if family == "qwen3" else 8},
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=GOLDEN_SCALING[family],
        max_positions=64,
        tied_embeddings=family == "qwen3",
    )
    model = module.Transformer(args).double()
    with torch.no_grad():
        for phase, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.sin(0.013 * steps**2 + phase).view_as(parameter)
            parameter.copy_(
                1 + wave / 2 if parameter.dim() == 1 else 1.5 * wave / math.sqrt(parameter.size(1))
            )
    tokens = torch.arange(24) ** 2 * 7 % 96
    chunk = whole_sequence(tokens, torch.cat([tokens[1:], torch.tensor([-100])]), loss_sum)
    loss, logits = GOLDEN_LOSS_AND_LOGITS[family]
    assert model(tokens, chunk).item() == pytest.approx(loss, abs=2e-5)
    chunk.end = last_logits
    last = model(tokens, chunk)[:4]
    torch.testing.assert_close(last, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-5)


# LlamaRotaryEmbedding(...).inv_freq and .attention_scaling with head_dim 32, rope_theta 500000, 131072
# positions.
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn, attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
}
GOLDEN_FACTORS = {
    "yarn": 1.138629436111989,
    "yarn, not truncated": 1.2079441541679836,
    "yarn, mscale": 0.9210423553163399,
    "yarn, attention_factor": 1.25,
}
GOLDEN_FREQUENCIES = {
    None: [
        1.0,
        0.440366626,
        0.193922758,
        0.0853971019,
        0.0376060307,
        0.0165604409,
        0.00729266508,
        0.00321144611,
        0.00141421345,
        0.000622772437,
        0.000274248188,
        0.000120769742,
        5.31829573e-05,
        2.34199979e-05,
        1.03133852e-05,
        4.54167048e-06,
    ],
    "linear": [
        0.25,
        0.110091656,
        0.0484806895,
        0.0213492755,
        0.00940150768,
        0.00414011022,
        0.00182316627,
        0.000802861527,
        0.000353553361,
        0.000155693109,
        6.85620471e-05,
        3.01924356e-05,
        1.32957393e-05,
        5.85499947e-06,
        2.57834631e-06,
        1.13541762e-06,
    ],
    "llama3": [
        1.0,
        0.440366626,
        0.193922758,
        0.0853971019,
        0.0376060307,
        0.0165604409,
        0.00729266508,
        0.00321144611,
        0.000524846022,
        7.78465546e-05,
        3.42810235e-05,
        1.50962178e-05,
        6.64786967e-06,
        2.92749974e-06,
        1.28917316e-06,
        5.6770881e-07,
    ],
    "yarn": [
        1.0,
        0.440366626,
        0.193922758,
        0.0853971019,
        0.0376060307,
        0.0165604409,
        0.00729266508,
        0.00272972928,
        0.000989949447,
        0.000342524843,
        0.000109699278,
        3.01924356e-05,
        1.32957393e-05,
        5.85499947e-06,
        2.57834631e-06,
        1.13541762e-06,
    ],
    "yarn, not truncated": [
        1.0,
        0.440366626,
        0.193922758,
        0.0853971019,
        0.03507635,
        0.0120173823,
        0.00378200528,
        0.001000494,
        0.000176776681,
        7.78465546e-05,
        3.42810235e-05,
        1.50962178e-05,
        6.64786967e-06,
        2.92749974e-06,
        1.28917316e-06,
        5.6770881e-07,
    ],
    "yarn, mscale": [
        1.0,
        0.440366626,
        0.193922758,
        0.0853971019,
        0.0376060307,
        0.0125238327,
        0.00373749086,
        0.000863076129,
        3.53553369e-05,
        1.55693106e-05,
        6.85620444e-06,
        3.01924365e-06,
        1.32957393e-06,
        5.85500004e-07,
        2.57834614e-07,
        1.13541766e-07,
    ],
    "yarn, attention_factor": [
        1.0,
        0.440366626,
        0.193922758,
        0.0853971019,
        0.0376060307,
        0.0165604409,
        0.00729266508,
        0.00321144611,
        0.00123743678,
        0.000467079313,
        0.000171405118,
        6.03848675e-05,
        1.99436108e-05,
        5.85499947e-06,
        2.57834631e-06,
        1.13541762e-06,
    ],
}


def frequencies(scaling, head_dim=32, theta=500000.0, max_positions=131072):
    return rotary_frequencies(head_dim, theta, scaling, max_positions, "cpu")


@pytest.mark.parametrize("kind", GOLDEN_FREQUENCIES)
def test_rotary_frequencies_are_those_of_transformers(kind):
    ours, factor = frequencies(SCALINGS.get(kind))
    golden = torch.tensor(GOLDEN_FREQUENCIES[kind], dtype=torch.float64)
    assert factor == pytest.approx(GOLDEN_FACTORS.get(kind, 1.0), abs=1e-12)
    torch.testing.assert_close(ours, golden, rtol=1e-6, atol=0)


@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_and_yarn_formulas(theta, head_dim):
    """The same, written from the papers' words, one pair at a time."""
    original, scale = 8192, 16.0
    common = {"factor": scale, "original_max_position_embeddings": original}
    llama3_scaling = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **common)
    yarn_scaling = dict(rope_type="yarn", **common)
    llama3_frequencies, _ = frequencies(llama3_scaling, head_dim, theta)
    yarn_frequencies, sharpness = frequencies(yarn_scaling, head_dim, theta)
    assert sharpness == pytest.approx(0.1 * math.log(scale) + 1)

    def index_of(turns):  # of the pair that turns so often within the original length
        return math.log(original / (turns * 2 * math.pi), theta) * head_dim / 2

    first, last = math.floor(index_of(32)), math.ceil(index_of(1))
    for pair in range(head_dim // 2):
        frequency = 1 / theta ** (2 * pair / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4:
            expected = frequency
        elif wavelength > original:
            expected = frequency / scale
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / scale + smooth * frequency
        assert llama3_frequencies[pair].item() == pytest.approx(expected, rel=1e-12)
        ramp = min(max((pair - first) / (last - first), 0), 1)
        assert yarn_frequencies[pair].item() == pytest.approx(
            ramp * frequency / scale + (1 - ramp) * frequency, rel=1e-12
        )


@pytest.mark.parametrize(
    "scaling, message",
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rope_type 'dynamic': use one of default, linear, llama3, yarn",
        ),
        ({"rope_type": "yarn"}, "needs 'factor', a number above 0"),
        ({"rope_type": "linear", "factor": "4"}, "needs 'factor', a number above 0"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "needs 'high_freq_factor'"),
    ],
)
@every_family
def test_wrong_scaling_is_refused_with_a_sentence(family, scaling, message):
    with pytest.raises(ValueError, match=message):
        families[family].ModelArgs(**SMALL, rope_scaling=scaling)


# Rotary embedding, norm, precision


def test_rotation_depends_on_the_distance_only():
    query, key = torch.randn(2, 1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(query_position, key_position):
        turned = [
            Rotary(frequencies(None), torch.tensor([position]), torch.float64)(vector)
            for position, vector in [(query_position, query), (key_position, key)]
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(5, 2) == pytest.approx(score(70005, 70002), abs=1e-9)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
    assert score(0, 0) == pytest.approx((query * key).sum().item())


def test_angles_of_far_positions_do_not_suffer_from_bf16():
    positions = torch.arange(100_000, 100_064)
    x = torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = Rotary(frequencies(None), positions, torch.float64)(x.double())
    rotary = Rotary(frequencies(None), positions, torch.promote_types(x.dtype, torch.float32))
    assert rotary.cos_T1R.dtype == torch.float32 and rotary(x).dtype == torch.bfloat16
    assert (
        rotary(x).double() - exact
    ).abs().max() < 0.03  # half an ulp of bf16 below 4, and fp32 angles near 1e5


def test_norm_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    for shape in [(6, 16), (6, 3, 16)]:
        norm = RMSNorm(16, 1e-3).double()
        x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5, generator=generator)
        upstream = torch.randn(shape, dtype=torch.float64, generator=generator)
        ours = torch.autograd.grad((norm(x) * upstream).sum(), [x, norm.weight])
        theirs = F.rms_norm(x, (16,), norm.weight, 1e-3)
        torch.testing.assert_close(norm(x), theirs, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            ours, torch.autograd.grad((theirs * upstream).sum(), [x, norm.weight]), rtol=1e-12, atol=1e-12
        )


def test_norm_of_bf16_is_computed_in_fp32():
    """One rounding, at the end: what bf16 arithmetic in between would not give."""
    norm = RMSNorm(512, 1e-5).bfloat16()
    x = (100 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    exact = F.rms_norm(x.double(), (512,), norm.weight.double(), 1e-5)
    wrong = norm(x).ne(exact.bfloat16()).float().mean()  # a tie may fall to the other side
    assert norm(x).dtype == torch.bfloat16 and wrong < 1e-3
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.nbytes), lambda nothing: nothing
    ):
        norm(x)
    assert sum(saved) < 1.1 * x.nbytes, "keeps more than x"


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations_have_the_dtype_of_the_embeddings(family, dtype):
    model, chunk = small_model(family, dtype), standalone_chunk()
    calls = record_calls(model)
    angles = []
    model.layers["1"].register_forward_pre_hook(lambda layer, inputs: angles.append(inputs[1].cos_T1R.dtype))
    loss = model(chunk.tokens, chunk)
    compute = torch.promote_types(dtype, torch.float32)
    assert loss.shape == () and loss.dtype == calls.pop("") == compute
    assert len(calls) >= 3 * 12 and set(calls.values()) == {dtype} and angles == [compute]
    assert loss.item() == pytest.approx(small_model(family)(chunk.tokens, chunk).item(), rel=0.05)


class Products(TorchDispatchMode):
    """Sizes of all matrix products while it is on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.sizes.append((*args[-2].shape, args[-1].size(1)))
        return function(*args, **(kwargs or {}))

    def __init__(self):
        super().__init__()
        self.sizes = []


@every_family
def test_padded_rows_change_nothing(family):
    chunk, results = standalone_chunk(length=20), []
    for pads in (False, True):
        model = small_model(family)
        model.layers["1"].attention.wk.weight.requires_grad_(False)
        if pads:
            fit_linear_layers(model)
        with Products() as products, mock.patch.object(linear, "pads", lambda tensor, pads=pads: pads):
            loss = model(chunk.tokens, chunk)
            loss.backward()
        layers = [sizes for sizes in products.sizes if SMALL["vocab_size"] not in sizes]
        assert len(layers) == 3 * 3 * 7 - 1, "each of 7 layers' three products in 3 blocks, but for one"
        assert {20 in sizes for sizes in layers} == {not pads} and {64 in sizes for sizes in layers} == {pads}
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (padded_loss, padded) = results
    assert (
        padded_loss == pytest.approx(loss, rel=1e-13) and padded.pop("layers.1.attention.wk.weight") is None
    )
    for name, gradient in padded.items():
        assert (gradient - gradients[name]).norm() <= 1e-12 * gradients[name].norm(), name


class Factors(TorchDispatchMode):
    """The dtypes of all factors of matrix products and attention while it is on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_") or "flash" in name:
            self.dtypes |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return function(*args, **(kwargs or {}))

    def __init__(self):
        super().__init__()
        self.dtypes = set()


@every_family
@pytest.mark.parametrize("loss_gradient", [1.0, None])
def test_a_cpu_without_bf16_instructions_multiplies_in_fp32(family, loss_gradient):
    chunk, results = standalone_chunk(length=20), []
    chunk.loss_gradient = loss_gradient
    for dtype, instructions in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        model = small_model(family).bfloat16().to(dtype)
        fit_linear_layers(model)
        has_instructions = mock.patch.object(linear, "_has_bf16_products", lambda has=instructions: has)
        with has_instructions, Factors() as factors:
            loss = model(chunk.tokens, chunk)
            loss.backward()
        narrow = dtype == torch.bfloat16 and instructions
        assert (torch.bfloat16 in factors.dtypes) == narrow and torch.float32 in factors.dtypes
        assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
        gradients = torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])
        results.append(torch.cat([loss.detach().view(1).float(), gradients]))
    exact, narrow, widened = results
    assert not torch.equal(widened, exact)  # activations are rounded to bf16
    assert (widened - exact).norm() <= 2 * (narrow - exact).norm()


# Stages, tied embeddings


def cut(model, layers, first=False, last=False):
    for name in list(model.layers):
        if int(name) not in layers:
            del model.layers[name]
    if not first:
        model.tok_embeddings = None
    if not last:
        model.norm = model.output = None
    return model


@every_family
def test_stages_are_the_model_with_layers_deleted(family):
    chunk = standalone_chunk()
    untied = {"tied_embeddings": False}
    whole = small_model(family, **untied)
    loss = whole(chunk.tokens, chunk)
    loss.backward()
    stages = [small_model(family, **untied) for _ in range(4)]
    cut(stages[0], [0], first=True), cut(stages[1], [1]), cut(stages[2], [2]), cut(stages[3], [], last=True)
    x = chunk.tokens
    for stage in stages[:-1]:
        x = stage(x, chunk)
        assert x.shape == (20, SMALL["dim"])
    staged = stages[-1](x, chunk)
    staged.backward()
    assert staged.item() == loss.item()
    parts = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
    assert parts.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parts[name].grad, parameter.grad), name


@every_family
def test_only_keys_and_values_of_the_last_layer(family):
    group = build_groups([30], 20)[0]
    chunk = chunk_tensors([group], random_sequences([30], 96, 0))[0][0]
    model = small_model(family)
    chunk.state, chunk.end = KeyValueState(group), loss_sum
    full = chunk.state
    model(chunk.tokens, chunk)
    chunk.state, chunk.end = KeyValueState(group), None
    calls = record_calls(model)
    with torch.no_grad():
        assert model(chunk.tokens, chunk) is None
    last = {name.removeprefix("layers.2.") for name in calls if name.startswith("layers.2.")}
    key_norm = {"attention.k_norm"} if family == "qwen3" else set()
    assert last == {"attention_norm", "attention", "attention.wk", "attention.wv"} | key_norm
    assert not {"norm", "output"} & set(calls) and "layers.1.feed_forward.w2" in calls
    for layer in range(3):
        assert torch.equal(full.buffers[layer][:, :20], chunk.state.buffers[layer][:, :20])

    stage = cut(model, [0, 1], first=True)  # the next stage needs its hidden states
    assert stage(chunk.tokens, chunk).shape == (20, SMALL["dim"])
    head = cut(small_model(family), [], last=True)
    assert head(torch.zeros(20, SMALL["dim"], dtype=torch.float64), chunk) is None


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(family, tied):
    args = dataclasses.replace(families[family].flavors["debugmodel"], **SMALL, tied_embeddings=tied)
    with torch.device("meta"):
        model = families[family].Transformer(args)
    names = [name for name, _ in model.named_parameters()]
    assert ("output.weight" in names) == (not tied)
    for moved in [model, model.to_empty(device="cpu"), model.double(), model.bfloat16()]:
        assert (moved.output.weight is moved.tok_embeddings.weight) == tied
        assert [name for name, _ in moved.named_parameters()] == names
    assert not any(parameter.is_meta for parameter in model.parameters())


# Initialisation


@every_family
def test_initial_values(family):
    module = families[family]
    model = module.Transformer(dataclasses.replace(module.flavors["debugmodel"], n_layers=8))
    for name, parameter in model.named_parameters():
        whole = torch.full(parameter.shape, float("nan"))
        model.init_parameter(name, whole, torch.Generator().manual_seed(1))
        if "norm" in name:
            assert whole.eq(1).all(), name
        elif name.endswith("bias"):
            assert whole.eq(0).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02  # sqrt(2 x 8 layers)
            if "tok_embeddings" in name and not model.args.tied_embeddings:
                std = 1.0
            assert whole.abs().max() <= 3 * std and whole.std().item() == pytest.approx(
                0.9866 * std, rel=0.02
            ), name
            assert abs(whole.mean()) < 0.05 * std, name


@every_family
def test_initial_values_depend_on_generator_and_name_alone(family):
    """Not on other parameters, their order, the global generator, or which layers this stage has."""
    whole = families[family].Transformer(dataclasses.replace(families[family].flavors["debugmodel"], **SMALL))
    stage = cut(families[family].Transformer(whole.args), [1])

    def values(model, name):
        tensor = torch.empty(48, 32, dtype=torch.float64)
        model.init_parameter(name, tensor, torch.Generator().manual_seed(7))
        return tensor

    name = "layers.1.feed_forward.w1.weight"
    first = values(whole, name)
    torch.manual_seed(123)
    values(whole, "layers.0.attention.wq.weight")
    assert torch.equal(first, values(whole, name)) and torch.equal(first, values(stage, name))
