"""What transformers' `pipeline("decision")` needs to score with a model: decision.json and its
prompt template.

That pipeline (transformers 5.23) reads the logits of one word for each level behind a prompt, as a
scorer is read. Its answer counts levels from 0, the lowest; on an even scale this is the score,
shifted and stretched. Releases without the pipeline do not look at the files.
"""

import json
import re
from pathlib import Path

from ..modeling.presets_mplug_owl2 import (
    IMAGE_TOKEN,
    PRESET_FILE,
    SCORER_FILES,
    Preset,
    read_preset,
)
from ..modeling.scoring_mplug_owl2 import level_ids
from ..processing.processing_mplug_owl2 import MplugOwl2Processor

_, CONFIG_FILE, TEMPLATE_FILE = SCORER_FILES

# A template that ends without `<|mark|>` is read at its end. Only the images of the state count.
_TEMPLATE = """\
{%- set prompts = PROMPTS -%}
{%- set levels = LEVELS -%}
{%- macro images(value) -%}
    {%- if value is mapping -%}
        {%- if value.type == 'image' and value.image is defined -%}
            {{- 'IMAGE' -}}
        {%- else -%}
            {%- for inner in value.values() -%}{{- images(inner) -}}{%- endfor -%}
        {%- endif -%}
    {%- elif value is sequence and value is not string -%}
        {%- for inner in value -%}{{- images(inner) -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set task = question.instructions or FIRST -%}
{%- set shown = images(state) -%}
{%- if question.type != 'score' or question.descriptions != levels -%}
    {{- raise_exception("this scorer answers questions of type 'score' with the criteria " ~ levels|tojson
        ~ ", the lowest first") -}}
{%- elif task is not string or task not in prompts -%}
    {{- raise_exception("the instructions of a question name the task, one of " ~ prompts|list|tojson) -}}
{%- elif not shown -%}
    {{- raise_exception("the state holds no image: put the name of one in assets there") -}}
{%- endif -%}
{{- prompts[task].replace('IMAGE', shown) -}}
"""


def decision_files(preset: Preset) -> dict[str, str]:
    """Name -> text of the pipeline's files; none where it cannot score as the preset does.

    It reads one word for each level, counts them in even steps, and leaves images as the processor
    makes them.
    """
    steps = len(preset.levels) - 1
    has_words = all(isinstance(level, str) for level in preset.levels)
    is_even = preset.values == tuple(1 - index / steps for index in range(steps + 1))
    if not (has_words and is_even and preset.images_per_prompt == 1):
        return {}
    lowest_first = list(reversed(preset.levels))
    config = {"labels": {"score": lowest_first}, "temperature": {"score": preset.temperature}}
    texts = {
        "PROMPTS": json.dumps(preset.prompts, ensure_ascii=False),
        "LEVELS": json.dumps(lowest_first, ensure_ascii=False),
        "FIRST": json.dumps(next(iter(preset.prompts)), ensure_ascii=False),
        "IMAGE": IMAGE_TOKEN,
    }
    template = re.sub(r"\b(PROMPTS|LEVELS|FIRST|IMAGE)\b", lambda found: texts[found[0]], _TEMPLATE)
    return {CONFIG_FILE: json.dumps(config, indent=2) + "\n", TEMPLATE_FILE: template}


def scorer_files(preset: Preset, processor: MplugOwl2Processor | None = None) -> dict[str, str]:
    """Name -> text of all that says how a model scores, for the folder of its weights.

    Args:
        processor: That of the folder. Without one, and where it makes images square in another way
            than the preset, the pipeline's files are left out: it would give other scores.

    Raises:
        ValueError: If a level word is not one token of the vocabulary.
    """
    files = {PRESET_FILE: preset.to_json()}
    if processor is not None:
        level_ids(processor.tokenizer, preset)
        if processor.image_processor.image_aspect_ratio == preset.image_aspect_ratio:
            files.update(decision_files(preset))
    return files


def check_scorer(folder: Path) -> Preset | None:
    """How the model of a folder scores, `None` if it does not; its files fit each other.

    Raises:
        ValueError: If one is damaged, or of another preset.
    """
    found = [name for name in SCORER_FILES if (folder / name).is_file()]
    if not found:
        return None
    if PRESET_FILE not in found:
        raise ValueError(
            f"{folder} has {found[0]} without {PRESET_FILE}: convert or save the model again."
        )
    preset = read_preset(folder / PRESET_FILE)
    expected = decision_files(preset)
    for name in found[1:]:
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if text != expected.get(name):
            raise ValueError(
                f"{folder / name} does not match {PRESET_FILE}: convert or save the model again."
            )
    return preset
