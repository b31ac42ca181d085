"""Prompts and generation settings of the original's evaluation scripts (mplug_owl2/evaluate), as data."""

from dataclasses import dataclass, field
from typing import Any

_GREEDY = {"do_sample": False, "num_beams": 1}
# Upstream: prompts end with a space, which is a token of its own.
_SHORT = "Answer the question using a single word or phrase. ASSISTANT: "
_LETTER = "Answer with the option\u2019s letter from the given choices directly. ASSISTANT: "


@dataclass(frozen=True)
class Evaluation:
    """How the original asks the questions of one benchmark.

    Args:
        prompt: With `<|image|>` at the place of the picture and the names of what is filled in, in braces.
        generation: Arguments of `generate`.
        dropped: Words that the original takes out of a question before it asks.
    """

    prompt: str
    generation: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""

    def fill(self, **values: str) -> str:
        """The prompt of one question; text of the question stays text, also where it holds braces.

        Raises:
            ValueError: A value that the prompt names is missing.
        """
        try:
            return self.prompt.format(
                **{name: value.replace(self.dropped, "") if self.dropped else value for name, value in values.items()}
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
}
