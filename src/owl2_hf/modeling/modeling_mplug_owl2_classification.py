"""mPLUG-Owl2 with a head that gives each prompt scores: classes, a regression, the reward of an answer.

The head reads the last token of the prompt that is no padding, as in transformers' own sequence classifiers.

B: batch, L: positions, N: images of the whole batch, D: width of the language model, K: labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging

from .compatibility_mplug_owl2 import SequenceClassifierOutputWithPast, known_arguments, named_cache
from .configuration_mplug_owl2 import MplugOwl2Config
from .modeling_mplug_owl2 import (
    MplugOwl2ImageFeatures,
    MplugOwl2Model,
    MplugOwl2PreTrainedModel,
    WithImageOutputs,
)

logger = logging.get_logger(__name__)


@dataclass
class MplugOwl2SequenceClassifierOutputWithPast(WithImageOutputs, SequenceClassifierOutputWithPast):
    """Args: image_outputs: what `get_image_features` made of the images of this step."""

    image_outputs: MplugOwl2ImageFeatures | None = None


class MplugOwl2ForSequenceClassification(MplugOwl2PreTrainedModel):
    """mPLUG-Owl2 with `config.num_labels` scores for each prompt of text and images."""

    # A causal checkpoint gives all but the head of this class, and has one of its own.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]
    # The loss is a mean over prompts: Trainer divides it by its steps of accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: MplugOwl2Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MplugOwl2Model(config)
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> MplugOwl2ImageFeatures:
        """(N, 3, H, W) normalised pixels -> the visual tokens of each image, in `pooler_output`."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @known_arguments
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
        labels: Tensor | None = None,
        **kwargs,
    ) -> MplugOwl2SequenceClassifierOutputWithPast:
        """Score each prompt.

        Args:
            input_ids, pixel_values, attention_mask, inputs_embeds, mm_token_type_ids, mm_encoder_outputs: as in
                `MplugOwl2Model.forward`.
            labels: By `config.problem_type`: "regression" (B,) or (B, K) numbers, "single_label_classification" (B,)
                ids, "multi_label_classification" (B, K) of 0 and 1. Where it is not set, the first labels decide it as
                in transformers: one label is a regression, of more labels whole numbers are ids.

        Returns:
            `loss` where labels are given, `logits` (B, K), the cache, and on request hidden states and attentions.
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
        last = self._last_tokens(outputs.last_hidden_state, input_ids, attention_mask)  # (B,)
        rows = torch.arange(len(last), device=last.device)
        logits = self.score(outputs.last_hidden_state[rows, last])  # (B, K)
        loss = None if labels is None else self._loss(logits, labels)
        return MplugOwl2SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **named_cache(outputs.cache),
        )

    def _last_tokens(self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(B,) positions of the last tokens that are no padding, by the mask or else by the padding's id.

        Raises:
            ValueError: Neither tells what is padding, and there are several prompts.
        """
        num_rows, length = hidden_states.shape[:2]
        padding = self.config.get_text_config().pad_token_id
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            is_token = attention_mask[:, -length:].to(hidden_states.device).bool()  # (B, L), a mask has the cache's too
        elif input_ids is not None and padding is not None:
            is_token = input_ids.ne(padding).to(hidden_states.device)
        elif num_rows == 1 or input_ids is None:
            is_token = hidden_states.new_ones(num_rows, length, dtype=torch.bool)
            if num_rows > 1:
                logger.warning_once(
                    "inputs_embeds came without an attention_mask: the last position of each prompt is scored, as if "
                    "there were no padding behind it."
                )
        else:
            raise ValueError(
                f"Nothing tells which of the {num_rows} prompts are padded: expected an attention_mask, or a "
                "pad_token_id in text_config. Pass the attention_mask that the processor makes."
            )
        positions = torch.arange(length, device=hidden_states.device)
        return (positions * is_token).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """transformers' loss of sequence classifiers, in float32 whatever the model's dtype."""
        if self.config.num_labels == 1 or self.config.problem_type in ("regression", "multi_label_classification"):
            labels = labels.float()
        logits = logits.float()
        return self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)


MplugOwl2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["MplugOwl2ForSequenceClassification"]
