"""Training of scorers: rows and pairs, the losses, runs that repeat to the bit, SRCC on the way."""

import csv
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.scoring import Scorer, load_opinions
from owl2_hf.scoring.frames import read_frames
from owl2_hf.scoring.labels import hard_level, soft_label
from owl2_hf.scoring.losses import level_kl, level_logits, level_scores, pair_loss, rest_loss
from owl2_hf.scoring.presets import load_preset
from owl2_hf.scoring.statistics import srcc
from owl2_hf.training import run as run_module
from owl2_hf.training.recipe import QUESTIONS, Recipe, ScoreRecipe, load_recipe
from owl2_hf.training.run import load_for_training, train
from owl2_hf.training.score_trainer import KeepBest, ScoreTrainer
from owl2_hf.training.scores import (
    ScoreCollator,
    ScoreRows,
    answer_ids,
    checked_score_rows,
    load_score_rows,
    preset_of,
    question_parts,
)

from ..syncs import host_syncs
from ..test_videos import make_video

LEVELS = ["high", "soft", "bad"]
BASE = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two data sets of coloured squares on different scales; red is good. The second has no
    standard deviations.
    """
    folder = tmp_path_factory.mktemp("opinions")
    generator = np.random.default_rng(0)
    for name, count, high in (("one", 16, 5), ("two", 10, 100)):
        rows = [["image", "mos", "std", "split"]]
        for index in range(count):
            colour = tuple(generator.integers(0, 256, 3).tolist())
            Image.new("RGB", (20, 16), colour).save(folder / f"{name}{index}.png")
            std = f"{0.1 * high * (1 + generator.random()):.3f}" if name == "one" else ""
            rows.append(
                [
                    f"{name}{index}.png",
                    f"{colour[0] / 255 * high:.4f}",
                    std,
                    "test" if index % 4 == 0 else "train",
                ]
            )
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


@pytest.fixture
def recipe(folder, tmp_path):
    """A short run of the embedded model."""

    def make(**changes) -> Recipe:
        settings = {**BASE, **changes.pop("trainer", {})}
        data = {
            "train": [str(folder / "one.csv"), str(folder / "two.csv")],
            "max_length": 96,
            **changes.pop("data", {}),
        }
        scores = {
            "levels": LEVELS,
            "train_split": "train",
            "eval_split": "test",
            **changes.pop("scores", {}),
        }
        values = {"model": "default", "output_dir": str(tmp_path / "run"), **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump({**values, "trainer": settings, "data": data, "scores": scores})
        )
        return load_recipe(path)

    return make


@pytest.fixture(scope="module")
def default():
    return owl2_hf.load_default(dtype=torch.float32)


def history(folder, key):
    rows = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [row[key] for row in rows if key in row]


def weights(folder):
    (file,) = (
        path
        for path in Path(folder).iterdir()
        if path.name in ("model.safetensors", "adapter_model.safetensors")
    )
    return load_file(file)


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_row_asks_one_of_the_questions_and_answers_with_the_level(recipe, folder):
    rows, _ = load_score_rows(recipe(), seed=0)
    opinions = load_opinions(folder / "one.csv")
    assert len(rows) == 12 + 7
    first = rows[0]
    assert first["messages"][0]["content"][1] == {"type": "image"}
    level = LEVELS[hard_level(opinions.rows[1].mos, *opinions.ranges[""], 3)]
    assert first["messages"][1]["content"][0]["text"] == f"The quality of the image is {level}."
    assert first["images"] == [opinions.rows[1].image] and first["mos"] == opinions.rows[1].mos
    assert first["level_probs"] == soft_label(
        first["mos"], first["mos_stds"], *opinions.ranges[""], "pdf", 3
    )
    assert math.isnan(rows[15]["mos_stds"]) and rows[15]["datasets"] == 1


def test_questions_have_even_shares_and_stay_with_their_rows(recipe, folder):
    made = recipe(scores={"train_split": None}, data={"train": str(folder / "two.csv")})
    rows, _ = load_score_rows(made, seed=0)
    asked = [
        row["messages"][0]["content"][0]["text"]
        for row in (rows[index] for index in range(len(rows)))
    ]
    assert Counter(asked) == Counter(f"{question}\n" for question in QUESTIONS)
    again = load_score_rows(made, seed=0)[0]
    assert [again[index]["messages"] for index in range(10)] == [
        rows[index]["messages"] for index in range(10)
    ]
    other = load_score_rows(made, seed=1)[0]
    assert [other[index]["messages"] for index in range(10)] != [
        rows[index]["messages"] for index in range(10)
    ]


def test_a_question_may_say_where_its_image_stands():
    image, kind = {"type": "image"}, {"type": "video"}
    assert question_parts("Good?") == [{"type": "text", "text": "Good?\n"}, image]
    assert question_parts("<|image|>Good?", "video") == [kind, {"type": "text", "text": "Good?"}]
    parts = question_parts("Is <|image|> good?")
    assert [part.get("text") for part in parts] == ["Is ", None, " good?"]


def test_pairs_are_of_one_data_set_and_other_ones_in_each_epoch(recipe):
    rows, _ = load_score_rows(recipe(scores={"labels": "soft"}), seed=0)

    def partners(epoch):
        rows.begin_epoch(epoch)
        pairs = [rows[index]["pair"] for index in range(len(rows))]
        assert all(first["datasets"] == second["datasets"] for first, second in pairs)
        assert all(first["images"] != second["images"] for first, second in pairs)
        return [second["images"] for _, second in pairs]

    first = partners(0)
    assert partners(1) != first and partners(0) == first
    chosen = {image for epoch in range(60) for [image] in partners(epoch)}
    assert len(chosen) == 12 + 7


def test_weights_say_how_often_a_data_set_counts(recipe):
    rows, _ = load_score_rows(recipe(scores={"weights": [2, 0.5]}), seed=0)
    counts = Counter(rows[index]["images"][0] for index in range(len(rows)))
    assert Counter(Path(name).name[:3] for name in counts) == {"one": 12, "two": 4}
    assert {counts[name] for name in counts if "one" in Path(name).name} == {2}


def test_the_files_own_labels_and_levels_win(recipe, folder, tmp_path):
    turns = [
        {"from": "human", "value": "?\n<|image|>"},
        {"from": "gpt", "value": "The quality of the image is Soft."},
    ]
    lines = [
        {
            "image": str(folder / "one0.png"),
            "gt_score": "5",
            "conversations": turns,
            "level_probs": [0.0, 0.25, 0.75],
        },
        {"image": str(folder / "one1.png"), "gt_score": 1},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    made = recipe(
        scores={"train_split": None},
        data={"train": str(tmp_path / "rows.json"), "allow_outside": True},
    )
    rows, _ = load_score_rows(made, seed=0)
    assert rows[0]["messages"][1]["content"][0]["text"].endswith(" is soft.")
    assert rows[0]["level_probs"] == (0.0, 0.25, 0.75)
    assert rows[1]["level_probs"] == pytest.approx((0, 0, 1), abs=1e-6)
    lines[0]["level_probs"] = [0.5, 0.5]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    with pytest.raises(
        ValueError, match=r"rows\.json: row 1: expected level_probs of 3 levels, got 2"
    ):
        load_score_rows(made, seed=0)[0][0]


def test_the_trained_model_is_asked_in_the_words_of_its_training(default, recipe):
    _, processor = default
    rows, held_out = load_score_rows(recipe(data={"eval": recipe().data.train}), seed=0)
    collator = ScoreCollator(processor)
    prefix, ids = answer_ids(collator, recipe().scores)
    row = held_out[0]
    [encoded] = collator.encode([row])
    place = int(
        encoded.labels.eq(
            ids[LEVELS.index(rows.level(held_out.groups[0], held_out.groups[0].rows[0]))]
        ).nonzero()[-1]
    )
    preset = preset_of(recipe().scores, processor)
    inputs = processor(text=preset.prompts["quality"], images=row["images"][0])
    assert list(inputs["input_ids"][0]) == encoded.input_ids[:place].tolist()
    assert encoded.labels[place - len(prefix) : place].tolist() == prefix
    assert preset.levels == tuple(LEVELS) and preset.scale == (1.0, 3.0)


def test_levels_have_to_be_single_tokens_of_the_answer(default):
    collator = ScoreCollator(default[1])
    prefix, ids = answer_ids(collator, ScoreRecipe(levels=["red", "blue"], answer="{level}"))
    assert prefix == [] and len(ids) == 2
    with pytest.raises(ValueError, match="the level 'excellent' is not one token"):
        answer_ids(collator, ScoreRecipe())
    with pytest.raises(ValueError, match=r"'high' is not a single token in 'It is un\{level\}'"):
        answer_ids(collator, ScoreRecipe(levels=["high", "bad"], answer="It is un{level}"))


def test_the_soft_loss_is_the_sum_of_its_parts(recipe, tmp_path):
    made = recipe(scores={"labels": "soft", "in_level_weight": 0.0})
    trainer = run_module._trainer(made)
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[0], rows[3]])
    assert batch["input_ids"].shape[0] == 4
    pairs = [rows[0]["pair"], rows[3]["pair"]]
    assert batch["mos"].tolist() == pytest.approx(
        [pairs[0][0]["mos"], pairs[1][0]["mos"], pairs[0][1]["mos"], pairs[1][1]["mos"]]
    )
    model = trainer.model.train()
    loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
    total, scores = 0.0, []
    for place in (0, 1):
        own = trainer.data_collator([pair[place] for pair in pairs])
        inputs = {
            name: own[name]
            for name in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")
        }
        logits = model(**inputs).logits
        positions = torch.tensor(
            [
                int(torch.isin(row, torch.tensor(trainer.level_ids)).nonzero()[-1])
                for row in own["labels"]
            ]
        )
        found = level_logits(logits, positions)
        total += rest_loss(logits, own["labels"], positions) + level_kl(
            found, trainer.level_ids, own["level_probs"]
        )
        scores.append(level_scores(found, trainer.level_ids)[0])
    mos, stds = (
        [torch.tensor([pair[place][key] for pair in pairs]) for place in (0, 1)]
        for key in ("mos", "mos_stds")
    )
    expected = pair_loss(scores, mos, stds) + 0.05 * total
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("deviations", ["all", "some", "none"])
def test_the_soft_loss_makes_the_host_wait_once(recipe, deviations):
    trainer = run_module._trainer(recipe(scores={"labels": "soft", "in_level_weight": 0.1}))
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[0], rows[3]])
    unknown = {"all": 0, "some": 1, "none": 4}[deviations]
    batch["mos_stds"][:unknown] = math.nan
    inputs = trainer._prepare_inputs(dict(batch))
    model = trainer.model.train()
    plain = {
        name: inputs[name]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")
    }
    models = host_syncs(lambda: model(**plain).logits.sum().backward())
    losses = []

    def step():
        losses.append(trainer.compute_loss(model, dict(inputs)))
        losses[0].backward()

    assert host_syncs(step) - models == {"cpu": 1}
    assert losses[0].isfinite()


def test_pairs_without_deviations_have_targets_of_0_and_1(recipe):
    trainer = run_module._trainer(recipe(scores={"labels": "soft", "pair_loss": "bce"}))
    found, nan = torch.randn(4, 1500, requires_grad=True), float("nan")
    opinions = {
        "mos": torch.tensor([1.0, 2.0, 3.0, 1.5]),
        "mos_stds": torch.tensor([0.5, nan, 0.25, 0.5]),
    }
    has_std = opinions["mos_stds"].isfinite()
    loss = trainer._pair_loss(found, opinions, has_std, slice(0, 2), slice(2, 4))
    scores = level_scores(found, trainer.level_ids)[0]
    first = pair_loss(
        (scores[:1], scores[2:3]),
        (torch.tensor([1.0]), torch.tensor([3.0])),
        (torch.tensor([0.5]), torch.tensor([0.25])),
    )
    second = pair_loss(
        (scores[1:2], scores[3:]), (torch.tensor([2.0]), torch.tensor([1.5])), kind="bce"
    )
    assert loss.item() == pytest.approx((first + second).item() / 2, rel=1e-6)


class Dies(TrainerCallback):
    """Stands in for a process that is killed after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("labels", "has_adapter"), [("hard", False), ("soft", False), ("soft", True)]
)
def test_a_scorer_is_the_same_to_the_bit_twice_and_after_a_kill(
    recipe, tmp_path, monkeypatch, labels, has_adapter
):
    """Nineteen rows in batches of four are five steps an epoch: the kill and its checkpoint lie in
    the second.
    """
    settings = {"max_steps": 9, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine"}
    adapter = (
        {"preset": "q-align", "r": 4, "lora_dropout": 0.2, "train_connector": True}
        if has_adapter
        else None
    )

    def made(name):
        changes = {"trainer": settings, "adapter": adapter, "scores": {"labels": labels}}
        return recipe(output_dir=str(tmp_path / name), **changes)

    for name in ("whole", "again"):
        train(made(name))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "again"))

    class Mortal(ScoreTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Dies()], **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "ScoreTrainer", Mortal)
        train(made("broken"))
    epochs = []
    begin = ScoreRows.begin_epoch
    monkeypatch.setattr(
        ScoreRows, "begin_epoch", lambda self, epoch: (epochs.append(epoch), begin(self, epoch))
    )
    assert train(made("broken"), resume=True).resumed_from.endswith("checkpoint-6")
    assert epochs == [1]
    assert history(tmp_path / "broken", "loss") == history(tmp_path / "whole", "loss")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_workers_draw_the_pairs_of_the_epoch(recipe, tmp_path):
    settings = {"max_steps": 8, "per_device_train_batch_size": 5, "save_strategy": "no"}
    workers = {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 2,
    }
    for name, more in (("none", {}), ("one", workers)):
        train(
            recipe(
                output_dir=str(tmp_path / name),
                trainer={**settings, **more},
                scores={"labels": "soft"},
            )
        )
    assert history(tmp_path / "one", "loss") == history(tmp_path / "none", "loss")


def test_two_ranks_compute_what_one_does(recipe, tmp_path):
    settings = {
        "max_steps": 3,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    changes = {"scores": {"labels": "soft"}, "data": {"eval": recipe().data.train}}
    report = train(recipe(output_dir=str(tmp_path / "one"), trainer=settings, **changes))
    pair = {**settings, "per_device_train_batch_size": 1}
    file = tmp_path / "ranks.yaml"
    file.write_text(recipe(output_dir=str(tmp_path / "two"), trainer=pair, **changes).to_yaml())
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, "-m", "owl2_hf", "train", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert history(tmp_path / "two", "loss") == pytest.approx(
        history(tmp_path / "one", "loss"), rel=1e-5
    )
    assert history(tmp_path / "two", "eval_srcc") == pytest.approx([report.eval_srcc])
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[name], rtol=1e-4, atol=1e-5)


def test_accumulated_batches_compute_what_one_does(recipe, tmp_path):
    settings = {
        "max_steps": 2,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for name, more in (("whole", {"per_device_train_batch_size": 4}), ("halves", halves)):
        trainer = {**settings, **more, "save_strategy": "no"}
        train(recipe(output_dir=str(tmp_path / name), trainer=trainer, scores={"labels": "soft"}))
    assert history(tmp_path / "halves", "loss") == pytest.approx(
        history(tmp_path / "whole", "loss"), rel=1e-5
    )
    for name, value in weights(tmp_path / "halves").items():
        torch.testing.assert_close(value, weights(tmp_path / "whole")[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_evaluation_gives_the_srcc_of_the_scores(recipe, folder, tmp_path, labels):
    settings = {
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "per_device_eval_batch_size": 3,
    }
    report = train(
        recipe(
            trainer=settings,
            data={"eval": recipe().data.train},
            scores={"labels": labels, "keep_best": 1},
        )
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run").eval()
    scorer = Scorer(
        model, AutoProcessor.from_pretrained(tmp_path / "run"), load_preset(str(tmp_path / "run"))
    )
    expected = {}
    for name in ("one", "two"):
        opinions = load_opinions(folder / f"{name}.csv", split="test")
        found = [score.score for score in scorer([row.image for row in opinions])]
        expected[name] = srcc(found, [row.mos for row in opinions])
    assert report.eval_srcc == pytest.approx(np.mean(list(expected.values())))
    assert history(tmp_path / "run", "eval_srcc_two")[-1] == pytest.approx(expected["two"])
    assert f"evaluation SRCC {report.eval_srcc:.4f}" in report.summary()
    steps = history(tmp_path / "run", "eval_srcc")[:3]
    best = max(range(3), key=lambda step: (steps[step], step)) + 1
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-3"}
    for name in ("scorer.json", "decision.json", "decision_template.jinja"):
        assert (tmp_path / "run" / "checkpoint-3" / name).is_file()
        assert (tmp_path / "run" / name).is_file()
    image = next(iter(load_opinions(folder / "one.csv", split="test"))).image
    assert model.score([image]).tolist() == pytest.approx([scorer(image)[0].score])
    if hasattr(transformers, "DecisionPipeline"):  # since 5.23
        decide = transformers.pipeline("decision", model=str(tmp_path / "run"))
        question = {"type": "score", "criteria": LEVELS[::-1]}
        request = {"state": "img", "questions": {"q": question}, "assets": {"img": str(image)}}
        found = 1 + decide(request)["q"]["score"]
        assert found == pytest.approx(scorer(image)[0].score, abs=1e-5)


def test_the_best_checkpoints_stay_and_the_newest(tmp_path):
    from transformers import TrainingArguments
    from transformers.trainer_callback import TrainerState

    values = {1: 0.5, 2: 0.9, 3: math.nan, 4: 0.7, 5: 0.1}
    state = TrainerState(
        log_history=[{"step": step, "eval_srcc": value} for step, value in values.items()],
        global_step=5,
    )
    for step in (*values, 99):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    KeepBest(2).on_save(TrainingArguments(str(tmp_path), use_cpu=True), state, None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
        "checkpoint-mine",
    }


def test_a_scorer_learns_what_people_like(recipe, tmp_path):
    settings = {
        "max_steps": 60,
        "per_device_train_batch_size": 6,
        "save_strategy": "no",
        "learning_rate": 2e-3,
    }
    changes = {"data": {"train": recipe().data.train[0], "eval": recipe().data.train[0]}}
    for labels, least in (("hard", 0.7), ("soft", 0.9)):
        scores = {"labels": labels, "eval_split": "train"}
        made = recipe(output_dir=str(tmp_path / labels), trainer=settings, scores=scores, **changes)
        assert train(made).eval_srcc > least, labels


@pytest.mark.parametrize("name", ["score", "score-lora", "score-soft", "score-soft-lora"])
def test_each_recipe_runs_from_the_command_line_and_its_model_scores(folder, tmp_path, name):
    settings = [
        f"--set=trainer.{key}={json.dumps(value)}"
        for key, value in {**BASE, "max_steps": 1}.items()
    ]
    settings += [
        "--set=trainer.bf16=false",
        "--set=trainer.dataloader_num_workers=0",
        "--set=dtype=float32",
    ]
    settings += [f"--set=scores.levels={json.dumps(LEVELS)}"]
    out = tmp_path / "run"
    command = [
        "train",
        name,
        "--model",
        "default",
        "--data",
        str(folder / "one.csv"),
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, [*command, *settings])
    assert result.exit_code == 0, result.output
    scored = CliRunner().invoke(
        app, ["score", str(folder / "one0.png"), "--model", str(out), "--csv"]
    )
    assert scored.exit_code == 0, scored.output
    assert scored.stdout.splitlines()[0] == "image,score,std,high,soft,bad"
    pytest.importorskip("scipy", reason="scipy is not installed")
    judged = CliRunner().invoke(
        app, ["evaluate-scores", str(out), str(folder / "one.csv"), "--samples", "5", "--json"]
    )
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout)["datasets"][""]["images"] == 16


def test_an_adapter_of_a_scorer_reloads_through_peft_without_a_missing_key(recipe, tmp_path):
    adapter = {"preset": "q-align", "r": 4, "lora_alpha": 8, "train_connector": True}
    train(recipe(adapter=adapter, scores={"labels": "soft"}, trainer={"max_steps": 1}))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(
        owl2_hf.load_default(dtype=torch.float32)[0], str(tmp_path / "run")
    )
    assert same(get_peft_model_state_dict(loaded), saved)
    assert any("visual_abstractor" in name for name in saved)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)


def test_the_lora_recipes_train_the_originals_modules():
    model, _ = load_for_training(load_recipe("score-soft-lora", ["model=default"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(
        ".q_proj." in name or ".visual_v_proj." in name or "visual_abstractor" in name
        for name in trained
    )
    assert any("visual_abstractor" in name for name in trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": {"labels": "smooth"}}, "labels: expected one of hard, soft, got 'smooth'"),
        ({"scores": {"levels": ["bad", "bad"]}}, "two or more different words"),
        ({"scores": {"answer": "Good."}}, r"answer: expected \{level\} once, got 'Good.'"),
        ({"scores": {"questions": []}}, "questions: expected at least one"),
        (
            {"scores": {"weights": [1.0]}},
            r"scores\.weights: expected 2 values, one for each of data\.train, got 1",
        ),
        ({"scores": {"weights": [1.0, 0]}}, "weights: expected numbers above 0"),
        ({"scores": {"density": "pmf"}}, "density: expected one of pdf, cdf, got 'pmf'"),
        (
            {"scores": {"density": ["pdf"]}},
            r"scores\.density: expected 2 values, one for each of data\.train, got 1",
        ),
        ({"scores": {"keep_best": 0}}, "keep_best: expected at least 1, got 0"),
        ({"scores": {"keep_best": 1}}, "keep_best compares SRCC: set data.eval"),
        (
            {"scores": {"keep_best": 1}, "data": {"eval": "x"}},
            r"set trainer\.eval_strategy to steps or epoch",
        ),
        (
            {"scores": {"keep_best": 1}, "trainer": {"save_total_limit": 1}},
            "both remove checkpoints",
        ),
        ({"data": {"streaming": True}}, r"data\.streaming: a scorer needs all rows"),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "with a scorer's own labels"),
        (
            {"scores": {"train_split": "val"}},
            r"one\.csv: no row has split 'val'; the file has 'test', 'train'",
        ),
        (
            {"scores": {"labels": "soft"}, "data": {"max_length": 20}},
            "rows have no level after the tokens",
        ),
    ],
)
def test_mistakes_are_named(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        train(recipe(**changes))


def test_a_broken_image_is_named_before_the_model_is_loaded(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("owl2_hf.training.run.load_for_training", None)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "rows.csv").write_text("image,mos\na.png,1\nb.png,2\n")
    made = recipe(data={"train": str(tmp_path / "rows.csv")}, scores={"train_split": None})
    with pytest.raises(ValueError, match=r"rows\.csv: row 3: .*b\.png.*data check"):
        train(made)
    (tmp_path / "rows.csv").write_text("image,mos,dataset\na.png,1,x\na.png,2,x\na.png,2,y\n")
    with pytest.raises(ValueError, match=r"every MOS of 'y' is 2: nothing to learn"):
        train(made)


def test_bad_opinions_are_left_out_where_a_recipe_says_so(recipe, tmp_path, caplog):
    """A row without a MOS, one without its image, and one whose image only decoding finds
    broken.
    """
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "b.png", "c.png", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = ["image,mos,std", "a.png,1,0.5", "b.png,high,0.5", "none.png,2,0.5"]
    lines += ["cut.png,2,0.5", "b.png,3,0.5", "c.png,4,0.5"]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "mine.csv"), "eval": str(tmp_path / "mine.csv")}
    scores = {"labels": "soft", "train_split": None, "eval_split": None}
    with pytest.raises(ValueError, match=r"mine\.csv: row 3: expected a number as 'mos'"):
        train(recipe(data=data, scores=scores))
    made = recipe(data={**data, "bad_rows": "skip"}, scores=scores)
    report = train(made)
    assert report.counts["skipped"] == 3 and report.steps == 4
    assert "3 rows skipped" in report.summary()
    for row, reason in ((3, "a number as 'mos'"), (4, "does not exist"), (5, "cut.png")):
        (line,) = (m for m in caplog.messages if f"mine.csv: row {row}: " in m)
        assert reason in line and line.endswith("The row is skipped.")
    rows, eval_rows, _ = checked_score_rows(made, 0)
    assert [row.row for row in rows.groups[0].rows] == [2, 6, 7] and len(rows) == 3
    assert len(eval_rows) == 3 and rows.groups[0].bounds == (1.0, 4.0)
    (tmp_path / "mine.csv").write_text("\n".join([lines[0], lines[4], "cut.png,3,0.5"]))
    with pytest.raises(ValueError, match="all rows of 'mine' are bad"):
        checked_score_rows(made, 0)


def test_videos_are_scored_and_learned_from(recipe, tmp_path):
    for index, frames in enumerate((10, 20, 30)):
        make_video(tmp_path / f"{index}.mp4", frames, 10)
    (tmp_path / "rows.csv").write_text("video,mos\n0.mp4,1\n1.mp4,2\n2.mp4,3\n")
    data = {
        "train": str(tmp_path / "rows.csv"),
        "eval": str(tmp_path / "rows.csv"),
        "max_length": 512,
    }
    scores = {"labels": "soft", "train_split": None, "eval_split": None}
    report = train(recipe(data=data, scores=scores, trainer={"max_steps": 2}))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run").eval()
    scorer = Scorer(
        model, AutoProcessor.from_pretrained(tmp_path / "run"), load_preset(str(tmp_path / "run"))
    )
    found = [
        score.score
        for score in scorer([[*read_frames(tmp_path / f"{index}.mp4")] for index in range(3)])
    ]
    assert report.eval_srcc == pytest.approx(srcc(found, [1, 2, 3]))


def test_a_damaged_preset_is_refused(tmp_path):
    (tmp_path / "scorer.json").write_text('{"levels": 3}')
    with pytest.raises(ValueError, match=r"scorer\.json is not a valid scorer preset"):
        load_preset(str(tmp_path))
    assert load_preset(str(tmp_path.parent / tmp_path.name / "..")) is None
