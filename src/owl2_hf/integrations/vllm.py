"""The model on vLLM's transformers backend, which by itself would read visual tokens as text.

vLLM puts the visual tokens into the embeddings itself and hands the decoder embeddings alone, so
that nothing tells it which positions are visual. Here vLLM keeps the raw token ids as well, and the
modality indicators are read off them. `registration.register_in_vllm`, the entry point of the group
`vllm.general_plugins`, names this class to vLLM.

T: tokens of all requests of a step, one after another; D: width of the language model; V: embedding
rows.
"""

import dataclasses
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.model_executor.models.transformers.multimodal import MultiModalMixin
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.sequence import IntermediateTensors

from ..modeling import MplugOwl2ForConditionalGeneration


class MplugOwl2ProcessingInfo(MultiModalProcessingInfo):
    """What vLLM asks about images before it has seen one."""

    def get_image_size_with_most_features(self) -> ImageSize:
        """The image that nothing is done to, as all take the same; vLLM's guess has more pixels
        than are accepted.
        """
        size = self.get_hf_processor().image_processor.size
        return ImageSize(width=size["width"], height=size["height"])


class MplugOwl2MultiModalProcessor(MultiModalProcessor):
    """vLLM's expansion of placeholders."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """As in vLLM, with the tokenizer's first token in front, which vLLM's chats leave out."""
        first = self.info.get_tokenizer().bos_token_id
        if first is not None and inputs.prompt[:1] != [first]:
            inputs = dataclasses.replace(inputs, prompt=[first, *inputs.prompt])
        return super().apply(inputs, timing_ctx)


@MULTIMODAL_REGISTRY.register_processor(
    MplugOwl2MultiModalProcessor,
    info=MplugOwl2ProcessingInfo,
    dummy_inputs=MultiModalDummyInputsBuilder,
)
class MplugOwl2ForVllm(TransformersMultiModalForCausalLM):
    """vLLM's wrapper of any transformers model, with the modality indicators of this one.

    Raises:
        ValueError: vLLM was asked for what would give other text than transformers: several
            pipeline stages, DocOwl's crops, or prompts so long that the rotary base would change.
    """

    requires_raw_input_tokens = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        _check_settings(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _decorate_cls_for_torch_compile(
        self, cls: Any, dynamic_arg_dims: Any, enable_if: Any, is_encoder: Any
    ) -> None:
        """As in vLLM; the indicators grow with the tokens, as the embeddings do."""
        if not is_encoder:
            dynamic_arg_dims = {**dynamic_arg_dims, "mm_token_type_ids": 1}
        super()._decorate_cls_for_torch_compile(cls, dynamic_arg_dims, enable_if, is_encoder)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Run the decoder.

        Args:
            input_ids: (T,), `image_token_id` at each visual token.
            positions: (T,), each counted within its request.
            inputs_embeds: (T, D), the visual tokens in their places; made of `input_ids` when
                absent.

        Returns:
            (T, D) after the final norm.
        """
        if input_ids is None:
            raise ValueError(
                "vLLM passed embeddings without token ids, so visual and text positions cannot "
                "be told apart. Install vLLM 0.30 or newer, which supports "
                "requires_raw_input_tokens."
            )
        indicators = input_ids.eq(self.config.image_token_id).long()[None]
        # Skip MultiModalMixin, whose forward does not pass on this keyword.
        return super(MultiModalMixin, self).forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, mm_token_type_ids=indicators
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(T, D) -> (T, V), with the ids that are never predicted made unreachable."""
        logits = super().compute_logits(hidden_states)
        return (
            None
            if logits is None
            else MplugOwl2ForConditionalGeneration._suppress_reserved_ids(self, logits)
        )


def _check_settings(vllm_config: VllmConfig) -> None:
    config, longest = vllm_config.model_config.hf_config, vllm_config.model_config.max_model_len
    if (num_stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        raise ValueError(
            f"pipeline_parallel_size must be 1, got {num_stages}: vLLM passes the token ids only "
            "to the first stage, but every layer needs them. Use tensor_parallel_size."
        )
    if config.connector_type != "abstractor":
        raise ValueError(
            "vLLM runs models with a visual abstractor, got connector_type "
            f"{config.connector_type!r}: it tokenizes the names of DocOwl's crops separately, "
            "which gives wrong ids. Use owl2-hf serve."
        )
    ntk_length = config.text_config.rope_dynamic_ntk_length
    if ntk_length is not None and longest > ntk_length:
        raise ValueError(
            f"max_model_len must be at most {ntk_length}, got {longest}: longer prompts change "
            "the rotary base, which all requests in a vLLM batch share. Pass --max-model-len "
            f"{ntk_length}."
        )
