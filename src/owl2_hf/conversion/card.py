"""The model card of a converted folder: `model_card.md` with the facts of this checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config

if TYPE_CHECKING:
    from .convert import ConversionReport

_PACKAGE = Path(__file__).parents[1]
_FACTS = "<!-- facts -->"


def _template() -> Path:
    """Inside an installed package, or at the top of the repository where it is installed for editing."""
    return next(path for path in (_PACKAGE / "model_card.md", _PACKAGE.parents[1] / "model_card.md") if path.is_file())


def write_card(folder: Path, config: MplugOwl2Config, report: "ConversionReport") -> None:
    """README.md of a converted folder."""
    card = ModelCard.load(_template())
    dropped = len(report.dropped)
    facts = {
        "Converted from": f"`{report.source}` ({report.layout})",
        "Parameters": f"{report.num_parameters:,} in {report.num_tensors} tensors, {report.dtype}",
        "Dropped, because the model computes them": str(dropped) if dropped else "nothing",
        "Rebuilt sin-cos tables": str(len(report.rebuilt)) if report.rebuilt else "none, the source had them",
        "Language model": f"{config.text_config.num_hidden_layers} layers of width {config.text_config.hidden_size}",
        "Context length": f"{config.text_config.max_position_embeddings} positions",
        "Picture": f"{config.vision_config.image_size} x {config.vision_config.image_size} pixels, "
        f"{config.num_image_tokens} positions",
        "Tokenizer": "none in the source" if report.tokenizer is None else f"from `{report.tokenizer}`",
        "Converted with": ", ".join(f"{name} {number}" for name, number in report.versions.items()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    card.text = card.text.replace(_FACTS, f"## This checkpoint\n\n| | |\n| --- | --- |\n{rows}")
    card.save(folder / "README.md")
