"""The web page as a Space of the Hub; the Space's variable MODEL names a model of the family, else
the bundled one.
"""

import os
from importlib.util import find_spec
from typing import Any

# On ZeroGPU the Hub lends a GPU for each call of a decorated function. Its package changes torch:
# it comes first.
if find_spec("spaces"):
    import spaces

    on_device: Any = spaces.GPU(duration=int(os.environ.get("GPU_SECONDS", "60")))
else:

    def on_device(function: Any) -> Any:
        return function


import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import owl2_hf
from owl2_hf.demo import LAUNCH_OPTIONS, DemoSettings, build_page

MODEL = os.environ.get("MODEL")

if MODEL:
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(MODEL),
        AutoProcessor.from_pretrained(MODEL),
    )
else:
    model, processor = owl2_hf.load_default()
settings = DemoSettings(max_new_tokens=int(os.environ.get("MAX_NEW_TOKENS", "512")))
demo = build_page(
    model.to("cuda" if torch.cuda.is_available() else "cpu"),
    processor,
    MODEL or "default",
    settings,
    on_device,
)

if __name__ == "__main__":
    demo.launch(**LAUNCH_OPTIONS)
