"""Score many images with one prompt: its text before the image is computed once.

B: images of one batch, L: positions, P: positions in front of the image, V: embedding rows.
"""

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.cache_utils import DynamicCache

from ..modeling.compatibility_mplug_owl2 import named_cache
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..modeling.scoring_mplug_owl2 import level_logits
from .scorer import Scorer

KeysAndValues = list[tuple[Tensor, Tensor]]


class PrefixScorer(Scorer):
    """A scorer that keeps the keys and values of the text in front of the image.

    Its scores are those of `Scorer` up to rounding: 1e-5 in float32. In half precision rounding may
    move them by more, so that `with_prefix` leaves such a model to `Scorer`.
    """

    _prefix: tuple[list[int], KeysAndValues] | None = None

    def _read(self, inputs: BatchFeature) -> Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (B, L)
        # Read at once, because each time the host waits for the device.
        first, is_token = torch.stack([ids[0], mask.bool().all(0).to(ids.dtype)]).tolist()
        length = first.index(self.model.config.image_token_id)
        # With padding, or without text before the image, there is no prefix to share.
        if not length or not all(is_token):
            return super()._read(inputs)
        rest = {name: inputs[name][:, length:] for name in ("input_ids", "mm_token_type_ids")}
        cache = DynamicCache()
        with torch.no_grad():
            for layer, pair in enumerate(self._read_prefix(first[:length], ids[:1, :length])):
                cache.update(*(one.expand(len(ids), -1, -1, -1) for one in pair), layer)
            logits = self.model(
                **{**inputs, **rest}, logits_to_keep=1, use_cache=True, **named_cache(cache)
            ).logits[:, -1]
        return level_logits(logits.float().cpu(), self._ids, self.preset)

    def _read_prefix(self, text: list[int], ids: Tensor) -> KeysAndValues:
        """(1, P) ids -> (1, heads, P, head_dim) keys and values of each layer; read again where the
        prompt changes.

        Args:
            text: The same ids on the host.
        """
        if self._prefix is None or self._prefix[0] != text:
            cache = DynamicCache()
            self.model(input_ids=ids, logits_to_keep=1, use_cache=True, **named_cache(cache))
            self._prefix = text, [(layer.keys, layer.values) for layer in cache.layers]
        return self._prefix[1]


def with_prefix(scorer: Scorer) -> Scorer:
    """The same scorer, as a `PrefixScorer` where that keeps its scores to 1e-5.

    Adapters of soft prompts, for one, put positions of their own in front: only the plain model is
    taken.
    """
    model = scorer.model
    if not isinstance(model, MplugOwl2ForConditionalGeneration) or model.dtype != torch.float32:
        return scorer
    given = (scorer.preset, None, scorer.batch_size, scorer.crops, scorer.original_reading)
    return PrefixScorer(model, scorer.processor, *given)
