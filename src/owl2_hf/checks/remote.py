"""Run the model as remote code, in a process that cannot import this package."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from safetensors.torch import load_file
from torch import Tensor

from ..default import default_pictures
from .subject import Skipped, Subject

# `None` in sys.modules makes every `import owl2_hf` fail.
SCRIPT = """
import json, sys
sys.modules["owl2_hf"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, target, device, attention, prompt, options, *images = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", attn_implementation=attention
)
assert type(model).__module__.startswith("transformers_modules"), type(model)
model = model.to(device).eval()
inputs = processor(text=prompt, images=images, return_tensors="pt", **json.loads(options))
inputs = inputs.to(device, model.dtype)
with torch.no_grad():
    logits = model(**inputs, logits_to_keep=1).logits[0]
save_file({"logits": logits.cpu().contiguous()}, target)
"""


def ask_without_the_package(subject: Subject, prompt: str, images: Sequence[str]) -> Tensor:
    """(1, V) logits behind a prompt with bundled images.

    Raises:
        RuntimeError: If the other process failed; its last words are in the text.
        Skipped: The model is an adapter on another.
    """
    if (subject.saved() / "adapter_config.json").is_file():
        raise Skipped("a saved adapter contains no code: the code is saved with its base model")
    model, target = subject.model, subject.scratch / "logits.safetensors"
    arguments = [subject.saved(), target, model.device, model.config._attn_implementation]
    arguments += [prompt, json.dumps(subject.image_options)]
    arguments += [default_pictures()[name] for name in images]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(subject.scratch / "modules"),
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=subject.scratch,
    )
    if result.returncode:
        words = result.stderr.strip().splitlines()
        raise RuntimeError(
            words[-1] if words else f"the other process ended with exit code {result.returncode}"
        )
    return load_file(target)["logits"]
