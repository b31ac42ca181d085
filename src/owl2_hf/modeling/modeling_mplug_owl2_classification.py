"""mPLUG-Owl2 with a classification, regression or reward head.

The head reads the last token of the prompt that is not padding, as transformers' sequence
classifiers do.

Q-Scorer (arXiv:2511.07812) is such a model: its head reads the first token of the model's own
answer, and is an MLP. A configuration with `deepmlp_hidden_dims`, the name in Q-Scorer's
checkpoints, describes one.

B: batch, L: positions, N: images of the whole batch, D: width of the language model, K: labels.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging

from .compatibility_mplug_owl2 import SequenceClassifierOutputWithPast, known_arguments, named_cache
from .configuration_mplug_owl2 import MplugOwl2Config
from .modeling_mplug_owl2 import MplugOwl2Model, MplugOwl2PreTrainedModel
from .outputs_mplug_owl2 import MplugOwl2ImageFeatures, WithImageOutputs

logger = logging.get_logger(__name__)


@dataclass
class MplugOwl2SequenceClassifierOutputWithPast(WithImageOutputs, SequenceClassifierOutputWithPast):
    """Args: image_outputs: what `get_image_features` returned for the images of this step."""

    image_outputs: MplugOwl2ImageFeatures | None = None


class MplugOwl2QScorerHead(nn.Module):
    """Q-Scorer's MLP. A layer whose input and output widths are equal has a residual connection.

    Args:
        widths: Widths of the hidden layers.

    Raises:
        ValueError: If `widths` is not a list of positive numbers.
    """

    def __init__(self, hidden_size: int, widths: list[int], num_labels: int):
        super().__init__()
        if not isinstance(widths, list) or not all(
            type(width) is int and width > 0 for width in widths
        ):
            raise ValueError(
                f"deepmlp_hidden_dims: expected a list of layer widths, got {widths!r}; correct "
                "config.json."
            )
        sizes = [hidden_size, *widths]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.out_proj = nn.Linear(sizes[-1], num_labels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        for layer in self.layers:
            output = layer(hidden_states).relu()
            hidden_states = (
                output + hidden_states if output.shape == hidden_states.shape else output
            )
        return self.out_proj(hidden_states)


class MplugOwl2ForSequenceClassification(MplugOwl2PreTrainedModel):
    """mPLUG-Owl2 with a head that gives each prompt `config.num_labels` scores."""

    # A causal checkpoint has all weights but the head of this class, and its own head.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]
    # The loss is a mean over prompts: Trainer divides it by its gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: MplugOwl2Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MplugOwl2Model(config)
        text, widths = config.text_config, getattr(config, "deepmlp_hidden_dims", None)
        self.score: nn.Module = nn.Linear(text.hidden_size, config.num_labels, bias=False)
        self.reads_answer = widths is not None
        if widths is not None:
            self.score = MplugOwl2QScorerHead(text.hidden_size, widths, config.num_labels)
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> MplugOwl2ImageFeatures:
        """Encode (N, 3, H, W) normalised pixels.

        `pooler_output` has the visual tokens of each image.
        """
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
        **kwargs: Any,
    ) -> MplugOwl2SequenceClassifierOutputWithPast:
        """Score each prompt.

        Args:
            input_ids, pixel_values, attention_mask, inputs_embeds, mm_token_type_ids,
                mm_encoder_outputs: see `MplugOwl2Model.forward`.
            labels: By `config.problem_type`: "regression" (B,) or (B, K) numbers,
                "single_label_classification" (B,) ids, "multi_label_classification" (B, K) of 0 and
                1. If it is not set, the first labels decide, as in transformers: with `num_labels`
                1 it is a regression; otherwise, integer labels are class ids.

        Returns:
            `loss` if labels are given, `logits` (B, K), the cache, and, if requested, hidden states
            and attentions.

        Raises:
            ValueError: If padding cannot be recognised, or a Q-Scorer gets embeddings or a cache.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "mm_token_type_ids": mm_token_type_ids,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        if self.reads_answer:
            inputs = self._with_answer(inputs)
        outputs = self.model(**inputs, **{**kwargs, "return_dict": True})
        hidden_states = outputs.last_hidden_state  # (B, L, D)
        # (B,)
        last = self._last_tokens(hidden_states, inputs["input_ids"], inputs["attention_mask"])
        rows = torch.arange(len(last), device=last.device)
        logits = self.score(hidden_states[rows, last])  # (B, K)
        loss = None if labels is None else self._loss(logits, labels)
        return MplugOwl2SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **named_cache(outputs.cache),
        )

    def _with_answer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The prompts with the first token of their answers, which is the likeliest one.

        The images are encoded once, and the prompts read twice, for the first time without
        gradients.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if ids is None or inputs["cache"] is not None:
            raise ValueError("Q-Scorer needs the whole prompt: pass input_ids and no cache.")
        if inputs["pixel_values"] is not None:
            encoded = self.get_image_features(inputs["pixel_values"], return_dict=True)
            inputs = {**inputs, "pixel_values": None, "mm_encoder_outputs": {"image": encoded}}
        with torch.no_grad():
            hidden_states = self.model(
                **inputs, use_cache=False, return_dict=True
            ).last_hidden_state
            last = self._last_tokens(hidden_states, ids, mask).to(ids.device)  # (B,)
            rows = torch.arange(len(last), device=last.device)
            # Later rows are not tokens of texts.
            logits = self.lm_head(hidden_states[rows, last])  # (B, V)
            tokens = logits[:, : self.config.output_vocab_size].argmax(-1)  # (B,)
        mask = (
            torch.arange(ids.shape[1], device=ids.device) <= last[:, None] if mask is None else mask
        )
        extended = {"input_ids": (ids, tokens), "attention_mask": (mask, 1)}
        if inputs["mm_token_type_ids"] is not None:
            extended["mm_token_type_ids"] = (inputs["mm_token_type_ids"], 0)
        if inputs["position_ids"] is not None:
            positions = inputs["position_ids"].expand_as(ids)  # (B, L)
            extended["position_ids"] = (positions, positions[rows, last] + 1)
        for name, (values, new) in extended.items():
            values = nn.functional.pad(values, (0, 1))  # (B, L + 1)
            # A number is filled in on the device: a copy from the host would wait for it.
            new = new.to(values) if isinstance(new, Tensor) else values.new_full((), new)
            values[rows, last + 1] = new
            inputs = {**inputs, name: values}
        return inputs

    def _last_tokens(
        self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """(B,) positions of the last tokens that are no padding, by the mask or else by the
        padding's id.

        Raises:
            ValueError: If neither tells what is padding, and there are several prompts.
        """
        num_rows, length = hidden_states.shape[:2]
        padding = self.config.get_text_config().pad_token_id
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            # (B, L), without the positions in the cache.
            is_token = attention_mask[:, -length:].to(hidden_states.device).bool()
        elif input_ids is not None and padding is not None:
            is_token = input_ids.ne(padding).to(hidden_states.device)  # (B, L)
        elif num_rows == 1 or input_ids is None:
            is_token = hidden_states.new_ones(num_rows, length, dtype=torch.bool)
            if num_rows > 1:
                logger.warning_once(
                    "inputs_embeds came without an attention_mask: the last position of each "
                    "prompt is scored, as if there were no padding on the right."
                )
        else:
            raise ValueError(
                f"Padding cannot be found in {num_rows} prompts: expected an attention_mask, or "
                "a pad_token_id in text_config. Pass the attention_mask of the processor."
            )
        positions = torch.arange(length, device=hidden_states.device)
        return (positions * is_token).argmax(-1)  # (B,)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """transformers' loss of sequence classifiers, in float32 whatever the model's dtype."""
        if self.config.num_labels == 1 or self.config.problem_type in (
            "regression",
            "multi_label_classification",
        ):
            labels = labels.float()
        logits = logits.float()
        return self.loss_function(
            logits=logits, labels=labels, pooled_logits=logits, config=self.config
        )


MplugOwl2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["MplugOwl2ForSequenceClassification"]
