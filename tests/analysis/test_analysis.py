"""Attention by modality and maps of the queries against direct computations; the figures, the JSON
and the command.
"""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.analysis import (
    analyze,
    attention_mass,
    attention_shares,
    query_maps,
    uniform_attention,
)
from owl2_hf.cli import app
from owl2_hf.default import default_dir

from ..modeling.test_modeling_mplug_owl2 import IMAGE, RUN, pictures, tiny_config

QUESTION = "What is this?"
PICTURES = owl2_hf.default_pictures()
CAT, SHAPES = str(PICTURES["emoji-wide-cat-face"]), str(PICTURES["shapes-0"])


def left_pad(rows):
    """Ids, mask and indicators of rows that end together."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": ids.eq(IMAGE).long()}


def own_weights(attn, normed, position_embeddings, indicators, mask):
    """(B, heads, L, L) softmax of the scores, the key of each token from the branch of its
    modality.
    """
    batch, length, _ = normed.shape
    keys = torch.empty(batch, length, attn.k_proj.out_features)
    for row in range(batch):
        for position in range(length):
            branch = attn.visual_k_proj if indicators[row, position] == 1 else attn.k_proj
            keys[row, position] = branch(normed[row, position])
    query = attn.q_proj(normed).view(batch, length, -1, attn.head_dim).transpose(1, 2)
    key = keys.view(batch, length, -1, attn.head_dim).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) / math.sqrt(attn.head_dim)
    for row in range(batch):
        for position in range(length):
            for other in range(length):
                if other > position or not mask[row, other]:
                    scores[row, :, position, other] = -torch.inf
    return scores.softmax(-1)


@torch.no_grad()
def test_masses_match_a_direct_computation_with_two_pictures_and_left_padding():
    torch.manual_seed(3)
    model = owl2_hf.MplugOwl2ForConditionalGeneration(tiny_config()).eval()
    model.set_attn_implementation("eager")
    inputs = left_pad([[1, 5, *RUN, 7, 8, *RUN, 9, 11, 12], [1, 9, *RUN, 8]])
    indicators, mask = inputs["mm_token_type_ids"], inputs["attention_mask"]
    seen = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda attn, args, kwargs: seen.append((attn, args[0], kwargs["position_embeddings"])),
            with_kwargs=True,
        )
    outputs = model(**inputs, pixel_values=pictures(3), output_attentions=True)
    found = attention_mass(outputs.attentions, indicators, mask)
    assert found.shape == (3, 2, 2)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2), rtol=0, atol=1e-6)
    last = torch.zeros_like(mask, dtype=torch.bool)
    last[:, -2:] = True
    of_last = attention_mass(outputs.attentions, indicators, mask, last)
    for layer, (attn, normed, position_embeddings) in enumerate(seen):
        weights = own_weights(attn, normed, position_embeddings, indicators, mask)
        for row in range(2):
            positions = [position for position in range(mask.shape[1]) if mask[row, position]]
            for shares, queries in ((found, positions), (of_last, positions[-2:])):
                total = {0: 0.0, 1: 0.0}
                for query in queries:
                    for key in positions:
                        mean = float(weights[row, :, query, key].mean())
                        total[int(indicators[row, key])] += mean / len(queries)
                assert shares[layer, row].tolist() == pytest.approx([total[0], total[1]], abs=1e-5)


def test_groups_of_keys_uniform_attention_and_half_precision():
    mask = torch.tensor([[0, 1, 1, 1]])
    uniform = uniform_attention(mask)
    assert uniform[0, 0].tolist() == [
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0.5, 0.5, 0],
        [0, pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3)],
    ]
    first = torch.tensor([[[False, True, False, False]]])
    assert float(attention_shares([uniform], first, mask)) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    rounded = torch.rand(1, 4, 9, 9).softmax(-1).bfloat16()
    shares = attention_mass([rounded], torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1]]))
    assert float(shares.sum()) == pytest.approx(1, abs=1e-6)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"expected attention weights of shape \(1, heads, 3, 3\) in layer 0"
    ):
        attention_mass([torch.rand(1, 2, 1, 3)], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least one query"):
        attention_mass(
            [torch.rand(1, 2, 3, 3)],
            torch.zeros(1, 3),
            torch.tensor([[1, 1, 0]]),
            torch.eye(3)[2:].bool(),
        )
    with pytest.raises(
        ValueError, match="expected 4 queries, 5 x 5 patches and at most one class token"
    ):
        query_maps([torch.rand(1, 2, 4, 14)], 5)


@pytest.mark.parametrize("num_class_tokens", [0, 1])
def test_query_maps_match_a_direct_reduction(num_class_tokens):
    num_queries, grid, layers = (
        3,
        4,
        [torch.randn(2, 5, 3, 19 + num_class_tokens).softmax(-1) for _ in range(2)],
    )
    found = query_maps(layers, grid)
    assert found.maps.shape == (2, num_queries, grid, grid) and found.shares.shape == (2, 2, 3)
    torch.testing.assert_close(found.maps.sum((-1, -2)), torch.ones(2, num_queries))
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(2, 2))
    for picture in range(2):
        for query in range(num_queries):
            total = sum(layer[picture, head, query] for layer in layers for head in range(5))
            patches = total[num_queries + num_class_tokens :]
            for row in range(grid):
                for column in range(grid):
                    expected = float(patches[row * grid + column] / patches.sum())
                    assert float(found.maps[picture, query, row, column]) == pytest.approx(
                        expected, rel=1e-4
                    )
        class_share = float(layers[1][picture, :, :, 3].mean()) if num_class_tokens else 0.0
        assert float(found.shares[1, picture, 1]) == pytest.approx(class_share, rel=1e-4)
        assert float(found.shares[1, picture, 0]) == pytest.approx(
            float(layers[1][picture, :, :, :3].sum(-1).mean()), rel=1e-4
        )


@pytest.fixture(scope="module")
def default():
    return owl2_hf.load_default(dtype=torch.float32)


@pytest.fixture(scope="module")
def without():
    """The bundled model with its text branch alone."""
    config = owl2_hf.MplugOwl2Config.from_pretrained(default_dir()).to_dict()
    config["text_config"].update(modality_specific_projections=[], modality_specific_norms=False)
    # Asking for what is missing allows the visual branch of the weights to be left out.
    model, _ = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(
        default_dir(),
        config=owl2_hf.MplugOwl2Config.from_dict(config),
        dtype=torch.float32,
        output_loading_info=True,
    )
    return model.eval(), owl2_hf.MplugOwl2Processor.from_pretrained(default_dir())


@pytest.fixture(scope="module")
def found(default, without):
    return analyze(*default, CAT, QUESTION, unrelated=SHAPES, without=without, name="bundled")


def test_the_analysis_reads_what_the_model_computes(default, found):
    model, processor = default
    run = found.runs[0]
    assert (
        found.answer == run.generated == "cat face"
        and found.is_answer_generated
        and found.has_module
    )
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": CAT}, {"type": "text", "text": QUESTION}],
        },
        {"role": "assistant", "content": "cat face"},
    ]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **settings)
    start = processor.apply_chat_template(messages[:1], add_generation_prompt=True, **settings)[
        "input_ids"
    ].shape[1]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = eager(**inputs, output_attentions=True, output_hidden_states=True)
        features = eager.get_image_features(inputs["pixel_values"], output_attentions=True)
    ids, visual = inputs["input_ids"][0], inputs["mm_token_type_ids"][0].bool()
    for layer, weights in enumerate(outputs.attentions):
        answer = weights[0].mean(0)[start - 1 : -1].mean(0)
        assert run.attention["answer"]["visual"][layer] == pytest.approx(
            float(answer[visual].sum()), abs=1e-5
        )
        assert run.attention["answer"]["first_token"][layer] == pytest.approx(
            float(answer[0]), abs=1e-5
        )
        for keys in run.attention.values():
            assert keys["text"][layer] + keys["visual"][layer] == pytest.approx(1, abs=1e-6)
    decoder_layer, before = eager.model.language_model.layers[1], outputs.hidden_states[1][0]
    rms = before.pow(2).mean(-1).sqrt()
    assert run.norms["residual"]["visual"][1] == pytest.approx(
        float(rms[visual].median()), rel=1e-5
    )
    with torch.no_grad():
        keys = decoder_layer.self_attn.visual_k_proj(
            decoder_layer.visual_input_layernorm(before[visual])
        )
    assert run.norms["key"]["visual"][1] == pytest.approx(
        float(keys.pow(2).mean(-1).sqrt().median()), rel=1e-4
    )
    logprobs = outputs.logits[0].log_softmax(-1)[start - 1 : -1].gather(1, ids[start:, None])
    assert run.answer_logprob == pytest.approx(float(logprobs.mean()), abs=1e-4)
    assert run.num_tokens == {"text": len(ids) - 9, "visual": 9, "answer": len(ids) - start}
    direct = query_maps(features.abstractor_attentions, 8).maps
    np.testing.assert_allclose(run.query_maps, direct.numpy(), rtol=1e-4, atol=1e-6)
    assert run.squares.shape == (1, 64, 64, 3) and run.aspect_ratio == pytest.approx(
        64 / 80, abs=0.1
    )


def test_squares_are_the_picture_as_the_model_sees_it(default, found):
    pixels = default[1].image_processor(
        CAT, do_normalize=False, do_rescale=False, return_tensors="np"
    )["pixel_values"]
    assert np.array_equal(found.runs[0].squares[0], pixels[0].transpose(1, 2, 0))


def test_an_unrelated_picture_and_none_are_read_with_the_same_answer(found):
    given, unrelated, none = found.runs
    assert [run.picture for run in found.runs] == ["given", "unrelated", "none"]
    assert unrelated.image == SHAPES and none.image is None and none.query_maps is None
    assert unrelated.generated != given.generated
    assert unrelated.answer_logprob < given.answer_logprob
    assert (
        none.attention["answer"]["text"] == pytest.approx([1.0] * 3)
        and none.num_tokens["visual"] == 0
    )
    assert none.norms["key"]["visual"] == [None] * 3
    assert given.num_tokens["answer"] == unrelated.num_tokens["answer"] == none.num_tokens["answer"]


def test_an_analysis_shows_that_the_module_is_missing(default, found):
    other = found.without
    assert not other.has_module and other.answer == found.answer and not other.is_answer_generated
    assert "no modality-adaptive module" in other.notes[0]
    assert (
        other.weights["k_proj"]["visual"] == [None] * 3 and other.weights["k_proj"]["text"][0] > 0
    )
    text, visual = (
        default[0].model.language_model.layers[2].get_submodule(f"self_attn.{name}").weight.detach()
        for name in ("k_proj", "visual_k_proj")
    )
    expected = float((text - visual).norm() / text.norm())
    assert found.weights["k_proj"]["distance"][2] == pytest.approx(expected, rel=1e-5)
    assert found.weights["q_proj"]["distance"] == [None] * 3
    again = analyze(*default, CAT, QUESTION, answer="cat face", without=default)
    assert "but this one has it" in again.without.notes[0] and not again.is_answer_generated
    for queries, keys in found.runs[0].attention.items():
        assert again.runs[0].attention[queries]["visual"] == pytest.approx(keys["visual"])


def test_the_model_is_left_as_it_was():
    model, processor = owl2_hf.load_default()
    model.train()
    model.model.vision_tower.eval()
    model.model.language_model.set_attn_implementation("eager")
    analyze(model, processor, CAT, QUESTION, max_new_tokens=2)
    assert (
        model.training
        and model.model.language_model.training
        and not model.model.vision_tower.training
    )
    config = model.config
    assert (
        config.abstractor_config._attn_implementation
        == config.vision_config._attn_implementation
        == "sdpa"
    )
    assert config.text_config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="got a list of 2"):
        analyze(model, processor, [CAT, CAT], QUESTION)
    assert model.training and config.abstractor_config._attn_implementation == "sdpa"
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not any("owl2_hf" in hook.__module__ for hook in hooks)


def test_docowls_crops_have_masses_but_no_query_maps(default, tmp_path):
    processor = copy.deepcopy(default[1])
    config = tiny_config().to_dict()
    config.pop("abstractor_config")
    config["text_config"].update(vocab_size=default[0].config.text_config.vocab_size)
    config["vision_config"].update(image_size=28)
    config.update(
        connector_type="h_reducer",
        image_token_id=default[0].config.image_token_id,
        output_vocab_size=None,
    )
    model = owl2_hf.MplugOwl2ForConditionalGeneration(owl2_hf.MplugOwl2Config.from_dict(config))
    processor.num_image_tokens = model.config.num_image_tokens
    processor.image_processor.size = {"height": 28, "width": 28}
    processor.image_processor.image_aspect_ratio = "anchors"
    found = analyze(
        model, processor, Image.new("RGB", (80, 30)), QUESTION, max_new_tokens=2, answer="a cat"
    )
    (run,) = found.runs
    assert "no learnable queries" in found.notes[0] and run.query_maps is None
    assert len(run.squares) > 2 and run.num_tokens["visual"] == len(run.squares) * 5
    files = found.save(tmp_path / "out")
    assert sorted(files) == ["analysis.json", "attention.png", "norms.png"]


def test_inputs_that_cannot_be_analysed_are_refused(default):
    model, processor = default
    with pytest.raises(
        ValueError, match="expected an MplugOwl2ForConditionalGeneration, got MplugOwl2TextModel"
    ):
        analyze(model.model.language_model, processor, CAT, QUESTION)
    with pytest.raises(ValueError, match="the answer is empty"):
        analyze(model, processor, CAT, QUESTION, answer=" ")
    with pytest.raises(ValueError, match="max_new_tokens of at least 1"):
        analyze(model, processor, CAT, QUESTION, max_new_tokens=0)


def test_files_have_the_said_sizes_and_keys_and_replace_only_their_own(found, tmp_path):
    folder = tmp_path / "new" / "out"
    files = found.save(folder)
    assert (
        set(files)
        == {path.name for path in folder.iterdir()}
        == {
            "analysis.json",
            "attention.png",
            "norms.png",
            *(
                f"query_maps{which}.png"
                for which in ("", "_unrelated", "_without", "_without_unrelated")
            ),
        }
    )
    for name, size in files.items():
        if size is not None:
            with Image.open(folder / name) as picture:
                assert picture.size == size and len(picture.convert("RGB").getcolors(2**24)) > 20
    assert files["attention.png"] == (1400, 450) and files["norms.png"] == (1400, 760)
    values = json.loads((folder / "analysis.json").read_text())
    assert {
        "model",
        "has_module",
        "question",
        "answer",
        "runs",
        "weights",
        "notes",
        "without",
    } <= set(values)
    assert {"picture", "attention", "uniform", "norms", "query_maps", "query_shares"} <= set(
        values["runs"][0]
    )
    assert values["runs"][0]["attention"] == found.runs[0].attention
    assert np.sum(values["runs"][0]["query_maps"], axis=(-1, -2)) == pytest.approx(
        np.ones((1, 8)), abs=1e-4
    )
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"is not empty: choose another folder, or replace .* \(--overwrite\)"
    ):
        found.save(folder)
    with pytest.raises(ValueError, match="is a file"):
        found.save(folder / "notes.txt", overwrite=True)
    alone = copy.copy(found)
    alone.without, alone.runs = None, found.runs[:1]
    assert alone.save(folder, overwrite=True)["attention.png"] == (700, 450)
    names = {"analysis.json", "attention.png", "norms.png", "query_maps.png"}
    assert {path.name for path in folder.iterdir()} == {*names, "notes.txt"}


def test_plots_leave_the_users_backend_alone_and_say_what_they_need(found, tmp_path, monkeypatch):
    import owl2_hf.analysis

    found.save(tmp_path / "out")
    assert "matplotlib.pyplot" not in sys.modules
    monkeypatch.delitem(sys.modules, "owl2_hf.analysis.plots")
    monkeypatch.delattr(owl2_hf.analysis, "plots")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'owl2_hf\[analysis\]'"):
        found.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def run(*arguments):
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def test_the_command_writes_and_prints(found, without, tmp_path):
    for part in without:
        part.save_pretrained(tmp_path / "without")
    result = run(
        CAT, "-q", QUESTION, "--out", tmp_path / "out", "--without", tmp_path / "without", "--json"
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert set(values["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert values["answer"] == "cat face" and values["without"]["has_module"] is False
    for runs in (values["runs"], values["without"]["runs"]):
        shares = runs[0]["attention"]["answer"]
        assert [
            text + visual for text, visual in zip(shares["text"], shares["visual"], strict=True)
        ] == [pytest.approx(1, abs=1e-6)] * 3
    assert values["runs"][0]["attention"]["answer"]["visual"] == pytest.approx(
        found.runs[0].attention["answer"]["visual"], abs=0.02
    )
    refused = run(CAT, "--out", tmp_path / "out")
    assert refused.exit_code == 1 and "is not empty" in refused.stderr
    settings = [
        "--model",
        tmp_path / "without",
        "--overwrite",
        "--answer",
        "a cat",
        "--max-new-tokens",
        2,
    ]
    lines = run(CAT, "--out", tmp_path / "out", "--unrelated", SHAPES, *settings).stdout
    assert (
        "unrelated image" in lines and "no image" in lines and "query_maps_unrelated.png" in lines
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-picture.png"], "no-such-picture.png"),
        ([CAT, "--unrelated", "no-such-picture.png"], "no-such-picture.png"),
        ([CAT, "--model", "path/to/no-such-folder"], "path/to/no-such-folder"),
        ([CAT, "--without", "path/to/no-such-folder"], "path/to/no-such-folder"),
        ([CAT, "--answer", ""], "the answer is empty"),
    ],
)
def test_a_mistake_ends_in_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, "--out", "out")
    assert result.exit_code == 1 and message in result.stderr
    assert result.stderr.strip().count("\n") == 0 and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_model_with_adapters_is_read_with_them(default, found):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["visual_k_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(default[0]), config)
    other = analyze(adapted, default[1], CAT, QUESTION, answer="cat face", max_new_tokens=1)
    before, after = (one.runs[0].norms["key"] for one in (found, other))
    assert (
        after["text"][0] == pytest.approx(before["text"][0])
        and after["visual"][0] != before["visual"][0]
    )
    assert other.weights["k_proj"] == found.weights["k_proj"]
