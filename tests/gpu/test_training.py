"""Training on a GPU, through the recipes; each test also runs on the CPU where it can."""

import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import owl2_hf
from owl2_hf.default import default_dir
from owl2_hf.training.collator import Collator
from owl2_hf.training.data import load_rows
from owl2_hf.training.loading import checkpoint_activations
from owl2_hf.training.recipe import load_recipe
from owl2_hf.training.run import train


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_as_float32_does(settings, tmp_path, device, precision):
    if precision == "fp16" and device == "cpu":
        pytest.skip("accelerate trains in float16 on accelerators only")
    # The scale of float16 begins high, and the first steps only bring it down.
    steps, found = 12 if precision == "fp16" else 3, {}
    for name in ("float32", precision):
        made = settings(bf16=name == "bf16", fp16=name == "fp16", max_steps=steps)
        made.append(f"output_dir={tmp_path / name}")
        report = train(load_recipe("instruct", [*made, "image_size=null"]))
        assert report.steps == steps
        found[name] = losses(tmp_path / name)
    assert all(loss > 0 for loss in found[precision])
    assert found[precision][0] == pytest.approx(found["float32"][0], rel=0.02)
    assert found[precision][-1] < found[precision][0]
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / precision)
    assert saved.dtype == torch.float32
    assert all(one.isfinite().all() for one in saved.state_dict().values())


def test_checkpointing_changes_memory_and_nothing_else(device):
    model = owl2_hf.load_default(dtype=torch.float32)[0].train().to(device)
    length = 256
    ids = torch.arange(3, 3 + length, device=device)[None].repeat(2, 1)
    side = model.config.vision_config.image_size
    ids[:, : model.config.num_image_tokens] = model.config.image_token_id
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, side, side).to(device)
    found = {}
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
        model.zero_grad()
        kept = Kept(device)
        with kept:
            loss = model(input_ids=ids, pixel_values=pixels, labels=ids, use_cache=False).loss
        loss.backward()
        grads = {name: one.grad.clone() for name, one in model.named_parameters()}
        found[checkpointed] = loss.detach(), grads, kept.num_bytes
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-6, atol=0)
    for name, expected in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], expected, rtol=1e-4, atol=1e-6)
    assert found[True][2] < 0.6 * found[False][2]


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that a forward leaves behind: on a GPU as its allocator says, else as autograd does."""

    def __init__(self, device):
        super().__init__(self.keep, lambda tensor: tensor)
        self.device, self.saved, self.num_bytes = device, {}, 0

    def keep(self, tensor):
        self.saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self):
        super().__enter__()
        self.before = torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def __exit__(self, *error):
        super().__exit__(*error)
        held = torch.cuda.memory_allocated() if self.device == "cuda" else sum(self.saved.values())
        self.num_bytes = held - self.before


def test_batches_are_pinned_for_the_copy_to_the_device(rows, device):
    processor = AutoProcessor.from_pretrained(default_dir())
    found = load_rows(str(rows))

    def batches(is_pinned):
        return list(
            DataLoader(
                [found[index] for index in range(len(found))],
                batch_size=2,
                collate_fn=Collator(processor, 128, name_rows=True),
                pin_memory=is_pinned,
                num_workers=1,
            )
        )

    for pinned, plain in zip(batches(device == "cuda"), batches(False), strict=True):
        assert pinned["rows"] == plain["rows"]
        for name, value in plain.items():
            if isinstance(value, torch.Tensor):
                assert pinned[name].is_pinned() == (device == "cuda")
                moved = pinned[name].to(device, non_blocking=True)
                assert torch.equal(moved.cpu(), value)


def test_a_run_with_workers_and_pinned_batches(settings, tmp_path, device):
    made = settings(dataloader_num_workers=1, dataloader_pin_memory=True, bf16=False)
    report = train(load_recipe("visual-branch", made))
    assert report.steps == 3 and len(losses(tmp_path / "run")) == 3


@pytest.fixture
def wide_model(tmp_path):
    """Folder of a model with random weights, whose widths bitsandbytes can divide by 64."""
    config = AutoConfig.from_pretrained(default_dir())
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.head_dim = 128, 192, 32
    text.num_attention_heads = text.num_key_value_heads = 4
    config.abstractor_config.projection_dim = 128
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "wide")
    AutoProcessor.from_pretrained(default_dir()).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_qlora_trains_over_four_bits(settings, wide_model, tmp_path, device):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'owl2_hf[qlora]'")
    # Paged states need a GPU.
    optim = {} if device == "cuda" else {"optim": "adamw_torch"}
    made = [
        *settings(max_steps=6, learning_rate=1e-2, **optim),
        f"model={wide_model}",
        "adapter.r=8",
    ]
    report = train(load_recipe("qlora", made))
    found = losses(tmp_path / "run")
    assert report.steps == 6 and found[-1] < found[0]
    trained = {row.component for row in report.parameters if row.trainable}
    assert trained == {"adapters"}
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
