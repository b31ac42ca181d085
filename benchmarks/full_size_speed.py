"""The full-size model on a processor: loading against torch.load of the original shards, prefill,
and decoding with oneDNN and without. `benchmarks.full_size_decode` measures what the model chooses.

    python -m benchmarks.full_size make ORIGINAL --tokenizer tokenizer.model
    owl2-hf convert ORIGINAL CONVERTED
    python -m benchmarks.full_size_speed ORIGINAL CONVERTED --json full_size_speed.json

needs 20 GB of memory and 33 GB of disk. Loading runs in processes of its own, from a cold cache
where that may be dropped. A decoded token has to read every weight that it passes; the floor is the
time that plain reading of the same weights takes, measured in turns with decoding.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from owl2_hf.modeling import cpu_kernels_mplug_owl2
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE

from .full_size import timed
from .timing import Run, in_turns, parser, seconds, summarize, write

LOADERS = {
    "torch.load": """
import sys, pathlib, torch
shards = [torch.load(path, weights_only=True) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.bin"))]
""",
    "from_pretrained": """
import sys, torch, owl2_hf
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for parameter in model.parameters():
    parameter.detach().flatten()[::1024].sum()
""",
}
NUM_DECODED = 12


def load(folders: dict[str, Path], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Loader -> seconds and peak MB of each process, imports included."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for _ in range(rounds):
        for name, code in LOADERS.items():
            found[name].append(timed([sys.executable, "-c", code, str(folders[name])]))
            print(f"  {name}: {found[name][-1]}", flush=True)
    return found


def passed_weights(model: Any) -> list[torch.Tensor]:
    """What a token of text reads in decoding: the decoder's text branch and the head."""
    names = ("vision_tower", "visual_", "embed_tokens", "h_reducer")
    tied = model.config.tie_word_embeddings
    return [
        value
        for name, value in model.named_parameters()
        if not any(part in name for part in names) or (tied and "embed_tokens" in name)
    ]


def without_onednn(run: Run) -> Run:
    """The same with PyTorch's own kernels, of which the one for a single bfloat16 row reads faster
    than oneDNN's.
    """

    def wrapped() -> None:
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            run()

    return wrapped


def with_onednn_alone(run: Run) -> Run:
    """The same with oneDNN for single rows too, whatever the model chooses."""

    def wrapped() -> None:
        with mock.patch.object(cpu_kernels_mplug_owl2, "onednn_is_slow", lambda: False):
            run()

    return wrapped


def read_all(weights: list[torch.Tensor]) -> None:
    """Every byte once, as float32 whatever it stands for."""
    for weight in weights:
        weight.view(torch.float32).sum()


@torch.no_grad()
def speed(folder: Path, rounds: int) -> dict[str, Any]:
    """Prefill of one picture with a short question, then single tokens in turns with plain
    reading.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.radial_gradient("L").convert("RGB").resize((640, 480))
    content = [
        {"type": "image", "image": picture},
        {"type": "text", "text": "Describe this picture in detail."},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    pixels = inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)

    def prefill() -> None:
        model(**inputs, use_cache=False, logits_to_keep=1)

    prefills = [seconds(prefill) for _ in range(rounds + 1)][1:]
    encodings = [seconds(lambda: model.get_image_features(pixels)) for _ in range(rounds)]
    cache = DynamicCache(config=model.config.get_text_config())
    model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    token = torch.tensor([[29871]])
    weights = passed_weights(model)

    def decode() -> None:
        model(token, **{CACHE: cache}, use_cache=True)

    runs = {
        "decode": with_onednn_alone(decode),
        "decode without oneDNN": without_onednn(decode),
        "read": lambda: read_all(weights),
    }
    times = in_turns(runs, rounds=NUM_DECODED, warmup=2)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    read = statistics.median(times["read"])
    return {
        "positions": inputs["input_ids"].shape[1],
        "prefill_seconds": statistics.median(prefills),
        "prefill_without_onednn_seconds": seconds(without_onednn(prefill)),
        "encoding_seconds": statistics.median(encodings),
        "bytes_of_a_token": num_bytes,
        "read_seconds": read,
        "bandwidth_gb_per_second": num_bytes / read / 1e9,
        "decode": {
            name: summarize(taken, times["read"]) for name, taken in times.items() if name != "read"
        },
    }


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("original", type=Path)
    options.add_argument("converted", type=Path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    loading = load({"torch.load": args.original, "from_pretrained": args.converted}, args.rounds)
    found = speed(args.converted, args.rounds)
    print(json.dumps(found, indent=1))
    print(f"{time.perf_counter() - start:.0f} s in all")
    write(args.json, args, {"loading": loading, "speed": found})


if __name__ == "__main__":
    main()
