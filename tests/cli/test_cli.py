"""The command line, as a user types it."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from owl2_hf import load_default
from owl2_hf.cli import app
from owl2_hf.memory import Memory
from owl2_hf.printing import printable


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_describe_streams_the_answer_of_the_bundled_model():
    result = run("describe")
    assert result.exit_code == 0
    assert result.stdout.strip()


def test_describe_prints_json_for_a_program():
    result = run("describe", "--json", "-q", "What is this?")
    answer = json.loads(result.stdout)
    assert answer["question"] == "What is this?"
    assert answer["answer"] == run("describe").stdout.strip()


def test_describe_keeps_to_the_context_unless_a_longer_answer_is_asked_for(tmp_path):
    model, processor = load_default()
    model.config.text_config.max_position_embeddings = 80
    model.generation_config.max_new_tokens = None
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    assert run("describe", "--model", str(tmp_path)).stdout.strip() == "banana"
    refused = run("describe", "--model", str(tmp_path), "--max-new-tokens", "70")
    assert refused.exit_code == 1
    assert (
        "at most 80 tokens" in refused.stderr
        and "a prompt of 19 and max_new_tokens=70" in refused.stderr
    )


def test_info_shows_the_bundled_model():
    facts = json.loads(run("info", "--json").stdout)
    parameters = facts["parameters"]
    assert parameters["total"] == sum(
        count for name, count in parameters.items() if name != "total"
    )
    assert set(parameters) >= {"vision_tower", "visual_abstractor", "language_model"}
    assert facts["preprocessing"] == "resize"
    assert f"{parameters['total']:,}" in run("info").stdout


def test_info_computes_the_memory_of_each_task(tmp_path):
    size = ("--batch-size", 2, "--length", 40, "--images", 1)
    found = json.loads(run("info", "--memory", *size, "--json").stdout)["memory"]
    assert {"inference, int8", "qlora", "lora, no checkpointing", "instruct"} < set(found)
    for parts in found.values():
        total, card = parts.pop("total"), parts.pop("card")
        assert total == sum(parts.values()) > 0 and card == 16
    assert found["instruct"]["optimizer"] > found["lora"]["optimizer"] > 0


def test_info_prints_the_memory_as_a_table(monkeypatch):
    tasks = {"one": Memory(15 * 10**9, cache=10**6), "two": Memory(10**9, optimizer=200 * 10**9)}
    sizes = []

    def computed(config, **size):
        sizes.append(size)
        return iter(tasks.items())

    monkeypatch.setattr("owl2_hf.memory.memory_of_tasks", computed)
    title, head, *rows = run("info", "--memory", "--batch-size", 2).stdout.splitlines()[-4:]
    assert sizes == [{"batch_size": 2}]
    assert title == "GPU memory (GB), batch size 2, 2,048 positions and 1 image(s) a row:"
    assert head.split()[:2] == ["weights", "cache"] and head.endswith("smallest card")
    assert rows[0].split() == ["one", "15.000", "0.001", *3 * ["0.000"], "15.001", "24", "GB"]
    assert rows[1].endswith("over 141 GB")


def test_info_refuses_sizes_that_cannot_be():
    for arguments, message in (
        (("--length", 5), "--length needs --memory: add it, or leave --length out."),
        (("--memory", "--length", 9999), "length: expected at most the model's 2048, got 9999"),
        (("--memory", "--length", 9), "images: 1 take 9 positions, but a row has 9"),
    ):
        refused = run("info", *arguments)
        assert refused.exit_code == 1 and message in refused.stderr


def test_convert_and_info_of_an_original_checkpoint(golden_dir, tmp_path):
    source = golden_dir("A") / "hf"
    result = run("convert", source, tmp_path / "target", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["dtype"] == "float32"
    facts = json.loads(run("info", tmp_path / "target", "--json").stdout)
    assert facts["tokens per image"] == 9
    answer = run(
        "describe",
        "--model",
        tmp_path / "target",
        "-q",
        "Describe the image.",
        "--max-new-tokens",
        "4",
    )
    assert answer.exit_code == 0, answer.stderr


def test_convert_without_a_tokenizer_says_so_and_takes_one(golden_dir, tmp_path):
    source = golden_dir("B") / "hf"
    result = run("convert", source, tmp_path / "without")
    assert result.exit_code == 0
    assert "no tokenizer" in result.stdout
    assert run("info", tmp_path / "without").exit_code == 0
    result = run("convert", source, tmp_path / "with", "--tokenizer", golden_dir("A") / "hf")
    assert result.exit_code == 1
    assert "tokens, as the weights have, got" in result.stderr
    assert not (tmp_path / "with").exists()


def test_init_makes_a_model_that_answers(golden_dir, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
    ).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "llama" / name).write_bytes((golden_dir("A") / "hf" / name).read_bytes())
    result = run(
        "init",
        tmp_path / "new",
        "--language",
        tmp_path / "llama",
        "--image-size",
        "28",
        "--num-queries",
        "3",
    )
    assert result.exit_code == 0, result.output
    assert "from llama and a fresh vision encoder" in result.stdout
    assert run("verify", tmp_path / "new").stdout.splitlines()[-1] == "ok"
    assert run("describe", "--model", tmp_path / "new", "--max-new-tokens", "2").exit_code == 0
    listed = run("push", tmp_path / "new", "me/new", "--dry-run")
    assert listed.exit_code == 0, listed.output
    assert "model.safetensors" in listed.stdout and "would be uploaded to me/new" in listed.stdout
    assert run("init", tmp_path / "other", "--language", golden_dir("A") / "hf").exit_code == 1


def test_a_converted_folder_may_be_published(golden_dir, tmp_path):
    assert run("convert", golden_dir("A") / "hf", tmp_path / "target").exit_code == 0
    report = json.loads(run("push", tmp_path / "target", "me/owl", "--dry-run", "--json").stdout)
    names = {name for name, _ in report["files"]}
    assert names == {path.name for path in (tmp_path / "target").iterdir()}
    (tmp_path / "target" / "optimizer.pt").write_bytes(b"")
    result = run("push", tmp_path / "target", "me/owl", "--dry-run")
    assert result.exit_code == 1 and "optimizer.pt" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "no-such-picture.png"], "no-such-picture.png"),
        (["describe", "--model", "no-such-folder"], "no-such-folder"),
        (["info", "no-such-folder"], "no-such-folder"),
        (["convert", "no-such-folder", "target"], "no-such-folder is not a folder"),
        (["verify", "no-such-folder"], "no-such-folder is not a folder"),
        (["push", "no-such-folder", "me/it", "--dry-run"], "no-such-folder"),
        (["init", "target", "--language", "no-such-folder"], "no-such-folder"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_1(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.strip().count("\n") == 0


def test_wrong_arguments_exit_with_2():
    assert run("describe", "--no-such-option").exit_code == 2
    assert run("convert").exit_code == 2
    assert run("describe", "--max-new-tokens", "0").exit_code == 2


ODD = "\x1b]0;owned\x07bad\nowl2-hf: forged \u202e.png"


def test_control_characters_are_escaped():
    assert printable(ODD) == "\\x1b]0;owned\\x07bad\\nowl2-hf: forged \\u202e.png"
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable("Grüße, 猫 🦉.png \udcff") == "Grüße, 猫 🦉.png \\udcff"


@pytest.mark.parametrize(
    "arguments",
    [
        ("describe", ODD),
        ("describe", "--model", ODD),
        ("chat", ODD),
        ("chat", "--model", ODD),
        ("info", ODD),
        ("analyze", ODD, "--out", "never"),
        ("score", ODD, "--model", ODD),
        ("convert", ODD, "never"),
        ("verify", ODD),
        ("init", "never", "--language", ODD),
        ("train", ODD),
        ("push", ODD, "me/model"),
        ("serve", ODD, "--port", "0"),
        ("demo", ODD, "--port", "0"),
        ("data", "check", ODD),
    ],
)
def test_no_name_steers_the_terminal_or_forges_a_line(arguments):
    result = run(*arguments)
    assert result.exit_code == 1
    assert all(line.isprintable() for line in result.output.split("\n"))
    (error,) = [line for line in result.stderr.split("\n") if line.startswith("owl2-hf: ")]
    assert "owned" in error


def test_an_answer_of_a_model_steers_no_terminal(monkeypatch):
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerBase.decode",
        lambda *args, **kwargs: "a \x1b]0;owned\x07 b",
    )
    assert run("describe").stdout.strip() == "a \\x1b]0;owned\\x07 b"


def test_a_large_image_is_one_line_without_a_warning(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    result = subprocess.run(
        [sys.executable, "-m", "owl2_hf", "describe", str(tmp_path / "large.png")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Warning" not in result.stderr
    assert "it has 10000 x 9000 pixels, the limit is 89,478,485 in all" in result.stderr
