"""A saved folder loads with trust_remote_code=True where the package cannot be imported."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import owl2_hf
from owl2_hf.modeling.configuration_mplug_owl2 import AUTO_MAP

PACKAGE = Path(owl2_hf.__file__).parent
TRAVELLING = sorted(
    [
        *(PACKAGE / "modeling").glob("*_mplug_owl2*.py"),
        *(PACKAGE / "processing").glob("*_mplug_owl2*.py"),
    ]
)
# transformers needs all of them itself; sentencepiece is imported only where a tokenizer.model is
# read.
ALLOWED = {
    *(
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "numpy",
        "PIL",
        "tokenizers",
        "sentencepiece",
    ),
    "packaging",
}

# Runs where `import owl2_hf` fails, without a network, and prints the last logits.
STRANGER = """
    import sys
    sys.modules["owl2_hf"] = None
    import torch
    from PIL import Image
    from transformers import (
        AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
        AutoModelForMultimodalLM, AutoModelForPreTraining, AutoProcessor, AutoTokenizer, pipeline,
    )
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    folder, image, prompt = sys.argv[1:]
    trust = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(folder, **trust).model_type in ("mplug_owl2", "mplug_owl2_1")
    processor = AutoProcessor.from_pretrained(folder, **trust)
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    inputs = processor(text=prompt, images=Image.open(image), return_tensors="pt")
    assert torch.equal(image_processor(Image.open(image), return_tensors="pt").pixel_values, inputs.pixel_values)
    assert tokenizer("Hello there").input_ids == processor(text="Hello there").input_ids[0]
    assert type(AutoModel.from_pretrained(folder, **trust)).__name__ == "MplugOwl2Model"
    for auto_class in (
        AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForPreTraining, AutoModelForImageTextToText
    ):
        model = auto_class.from_pretrained(folder, dtype=torch.float32, **trust).eval()
        assert type(model).__name__ == "MplugOwl2ForConditionalGeneration"
        assert "transformers_modules" in type(model).__module__
    pipe = pipeline("image-text-to-text", model=folder, **trust)
    parts = [{"type": "image", "path": image}, {"type": "text", "text": "What is this?"}]
    assert pipe(text=[{"role": "user", "content": parts}], max_new_tokens=3)[0]["generated_text"]
    with torch.no_grad():
        print(model(**inputs).logits[0, -1].tolist())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "a.model-1"
    model, processor = owl2_hf.load_default()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def ask_a_stranger(folder, picture, prompt, tmp_path):
    """Last logits of a process that cannot import the package."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "m"),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRANGER), str(folder), picture, prompt],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.tensor(json.loads(result.stdout.splitlines()[-1]))


def test_remote_code_without_the_package_gives_the_same_logits(saved, tmp_path):
    picture = str(next(iter(owl2_hf.default_pictures().values())))
    prompt = "USER: <|image|>What is this? ASSISTANT:"
    found = ask_a_stranger(saved, picture, prompt, tmp_path)
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    with torch.no_grad():
        expected = model(**processor(text=prompt, images=picture, return_tensors="pt")).logits[
            0, -1
        ]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_saved_folder_holds_the_code_and_names_all_auto_classes(saved):
    names = {path.name for path in saved.glob("*.py")}
    assert names == {path.name for path in TRAVELLING}
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    for path in TRAVELLING:
        assert (saved / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_remote_code_imports_only_its_own_files_and_common_packages(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path.name} imports from another folder"
            assert node.module and (path.parent / f"{node.module}.py").is_file(), (
                f"{path.name}: from .{node.module}"
            )
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            for name in names:
                root = name.split(".")[0]
                assert root in ALLOWED or root in sys.stdlib_module_names, (
                    f"{path.name} imports {name}"
                )


def test_travelling_files_have_names_of_their_own():
    names = [path.name for path in TRAVELLING]
    assert names and len(names) == len(set(names))
