"""Write model cards of converted checkpoints and of new models."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..modeling.presets_mplug_owl2 import Preset
from ..scoring.card import one_liner

_PACKAGE = Path(__file__).parents[1]
_FACTS, _USE = "<!-- facts -->", "## Use\n"
_NEW = """\
# A new mPLUG-Owl2

{summary}.

The model is not trained yet. It answers text like the language model, and cannot use images. Both branches of every
modality-adaptive module are copies of the language model's. The visual abstractor is new.

Replace this card before you publish the model. The licences of its sources apply.
"""


def _template() -> Path:
    """Inside an installed package, or at the top of the repository where it is installed for
    editing.
    """
    return next(
        path
        for path in (_PACKAGE / "model_card.md", _PACKAGE.parents[1] / "model_card.md")
        if path.is_file()
    )


def write_card(
    folder: Path, facts: dict[str, str], is_published: bool, scorer: Preset | None = None
) -> None:
    """README.md of a converted folder.

    Args:
        facts: What the table of this checkpoint says, by row.
        is_published: The model has the published one's sizes: it is the base model, or was tuned
            from it.
        scorer: How it scores, if it does.
    """
    card = ModelCard.load(_template())
    if not is_published:
        for name in ("base_model", "datasets"):
            card.data.pop(name)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    card.text = card.text.replace(_FACTS, f"## This checkpoint\n\n| | |\n| --- | --- |\n{rows}")
    if scorer is not None:
        card.data.tags.append("image-quality-assessment")
        card.text = card.text.replace(
            _USE, f"## Scores\n\n{one_liner('path/or/id', scorer)}\n\n{_USE}"
        )
    card.save(folder / "README.md")


def write_new_card(folder: Path, language: str, vision: str | None, summary: str) -> None:
    """README.md of a model that was put together from others.

    Args:
        language: Name of the language model.
        vision: Name of the vision model, if it was not made anew.
        summary: What it was made of, in one line.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="other",
        license_name="that-of-its-sources",
        language=["en"],
        tags=["mplug-owl2", "multimodal", "image-text-to-text", "custom_code"],
        base_model=[name for name in (language, vision) if name is not None and "/" in name]
        or None,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_NEW.format(summary=summary)}").save(
        folder / "README.md"
    )
