"""mPLUG-Owl2: vision encoder, connector and modality-adaptive LLaMA.

The connector is the visual abstractor, or the H-Reducer of DocOwl 1.5. It makes Q + 1 visual tokens
of an image.

B: batch, L: positions, N: images of the whole batch, D: width of the language model, V: embedding
rows.

This is one file so that the model can be read from its parts to the whole.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults

from .compatibility_mplug_owl2 import (
    known_arguments,
    named_cache,
    visual_tokens,
)
from .configuration_mplug_owl2 import MplugOwl2Config
from .cpu_kernels_mplug_owl2 import fast_single_row
from .generation_mplug_owl2 import MplugOwl2Generation
from .loading_mplug_owl2 import MplugOwl2LoadableModel
from .modeling_mplug_owl2_abstractor import MplugOwl2VisualAbstractor
from .modeling_mplug_owl2_h_reducer import MplugOwl2HReducer
from .modeling_mplug_owl2_text import MplugOwl2TextModel, match_indicators, text_first
from .modeling_mplug_owl2_vision import MplugOwl2VisionModel
from .outputs_mplug_owl2 import (
    MplugOwl2CausalLMOutputWithPast,
    MplugOwl2ImageFeatures,
    MplugOwl2ModelOutputWithPast,
)
from .scoring_mplug_owl2 import ScoresImages

# A folder that names the classifier needs its file: those named here are saved with this one.
if TYPE_CHECKING:
    from .modeling_mplug_owl2_classification import MplugOwl2ForSequenceClassification  # noqa: F401

logger = logging.get_logger(__name__)

# Logit of ids that are never predicted. Its probability is exactly 0 in float32, so it neither wins
# nor changes a loss; it is finite in float16, so that entropies (p * log p), beam scores and
# repetition penalties stay finite.
RESERVED_LOGIT = -1e4


def read_together(counts: dict[str, Tensor]) -> dict[str, int]:
    """Numbers of the device on the host, which waits for it once, or not at all if there are
    none.
    """
    if not counts:
        return {}
    device = next(iter(counts.values())).device
    return dict(
        zip(
            counts,
            torch.stack([count.to(device, torch.long) for count in counts.values()]).tolist(),
            strict=True,
        )
    )


def insert(image_features: Tensor, inputs_embeds: Tensor, image_mask: Tensor) -> Tensor:
    """Put visual tokens at their positions.

    By positions, since the gradient of `masked_scatter` waits for the device. Positions would fix
    the number of images in an exported graph.

    Args:
        image_features: (V, D).
        inputs_embeds: (B, L, D).
        image_mask: (B, L, 1), True at V positions.

    Returns:
        (B, L, D).
    """
    if torch.compiler.is_exporting():
        return inputs_embeds.masked_scatter(image_mask, image_features)
    order = text_first(image_mask)  # (B * L,)
    positions = order[order.numel() - len(image_features) :]  # (V,)
    tokens = inputs_embeds.flatten(0, 1).index_copy(0, positions, image_features)
    return tokens.view_as(inputs_embeds)


class MplugOwl2PreTrainedModel(MplugOwl2LoadableModel):
    config: MplugOwl2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "MplugOwl2VisionEmbeddings",
        "MplugOwl2VisionLayer",
        "MplugOwl2AbstractorLayer",
        "MplugOwl2HReducer",
        "MplugOwl2DecoderLayer",
    ]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_missing = [r"[qk]_pos_embed$"]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise weights. Differs from transformers: rows of ids that text lacks are zero."""
        super().initialize_weights()
        for embeddings in (self.get_input_embeddings(), self.get_output_embeddings()):
            if embeddings is not None and not getattr(
                embeddings.weight, "_is_hf_initialized", False
            ):
                embeddings.weight[self.config.image_token_id] = 0
                embeddings.weight[self.config.output_vocab_size or len(embeddings.weight) :] = 0

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any
    ) -> None:
        """Set the attention. Differs from transformers: the name of an unknown part is an error."""
        self.config.check_attn_implementation(attn_implementation)
        return super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """Resize the embedding table, and let all ids except the placeholder be predicted."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.output_vocab_size = new_num_tokens
        return embeddings


class MplugOwl2Model(MplugOwl2PreTrainedModel):
    """mPLUG-Owl2 without the language-model head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: MplugOwl2Config):
        super().__init__(config)
        self.vision_tower = MplugOwl2VisionModel._from_config(config.vision_config)
        if config.connector_type == "h_reducer":
            self.h_reducer = MplugOwl2HReducer._from_config(config.h_reducer_config)
        else:
            self.visual_abstractor = MplugOwl2VisualAbstractor._from_config(
                config.abstractor_config
            )
        self.language_model = MplugOwl2TextModel._from_config(config.text_config)
        self.post_init()

    @property
    def connector(self) -> MplugOwl2VisualAbstractor | MplugOwl2HReducer:
        """Return the module that turns encoded images into visual tokens."""
        return (
            self.h_reducer if self.config.connector_type == "h_reducer" else self.visual_abstractor
        )

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> MplugOwl2ImageFeatures:
        """Encode (N, 3, H, W) normalised pixels; `pooler_output` has each image's visual tokens."""
        encoded = self.vision_tower(pixel_values, **{**kwargs, "return_dict": True})
        connected = self.connector(encoded.last_hidden_state, **{**kwargs, "return_dict": True})
        tokens = connected.last_hidden_state  # (N, Q + 1, D)
        return MplugOwl2ImageFeatures(
            last_hidden_state=encoded.last_hidden_state,
            # A list would fix the number of images in a graph.
            pooler_output=tokens if torch.compiler.is_compiling() else list(tokens),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            abstractor_hidden_states=connected.hidden_states,
            abstractor_attentions=connected.attentions,
        )

    def get_placeholder_mask(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        image_features: Tensor,
        mm_token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Find the positions of the visual tokens.

        Args:
            input_ids: (B, L), used if `mm_token_type_ids` is not given.
            inputs_embeds: (B, L, D).
            image_features: (N * (Q + 1), D).
            mm_token_type_ids: (B, L) modality indicators.

        Returns:
            (B, L, 1), True at visual tokens.

        Raises:
            ValueError: If neither ids nor indicators are given, or the number of visual positions
                differs from that of the visual tokens.
        """
        if mm_token_type_ids is not None:
            image_mask = match_indicators(mm_token_type_ids, inputs_embeds).eq(1)
        elif input_ids is not None:
            image_mask = input_ids.eq(self.config.image_token_id)  # (B, L)
        else:
            raise ValueError(
                "inputs_embeds came with images but without mm_token_type_ids, so visual and text "
                "positions cannot be told apart: pass mm_token_type_ids (0 text, 1 image), or "
                "input_ids instead of inputs_embeds."
            )
        if image_features.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(
                f"Visual tokens of width {image_features.shape[-1]} do not fit a language model "
                f"of width {inputs_embeds.shape[-1]}: encode the images with this model."
            )
        can_look = not (torch.compiler.is_compiling() or image_mask.is_meta)
        if can_look and (num_positions := int(image_mask.sum())) != len(image_features):
            per_image = self.config.num_image_tokens
            raise ValueError(
                f"Image features and image tokens do not match: {len(image_features)} features "
                f"({len(image_features) / per_image:g} images of {per_image}) for {num_positions} "
                f"placeholder positions. Each image needs {per_image} placeholders (id "
                f"{self.config.image_token_id}) in its prompt; MplugOwl2Processor writes them."
            )
        return image_mask.unsqueeze(-1).to(inputs_embeds.device)

    @known_arguments
    @merge_with_config_defaults  # use_cache, which Trainer sets in the configuration
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MplugOwl2ModelOutputWithPast:
        """Encode the images, insert them at their placeholders, and run the language model.

        Args:
            input_ids: (B, L), with `config.image_token_id` at each visual token.
            inputs_embeds: (B, L, D). Give either this or `input_ids`.
            pixel_values: (N, 3, H, W), in the order of the placeholders in the batch.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, for images that are already
                encoded. Give at most one of this and `pixel_values`.
            mm_token_type_ids: (B, L) modality indicators, 0 for text and 1 for image. Default:
                computed from `input_ids`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected input_ids or inputs_embeds, got both or neither.")
        encoder_output = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoder_output is not None:
            raise ValueError(
                "Pass pixel_values or mm_encoder_outputs, not both: they are the same images."
            )
        if pixel_values is not None:
            encoder_output = self.get_image_features(pixel_values, return_dict=True)
        elif self.training and encoder_output is None:
            # Ahead of the embedding, where images are encoded: sharded ranks gather parameters in
            # the order of use.
            nothing = self._untouched_vision_side()
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, L, D)
        elif mm_token_type_ids is not None:
            mm_token_type_ids = self._behind_virtual_tokens(mm_token_type_ids, inputs_embeds)

        if encoder_output is not None:
            image_features = visual_tokens(encoder_output).to(inputs_embeds)  # (N * (Q + 1), D)
            image_mask = self.get_placeholder_mask(
                input_ids, inputs_embeds, image_features, mm_token_type_ids
            )
            inputs_embeds = insert(image_features, inputs_embeds, image_mask)
            mm_token_type_ids = image_mask.squeeze(-1)
            # The count is a shape here. An exported graph computes both branches everywhere, since
            # not all runtimes that read it can sort.
            num_visual_tokens = None if torch.compiler.is_exporting() else len(image_features)
        else:
            if mm_token_type_ids is not None:
                mm_token_type_ids = match_indicators(mm_token_type_ids, inputs_embeds)
            num_visual_tokens = self._count_without_images(input_ids, mm_token_type_ids, cache)
            if self.training:
                inputs_embeds = inputs_embeds + nothing.to(inputs_embeds)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            mm_token_type_ids=mm_token_type_ids,
            num_visual_tokens=num_visual_tokens,
            **{**kwargs, "return_dict": True},
        )
        return MplugOwl2ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=encoder_output,
            **named_cache(outputs.cache),
        )

    def _behind_virtual_tokens(self, mm_token_type_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        """(B, L) indicators for (B, P + L, D) embeddings, of which PEFT's prompt tuning put P in
        front: these are text.

        PEFT does not say that it did, but it freezes all of the model; with a table that trains,
        lengths must agree.
        """
        num_virtual = inputs_embeds.shape[1] - mm_token_type_ids.shape[-1]
        if num_virtual <= 0 or self.get_input_embeddings().weight.requires_grad:
            return mm_token_type_ids
        return nn.functional.pad(mm_token_type_ids, (num_virtual, 0))

    def _count_without_images(
        self, input_ids: Tensor | None, mm_token_type_ids: Tensor | None, cache: Cache | None
    ) -> int | None:
        """The number of visual indicators in a step without images; `None` if it is not known.

        A prompt that names images needs them; looked at once per prompt, not at each decoding step.
        Training and generation (which hands over a cache) refuse an image's run of placeholders. A
        bare forward warns and embeds them, as transformers' models do: its own tests feed ids at
        random.
        """
        given = input_ids if mm_token_type_ids is None else mm_token_type_ids
        if given is None or torch.compiler.is_compiling() or given.is_meta:
            return None
        per_image = self.config.num_image_tokens
        # All that the host has to know is read at once, because each time it waits for the device.
        counts: dict[str, Tensor] = {}
        if mm_token_type_ids is not None:
            counts["visual"] = mm_token_type_ids.bool().sum()
        past = 0 if cache is None else cache.get_seq_length() if isinstance(cache, Cache) else None
        if isinstance(past, Tensor) and input_ids is not None and input_ids.shape[1] >= per_image:
            counts["past"] = past  # a static cache knows its length on the device alone
        if input_ids is not None and (past == 0 if isinstance(past, int) else "past" in counts):
            placeholders = input_ids.eq(self.config.image_token_id)  # (B, L)
            counts["placeholders"] = placeholders.sum()
        found = read_together(counts)
        if found.get("placeholders") and not found.get("past"):
            message = (
                f"The prompt has {found['placeholders']} image placeholders (id "
                f"{self.config.image_token_id}) but got no images: pass pixel_values, or leave "
                "the placeholders out."
            )
            is_run = (
                placeholders.shape[1] >= per_image
                and placeholders.unfold(1, per_image, 1).all(-1).any()
            )
            if is_run and (self.training or cache is not None):
                raise ValueError(message)
            logger.warning_once(message)
        return found.get("visual")

    def _untouched_vision_side(self) -> Tensor:
        """Zero that depends on the vision side, so that ranks with and without images run the same
        collectives.
        """
        vision = self.config.vision_config
        picture = torch.zeros(
            1, vision.num_channels, vision.image_size, vision.image_size, device=self.device
        )
        return 0.0 * visual_tokens(self.get_image_features(picture, return_dict=True)).sum()


class MplugOwl2ForConditionalGeneration(
    ScoresImages, MplugOwl2PreTrainedModel, MplugOwl2Generation, GenerationMixin
):
    """mPLUG-Owl2 with a language-model head. Generates text, and scores images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MplugOwl2Config):
        super().__init__(config)
        self.model = MplugOwl2Model(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()

    @fast_single_row
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> MplugOwl2ImageFeatures:
        """Encode (N, 3, H, W) normalised pixels; `pooler_output` has each image's visual tokens."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @known_arguments
    @can_return_tuple
    @fast_single_row
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MplugOwl2CausalLMOutputWithPast:
        """Predict the next token at each position.

        Args:
            input_ids, pixel_values, attention_mask, inputs_embeds, mm_token_type_ids,
                mm_encoder_outputs: see `MplugOwl2Model.forward`.
            labels: (B, L) target ids, -100 at positions without a loss. Visual positions never have
                a loss.
            logits_to_keep: Number of last positions to predict, or a tensor of positions. 0
                predicts all.

        Returns:
            `loss` if labels are given, `logits` (B, L, V), the cache, and, if requested, hidden
            states and attentions.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **{**kwargs, "return_dict": True},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._suppress_reserved_ids(self.lm_head(outputs.last_hidden_state[:, keep]))
        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels.eq(self.config.image_token_id), -100)
            if (num_labels := kwargs.get("num_items_in_batch")) is None:
                num_labels = kwargs.get("shift_labels", labels[..., 1:]).ne(-100).sum()
            elif not isinstance(num_labels, Tensor):
                # Filled on the device: a copy from the host would wait for it.
                num_labels = torch.full((), num_labels, device=logits.device)
            # Without a single label the loss is 0; the mean of nothing would be NaN.
            kwargs["num_items_in_batch"] = num_labels.clamp_min(1)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        return MplugOwl2CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **named_cache(outputs.cache),
        )

    def _suppress_reserved_ids(self, logits: Tensor) -> Tensor:
        """(B, L, V) -> the same, with the placeholder and the rows that pad the table made
        unreachable.
        """
        ids = torch.arange(logits.shape[-1], device=logits.device)
        reserved = ids.eq(self.config.image_token_id)
        if self.config.output_vocab_size is not None:
            reserved = reserved | ids.ge(self.config.output_vocab_size)
        # Out of place: under tensor parallelism the head's output is a view that autograd does not
        # let change.
        return logits.masked_fill(reserved, RESERVED_LOGIT)


MplugOwl2Model.register_for_auto_class("AutoModel")
MplugOwl2ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MplugOwl2ForConditionalGeneration", "MplugOwl2Model", "MplugOwl2PreTrainedModel"]
