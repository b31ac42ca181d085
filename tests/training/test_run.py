"""Training runs: from a recipe to a model that loads, across kills, ranks and broken numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.training import run as run_module
from owl2_hf.training.checkpoints import last_checkpoint, num_processes
from owl2_hf.training.recipe import Recipe, load_recipe
from owl2_hf.training.run import train
from owl2_hf.training.trainer import NonFiniteError, Owl2Trainer

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
def rows(tmp_path_factory):
    """Rows with an image, without, and with two, in a file of messages."""
    folder = tmp_path_factory.mktemp("rows")
    pictures = list(owl2_hf.default_pictures().items())
    lines = []
    for index in range(12):
        name, path = pictures[index % len(pictures)]
        Image.open(path).save(folder / f"{index}.png")
        images = [[f"{index}.png"], [], [f"{index}.png", "0.png"]][index % 3]
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What is this?"}]
        answer = {
            "role": "assistant",
            "content": [{"type": "text", "text": name.replace("-", " ")}],
        }
        lines.append(
            {
                "id": f"r{index}",
                "messages": [{"role": "user", "content": parts}, answer],
                "images": images,
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


@pytest.fixture
def recipe(rows, tmp_path):
    """A short run of the embedded model."""

    def make(**changes):
        settings = {**BASE, **changes.pop("trainer", {})}
        data = {"train": str(rows), "max_length": 128, **changes.pop("data", {})}
        values = {
            "model": "default",
            "output_dir": str(tmp_path / "run"),
            "trains": "instruct",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**values, "trainer": settings, "data": data}))
        return load_recipe(path)

    return make


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_a_run_from_the_command_line_leaves_a_model_that_loads(rows, tmp_path):
    out = tmp_path / "run"
    settings = [f"--set=trainer.{name}={json.dumps(value)}" for name, value in BASE.items()]
    command = [
        "train",
        "visual-branch",
        "--model",
        "default",
        "--data",
        str(rows),
        "--out",
        str(out),
        "--json",
    ]
    more = [
        "--set",
        "trainer.bf16=false",
        "--set",
        "data.eval=" + str(rows),
        "--set",
        "trainer.dataloader_num_workers=0",
    ]
    result = CliRunner().invoke(app, [*command, *settings, *more])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["steps"] == 4 and report["loss"] > 0 and report["eval_loss"] > 0
    assert re.search(r"visual_branch +\d.*0 +0.0001|visual_branch", result.stderr)
    assert "component" in result.stderr and "of the parameters train" in result.stderr
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert AutoProcessor.from_pretrained(out).num_image_tokens == model.config.num_image_tokens
    assert AutoModelForImageTextToText.from_pretrained(out / "checkpoint-2").dtype == model.dtype
    for folder in (out, out / "checkpoint-4"):
        assert load_recipe(folder / "recipe.yaml").trains == "visual-branch"
        assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    assert Image.open(out / "loss.png").width > 500
    before = owl2_hf.load_default(dtype=torch.float32)[0].state_dict()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed and all("visual_" in name for name in changed)


def test_a_dry_run_counts_and_leaves_nothing(recipe, tmp_path):
    made = recipe(learning_rates={"connector": 5e-4}, vision_layer_decay=0.9)
    shown = []
    report = train(made, dry_run=True, on_parameters=shown.extend)
    assert report.steps == 0 and not (tmp_path / "run").exists()
    assert {row.component: row.learning_rates for row in shown}["connector"] == (5e-4,)


class Dies(TrainerCallback):
    """Stands in for a process that is killed after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 5])
def test_a_killed_run_goes_on_as_if_it_had_not_been(recipe, tmp_path, monkeypatch, step):
    settings = {"max_steps": 6, "lr_scheduler_type": "cosine"}
    adapter = {"preset": "language", "r": 4, "lora_dropout": 0.2} if step == 5 else None
    names = "adapter_model.safetensors" if adapter else "model.safetensors"
    whole = recipe(output_dir=str(tmp_path / "whole"), trainer=settings, adapter=adapter)
    train(whole)
    broken = recipe(output_dir=str(tmp_path / "broken"), trainer=settings, adapter=adapter)

    class Mortal(Owl2Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Dies(step)], **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "Owl2Trainer", Mortal)
        train(broken)
    # A checkpoint whose writing was cut short does not count.
    (tmp_path / "broken" / "checkpoint-99").mkdir()
    report = train(broken, resume=True)
    assert report.resumed_from.endswith(f"checkpoint-{step - 1}")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    after, expected = (load_file(tmp_path / run / names) for run in ("broken", "whole"))
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_a_loss_that_is_no_number_stops_the_run(recipe, tmp_path, monkeypatch):
    original = Owl2Trainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(Owl2Trainer, "compute_loss", poisoned)
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan in step 4, .*last checkpoint, .*checkpoint-3, with"
    ) as error:
        train(recipe())
    assert re.search(r"check the rows of this step: 'r\d+', 'r\d+'\.$", str(error.value))
    assert all(
        value.isfinite().all() for value in weights(last_checkpoint(tmp_path / "run")).values()
    )


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_are_lost(
    recipe, tmp_path, monkeypatch
):
    original = Owl2Trainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        next(iter(model.parameters())).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(Owl2Trainer, "training_step", poisoned)
    with pytest.raises(
        NonFiniteError,
        match=r"the gradient norm is (nan|inf) in step 1, .*there is no checkpoint yet",
    ) as error:
        train(recipe(trainer={"gradient_accumulation_steps": 2}))
    assert len(set(re.findall(r"'r\d+'", str(error.value)))) == 4


def test_a_divergent_run_ends_in_one_line(rows, tmp_path):
    settings = [f"--set=trainer.{name}={json.dumps(value)}" for name, value in BASE.items()]
    command = [
        "train",
        "instruct",
        "--model",
        "default",
        "--data",
        str(rows),
        "--out",
        str(tmp_path / "run"),
    ]
    wild = [
        "trainer.learning_rate=1e30",
        "trainer.bf16=false",
        "image_size=64",
        "trainer.dataloader_num_workers=0",
    ]
    wild += ["trainer.warmup_steps=0", "trainer.gradient_accumulation_steps=1"]
    result = CliRunner().invoke(app, [*command, *settings, *(f"--set={one}" for one in wild)])
    assert result.exit_code == 1
    assert re.search(
        r"^owl2-hf: the (loss|gradient norm) is (nan|inf) in step \d", result.stderr, re.MULTILINE
    )


def test_an_adapter_run_leaves_an_adapter_that_loads(recipe, tmp_path):
    made = recipe(adapter={"r": 4, "train_connector": True})
    train(made)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    names = {name for name, _ in model.named_parameters()}
    assert any("lora_A" in name for name in names)
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_config.json").is_file()


def test_rows_without_any_label_add_nothing(recipe, tmp_path):
    report = train(recipe(data={"max_length": 8}))
    assert report.counts and losses(tmp_path / "run") == [0.0] * 4


def test_pictures_of_another_size_are_trained_on(recipe, tmp_path):
    train(recipe(image_size=32, trainer={"max_steps": 1}))
    assert AutoProcessor.from_pretrained(tmp_path / "run").image_processor.size["height"] == 32
    assert (
        AutoModelForImageTextToText.from_pretrained(
            tmp_path / "run"
        ).config.vision_config.image_size
        == 32
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "the recipe has no model"),
        ({"output_dir": ""}, "the recipe has no output_dir"),
        ({"data": {"train": ""}}, "the recipe has no data.train"),
        (
            {"trainer": {"optim": "adam_w"}},
            "trainer: 'adam_w' is not a valid OptimizerNames|trainer: .*adam_w",
        ),
        (
            {"trainer": {"remove_unused_columns": True}},
            "trainer.remove_unused_columns must be False, got True",
        ),
        ({"quantization": "4bit", "adapter": {}}, "needs bitsandbytes: pip install"),
        (
            {"data": {"streaming": True, "train": ["a.jsonl", "b.jsonl"]}},
            "expected one source, got 2",
        ),
        (
            {"data": {"streaming": True}, "trainer": {"max_steps": -1}},
            "data.streaming needs trainer.max_steps",
        ),
    ],
)
def test_mistakes_of_a_recipe_are_named(recipe, changes, message, monkeypatch):
    monkeypatch.setattr("owl2_hf.training.loading.find_spec", lambda name: None)
    monkeypatch.setattr(run_module, "load_rows", lambda source, *args, **kwargs: [source])
    monkeypatch.setattr(run_module, "look_over", lambda *args: [])
    with pytest.raises(ValueError, match=message):
        train(recipe(**changes))


def test_training_refuses_a_folder_with_other_files(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="contains no complete checkpoint to resume from"):
        train(recipe(), resume=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: resume the run in it"):
        train(recipe())


def _torchrun(recipe: Recipe, folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    file = folder / f"ranks{processes}.yaml"
    file.write_text(recipe.to_yaml())
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        "0",
    ]
    command = [*launch, "--standalone", "-m", "owl2_hf", "train", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_two_ranks_compute_what_one_does(recipe, tmp_path):
    # In file order one rank sees a row with an image and the other one without.
    settings = {
        "max_steps": 3,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    single = recipe(output_dir=str(tmp_path / "one"), trainer=settings)
    train(single)
    pair = {**settings, "per_device_train_batch_size": 1}
    done = _torchrun(recipe(output_dir=str(tmp_path / "two"), trainer=pair), tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert last_checkpoint(tmp_path / "two").name == "checkpoint-3"
    assert num_processes(last_checkpoint(tmp_path / "two")) == 2
    expected = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_the_documentation_shows_what_runs(rows, tmp_path, monkeypatch, capsys):
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(rows.read_text())
    for picture in rows.parent.glob("*.png"):
        shutil.copy(picture, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "training.md", "exec"), {})
    assert "2 steps, training loss" in capsys.readouterr().out


@pytest.fixture
def damaged(rows, tmp_path):
    """Forty rows with an image each: the 36th is no image, and one that is cut short only shows
    when it is decoded.
    """
    turns = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]
    shutil.copy(rows.parent / "0.png", tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")

    def write(name, image):
        lines = [
            {"id": f"r{number}", "image": "good.png", "conversations": turns}
            for number in range(1, 41)
        ]
        lines[35]["image"] = image
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-100])
    return write


def test_a_broken_image_is_named_before_the_model_is_loaded(damaged, recipe, monkeypatch):
    monkeypatch.setattr("owl2_hf.training.run.load_for_training", None)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl: row 36 \(id 'r36'\): .*broken\.png': it is not an image"
    ):
        train(recipe(data={"train": damaged("rows.jsonl", "broken.png")}))


def test_bad_rows_are_skipped_where_the_recipe_says_so(damaged, recipe, tmp_path, caplog):
    file = Path(damaged("rows.jsonl", "broken.png"))
    lines = file.read_text().splitlines()
    lines[2], lines[7] = "{no JSON", lines[7].replace("good.png", "cut.png")
    file.write_text("\n".join(lines))
    length = {
        "max_steps": -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "save_strategy": "no",
    }
    report = train(recipe(data={"train": str(file), "bad_rows": "skip"}, trainer=length))
    assert report.steps == 40 and report.summary().endswith("3 rows skipped")
    assert (report.counts["rows"], report.counts["skipped"]) == (37, 3)
    for place in (
        r"row 3: ",
        r"row 8 \(id 'r8'\): .*cut\.png'",
        r"row 36 \(id 'r36'\): .*broken\.png'",
    ):
        assert re.search(rf"{re.escape(str(file))}: {place}.* The row is skipped\.", caplog.text), (
            place
        )


def test_a_bad_row_is_one_line_also_from_a_worker(damaged, tmp_path):
    settings = {
        **BASE,
        "max_steps": 40,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
    }
    settings |= {
        "save_steps": 100,
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 1,
        "bf16": False,
    }
    settings |= {"gradient_accumulation_steps": 1}
    command = ["train", "lora", "--model", "default", "--data", damaged("rows.jsonl", "cut.png")]
    command += [f"--set=trainer.{name}={json.dumps(value)}" for name, value in settings.items()]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    message = r"^owl2-hf: \S+rows\.jsonl: row 36 \(id 'r36'\): .* `owl2-hf data check` names all bad rows\.$"
    assert re.search(message, result.stderr, re.MULTILINE)
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-34"


def test_bad_rows_of_a_file_are_named_before_the_model_is_loaded(tmp_path, recipe, monkeypatch):
    rows = [{"id": name, "conversations": [{"from": "human", "value": "Hi"}]} for name in "789"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("owl2_hf.training.run.load_for_training", None)
    for data in ({"train": str(tmp_path / "rows.jsonl")}, {"eval": str(tmp_path / "rows.jsonl")}):
        with pytest.raises(
            ValueError,
            match=r"rows\.jsonl: row 1 \(id '7'\): .* 2 more rows are bad: `owl2-hf data",
        ):
            train(recipe(data=data))


def test_a_tracker_that_is_not_installed_is_named(recipe):
    with pytest.raises(ValueError, match=r"^trainer: .*clearml"):
        train(recipe(trainer={"report_to": "clearml"}))


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "epochs"]
)
def test_a_finished_run_stays_as_it_is_when_it_is_resumed(recipe, tmp_path, length):
    made = recipe(trainer={**length, "lr_scheduler_type": "constant"})
    steps = train(made).steps
    before = everything(tmp_path / "run")
    command = ["train", str(tmp_path / "recipe.yaml"), "--resume"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (
        result.stdout
        == f"{tmp_path / 'run'}: all {steps} steps are already done; nothing was changed\n"
    )
    assert everything(tmp_path / "run") == before


def test_a_finished_run_goes_on_to_more_steps(recipe):
    train(recipe(trainer={"max_steps": 2}))
    assert train(recipe(trainer={"max_steps": 3}), resume=True).steps == 3


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_a_run_that_died_before_its_model_was_written_takes_no_more_steps(recipe, tmp_path, name):
    made = recipe(trainer={"lr_scheduler_type": "constant"})
    train(made)
    expected = weights(tmp_path / "run" / "checkpoint-4")  # the tensors are the file
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    report = train(made, resume=True)
    assert (report.steps, report.loss, report.was_finished) == (4, None, False)
    assert all(
        torch.equal(value, expected[key]) for key, value in weights(tmp_path / "run").items()
    )


@pytest.mark.parametrize(
    "adapter", [None, {"preset": "language", "r": 4, "lora_dropout": 0.2}], ids=["model", "lora"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    recipe, tmp_path, caplog, adapter
):
    made = recipe(adapter=adapter)
    train(made)
    run = tmp_path / "run"
    whole = losses(run)
    (run / "trainer_state.json").unlink()  # it died at the last checkpoint
    file = run / "checkpoint-4" / ("adapter_model.safetensors" if adapter else "optimizer.pt")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    caplog.clear()
    report = train(made, resume=True)
    assert (
        f"incomplete or damaged: checkpoint-4: {file.name} is truncated or damaged; resuming from "
        "checkpoint-2." in caplog.text
    )
    assert report.resumed_from == str(run / "checkpoint-2") and losses(run) == whole
    assert last_checkpoint(run).name == "checkpoint-4"


def test_another_number_of_processes_is_said(recipe, tmp_path, caplog):
    train(recipe(trainer={"max_steps": 2}))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    for name in ("rng_state.pth", "versions.json"):
        (checkpoint / name).unlink()
    report = train(recipe(trainer={"max_steps": 3}), resume=True)
    assert (report.steps, report.resumed_from) == (3, str(checkpoint))
    assert (
        f"{checkpoint} was saved by 2 processes, this run has 1: random numbers and the order of rows"
        in caplog.text
    )


def test_a_run_without_a_whole_checkpoint_says_what_is_wrong_with_each(recipe, tmp_path):
    made = recipe(trainer={"save_only_model": True})
    train(made)
    (tmp_path / "run" / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"to resume from; checkpoint-4: optimizer\.pt is missing; checkpoint-2: optim",
    ):
        train(made, resume=True)


def failing_rows():
    """Stands in for `Collator`: the rows of the fourth step, read one step ahead, fail."""

    class Failing(run_module.Collator):
        batches = 0

        def __call__(self, rows):
            self.batches += 1
            if self.batches == 4:
                raise OSError("the disk is gone")
            return super().__call__(rows)

    return Failing


def test_an_error_in_the_middle_leaves_a_checkpoint_to_go_on_from(
    recipe, tmp_path, monkeypatch, caplog
):
    settings = {"save_steps": 100, "lr_scheduler_type": "cosine"}
    train(recipe(output_dir=str(tmp_path / "whole"), trainer=settings))
    made = recipe(trainer=settings)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(run_module, "Collator", failing_rows())
        train(made)
    assert "The run failed in step 3; checkpoint-2 has the state before it." in caplog.text
    report = train(made, resume=True)
    assert report.resumed_from == str(tmp_path / "run" / "checkpoint-2")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(
        torch.equal(value, expected[name]) for name, value in weights(tmp_path / "run").items()
    )


def test_an_error_within_an_update_keeps_no_half_of_it(recipe, tmp_path, monkeypatch):
    def dies(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    # Asked for right after the update.
    monkeypatch.setattr(run_module.Owl2Trainer, "_get_learning_rate", dies)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(recipe())
    assert last_checkpoint(tmp_path / "run") is None


def test_a_bad_row_of_one_rank_ends_all_of_them_with_a_checkpoint(damaged, recipe, tmp_path):
    settings = {
        "max_steps": 20,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 1,
    }
    settings |= {"save_steps": 100}
    done = _torchrun(
        recipe(data={"train": damaged("rows.jsonl", "cut.png")}, trainer=settings), tmp_path, 2
    )
    assert done.returncode == 1
    assert re.search(r"owl2-hf: \S+rows\.jsonl: row 36 \(id 'r36'\)", done.stderr)
    assert "owl2-hf: process 1 failed to read its rows: see its error." in done.stderr
    kept = last_checkpoint(tmp_path / "run")
    assert kept.name == "checkpoint-16" and num_processes(kept) == 2
