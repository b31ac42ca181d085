"""The Trainer: what it gathers and what it smooths, beside a loop written out here."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import DynamicCache, Trainer, TrainingArguments

import owl2_hf
from owl2_hf.modeling import modeling_mplug_owl2_text
from owl2_hf.training.adapters import lora_config
from owl2_hf.training.collator import Collator
from owl2_hf.training.trainer import Owl2Trainer, SmoothedLoss


@pytest.fixture(scope="module")
def parts():
    return owl2_hf.load_default(dtype=torch.float32)


@pytest.fixture
def rows():
    """Two rows with an image, two without, and so on: batches of two alternate."""
    files = list(owl2_hf.default_pictures().items())
    image, text = {"type": "image"}, {"type": "text", "text": "What is this?"}
    return [
        {
            "messages": [
                {"role": "user", "content": [text] if index // 2 % 2 else [image, text]},
                {"role": "assistant", "content": [{"type": "text", "text": name}]},
            ],
            "images": [] if index // 2 % 2 else [str(file)],
        }
        for index, (name, file) in enumerate(files[:8])
    ]


def arguments(folder, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "report_to": "none",
    }
    return TrainingArguments(
        folder, use_cpu=True, remove_unused_columns=False, **{**settings, **changes}
    )


@pytest.mark.parametrize("kind", [Trainer, Owl2Trainer])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_metrics_see_the_logits_alone_whether_or_not_a_batch_has_images(
    parts, rows, tmp_path, kind, has_adapter
):
    model, processor = owl2_hf.load_default(dtype=torch.float32) if has_adapter else parts
    model = get_peft_model(model, lora_config(r=2)) if has_adapter else model
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"seen": 1.0}

    trainer = kind(
        model=model,
        args=arguments(tmp_path),
        eval_dataset=rows,
        data_collator=Collator(processor),
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_seen"] == 1.0
    [logits] = seen
    assert isinstance(logits, np.ndarray) and logits.shape[::2] == (
        len(rows),
        model.config.text_config.vocab_size,
    )


def smoothed(model, batch, factor):
    """torch's own smoothing, over the logits of ids that can be predicted."""
    config = model.config
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    kept = [
        id
        for id in range(config.output_vocab_size or logits.shape[-1])
        if id != config.image_token_id
    ]
    positions = {id: position for position, id in enumerate(kept)}
    labels = torch.tensor(
        [[positions.get(id, -100) for id in row] for row in batch["labels"][:, 1:].tolist()]
    )
    return F.cross_entropy(
        logits[..., kept].flatten(0, 1), labels.flatten(), label_smoothing=factor
    )


@pytest.mark.parametrize("kind", [Trainer, Owl2Trainer])
def test_a_training_step_keeps_no_keys_and_values_in_a_cache(rows, tmp_path, kind, monkeypatch):
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    caches = []
    monkeypatch.setattr(
        modeling_mplug_owl2_text,
        "DynamicCache",
        lambda **kwargs: caches.append(DynamicCache(**kwargs)) or caches[-1],
    )
    trainer = kind(
        model=model,
        args=arguments(tmp_path, max_steps=1, save_strategy="no"),
        train_dataset=rows,
        data_collator=Collator(processor),
    )
    trainer.train()
    assert not caches
    model(input_ids=torch.tensor([[1, 5, 6]]), use_cache=True)
    assert len(caches) == 1


@pytest.mark.parametrize("factor", [0.1, 0.5])
def test_labels_are_smoothed_over_the_ids_that_can_be_predicted(parts, rows, tmp_path, factor):
    model, processor = parts
    batch = Collator(processor)(rows)
    expected = smoothed(model, batch, factor).item()
    settings = {
        "args": arguments(
            tmp_path, label_smoothing_factor=factor, per_device_eval_batch_size=len(rows)
        )
    }
    trainer = Owl2Trainer(
        model=model, **settings, eval_dataset=rows, data_collator=Collator(processor)
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    plain = arguments(tmp_path, per_device_eval_batch_size=len(rows))
    loss = SmoothedLoss(model.config, factor)
    trainer = Trainer(
        model=model,
        args=plain,
        eval_dataset=rows,
        data_collator=Collator(processor),
        compute_loss_func=loss,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_smoothing_by_nothing_is_the_models_own_loss(parts, rows):
    model, processor = parts
    batch = Collator(processor)(rows)
    outputs = model(**batch)
    torch.testing.assert_close(
        SmoothedLoss(model.config, 0.0)(outputs, batch["labels"]), outputs.loss
    )
    nothing = torch.full_like(batch["labels"], -100)
    assert SmoothedLoss(model.config, 0.1)(outputs, nothing) == 0


def test_a_smoothed_loss_does_not_depend_on_accumulation(rows, tmp_path):
    losses = []
    for size, accumulated in ((4, 1), (1, 4)):
        model, processor = owl2_hf.load_default(dtype=torch.float32)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        settings |= {
            "max_steps": 2,
            "label_smoothing_factor": 0.1,
            "logging_steps": 1,
            "learning_rate": 1e-3,
        }
        args = arguments(
            tmp_path / str(size), **settings, train_sampling_strategy="sequential", optim="sgd"
        )
        trainer = Owl2Trainer(
            model=model, args=args, train_dataset=rows, data_collator=Collator(processor)
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
