"""Prompts and generation settings of evaluation scripts, as data.

The original's (mplug_owl2/evaluate), and Q-Bench's as Q-Align and DeQA-Score ship it.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from owl2_hf.scoring import IMAGE_TOKEN

_GREEDY = {"do_sample": False, "num_beams": 1}
# Upstream: prompts end with a space, which is a token of its own.
_SHORT = "Answer the question using a single word or phrase. ASSISTANT: "
_LETTER = "Answer with the option\u2019s letter from the given choices directly. ASSISTANT: "
# How MMMU names an image inside a question or an option.
_NUMBERED = re.compile(r"<image (\d+)>")
_MMMU = {"max_new_tokens": 20, "min_new_tokens": 1}


@dataclass(frozen=True)
class Evaluation:
    """How the original asks the questions of one benchmark.

    Args:
        prompt: With `<|image|>` at the place of the image and the names of what is filled in, in
            braces; without it where questions say themselves where their images stand.
        generation: Arguments of `generate`.
        dropped: Words that the original takes out of a question before it asks.
    """

    prompt: str
    generation: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""

    def fill(self, **values: str) -> str:
        """The prompt of one question; text of the question stays text, also where it holds braces.

        Where the prompt has no place for an image, each `<image 1>`, `<image 2>`, ... of the values
        becomes one.

        Raises:
            ValueError: If a value that the prompt names is missing.
        """
        filled = self._fill(values)
        return filled if IMAGE_TOKEN in self.prompt else _NUMBERED.sub(IMAGE_TOKEN, filled)

    def picture_numbers(self, **values: str) -> list[int]:
        """Which images `fill` gives a place to, in their order: of `<image 2>` and `<image 1>`, [2,
        1].
        """
        return (
            []
            if IMAGE_TOKEN in self.prompt
            else [int(number) for number in _NUMBERED.findall(self._fill(values))]
        )

    @property
    def ending(self) -> str:
        """What stands behind the question and its instruction: where the answer begins."""
        return self.prompt[self.prompt.rindex("ASSISTANT:") :]

    def _fill(self, values: dict[str, str]) -> str:
        try:
            return self.prompt.format(
                **{
                    name: value.replace(self.dropped, "") if self.dropped else value
                    for name, value in values.items()
                }
            )
        except KeyError as error:
            raise ValueError(f"the prompt needs {error.args[0]!r}, got {sorted(values)}.") from None

    def generation_kwargs(self) -> dict[str, Any]:
        """Everything that `generate` takes, greedy as in the original."""
        return {**_GREEDY, **self.generation}


EVALUATIONS: dict[str, Evaluation] = {
    # VQAv2, OK-VQA and TextVQA.
    "vqa": Evaluation(
        f"USER: <|image|>{{question}} {_SHORT}",
        {"max_new_tokens": 10, "min_new_tokens": 1},
    ),
    # Flickr30k and NoCaps.
    "caption": Evaluation(
        "USER: <|image|>Provide a one-sentence caption for the provided image. ASSISTANT: ",
        {"max_new_tokens": 60, "min_new_tokens": 8, "length_penalty": 0.0},
    ),
    "mmbench": Evaluation(
        f"USER: <|image|>{{hint}}\n{{question}}\n{{options}}\n{_LETTER}",
        {"max_new_tokens": 10},
    ),
    "mme": Evaluation(
        f"USER: <|image|>{{question}}\n{_SHORT}",
        {"max_new_tokens": 10},
        dropped=" Please answer yes or no.",
    ),
    # Options are "A. ..." and so on, one a line. Upstream: here, and only here, no space ends the
    # prompt.
    "mmmu": Evaluation(f"USER: {{question}}\n{{options}}\n{_LETTER}".rstrip(), _MMMU),
    "mmmu-open": Evaluation(f"USER: {{question}}\n{_SHORT}".rstrip(), _MMMU),
    # Not the original's: eval_qbench_mcq.py of Q-Align and DeQA-Score, whose apostrophe is a plain
    # one.
    "qbench": Evaluation(
        "USER: The input image:<|image|>{question}\n{options}\n"
        "Answer with the option's letter from the given choices directly.\n ASSISTANT:",
        {"max_new_tokens": 512},
    ),
}
