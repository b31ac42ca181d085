"""Scores as rewards, through the calls of TRL, flow_grpo and DDPO."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import owl2_hf
from owl2_hf.scoring import Scorer, custom_preset, reward
from owl2_hf.scoring.presets import PRESET_FILE
from owl2_hf.scoring.rewards import to_images

PRESET = custom_preset("one-align", levels=["high", "soft", "bad"])


@pytest.fixture(scope="module")
def parts():
    return owl2_hf.load_default(dtype=torch.float32)


@pytest.fixture(scope="module")
def arrays():
    """(5, 48, 64, 3) uint8: noise, of which some is smooth."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    for index in range(5):
        small = Image.fromarray(noise[index]).resize((8 + 12 * index, 6 + 9 * index))
        noise[index] = np.asarray(small.resize((64, 48)))
    return noise


@pytest.fixture(scope="module")
def expected(parts, arrays):
    scores = [found.score for found in Scorer(*parts, PRESET)([*map(Image.fromarray, arrays)])]
    assert max(scores) - min(scores) > 0.01
    return scores


FORMS = {
    "tensor": lambda arrays: torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255,
    "float64": lambda arrays: torch.from_numpy(arrays).permute(0, 3, 1, 2).double() / 255,
    "slightly beyond": lambda arrays: torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255 * 1.0001,
    "with gradients": lambda arrays: (
        torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    ).requires_grad_(),
    "bytes tensor": lambda arrays: torch.from_numpy(arrays).permute(0, 3, 1, 2),
    "bytes array": lambda arrays: arrays,
    "float array": lambda arrays: arrays / 255,
    "PIL": lambda arrays: [*map(Image.fromarray, arrays)],
    "list of arrays": list,
    "list of tensors": lambda arrays: [*(torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255)],
}


@pytest.mark.parametrize("style", ["flow_grpo", "ddpo"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_images_gets_the_scorer_s_numbers(parts, arrays, expected, form, style):
    function = reward(*parts, style, PRESET)
    scores, info = function(FORMS[form](arrays), ["a prompt"] * 5, [{}] * 5)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert info == {}
    assert all(type(score) is float for score in scores)


def test_half_precision_changes_no_step_of_255(arrays):
    tensor = FORMS["tensor"](arrays)
    found = [np.asarray(image) for image in to_images(tensor.half())]
    # Half precision itself is finer than half a step, so the same bytes come back.
    np.testing.assert_array_equal(found, arrays)


def test_rewards_go_through_flow_grpo_s_sum_and_a_ddpo_trainer(parts, arrays, expected):
    function = reward(*parts, "flow_grpo", PRESET)
    # As flow_grpo adds rewards up and both make tensors of them.
    scores, _ = function(arrays, None, None)
    total = [0.5 * score for score in scores]
    gathered = torch.as_tensor(total, device="cpu").float()
    assert gathered.tolist() == pytest.approx([0.5 * score for score in expected], abs=1e-5)


def test_the_scale_of_deqa_s_reward_server_is_a_fifth_of_the_score(parts, arrays, expected):
    scores, _ = reward(*parts, "flow_grpo", PRESET, scale=(0.2, 1))(arrays, None, None)
    assert scores == pytest.approx([score / 5 for score in expected], abs=1e-6)


def test_images_of_different_sizes_and_no_image_at_all(parts, arrays, expected):
    function = reward(*parts, "ddpo", PRESET)
    mixed = [arrays[0], Image.fromarray(arrays[1]), arrays[2][:20]]
    scores, _ = function(mixed, None, None)
    assert scores[:2] == pytest.approx(expected[:2], abs=1e-5)
    assert function([], [], []) == ([], {})
    assert function(torch.zeros(0, 3, 8, 8), [], []) == ([], {})


def test_images_go_through_the_model_in_batches_without_gradients(parts, arrays):
    sizes, model = [], parts[0]
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    model.train()
    function = reward(*parts, "ddpo", PRESET, batch_size=2)
    assert not model.training
    function(FORMS["with gradients"](arrays), None, None)
    hook.remove()
    assert sizes == [2, 2, 1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_moves_to_its_device(parts, monkeypatch):
    moved = []
    monkeypatch.setattr(parts[0], "to", lambda device: moved.append(device))
    reward(*parts, "trl", PRESET)
    assert moved == []
    reward(*parts, "trl", PRESET, device="cpu")
    assert moved == ["cpu"]


def test_threads_and_a_trainer_s_autocast_change_nothing(parts, arrays, expected):
    function = reward(*parts, "flow_grpo", PRESET)

    def run(count):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(arrays[:count], None, None)[0]

    counts = [1, 5, 2, 4, 3, 5, 1, 2]
    with ThreadPoolExecutor(8) as pool:
        for count, scores in zip(counts, pool.map(run, counts), strict=True):
            assert scores == pytest.approx(expected[:count], abs=1e-5)


def test_the_preset_beside_the_weights_is_the_default(parts, arrays, expected, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    (tmp_path / PRESET_FILE).write_text(PRESET.to_json(), encoding="utf-8")
    model = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path)
    scores, _ = reward(model, parts[1], "ddpo")(arrays, None, None)
    assert scores == pytest.approx(expected, abs=1e-5)
    # Without a file beside them it is OneAlign's, whose words the small model lacks.
    with pytest.raises(ValueError, match="the level 'excellent' is not one token"):
        reward(*parts, "ddpo")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 8) * 2 - 1, r"floats from 0 to 1, got -.*clamp\(0, 1\)"),
        (torch.full((2, 3, 8, 8), torch.nan), "floats from 0 to 1, got nan"),
        (torch.rand(2, 3, 8, 8) * 255, "floats from 0 to 1"),
        (torch.rand(3, 8, 8), r"a tensor \(N, 3, H, W\)"),
        (torch.rand(2, 8, 8, 3), r"a tensor \(N, 3, H, W\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"an array \(N, H, W, 3\)"),
        (np.zeros((2, 8, 8, 3), np.int64), "floats or uint8, got int64"),
        ([np.zeros((8, 8), np.uint8)], r"an array \(N, H, W, 3\)"),
        (["no such file.png"], "expected an existing file"),
    ],
)
def test_images_that_are_not_of_these_kinds_are_refused(parts, images, message):
    with pytest.raises(ValueError, match=message):
        reward(*parts, "ddpo", PRESET)(images, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "grpo"}, "a style of trl, flow_grpo, ddpo, got 'grpo'"),
        ({"style": "trl", "task": "beauty"}, "a task of quality, aesthetics, video"),
        ({"style": "trl", "task": "video"}, "a task for images"),
        ({"style": "trl", "preset": "none"}, "expected a preset of"),
        ({"style": "trl", "batch_size": 0}, "batch_size of at least 1"),
    ],
)
def test_wrong_settings_are_refused_before_training(parts, options, message):
    with pytest.raises(ValueError, match=message):
        reward(*parts, **{"preset": PRESET, **options})


def test_trl_s_columns_give_a_reward_for_each_completion(parts, arrays, expected):
    function = reward(*parts, "trl", PRESET)
    images = [*map(Image.fromarray, arrays)]
    rows = [images[:2], [images[2]], [], None]
    found = function(prompts=["a"] * 4, completions=["b"] * 4, images=rows, trainer_state=None)
    mean = (expected[0] + expected[1]) / 2
    assert found[:2] == pytest.approx([mean, expected[2]], abs=1e-5) and found[2:] == [None, None]
    assert function(completions=["b"], image=images[:1]) == pytest.approx(expected[:1], abs=1e-5)
    drawn = reward(*parts, "trl", PRESET, column="drawn")
    found = drawn(completions=["b"], images=rows[:1], drawn=images[4:])
    assert found == pytest.approx(expected[4:], abs=1e-5)
    with pytest.raises(ValueError, match="'drawn' with images, got columns: images, prompts"):
        drawn(prompts=["a"], completions=["b"], images=rows[:1])
    with pytest.raises(ValueError, match="each of 3 completions, got 4 rows"):
        function(completions=["b"] * 3, images=rows)


def test_grpo_of_trl_trains_with_the_reward(parts, tmp_path):
    trl = pytest.importorskip("trl")
    Dataset = pytest.importorskip("datasets").Dataset

    policy, processor = owl2_hf.load_default(dtype=torch.float32)
    files = [*owl2_hf.default_pictures().values()][:2]
    images = [Image.open(file).convert("RGB") for file in files]
    prompt = [{"role": "user", "content": "What is in it?"}]
    rows = [{"prompt": prompt, "images": [image]} for image in images]
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        policy,
        reward_funcs=reward(*parts, "trl", PRESET),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.train()
    scores = [found.score for found in Scorer(*parts, PRESET)(images)]
    logged = [
        entry["rewards/owl2_quality/mean"]
        for entry in trainer.state.log_history
        if "rewards/owl2_quality/mean" in entry
    ]
    # Both rows are in each batch, twice.
    assert logged == pytest.approx(2 * [sum(scores) / 2], abs=1e-5)
