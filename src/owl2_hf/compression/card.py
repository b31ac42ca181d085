"""The model card of a compressed model: how it was made, and what was lost."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..modeling.adapters_mplug_owl2 import find_file
from ..modeling.presets_mplug_owl2 import Preset
from ..scoring.card import one_liner

# Metadata of the original model's card that also applies to the quantised model.
_KEPT = ("license", "license_name", "license_link", "language", "base_model", "datasets")
_TEXT = """\
# {title}

{summary} The vision encoder, the connector and the head are not quantised.

## What was lost

Measured by `owl2-hf quantize` on {subject}, compared with the model before quantisation: {losses}.
{table}
## Use

Install the package that reads the weights: `pip install {package}`. Then the model loads like any
other, without a `quantization_config`.

{use}
"""
_CHAT = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{title}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)
```"""
PACKAGES = {"torchao": "torchao", "llmcompressor": "compressed-tensors"}


def write_compressed_card(
    folder: Path, title: str, source: str, report: Any, preset: Preset | None
) -> None:
    """README.md of a compressed model.

    Args:
        folder: Of the compressed model.
        title: Its name.
        source: Folder or Hub id of the whole model, whose card tells the licence.
        report: `QuantizeReport`.
        preset: How the model scores, if it does.
    """
    kept = _kept(source)
    tags = [tag for tag in kept.pop("tags", []) if tag != "compressed"] or ["mplug-owl2"]
    if "/" in source and not Path(source).exists():
        kept.update(base_model=[source], base_model_relation="quantized")
    data = ModelCardData(
        **{
            "license": "other",
            "license_name": "that-of-its-source",
            **kept,
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "tags": [*dict.fromkeys([*tags, "custom_code", report.to, report.by])],
        }
    )
    losses = report.losses
    statistics = losses.before.statistics
    rows = [
        f"| {name} | {value:.4f} | {losses.after.statistics[name]:.4f} |"
        for name, value in statistics.items()
    ]
    table = (
        "\n".join(["", "| | before | after |", "| --- | --- | --- |", *rows, ""]) if rows else ""
    )
    text = _TEXT.format(
        title=title,
        summary=report.summary(),
        subject=losses.subject,
        losses=losses.lines()[-1],
        table=table,
        package=PACKAGES[report.by],
        use=_CHAT.format(title=title) if preset is None else one_liner(title, preset),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _kept(source: str) -> dict[str, Any]:
    """Licence and origin from the whole model's card; empty if it has no readable card."""
    path = find_file(source, "README.md", {})
    if path is None:
        return {}
    try:
        found = ModelCard.load(path).data.to_dict()
    except Exception:  # YAML's errors and the card's own share no base class
        return {}
    kept = {name: found[name] for name in (*_KEPT, "tags") if found.get(name)}
    if kept.get("license") != "other" and "license" in kept:
        kept.setdefault("license_name", None)
    return kept
