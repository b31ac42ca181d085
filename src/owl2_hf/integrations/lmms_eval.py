"""mPLUG-Owl2 for lmms-eval: `lmms_eval --model owl2_hf --model_args pretrained=DIR`.

lmms-eval finds it through the entry-point group `lmms_eval.models`; this file is imported only by
the harness.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..evaluation.settings import EVALUATIONS
from ..limits import Context
from ..naming import naming_model
from ..naming import place as place_of


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest(model_id="owl2_hf", simple_class_path=f"{__name__}.Owl2")


class Owl2(lmms):
    """A model of the family behind lmms-eval's interface.

    Args:
        pretrained: Folder or Hub id, in this package's format or the original's; `default` or
            `default-scorer` for a model in the package.
        device: Where to run.
        dtype: As `from_pretrained` takes it.
        batch_size: Questions in one call of `generate`.
        prompt: A name in `EVALUATIONS` whose generation settings are the defaults, and whose ending
            each question gets (its instruction comes from the task); the chat template's if not
            given.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int | str = 1,
        prompt: str | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        if kwargs:
            raise ValueError(
                "expected only pretrained, device, dtype, batch_size and prompt, got also "
                f"{sorted(kwargs)}."
            )
        if prompt is not None and prompt not in EVALUATIONS:
            raise ValueError(f"expected a prompt of {', '.join(EVALUATIONS)}, got {prompt!r}.")
        with naming_model(pretrained):
            folder = place_of(pretrained)
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
            self.processor = AutoProcessor.from_pretrained(folder)
        self.model.to(device)
        self.batch_size = int(batch_size)
        self.settings = None if prompt is None else EVALUATIONS[prompt]

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers: dict[int, str] = {}
        for batch in _batches(requests, self.batch_size):
            kwargs = batch[0][1].args[1]
            for (index, _), answer in zip(
                batch, self._answers([request for _, request in batch], kwargs), strict=True
            ):
                answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def _answers(self, requests: list[Any], kwargs: dict[str, Any]) -> list[str]:
        prompts, pictures = zip(*(self._prompt(request) for request in requests), strict=True)
        inputs = self.processor(
            text=list(prompts),
            images=list(pictures) if any(pictures) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device)
        until, generation = _generation(
            kwargs, self.settings.generation_kwargs() if self.settings else {}
        )
        room = Context(self.model, self.processor).room(inputs["input_ids"].shape[1])
        generation["max_new_tokens"] = min(generation["max_new_tokens"], room)
        output = self.model.generate(**inputs, **generation)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [
            _cut(text, until) for text in self.processor.batch_decode(new, skip_special_tokens=True)
        ]

    def _prompt(self, request: Any) -> tuple[str, list[Any]]:
        """A question with its images in front, or where it marks them."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        pictures = [
            picture.convert("RGB")
            for picture in doc_to_visual(self.task_dict[task][split][doc_id]) or []
        ]
        question, pictures = _place(context, pictures, self.processor.image_token)
        return (
            f"USER: {question} {self.settings.ending if self.settings else 'ASSISTANT:'}",
            pictures,
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [self._loglikelihood(request) for request in requests]

    @torch.no_grad()
    def _loglikelihood(self, request: Any) -> tuple[float, bool]:
        """Log probability of a target behind a question, and whether greedy decoding gives it."""
        _, target, _, doc_id, task, split = request.args
        target = target(self.task_dict[task][split][doc_id]) if callable(target) else target
        prompt, pictures = self._prompt(request)
        whole = {"text": f"{prompt} {target}", "images": pictures or None, "return_tensors": "pt"}
        inputs = self.processor(**whole).to(self.model.device)
        start = self.processor(**{**whole, "text": prompt})["input_ids"].shape[1]
        logits = self.model(**inputs).logits[0, start - 1 : -1].float().log_softmax(-1)
        ids = inputs["input_ids"][0, start:]
        return float(logits.gather(1, ids.unsqueeze(1)).sum()), bool(
            (logits.argmax(-1) == ids).all()
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported")


def _batches(requests: list[Any], size: int) -> Iterator[list[tuple[int, Any]]]:
    """Runs of requests that share their generation settings, each with its place among all."""
    run: list[tuple[int, Any]] = []
    for index, request in enumerate(requests):
        if run and (len(run) == size or request.args[1] != run[0][1].args[1]):
            yield run
            run = []
        run.append((index, request))
    if run:
        yield run


def _place(question: str, pictures: list[Any], image_token: str) -> tuple[str, list[Any]]:
    """Image tokens for the marks `<image>`, or MMMU's `<image 1>`, where they fit the images; else
    in front.

    MMMU gives each image once, in the order of the numbers, and may show it twice.
    """
    marks = re.findall(r"<image(?: (\d+))?>", question)
    numbers = sorted(set(marks))
    if marks and "" not in numbers and len(numbers) == len(pictures):
        pictures = [pictures[numbers.index(number)] for number in marks]
    if len(marks) != len(pictures) or len({bool(mark) for mark in marks}) != 1:
        return image_token * len(pictures) + question, pictures
    return re.sub(r"<image(?: \d+)?>", image_token, question), pictures


def _generation(
    kwargs: dict[str, Any], defaults: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Strings that end an answer, and arguments of `generate`; the task's win over the defaults."""
    until = kwargs.get("until") or []
    kept = ("max_new_tokens", "do_sample", "num_beams", "temperature", "top_p")
    given = {key: kwargs[key] for key in kept if kwargs.get(key) is not None}
    merged = {"do_sample": False, "max_new_tokens": 256, **defaults, **given}
    if not merged["do_sample"] or merged.get("temperature") == 0:
        merged["do_sample"] = False
        merged.pop("temperature", None)
        merged.pop("top_p", None)
    return [until] if isinstance(until, str) else list(until), merged


def _cut(text: str, until: list[str]) -> str:
    for end in until:
        if end:
            text = text.split(end)[0]
    return text.strip()
