"""TRL's trainers and inference give the model the same token ids for the same conversation."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification, pipeline

import owl2_hf
from owl2_hf.training.adapters import lora_config

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

QUESTION, ANSWER, WORSE = "What is in it?", "a red house", "two  blue cats"


def settings(folder, **changes):
    common = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "report_to": "none",
    }
    return {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **common,
        **changes,
    }


@pytest.fixture
def parts():
    return owl2_hf.load_default(dtype="float32")


@pytest.fixture
def seen(parts):
    """Token ids of every row that the model reads in one piece, without padding."""
    model, rows = parts[0], []

    def note(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        if ids is not None and ids.shape[1] > 1:
            mask = torch.ones_like(ids) if mask is None else mask
            rows.extend(row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


def images():
    return [Image.open(file).convert("RGB") for file in owl2_hf.default_pictures().values()][:1]


def ids_of(processor, answer=None, has_image=True):
    """What a chat is at inference: a prompt, or a prompt with its answer as a turn before the next
    question.
    """
    content = [{"type": "image", "image": images()[0]}] if has_image else []
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    [ids] = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=answer is None
    )["input_ids"]
    return ids


def turn(role, content):
    return [{"role": role, "content": content}]


@pytest.mark.parametrize("has_image", [True, False])
def test_generate_and_the_pipeline_read_the_ids_of_the_chat(parts, seen, has_image):
    model, processor = parts
    content = [{"type": "image", "image": images()[0]}] if has_image else []
    chat = turn("user", [*content, {"type": "text", "text": QUESTION}])
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    model.generate(**inputs, max_new_tokens=2)
    assert seen == [ids_of(processor, has_image=has_image)]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    pipe(text=chat, generate_kwargs={"max_new_tokens": 2})
    assert seen[1:] == seen[:1]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_rendered_chat_has_the_ids_of_the_chat_whole_or_in_parts(parts, legacy):
    processor = parts[1]
    processor.legacy = legacy
    chat = turn("user", [{"type": "image"}, {"type": "text", "text": QUESTION}])
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    whole = processor.apply_chat_template(
        [*chat, *turn("assistant", [{"type": "text", "text": WORSE}])]
    )
    assert whole.startswith(prompt + " ")
    for settings in (
        {},
        {"add_special_tokens": False},
        {"text_kwargs": {"add_special_tokens": False}},
    ):
        assert processor(text=prompt, images=images(), **settings)["input_ids"] == [
            ids_of(processor)
        ]
        assert processor(text=whole, images=images(), **settings)["input_ids"] == [
            ids_of(processor, WORSE)
        ]
    [answer] = processor(text=whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    assert ids_of(processor) + answer == ids_of(processor, WORSE)


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_sft_reads_the_ids_of_inference(parts, seen, tmp_path, form, has_image):
    model, processor = parts
    prompt, completion = turn("user", QUESTION), turn("assistant", ANSWER)
    row = (
        {"messages": prompt + completion}
        if form == "messages"
        else {"prompt": prompt, "completion": completion}
    )
    row |= {"images": images()} if has_image else {}
    config = trl.SFTConfig(**settings(tmp_path, max_length=None))
    trl.SFTTrainer(
        model, config, train_dataset=Dataset.from_list([row, row]), processing_class=processor
    ).train()
    assert seen == 2 * [ids_of(processor, ANSWER, has_image)]


@pytest.mark.parametrize("has_image", [True, False])
def test_dpo_reads_the_ids_of_inference(parts, seen, tmp_path, has_image):
    model, processor = parts
    row = {
        "prompt": turn("user", QUESTION),
        "chosen": turn("assistant", ANSWER),
        "rejected": turn("assistant", WORSE),
    }
    row |= {"images": images()} if has_image else {}
    trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**settings(tmp_path, max_length=None)),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=processor,
        peft_config=lora_config("language", r=2),
    ).train()
    expected = [ids_of(processor, answer, has_image) for answer in (ANSWER, ANSWER, WORSE, WORSE)]
    assert seen and seen == len(seen) // 4 * expected


@pytest.mark.parametrize("has_image", [True, False])
def test_kto_reads_the_ids_of_inference(parts, seen, tmp_path, has_image):
    model, processor = parts
    rows = [
        {"prompt": turn("user", QUESTION), "completion": turn("assistant", answer), "label": label}
        | ({"images": images()} if has_image else {})
        for answer, label in ((ANSWER, True), (WORSE, False))
    ]
    trl.KTOTrainer(
        model,
        args=trl.KTOConfig(**settings(tmp_path, max_length=None, seed=0)),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=lora_config("language", r=2),
    ).train()
    expected = [ids_of(processor, answer, has_image) for answer in (ANSWER, WORSE)]
    assert all(ids in expected for ids in seen) and all(ids in seen for ids in expected), (
        seen,
        expected,
    )


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_online_training_reads_the_ids_of_inference(parts, seen, tmp_path, kind, has_image):
    model, processor = parts
    row = {"prompt": turn("user", QUESTION)} | ({"images": images()} if has_image else {})
    getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=lambda completions, **kwargs: [
            float(index) for index in range(len(completions))
        ],
        args=getattr(trl, f"{kind}Config")(
            **settings(tmp_path, num_generations=2, max_completion_length=4)
        ),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=processor,
    ).train()
    prompt = ids_of(processor, has_image=has_image)
    assert len(seen) >= 4 and all(ids[: len(prompt)] == prompt for ids in seen)
    assert any(len(ids) > len(prompt) for ids in seen)


@pytest.fixture
def rewarding(parts, tmp_path):
    """Folder of a model with its processor, as a reward model is made from it."""
    for part in parts:
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_reward_model_trains_and_reads_the_ids_of_the_chat(parts, rewarding, tmp_path):
    tokenizer = parts[1].tokenizer
    row = {"chosen": turn("user", QUESTION) + turn("assistant", ANSWER)}
    row["rejected"] = turn("user", QUESTION) + turn("assistant", WORSE)
    config = trl.RewardConfig(
        **settings(tmp_path / "run", max_steps=4, learning_rate=1e-3, max_length=None)
    )
    trainer = trl.RewardTrainer(
        str(rewarding),
        config,
        train_dataset=Dataset.from_list([row, row]),
        processing_class=tokenizer,
    )
    assert type(trainer.model).__name__ == "MplugOwl2ForSequenceClassification"
    read = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs), with_kwargs=True
    )
    trainer.train()
    ids, mask = read[0]["input_ids"], read[0]["attention_mask"].bool()
    expected = [
        tokenizer.apply_chat_template(row[name], tokenize=True, return_dict=True)["input_ids"]
        for name in ("chosen", "chosen", "rejected", "rejected")
    ]
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == expected
    trainer.save_model(str(tmp_path / "reward"))
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", num_labels=1
    ).eval()
    inputs = tokenizer.pad({"input_ids": expected}, return_tensors="pt", padding=True)
    with torch.no_grad():
        chosen, _, rejected, _ = model(**inputs).logits[:, 0]
    assert chosen > rejected


def test_online_training_loads_a_reward_model_by_its_folder(parts, rewarding, tmp_path):
    model, processor = parts
    reward = AutoModelForSequenceClassification.from_pretrained(rewarding, num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    processor.tokenizer.save_pretrained(tmp_path / "reward")
    row = {"prompt": turn("user", QUESTION)}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=str(tmp_path / "reward"),
        args=trl.GRPOConfig(
            **settings(
                tmp_path / "run", num_generations=2, max_completion_length=4, logging_steps=1
            )
        ),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=processor,
    )
    assert type(trainer.reward_funcs[0]).__name__ == "MplugOwl2ForSequenceClassification"
    trainer.train()
    assert any(abs(entry.get("reward", 0)) > 0 for entry in trainer.state.log_history)


def test_the_page_on_classes_and_rewards_runs_as_shown(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in parts:
        part.save_pretrained(tmp_path / "path" / "to" / "owl2")
    for name in ("photo", "other"):
        images()[0].save(tmp_path / f"{name}.jpg")
    page = (Path(__file__).parents[2] / "docs" / "classification.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "classification.md", "exec"), names)
    assert "torch.Size([2, 1])" in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained("reward").config.num_labels == 1
