"""Configuration of mPLUG-Owl2. The defaults are those of the published 7B model.

Sources: mPLUG-Owl2 (CVPR 2024, arXiv:2311.04257), mPLUG-DocOwl 1.5 (arXiv:2403.12895) and their
released code (X-PLUG/mPLUG-Owl, X-PLUG/mPLUG-DocOwl).

This is one file because the configurations of all parts refer to each other.
"""

from dataclasses import field
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from .compatibility_mplug_owl2 import ComposedConfig, SubConfigSpec

# Written into every saved config.json, so that the folder also loads where this package is not
# installed.
AUTO_MAP = {
    "AutoConfig": "configuration_mplug_owl2.MplugOwl2Config",
    "AutoModel": "modeling_mplug_owl2.MplugOwl2Model",
    "AutoModelForPreTraining": "modeling_mplug_owl2.MplugOwl2ForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_mplug_owl2.MplugOwl2ForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_mplug_owl2.MplugOwl2ForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mplug_owl2.MplugOwl2ForConditionalGeneration",
    # transformers 5.23; `transformers serve` supports no other.
    "AutoModelForDecision": "modeling_mplug_owl2.MplugOwl2ForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_mplug_owl2_classification.MplugOwl2ForSequenceClassification",
    "AutoImageProcessor": "image_processing_mplug_owl2.MplugOwl2ImageProcessor",
    "AutoProcessor": "processing_mplug_owl2.MplugOwl2Processor",
}
# No model is larger: a file with larger values is broken.
MAX_LAYERS, MAX_SIZE = 1000, 2**20
_SIZES = ("_size", "_dim", "_width", "max_position_embeddings")
CONNECTOR_TYPES = ("abstractor", "h_reducer")
# Model types of the original that are read, besides our own.
DOCOWL_MODEL_TYPE = "mplug_docowl"


@strict
class MplugOwl2VisionConfig(PreTrainedConfig):
    """Configuration of the vision encoder (ViT-L/14).

    Args:
        use_cls_token: Put a class token in front of the patches.
        use_pre_layernorm: Normalise the input of the first layer, as CLIP does and DINOv2 does not.
        use_post_layernorm: Normalise the output of the last layer.
        position_grid_size: Positions along one side of the learned position table. Default: with a
            class token, the side of the patch grid; without one 16, as in the original, whose table
            is resized bicubically to the patch grid.
    """

    model_type = "mplug_owl2_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cls_token: bool = True
    use_pre_layernorm: bool = True
    use_post_layernorm: bool = True
    position_grid_size: int | None = None

    def validate_architecture(self) -> None:
        _check_sizes(self)
        _check_divisible(
            "vision hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads
        )
        _check_divisible("image_size", self.image_size, "patch_size", self.patch_size)
        if self.use_cls_token and self.position_table_side != self.grid_size:
            raise ValueError(
                f"With a class token the position table is not resized: position_grid_size "
                f"({self.position_table_side}) must be image_size // patch_size ({self.grid_size})."
            )

    @property
    def grid_size(self) -> int:
        """Return the number of patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def position_table_side(self) -> int:
        """Return the number of positions along one side of the learned table."""
        if self.position_grid_size is not None:
            return self.position_grid_size
        return self.grid_size if self.use_cls_token else 16


@strict
class MplugOwl2AbstractorConfig(PreTrainedConfig):
    """Configuration of the visual abstractor: learnable queries that summarise one image.

    Args:
        block_norm_eps: Epsilon of the norms around attention and MLP. It is always 1e-5, also if
            the original's config has another value.
        layer_norm_eps: Epsilon of the norm inside the MLP.
        grid_size: Patches along one side of the encoded image.
        use_cls_token: The encoded image begins with a class token, whose position embedding is
            zero.
        projection_dim: Width of the language model.
    """

    model_type = "mplug_owl2_abstractor"
    base_config_key = "abstractor_config"
    attribute_map = {"attention_probs_dropout_prob": "attention_dropout"}

    num_learnable_queries: int = 64
    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    attention_dropout: float | int = 0.0
    block_norm_eps: float = 1e-5
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    grid_size: int = 32
    use_cls_token: bool = True
    projection_dim: int = 4096

    def validate_architecture(self) -> None:
        _check_sizes(self)
        _check_divisible(
            "abstractor hidden_size",
            self.hidden_size,
            "num_attention_heads",
            self.num_attention_heads,
        )
        _check_divisible(
            "abstractor hidden_size", self.hidden_size, "sin-cos halves of rows and columns", 4
        )
        _check_equal(
            "abstractor hidden_size",
            self.hidden_size,
            "abstractor encoder_hidden_size",
            self.encoder_hidden_size,
        )

    @property
    def num_image_tokens(self) -> int:
        """Return the number of positions of one image: the queries and the end-of-image vector."""
        return self.num_learnable_queries + 1


@strict
class MplugOwl2HReducerConfig(PreTrainedConfig):
    """Configuration of DocOwl 1.5's H-Reducer, which merges neighbouring patches of a row.

    Args:
        hidden_size: Width of the vision encoder.
        kernel_width: Number of patches that become one visual token. "1x4" in the original's
            `conv_shape` means 4.
        layer_norm_eps: Epsilon of a norm that is in the weights but that the model never applies.
        grid_size: Patches along one side of the encoded image.
        projection_dim: Width of the language model.
    """

    model_type = "mplug_owl2_h_reducer"
    base_config_key = "h_reducer_config"

    hidden_size: int = 1024
    kernel_width: int = 4
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    grid_size: int = 32
    projection_dim: int = 4096

    def validate_architecture(self) -> None:
        _check_sizes(self)
        _check_divisible("H-Reducer grid_size", self.grid_size, "kernel_width", self.kernel_width)

    @property
    def num_image_tokens(self) -> int:
        """Return the positions of one image: the merged patches and the end-of-image vector."""
        return self.grid_size**2 // self.kernel_width + 1


@strict
class MplugOwl2TextConfig(LlamaConfig):
    """Configuration of the modality-adaptive LLaMA.

    `vocab_size` counts all rows of the embedding table, including the placeholder and padding.

    The fields that LLaMA does not have describe other decoders of the family. They are saved only
    if they differ from their defaults.

    Args:
        modality_specific_projections: Projections, of "q", "k" and "v", that have separate weights
            for visual tokens. Without any, and without separate norms, the decoder is a plain
            LLaMA.
        modality_specific_norms: Use separate layer norms for visual tokens.
        attention_out_bias: Whether the output projection has a bias. Default: `attention_bias`, the
            setting of queries, keys and values.
        rope_dynamic_ntk_length: In evaluation mode, use a larger rotary base for prompts longer
            than this.
        log_n_length: In evaluation mode, scale queries at positions beyond this with the logarithm
            of the position.
    """

    model_type = "mplug_owl2_text"
    base_config_key = "text_config"

    vocab_size: int = 32064
    modality_specific_projections: list[str] = field(default_factory=lambda: ["k", "v"])
    modality_specific_norms: bool = True
    attention_out_bias: bool | None = None
    rope_dynamic_ntk_length: int | None = None
    log_n_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_sizes(self)
        # Rules for this configuration only, because transformers warns about a rule that fits no
        # layer.
        own = {
            f"layers.*.self_attn.visual_{name}_proj": "colwise"
            for name in self.modality_specific_projections
        }
        self.base_model_tp_plan = {**LlamaConfig.base_model_tp_plan, **own}
        super().__post_init__(**kwargs)

    @property
    def has_modality_adaptive_module(self) -> bool:
        """Return whether the decoder has separate weights for visual tokens."""
        return self.modality_specific_norms or bool(self.modality_specific_projections)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict.

        Differs from transformers: fields that only other decoders of the family use are left out.
        """
        values = super().to_dict()
        for name in _BEYOND_LLAMA:
            if values.get(name) == _default_of(MplugOwl2TextConfig, name):
                values.pop(name, None)
        return values

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.modality_specific_projections not in ([], ["k", "v"], ["q", "k", "v"]):
            raise ValueError(
                "modality_specific_projections must be [], ['k', 'v'] or ['q', 'k', 'v'], got "
                f"{self.modality_specific_projections}."
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if self.rope_dynamic_ntk_length is not None and rope_type != "default":
            raise ValueError(
                f"rope_dynamic_ntk_length ({self.rope_dynamic_ntk_length}) changes the rotary base "
                f"by itself: it needs rope_type 'default', got {rope_type!r}."
            )
        for name in ("rope_dynamic_ntk_length", "log_n_length"):
            if (length := getattr(self, name)) is not None and length < 2:
                raise ValueError(f"{name} must be at least 2 positions, got {length}.")
        _check_divisible(
            "num_attention_heads",
            self.num_attention_heads,
            "num_key_value_heads",
            self.num_key_value_heads or 1,
        )


@strict
class MplugOwl2Config(ComposedConfig):
    """Configuration of the whole model.

    The original's flat form is also read: LLaMA's fields at the top level and `visual_config =
    {"visual_model": ..., "visual_abstractor": ...}`, or DocOwl 1.5's "visual_hreducer" instead of
    the latter. Unknown top-level keys are kept.

    Args:
        connector_type: "abstractor" with `abstractor_config`, or "h_reducer" with
            `h_reducer_config`. The configuration of the other connector is `None`.
        image_token_id: Id of the placeholder of one visual token, a row of the embedding table.
        output_vocab_size: Ids from this one on are never predicted: the placeholder and the rows
            that pad the table. Default: every id except the placeholder may be predicted.

    Raises:
        ValueError: If sizes of the components do not match. The message names both.
    """

    model_type = "mplug_owl2"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=MplugOwl2VisionConfig),
        "abstractor_config": SubConfigSpec(config_class=MplugOwl2AbstractorConfig, optional=True),
        "h_reducer_config": SubConfigSpec(config_class=MplugOwl2HReducerConfig, optional=True),
        "text_config": SubConfigSpec(config_class=MplugOwl2TextConfig),
    }
    # Outputs that a Trainer does not gather: they are large, or differ in shape from batch to
    # batch.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "image_hidden_states",
        "image_outputs",
    ]
    attribute_map = {"image_token_index": "image_token_id"}

    # What comes in may be a dictionary or nothing, and `strict` checks it at each assignment. After
    # `__post_init__` it is a configuration, and code that reads it may count on that.
    if TYPE_CHECKING:
        vision_config: MplugOwl2VisionConfig
        abstractor_config: MplugOwl2AbstractorConfig | None
        h_reducer_config: MplugOwl2HReducerConfig | None
        text_config: MplugOwl2TextConfig
    else:
        vision_config: MplugOwl2VisionConfig | dict[str, Any] | None = None
        abstractor_config: MplugOwl2AbstractorConfig | dict[str, Any] | None = None
        h_reducer_config: MplugOwl2HReducerConfig | dict[str, Any] | None = None
        text_config: MplugOwl2TextConfig | dict[str, Any] | None = None
    connector_type: str = "abstractor"
    image_token_id: int = 32000
    output_vocab_size: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "visual_config" in kwargs:
            kwargs = self._read_original_form(kwargs)
        elif self.text_config is None:
            self.output_vocab_size = self.output_vocab_size or 32000
        self._complete_connector_config()
        if getattr(self, "auto_map", None) is None:
            kwargs.setdefault("auto_map", dict(AUTO_MAP))
        kwargs.pop("model_type", None)  # the class sets it, whatever model type was read
        super().__post_init__(**kwargs)
        if self.is_owl21:
            # transformers uses it to find the original's weight names; the class's own is saved.
            self.model_type = MplugOwl21Config.model_type

    @PreTrainedConfig._attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        self.check_attn_implementation(value)
        PreTrainedConfig._attn_implementation.fset(self, value)

    def check_attn_implementation(self, value: str | dict[str, str] | None) -> None:
        """Check the names in a dict of attention implementations.

        Raises:
            ValueError: If a key is no part of this configuration.
        """
        if isinstance(value, dict) and (unknown := sorted(set(value) - {"", *self.sub_configs})):
            parts = ", ".join(map(repr, self.sub_configs))
            raise ValueError(
                f"attn_implementation: expected parts of {parts} or '', got {unknown}."
            )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration file.

        Differs from transformers: no warning about the other model types that this class reads.
        """
        values, kwargs = super().get_config_dict(*args, **kwargs)
        found = values.get("model_type")
        if found in (MplugOwl2Config.model_type, DOCOWL_MODEL_TYPE):
            values = {**values, "model_type": cls.model_type}
        elif found == MplugOwl21Config.model_type != cls.model_type:
            values = {**_from_qwen(values), "model_type": cls.model_type}
        return values, kwargs

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults.

        Differs from transformers: of the two connectors, only the one that the model has is
        included.
        """
        values = super().to_diff_dict()
        unused = {f"{kind}_config" for kind in CONNECTOR_TYPES if kind != self.connector_type}
        if self.connector_type == "abstractor":
            unused.add("connector_type")  # keeps files as in versions without this field
        return {key: value for key, value in values.items() if key not in unused}

    def _read_original_form(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Split the original's flat fields into the sub-configurations; returns what is left."""
        visual_config = kwargs.pop("visual_config")
        self.connector_type, connector, vision = self._read_visual_config(visual_config)
        setattr(self, f"{self.connector_type}_config", connector)
        if kwargs.get("model_type") == MplugOwl21Config.model_type:
            kwargs = _from_qwen(kwargs)
        text_fields = (_own_fields(MplugOwl2TextConfig) | {"rope_theta", "rope_scaling"}) - {
            "tie_word_embeddings"
        }
        text = {key: kwargs.pop(key) for key in list(kwargs) if key in text_fields}
        num_text_tokens = text.get("vocab_size", 32000)
        text["vocab_size"] = padded_vocab_size(num_text_tokens)
        self.text_config = MplugOwl2TextConfig(**text)
        self.image_token_id = self.output_vocab_size = num_text_tokens
        self.vision_config = MplugOwl2VisionConfig(**_known_fields(MplugOwl2VisionConfig, vision))
        if "deepmlp_hidden_dims" in kwargs:
            # Upstream: Q-Scorer has one score, but its configuration has no num_labels.
            kwargs.setdefault("num_labels", 1)
        # Drop the original's class names; saving writes ours.
        self.architectures: list[str] | None = None
        return kwargs

    def _read_visual_config(self, visual_config: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Read the original's vision side: type and fields of its connector, and those of its
        vision encoder.
        """
        found = (
            sorted(visual_config)
            if isinstance(visual_config, dict)
            else type(visual_config).__name__
        )
        if "visual_hrcompressor" in found or "mPLUGDocOwl2" in (self.architectures or ()):
            raise ValueError(
                "DocOwl2 is not supported, because it has a high-resolution compressor. Use "
                "DocOwl 1.5."
            )
        if {"visual_model", "visual_hreducer"} <= set(found):
            connector = _h_reducer_fields(visual_config["visual_hreducer"])
            # Upstream: DocOwl's vision encoder always has these settings; it ignores its
            # configuration.
            fixed = {"use_cls_token": True, "use_post_layernorm": True, "hidden_act": "quick_gelu"}
            vision = _as_dict(MplugOwl2VisionConfig, visual_config["visual_model"])
            return "h_reducer", connector, {**vision, **fixed}
        if {"visual_model", "visual_abstractor"} <= set(found):
            connector = _known_fields(MplugOwl2AbstractorConfig, visual_config["visual_abstractor"])
            return "abstractor", connector, visual_config["visual_model"]
        raise ValueError(
            "visual_config must hold 'visual_model' and 'visual_abstractor', the components of "
            "mPLUG-Owl2, or 'visual_model' and 'visual_hreducer', those of DocOwl 1.5; got "
            f"{found}. Other models are not supported."
        )

    def _complete_connector_config(self) -> None:
        """Sizes that the connector shares with its neighbours are taken from them unless given."""
        if self.connector_type not in CONNECTOR_TYPES:
            raise ValueError(
                f"connector_type must be one of {CONNECTOR_TYPES}, got {self.connector_type!r}."
            )
        name = f"{self.connector_type}_config"
        given = getattr(self, name)
        if given is not None and not isinstance(given, dict):
            return
        vision = self.vision_config
        if not isinstance(vision, PreTrainedConfig):
            vision = self.vision_config = MplugOwl2VisionConfig(**(vision or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = MplugOwl2TextConfig(**(self.text_config or {}))
        shared = {"grid_size": vision.grid_size, "projection_dim": self.text_config.hidden_size}
        if self.connector_type == "abstractor":
            shared.update(
                encoder_hidden_size=vision.hidden_size, use_cls_token=vision.use_cls_token
            )
        else:
            shared.update(hidden_size=vision.hidden_size)
        setattr(self, name, {**shared, **(given or {})})

    def validate_architecture(self) -> None:
        vision, connector, text = self.vision_config, self.connector_config, self.text_config
        for kind in CONNECTOR_TYPES:
            if kind != self.connector_type and getattr(self, f"{kind}_config") is not None:
                raise ValueError(
                    f"connector_type is {self.connector_type!r}, but {kind}_config is given too: "
                    f"leave it out, or choose connector_type {kind!r}."
                )
        name = "H-Reducer" if self.connector_type == "h_reducer" else "abstractor"
        if self.connector_type == "h_reducer":
            _check_equal(
                "vision hidden_size",
                vision.hidden_size,
                "H-Reducer hidden_size",
                connector.hidden_size,
            )
        else:
            _check_equal(
                "vision hidden_size",
                vision.hidden_size,
                "abstractor encoder_hidden_size",
                connector.encoder_hidden_size,
            )
            _check_equal(
                "vision use_cls_token",
                vision.use_cls_token,
                "abstractor use_cls_token",
                connector.use_cls_token,
            )
        _check_equal(
            "patches per side (image_size // patch_size)",
            vision.grid_size,
            f"{name} grid_size",
            connector.grid_size,
        )
        _check_equal(
            "text hidden_size", text.hidden_size, f"{name} projection_dim", connector.projection_dim
        )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id ({self.image_token_id}) must be a row of the embedding table: "
                f"text vocab_size is {text.vocab_size}. Set another image_token_id, or a "
                "vocab_size above it."
            )
        if self.output_vocab_size is not None and not 0 < self.output_vocab_size <= text.vocab_size:
            raise ValueError(
                f"output_vocab_size ({self.output_vocab_size}) must be between 1 and text "
                f"vocab_size ({text.vocab_size})."
            )

    @property
    def vocab_size(self) -> int:
        """Return the rows of the embedding table.

        PEFT compares this to find out whether a model was resized. If so, PEFT saves the table.
        """
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    @property
    def is_owl21(self) -> bool:
        """Return whether the decoder is mPLUG-Owl2.1's."""
        return "q" in self.text_config.modality_specific_projections

    @property
    def connector_config(self) -> MplugOwl2AbstractorConfig | MplugOwl2HReducerConfig:
        """Return the configuration of the connector, which makes the visual tokens."""
        return getattr(self, f"{self.connector_type}_config")

    @property
    def num_image_tokens(self) -> int:
        """Return the number of positions that one image takes in the language model."""
        return self.connector_config.num_image_tokens


@strict
class MplugDocOwlConfig(MplugOwl2Config):
    """DocOwl 1.5's model type in the original, for the Auto classes. Reads an `MplugOwl2Config`."""

    model_type = DOCOWL_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return MplugOwl2Config.from_dict(config_dict, **kwargs)


@strict
class MplugOwl21Config(MplugOwl2Config):
    """mPLUG-Owl2.1's model type in the original's config.json. Reads an `MplugOwl2Config`.

    The decoders differ only in fields of `text_config`. The configuration is saved as mPLUG-Owl2's.
    """

    model_type = "mplug_owl2_1"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return MplugOwl2Config.from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model_type": MplugOwl2Config.model_type}


# Fields of a text configuration that LLaMA's lacks.
_BEYOND_LLAMA = (
    "modality_specific_projections",
    "modality_specific_norms",
    "attention_out_bias",
    "rope_dynamic_ntk_length",
    "log_n_length",
)
# Settings of Qwen that are fixed in mPLUG-Owl2.1.
QWEN_FIXED = {
    "multiway": True,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "emb_dropout_prob": 0.0,
}
# Upstream: the published config.json leaves the vocabulary out. It is Qwen's: ranks, then three
# control tokens, the first of which ends a text, then 205 extra ones.
QWEN_VOCAB_SIZE = 151851
QWEN_END_OF_TEXT = 151643


def _from_qwen(values: dict[str, Any]) -> dict[str, Any]:
    """The flat fields of mPLUG-Owl2.1, whose decoder is Qwen's, under this package's names.

    Raises:
        ValueError: If a setting that all its decoders share is another one.
    """
    values = dict(values)
    for name, expected in QWEN_FIXED.items():
        if (got := values.pop(name, expected)) != expected:
            raise ValueError(f"{name} must be {expected} for mPLUG-Owl2.1, got {got!r}.")
    vocab_size = values.get("vocab_size") or QWEN_VOCAB_SIZE
    end_of_text = QWEN_END_OF_TEXT if vocab_size > QWEN_END_OF_TEXT else None
    # Upstream: `intermediate_size` counts both halves, the gate and the values.
    width = values.pop("intermediate_size", 22016)
    _check_divisible("intermediate_size", width, "the two halves of mPLUG-Owl2.1's MLP", 2)
    has_bias = not values.pop("no_bias", True)
    length = values.pop("seq_length", 2048)
    ours = {
        "vocab_size": vocab_size,
        "max_position_embeddings": values.pop("max_position_embeddings", 8192),
        "bos_token_id": values.pop("bos_token_id", None),
        "eos_token_id": end_of_text if (end := values.pop("eos_token_id", None)) is None else end,
        "intermediate_size": width // 2,
        "head_dim": values.pop("kv_channels", 128),
        "rms_norm_eps": values.pop("layer_norm_epsilon", 1e-6),
        "rope_theta": float(values.pop("rotary_emb_base", 10000.0)),
        "attention_dropout": values.pop("attn_dropout_prob", 0.0),
        "attention_bias": True,
        "attention_out_bias": has_bias,
        "mlp_bias": has_bias,
        "modality_specific_projections": ["q", "k", "v"],
        "modality_specific_norms": False,
        "rope_dynamic_ntk_length": length if values.pop("use_dynamic_ntk", True) else None,
        "log_n_length": length if values.pop("use_logn_attn", True) else None,
    }
    return {**values, **ours}


def padded_vocab_size(num_text_tokens: int, multiple: int = 64) -> int:
    """Rows of an embedding table that holds `num_text_tokens` ids, the placeholder, and padding to
    `multiple`.
    """
    return -(-(num_text_tokens + 1) // multiple) * multiple


def _own_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)


def _default_of(config_class: type[PreTrainedConfig], name: str) -> Any:
    declared = config_class.__dataclass_fields__[name]
    return declared.default_factory() if callable(declared.default_factory) else declared.default


def _known_fields(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """The original dumps all of transformers 4's generation defaults here; only the component's own
    fields are kept.
    """
    values = _as_dict(config_class, values)
    renamed = {config_class.attribute_map.get(key, key): value for key, value in values.items()}
    return {key: renamed[key] for key in _own_fields(config_class) & renamed.keys()}


def _as_dict(config_class: type[PreTrainedConfig], values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(
            f"{config_class.base_config_key} must be a dictionary, got {type(values).__name__}."
        )
    return values


def _h_reducer_fields(values: Any) -> dict[str, Any]:
    """The original writes the kernel's height and width as text, "1x4"."""
    fields = _known_fields(MplugOwl2HReducerConfig, values)
    height, _, width = str(values.get("conv_shape", "1x4")).partition("x")
    if height != "1" or not width.isdecimal():
        raise ValueError(
            "visual_hreducer: conv_shape must be one row high, such as '1x4', got "
            f"{values.get('conv_shape')!r}."
        )
    return {**fields, "kernel_width": int(width)}


def _check_sizes(config: PreTrainedConfig) -> None:
    """Before anything is divided by a size, or built of a billion layers."""
    for name in sorted(_own_fields(type(config))):
        value = getattr(config, name)
        if isinstance(value, int) and (name.startswith("num_") or name.endswith(_SIZES)):
            most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if not 1 <= value <= most:
                bound = "at least 1" if value < 1 else f"at most {most}"
                raise ValueError(f"{config.base_config_key}: {name} must be {bound}, got {value}.")


def _check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} ({value}) must be a multiple of {divisor_name} ({divisor}).")


def _check_equal(name: str, value: int, other_name: str, other: int) -> None:
    if value != other:
        raise ValueError(f"{name} ({value}) must equal {other_name} ({other}).")


MplugOwl2Config.register_for_auto_class()

__all__ = [
    "MplugDocOwlConfig",
    "MplugOwl2AbstractorConfig",
    "MplugOwl2Config",
    "MplugOwl2HReducerConfig",
    "MplugOwl2TextConfig",
    "MplugOwl2VisionConfig",
    "MplugOwl21Config",
]
