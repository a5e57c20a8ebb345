"""config.json in and out: what transformers takes it to mean; what the models cannot do is refused by name."""

import json
import shutil

import pytest
import tomllib
import torch
import transformers

from chunkflow.execution.rotary import rotary_frequencies
from chunkflow.storage.hf_weights import load_weights, parameter_shapes
from chunkflow.training.model_sizes import model_args, positions
from chunkflow.training.start import read_config
from models import families
from models.hf_config import config_json, hf_name, model_of
from tests.helpers.hugging_face import logits_of, ours, rewrite, theirs


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
    config.model.max_positions = 1024
    _, args = model_args(config.model, config.training.seq_len, 100)
    assert (args.rope_theta, args.rope_scaling) == (1e6, {"rope_type": "linear", "factor": 2.0})
    # Qwen's way to extend: YaRN is turned on, max_position_embeddings stays.
    config.model.rope_theta = config.model.rope_scaling = config.model.max_positions = None
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    rewrite(copy, rope_parameters=None, rope_theta=1e6, rope_scaling=yarn)
    config.training.seq_len = 2048
    _, args = model_args(config.model, config.training.seq_len, 100)
    assert (args.rope_theta, args.rope_scaling, args.max_positions) == (1e6, yarn, 512)


# ---------------------------------------------------------------------------------------- positions beyond the model's

YARN, LINEAR = {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def extended(folder, seq_len, **settings):
    """The args, and how many positions they are said to have."""
    config = read_config([f"--model.hf_assets_path={folder}"])
    for key, value in settings.items():
        setattr(config.model, key, value)
    _, args = model_args(config.model, seq_len, 100)
    return args, positions(config.model, args)


@pytest.mark.parametrize(
    "settings, seq_len, said",  # the folder has 512 positions, and a rope_theta of 20000
    [
        ({}, 512, 512),
        ({}, 513, "513 is beyond the 512 positions of qwen2"),
        ({"max_positions": 512}, 512, 512),  # it merely says what is so
        ({"max_positions": 256}, 256, 256),  # it was trained for less
        ({"max_positions": 256}, 257, "training.seq_len = 257 is beyond model.max_positions = 256: lower"),
        ({"max_positions": 513}, 9, "513 is beyond the 512 positions of qwen2"),
        ({"max_positions": 2048, "rope_theta": 2e5}, 2048, 2048),
        (
            {"max_positions": 2048, "rope_theta": 2e5},
            2049,
            "training.seq_len = 2,049 is beyond model.max_pos",
        ),
        (
            {"max_positions": 2048, "rope_theta": 2e4},
            9,
            "or with a larger model.rope_theta, for example 9.8e4",
        ),
        (
            {"max_positions": 2048, "rope_theta": 1e4},
            9,
            "or with a larger model.rope_theta, for example 9.8e4",
        ),
        ({"rope_theta": 2e5}, 512, 512),
        ({"rope_theta": 2e5}, 2048, "set model.max_positions = 2048, too"),
        ({"rope_theta": 1e4}, 2048, "for example 9.8e4, and model.max_positions = 2048"),
        ({"rope_scaling": YARN}, 2048, 2048),
        ({"rope_scaling": YARN}, 2049, "2,049 is beyond the 2,048 positions of qwen2"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 1024}}, 4096, 4096),
        ({"rope_scaling": YARN | {"factor": 1.1}}, 563, 563),
        ({"rope_scaling": YARN, "max_positions": 2048}, 2048, 2048),
        ({"rope_scaling": YARN, "max_positions": 1024}, 1024, 1024),
        ({"rope_scaling": YARN, "max_positions": 1024}, 1025, "beyond model.max_positions = 1,024"),
        ({"rope_scaling": YARN, "max_positions": 2049}, 9, "set the factor of model.rope_scaling to 5.0"),
        ({"rope_scaling": YARN, "max_positions": 9999, "rope_theta": 1e6}, 9, "model.rope_scaling to 20.0"),
        ({"rope_scaling": LINEAR, "max_positions": 2048}, 2048, 2048),
        ({"rope_scaling": LINEAR}, 2048, "set model.max_positions = 2048, too"),
        ({"rope_scaling": LLAMA3, "max_positions": 4096}, 4096, 4096),
        ({"rope_scaling": LLAMA3}, 2048, "set model.max_positions = 2048, too"),
        ({"rope_scaling": {"rope_type": "default"}}, 512, 512),
        (
            {"rope_scaling": {"rope_type": "default"}, "max_positions": 513},
            9,
            "angles there were never trained",
        ),
        ({"rope_scaling": {"rope_type": "default"}, "max_positions": 999, "rope_theta": 1e5}, 999, 999),
    ],
)
def test_how_far_a_model_goes(copy, settings, seq_len, said):
    if isinstance(said, int):
        assert extended(copy, seq_len, **settings)[1] == said
        return
    with pytest.raises(ValueError) as refused:
        extended(copy, seq_len, **settings)
    assert said in str(refused.value) and "\n" not in str(refused.value), str(refused.value)


def test_the_sentence_has_both_ways_and_both_work(copy):
    with pytest.raises(ValueError) as refused:
        extended(copy, 1500)
    said = str(refused.value)
    for way in ("model.rope_scaling, for example { ", "a larger model.rope_theta, for example 6.8e4, and"):
        assert way in said, said
    scaling = tomllib.loads("x = " + said[said.index("{") : said.index("}") + 1])["x"]
    assert extended(copy, 1500, rope_scaling=scaling)[1] == 1536
    assert extended(copy, 1500, rope_theta=6.8e4, max_positions=1500)[1] == 1500


def test_a_folder_with_yarn_says_how_far_it_goes(copy):
    """Its factor may be raised, and so may the base beside it, but nothing goes further than the factor."""
    rewrite(copy, rope_parameters=None, rope_theta=1e6, rope_scaling=YARN)  # its original is 512
    assert extended(copy, 2048)[1] == 2048
    args, most = extended(copy, 1024, max_positions=1024)
    assert most == 1024 and args.rope_scaling["original_max_position_embeddings"] == 512
    for wrong in ({"max_positions": 4096}, {"max_positions": 4096, "rope_theta": 1e7}):
        with pytest.raises(ValueError, match="set the factor of model.rope_scaling to 8.0"):
            extended(copy, 9, **wrong)
    assert extended(copy, 4096, max_positions=4096, rope_scaling=YARN | {"factor": 8.0})[1] == 4096


@pytest.mark.parametrize("before", [None, YARN])
@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 3e5},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 512}, "rope_theta": 3e4},
        {"rope_scaling": LINEAR},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 3e5},
    ],
    ids=lambda settings: "+".join(str(value) for value in settings.values())[:40],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_exported_is_what_was_trained(tmp_path, kind, settings, before):
    """transformers computes the same logits with the exported folder, at positions that the model did not
    have, and the folder needs none of the keys again."""
    own, out = tmp_path / "own", tmp_path / "out"
    reference = theirs(kind)
    reference.save_pretrained(own)
    if before:
        rewrite(own, rope_parameters=None, rope_theta=2e4, rope_scaling=before)
    most = 2048
    args, _ = extended(own, most, max_positions=most, **settings)
    name = {"llama": "llama3"}.get(kind, kind)
    with torch.device("meta"):
        model = families[name].Transformer(args)
    model.to_empty(device="cpu")
    load_weights(model, families[name], own)
    shutil.copytree(own, out)
    config = config_json(name, args, "float32", own)
    (out / "config.json").write_text(json.dumps(config))
    assert config["max_position_embeddings"] == most

    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert again.config.max_position_embeddings == most
    tokens = torch.randint(2048, (1100,))
    expected, logits = again(tokens[None]).logits[0], logits_of(model, tokens)
    tolerance = 1e-4 * expected.abs().max()  # its angles are in fp32: at position 1,100 they are that far off
    assert (logits - expected).abs().max() <= tolerance
    angles = args.head_dim, args.rope_theta, args.rope_scaling, args.max_positions
    frequencies_R, _ = rotary_frequencies(*angles, "cpu")
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, frequencies_R.float(), rtol=1e-6, atol=0)
    changed = reference(tokens[None]).logits[0]
    assert (logits - changed).abs().max() > 1e-2 * expected.abs().max(), "the angles are others than before"
    read, reach = extended(out, most)
    assert reach == most and read.rope_theta == args.rope_theta
    assert torch.equal(logits_of(ours(out), tokens), logits)
