"""Outputs of the models.

N: images of the whole batch, P: patches and the class token, C: width of the vision encoder or of
the abstractor, Q + 1: visual tokens of an image, D: width of the language model.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compatibility_mplug_owl2 import BaseModelOutputWithPast, CausalLMOutputWithPast, visual_tokens


@dataclass
class MplugOwl2ImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    Args:
        last_hidden_state: (N, P, C) vision encoder output; `hidden_states` and `attentions` are the
            vision encoder's.
        pooler_output: N times (Q + 1, D), the visual tokens of each image; one tensor (N, Q + 1, D)
            in an export.
        abstractor_hidden_states: layers + 1 times (N, Q, C), on request; `None` with an H-Reducer.
        abstractor_attentions: layers times (N, heads, Q, Q + P), on request; `None` with an
            H-Reducer.
    """

    abstractor_hidden_states: tuple[Tensor, ...] | None = None
    abstractor_attentions: tuple[Tensor, ...] | None = None


class WithImageOutputs:
    """An output with `image_outputs`."""

    image_outputs: MplugOwl2ImageFeatures | None

    @property
    def image_hidden_states(self) -> Tensor | None:
        """(N * (Q + 1), D), the visual tokens that entered the language model, in the order of
        their positions.
        """
        return None if self.image_outputs is None else visual_tokens(self.image_outputs)


@dataclass
class MplugOwl2ModelOutputWithPast(WithImageOutputs, BaseModelOutputWithPast):
    """Args: image_outputs: what `get_image_features` returned for the images of this step."""

    image_outputs: MplugOwl2ImageFeatures | None = None


@dataclass
class MplugOwl2CausalLMOutputWithPast(WithImageOutputs, CausalLMOutputWithPast):
    """Args: image_outputs: what `get_image_features` returned for the images of this step."""

    image_outputs: MplugOwl2ImageFeatures | None = None
