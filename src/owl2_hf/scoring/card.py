"""The model card of a scorer: its prompt, and how well it agrees with opinions."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .judging import Evaluation
from .presets import Preset

_NAMES = {
    "srcc": "SRCC",
    "krcc": "KRCC",
    "plcc": "PLCC",
    "plcc_fitted": "PLCC after the logistic fit",
    "rmse_fitted": "RMSE after the logistic fit",
    "kl": "KL distance",
    "js": "JS distance",
    "wasserstein": "Wasserstein distance",
}
_ONE_LINER = """\
```python
from PIL import Image
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
print(model.score([Image.open("photo.jpg")], task_="{task}", input_="image").tolist())
```

Scores go from {low:g} to {high:g}."""
_TEXT = """\
# {title}

A model of the mPLUG-Owl2 family that scores images by the probabilities of {count} words, from {low:g} to {high:g}.

{one_liner}

## Prompt

```text
{prompt}
```

Levels, best first: {levels}. An image becomes square by `{aspect}`.

## How well it agrees with people

Opinions: {data}. In parentheses: the 95 % interval, by bootstrap over the images.

{table}

Before you publish this card, say what the model was trained on, and choose its licence.
"""


def write_score_card(
    file: str | Path, report: Evaluation, preset: Preset, data: str, task: str = "quality"
) -> None:
    """Write a model card with the results, as text and as the Hub reads them.

    Args:
        file: README.md of the model's folder.
        report: What `evaluate` found.
        preset: How the model is asked.
        data: What the opinions are, in words or by the name of the file.
        task: Of the preset.

    Raises:
        ValueError: If there is such a file already.
    """
    path = Path(file)
    title = path.resolve().parent.name
    results = [
        EvalResult(
            task_type="image-quality-assessment",
            dataset_type=one.dataset or "opinions",
            dataset_name=one.dataset or data,
            metric_type=name,
            metric_name=_NAMES[name],
            metric_value=round(own.value, 6),
        )
        for one in report.judgements
        for name, own in one.statistics.items()
        if own.value == own.value  # not NaN
    ]
    metadata = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="other",
        license_name="choose-one",
        tags=["mplug-owl2", "image-quality-assessment", "custom_code"],
        eval_results=results or None,
    )
    text = _TEXT.format(
        title=title,
        one_liner=one_liner(title, preset, task),
        count=len(preset.levels),
        low=preset.scale[0],
        high=preset.scale[1],
        prompt=preset.prompts[task],
        levels=", ".join(
            level if isinstance(level, str) else "/".join(level) for level in preset.levels
        ),
        aspect=preset.image_aspect_ratio,
        data=data,
        table=_table(report),
    )
    check_new(path)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}").save(path)


def one_liner(name: str, preset: Preset, task: str = "quality") -> str:
    """The published scorers' call, as a card shows it.

    Args:
        name: Folder or Hub id of the model.
        task: Of the preset; the first of its own where it has no such task.
    """
    low, high = preset.scale
    shown = task if task in preset.prompts else next(iter(preset.prompts))
    return _ONE_LINER.format(name=name, task=shown, low=low, high=high)


def check_new(file: str | Path) -> None:
    """Whether a card can be written there.

    Raises:
        ValueError: If there is such a file already, or no such folder.
    """
    path = Path(file)
    if path.exists():
        raise ValueError(f"{path} already exists: choose another name, or remove it.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} for the card does not exist.")


def _table(report: Evaluation) -> str:
    names = list(dict.fromkeys(name for one in report.judgements for name in one.statistics))
    rows = [
        "| | "
        + " | ".join(
            f"{one.dataset or 'opinions'} ({one.images:,} images)" for one in report.judgements
        )
        + " |"
    ]
    rows.append("| --- |" + " --- |" * len(report.judgements))
    for name in names:
        found = [one.statistics.get(name) for one in report.judgements]
        values = [
            f"{own.value:.4f} ({own.low:.4f} to {own.high:.4f})" if own else "" for own in found
        ]
        rows.append(f"| {_NAMES[name]} | " + " | ".join(values) + " |")
    return "\n".join(rows)
