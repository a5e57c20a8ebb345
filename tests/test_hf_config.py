"""config.json in and out: what transformers takes it to mean; what the models cannot do is refused by name."""

import json

import pytest
import torch
import transformers

from chunkflow.storage.hf_weights import parameter_shapes
from chunkflow.training.build import model_args
from chunkflow.training.start import read_config
from models import families
from models.hf_config import config_json, hf_name, model_of
from tests.helpers.hugging_face import rewrite, theirs


@pytest.fixture(scope="module")
def config_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    theirs("qwen2").save_pretrained(path)
    return (path / "config.json").read_text()


@pytest.fixture
def copy(config_text, tmp_path):
    (tmp_path / "config.json").write_text(config_text)
    return tmp_path


@pytest.mark.parametrize("name", families)
def test_config_json_of_every_flavor_is_read_back_and_is_what_transformers_builds(tmp_path, name):
    for flavor, args in families[name].flavors.items():
        (tmp_path / "config.json").write_text(json.dumps(config_json(name, args, "bfloat16")))
        again = model_of(tmp_path)
        assert again == (name, args), flavor
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        parameters = {key: value.shape for key, value in model.named_parameters()}
        assert parameters == {
            hf_name(key, families[name]): shape
            for key, shape in parameter_shapes(families[name], args).items()
        }, flavor


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"model_type": "mistral"},
            "model_type = 'mistral' is not one of the models here: use a folder of llama, qwen2, qwen3",
        ),
        ({"model_type": None}, "model_type = None"),
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "architectures = ['Qwen2ForSequenceClassification']",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' asks for another activation"),
        ({"mlp_bias": True}, "mlp_bias = True asks for biases in the MLP"),
        ({"model_type": "llama", "architectures": None, "attention_bias": True}, "attention_bias = True"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 asks for dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config = {'bits': 4} asks for quantised weights",
        ),
        ({"num_experts": 8}, "num_experts = 8 asks for a mixture of experts"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "code of its own, which is never run"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "layer_types": None},
            "sliding_window = 64",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types has ['sliding_attention']",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic': use one of default, linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "needs 'factor', a number above 0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": "4"}},
            "rope_parameters has factor '4', which is not a number above 0",
        ),
        (
            dict.fromkeys(("architectures", "layer_types", "use_sliding_window", "max_window_layers"))
            | {"model_type": "llama", "sliding_window": 64},
            "sliding_window = 64",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters = {'full_attention'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}},
            "rope_parameters has 'mrope_section'",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters has partial_rotary_factor 0.5",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling and rope_parameters are both there",
        ),
        ({"rope_parameters": None, "rope_theta": -1}, "rope_theta = -1"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "2048"}, "vocab_size = '2048' is not a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 15}, "head_dim = 15 is odd"),
        (
            {"hidden_size": 66, "head_dim": None},
            "hidden_size = 66 is not a multiple of num_attention_heads = 4",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0 is not a number above 0"),
    ],
)
def test_what_cannot_be_honoured_is_named(copy, changes, said):
    rewrite(copy, **changes)
    with pytest.raises(ValueError) as refused:
        model_of(copy)
    sentence = str(refused.value)
    assert sentence.startswith(f"{copy / 'config.json'}: ") and said in sentence and "\n" not in sentence, (
        sentence
    )


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read .No such file"):
        model_of(tmp_path)
    for text, said in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            model_of(tmp_path)


def test_keys_that_say_what_is_so_anyway(copy):
    plain = model_of(copy)
    rewrite(
        copy, use_sliding_window=False, sliding_window=4096, attention_bias=True, quantization_config=None, partial_rotary_factor=1.0,
        rope_scaling=None, attention_dropout=0.0, use_mrope=False, num_experts=0, architectures=None,
    )  # fmt: skip
    assert model_of(copy) == plain
    rewrite(copy, use_sliding_window=True, max_window_layers=3, layer_types=None)
    assert model_of(copy) == plain


def test_the_folder_decides_and_the_config_overrides_its_angles(copy):
    config = read_config(
        [
            f"--model.hf_assets_path={copy}",
            "--model.name=llama3",
            "--model.flavor=8B",
            "--training.seq_len=512",
        ]
    )
    assert (config.model.name, config.model.flavor) == ("qwen2", copy.name)
    family, args = model_args(config.model, config.training.seq_len, 100)
    assert family is families["qwen2"] and (args.dim, args.vocab_size, args.rope_theta) == (64, 2048, 20000.0)
    with pytest.raises(ValueError, match="the tokenizer has 2,049 tokens"):
        model_args(config.model, config.training.seq_len, 2049)
    config.training.seq_len = 513
    with pytest.raises(ValueError, match="beyond the 512 positions"):
        model_args(config.model, config.training.seq_len, 100)
    config.model.rope_theta, config.model.rope_scaling = 1e6, {"rope_type": "linear", "factor": 2.0}
    _, args = model_args(config.model, config.training.seq_len, 100)
    assert (args.rope_theta, args.rope_scaling) == (1e6, {"rope_type": "linear", "factor": 2.0})
    # Qwen's way to extend: YaRN is turned on, max_position_embeddings stays.
    config.model.rope_theta = config.model.rope_scaling = None
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    rewrite(copy, rope_parameters=None, rope_theta=1e6, rope_scaling=yarn)
    config.training.seq_len = 2048
    _, args = model_args(config.model, config.training.seq_len, 100)
    assert (args.rope_theta, args.rope_scaling, args.max_positions) == (1e6, yarn, 512)
