"""Beyond one process and one device: tensor parallelism under torchrun, weights on the CPU and on
the disk.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.distributed import DistributedConfig

import owl2_hf
from owl2_hf.default import default_dir
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration

from ..original import pad
from .test_modeling_mplug_owl2 import RUN, pictures, tiny_config

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "scale-out.md").read_text()
GREEDY = {"do_sample": False, "max_new_tokens": 6}
TINY = {
    "even": {},
    "uneven": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "few_key_values": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
}


def tiny_inputs() -> dict[str, torch.Tensor]:
    """A row with an image, a row with two, and a row of text alone."""
    return {
        **pad([[1, 5, *RUN, 7], [1, *RUN, 4, *RUN, 9, 3], [1, 9, 8]]),
        "pixel_values": pictures(3),
    }


def default_inputs() -> dict[str, torch.Tensor]:
    picture = Image.open(owl2_hf.default_pictures()["emoji-banana"])
    text = "USER: <|image|>What is this? ASSISTANT:"
    return dict(
        AutoProcessor.from_pretrained(default_dir())(text=text, images=picture, return_tensors="pt")
    )


def inputs_of(folder: Path) -> dict[str, torch.Tensor]:
    return default_inputs() if folder.name == "default" else tiny_inputs()


@torch.no_grad()
def answers(
    model: MplugOwl2ForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {
        "logits": model(**inputs).logits,
        "ids": model.generate(**inputs, **GREEDY),
        "ids, static cache": model.generate(
            **inputs, **GREEDY, cache_implementation="static", disable_compile=True
        ),
    }


def gradients(
    model: MplugOwl2ForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].eq(0), -100)
    model(**inputs, labels=labels).loss.backward()
    grads = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in grads.items()
    }


def work(root: Path) -> None:
    """What each process of torchrun does: every model of the folder, and the first one's results
    into a file.
    """
    torch.set_num_threads(1)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        new_way = {"distributed_config": DistributedConfig(tp_size=2)}
        way = new_way if folder.name == "tied" else {"tp_plan": "auto"}
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", **way).eval()
        results = answers(model, inputs_of(folder))
        results["parts"] = {
            name: tuple(parameter.to_local().shape)
            for name, parameter in model.named_parameters()
            if hasattr(parameter, "to_local")
        }
        results["gradients"] = gradients(model, inputs_of(folder))
        model.save_pretrained(root / "saved" / folder.name)
        if torch.distributed.get_rank() == 0:
            torch.save(results, root / f"{folder.name}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> Path:
    """Folder of the models, and of what two processes made of them."""
    root = tmp_path_factory.mktemp("parallel")
    for name, overrides in TINY.items():
        torch.manual_seed(2)
        config = tiny_config(
            **{key: value for key, value in overrides.items() if key != "tie_word_embeddings"}
        )
        config.tie_word_embeddings = "tie_word_embeddings" in overrides
        MplugOwl2ForConditionalGeneration(config).save_pretrained(root / name)
    (root / "default").symlink_to(default_dir())
    torchrun(["-m", "tests.modeling.test_scale_out", str(root)])
    return root


def torchrun(arguments: list[str], cwd: Path = ROOT) -> str:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*launch, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


REFUSED = """
import sys
import pytest, torch
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
with pytest.raises(ValueError, match="original's layout, which tensor parallelism .* `owl2-hf convert`"):
    MplugOwl2ForConditionalGeneration.from_pretrained(sys.argv[1], tp_plan="auto")
print("refused")
torch.distributed.destroy_process_group()
"""


def test_the_originals_layout_is_to_be_converted_before_ranks_share_it(golden_dir, tmp_path):
    (tmp_path / "load.py").write_text(REFUSED)
    assert "refused" in torchrun([str(tmp_path / "load.py"), str(golden_dir("A") / "hf")])


def one_process(folder: Path) -> MplugOwl2ForConditionalGeneration:
    return MplugOwl2ForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()


# Tensor parallelism


@pytest.mark.parametrize("name", [*TINY, "default"])
def test_two_processes_answer_as_one(parallel, name):
    model = one_process(parallel / name)
    got = torch.load(parallel / f"{name}.pt")
    for key, expected in answers(model, inputs_of(parallel / name)).items():
        torch.testing.assert_close(got[key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*TINY, "default"])
def test_two_processes_have_the_gradients_of_one(parallel, name):
    expected = gradients(one_process(parallel / name), inputs_of(parallel / name))
    got = torch.load(parallel / f"{name}.pt")["gradients"]
    assert got.keys() == expected.keys()
    for key in expected:
        # Sums in another order.
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*TINY, "default"])
def test_two_processes_save_the_whole_model(parallel, name):
    expected, got = (
        one_process(parallel / name).state_dict(),
        one_process(parallel / "saved" / name).state_dict(),
    )
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_both_branches_are_shared_out(parallel):
    parts = torch.load(parallel / "even.pt")["parts"]
    own = {
        name.removeprefix("model.language_model.layers.0."): shape
        for name, shape in parts.items()
        if ".0." in name
    }
    for branch in ("", "visual_"):
        assert (
            own[f"self_attn.{branch}k_proj.weight"]
            == own[f"self_attn.{branch}v_proj.weight"]
            == (8, 48)
        )
    assert (own["self_attn.q_proj.weight"], own["self_attn.o_proj.weight"]) == ((24, 48), (48, 24))
    assert (parts["lm_head.weight"], parts["model.language_model.embed_tokens.weight"]) == (
        (48, 48),
        (48, 48),
    )


@pytest.mark.parametrize("name", ["uneven", "few_key_values", "default"])
def test_attention_of_heads_that_do_not_divide_stays_whole(parallel, name):
    parts = torch.load(parallel / f"{name}.pt")["parts"]
    assert not any("self_attn" in part for part in parts)
    assert {"embed_tokens", "gate_proj", "up_proj", "down_proj"} <= {
        part.split(".")[-2] for part in parts
    }


def test_the_documentation_shows_what_two_processes_run(tmp_path):
    [script] = re.findall(r"```python\n(import torch\.distributed.*?)```", DOCS, re.DOTALL)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "converted").symlink_to(default_dir())
    Image.open(owl2_hf.default_pictures()["emoji-banana"]).save(tmp_path / "photo.png")
    (tmp_path / "parallel.py").write_text(script)
    assert torchrun(["parallel.py"], cwd=tmp_path).split() == ["banana"]


# Weights elsewhere


def expected_default() -> dict[str, torch.Tensor]:
    return answers(owl2_hf.load_default()[0], default_inputs())


def assert_answers(
    model: MplugOwl2ForConditionalGeneration, expected: dict[str, torch.Tensor]
) -> None:
    got = answers(model, default_inputs())
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.5, 0.3, 0.0])
def test_device_map_auto_puts_on_the_disk_what_has_no_room(tmp_path, share):
    """The shares end within the decoder, the abstractor and the vision encoder, and before
    everything.
    """
    expected = expected_default()
    room = int(share * owl2_hf.load_default()[0].get_memory_footprint())
    model, _ = owl2_hf.load_default(
        device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path
    )
    places = {str(place) for place in model.hf_device_map.values()}
    assert places == ({"cpu", "disk"} if share else {"disk"})
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_answers(model, expected)


def test_the_documentation_shows_how_weights_are_put_on_the_disk(tmp_path, monkeypatch, capsys):
    [script] = re.findall(r"```python\n(import owl2_hf\n\nmodel, .*?)```", DOCS, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert "disk" in capsys.readouterr().out


def test_device_map_auto_with_room_moves_nothing():
    model, _ = owl2_hf.load_default(device_map="auto")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_answers(model, expected_default())


def test_weights_may_wait_on_the_cpu():
    """As on a machine with an accelerator: each module fetches its weights when it runs and drops
    them after.
    """
    model, _ = owl2_hf.load_default()
    expected = answers(model, default_inputs())
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_answers(model, expected)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
