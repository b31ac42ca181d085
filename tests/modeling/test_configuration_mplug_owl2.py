"""Configuration: defaults, the original's flat form, and what is refused."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.configuration_mplug_owl2 import MplugOwl2TextConfig, padded_vocab_size

FLAT = {
    "architectures": ["MPLUGOwl2LlamaForCausalLM"],
    "model_type": "mplug_owl2",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "image_aspect_ratio": "pad",
    "softkl_loss": True,
    "level_ids": [1781, 6534],
    "visual_config": {
        "visual_model": {
            "model_type": "mplug_owl_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "num_beams": 1,
            "tie_word_embeddings": True,
        },
        "visual_abstractor": {
            "model_type": "mplug_owl_visual_abstract",
            "num_learnable_queries": 3,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "grid_size": 4,
            "attention_probs_dropout_prob": 0.25,
        },
    },
}


def test_defaults_are_the_published_model():
    config = MplugOwl2Config()
    with torch.device("meta"):
        model = MplugOwl2ForConditionalGeneration(config)
    padding_rows = 2 * (config.text_config.vocab_size - 32000)
    assert sum(p.numel() for p in model.parameters()) - padding_rows * 4096 == 8_197_859_328
    assert config.num_image_tokens == 65
    assert (config.image_token_id, config.output_vocab_size, config.text_config.vocab_size) == (
        32000,
        32000,
        32064,
    )


def test_the_originals_flat_form_is_read():
    config = MplugOwl2Config.from_dict(FLAT)
    assert (config.text_config.hidden_size, config.text_config.num_key_value_heads) == (64, 2)
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (config.vision_config.image_size, config.vision_config.use_cls_token) == (28, True)
    assert config.abstractor_config.attention_dropout == 0.25
    assert config.abstractor_config.projection_dim == 64
    assert (config.image_token_id, config.output_vocab_size, config.text_config.vocab_size) == (
        211,
        211,
        256,
    )
    assert config.dtype == torch.float16
    assert not config.tie_word_embeddings


def test_unknown_keys_of_the_original_are_kept_and_its_dumps_are_not():
    config = MplugOwl2Config.from_dict(FLAT)
    assert (config.image_aspect_ratio, config.softkl_loss, config.level_ids) == (
        "pad",
        True,
        [1781, 6534],
    )
    assert not hasattr(config.vision_config, "num_beams")
    assert config.architectures is None


def test_both_forms_survive_saving(tmp_path):
    for config in (MplugOwl2Config(), MplugOwl2Config.from_dict(FLAT)):
        config.save_pretrained(tmp_path)
        assert MplugOwl2Config.from_pretrained(tmp_path).to_dict() == config.to_dict()
        assert "visual_config" not in json.loads((tmp_path / "config.json").read_text())


def test_reading_does_not_change_what_is_read():
    before = json.dumps(FLAT)
    MplugOwl2Config.from_dict(FLAT)
    assert json.dumps(FLAT) == before


def test_sizes_shared_with_neighbours_are_taken_from_them():
    config = MplugOwl2Config(
        vision_config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "image_size": 20,
            "patch_size": 4,
        },
        abstractor_config={"hidden_size": 32, "num_attention_heads": 4},
        text_config={"hidden_size": 64, "num_attention_heads": 4},
    )
    abstractor = config.abstractor_config
    assert (abstractor.encoder_hidden_size, abstractor.grid_size, abstractor.projection_dim) == (
        32,
        5,
        64,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_config": {"image_size": 30}}, r"image_size \(30\) .* patch_size \(14\)"),
        (
            {"vision_config": {"num_attention_heads": 3}},
            r"hidden_size \(1024\) .* num_attention_heads \(3\)",
        ),
        ({"vision_config": {"patch_size": 0}}, "patch_size must be at least 1, got 0"),
        ({"vision_config": {"position_grid_size": 16}}, r"\(16\) must be .* \(32\)"),
        (
            {"abstractor_config": {"grid_size": 31}},
            r"\(32\) must equal abstractor grid_size \(31\)",
        ),
        ({"abstractor_config": {"use_cls_token": False}}, r"\(True\) must equal .* \(False\)"),
        ({"abstractor_config": {"hidden_size": 512}}, r"\(512\) must equal .* \(1024\)"),
        (
            {
                "abstractor_config": {
                    "hidden_size": 30,
                    "encoder_hidden_size": 30,
                    "num_attention_heads": 2,
                }
            },
            r"\(30\).*4",
        ),
        ({"abstractor_config": {"projection_dim": 64}}, r"text hidden_size \(4096\) .* \(64\)"),
        (
            {"abstractor_config": {"num_learnable_queries": 0}},
            "num_learnable_queries must be at least 1",
        ),
        ({"text_config": {"vocab_size": 99}}, r"image_token_id \(32000\) .* vocab_size is 99"),
        (
            {
                "text_config": {
                    "num_attention_heads": 6,
                    "hidden_size": 96,
                    "num_key_value_heads": 4,
                }
            },
            r"\(6\) .* \(4\)",
        ),
        ({"output_vocab_size": 40000}, r"output_vocab_size \(40000\) .* \(32064\)"),
        ({"visual_config": {"visual_model": {}, "visual_other": {}}}, "visual_abstractor"),
        ({"connector_type": "mlp"}, r"connector_type must be one of .* got 'mlp'"),
        (
            {"connector_type": "h_reducer", "abstractor_config": {}},
            "abstractor_config is given too",
        ),
        ({"h_reducer_config": {}}, "h_reducer_config is given too"),
        (
            {"connector_type": "h_reducer", "h_reducer_config": {"kernel_width": 5}},
            r"grid_size \(32\) .* \(5\)",
        ),
        (
            {"connector_type": "h_reducer", "h_reducer_config": {"hidden_size": 64}},
            r"\(1024\) .* \(64\)",
        ),
        (
            {"visual_config": {"visual_model": {}, "visual_hreducer": {"conv_shape": "2x2"}}},
            "one row high.*'2x2'",
        ),
        ({"visual_config": {"visual_model": {}, "visual_hrcompressor": {}}}, "DocOwl2"),
        (
            {"visual_config": {"visual_model": 3, "visual_abstractor": {}}},
            "must be a dictionary, got int",
        ),
        ({"vision_config": MplugOwl2TextConfig()}, "Field 'vision_config' with value"),
        ({"text_config": "llama"}, "Field 'text_config' with value 'llama'"),
    ],
)
def test_errors_name_both_conflicting_values(values, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MplugOwl2Config(**values)


def test_padding_of_the_table():
    assert [padded_vocab_size(n) for n in (32000, 63, 64, 1000)] == [32064, 64, 128, 1024]
