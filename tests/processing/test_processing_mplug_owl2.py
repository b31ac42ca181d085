"""Prompts, placeholders and indicators; text stays text."""

import copy
import json
import shutil
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.processing_utils import ProcessorMixin

import owl2_hf
from owl2_hf.default import default_dir
from owl2_hf.processing import MplugOwl2ImageProcessor, MplugOwl2Processor
from owl2_hf.processing.processing_mplug_owl2 import ESCAPE, NO_PREFIX, _unexpand
from owl2_hf.processing.tokenization_mplug_owl2 import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CONTROL = ["<|image|>", "<s>", "</s>", "<unk>"]
RED, BLUE = Image.new("RGB", (9, 5), "red"), Image.new("RGB", (5, 9), "blue")


def make(legacy=True, **kwargs):
    tokenizer, _ = load_tokenizer(GOLDEN / "T" / "tiny.model")
    image_processor = MplugOwl2ImageProcessor(size={"height": 14, "width": 14})
    return MplugOwl2Processor(
        image_processor, tokenizer, num_image_tokens=3, legacy=legacy, **kwargs
    )


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def processor(request):
    return make(request.param)


def user(*parts):
    return {
        "role": "user",
        "content": [part if isinstance(part, dict) else text(part) for part in parts],
    }


def text(value):
    return {"type": "text", "text": value}


def picture(image):
    return {"type": "image", "image": image}


def encode(processor, conversation, **kwargs):
    kwargs = {"add_generation_prompt": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **kwargs)


# Chat template


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([user(picture(RED), "Describe.")], "USER: <|image|>Describe. ASSISTANT:"),
        ([user("a ", picture(RED), " b")], "USER: a <|image|> b ASSISTANT:"),
        ([{"role": "user", "content": "Hi"}], "USER: Hi ASSISTANT:"),
        ([{"role": "user", "content": ""}], "USER:ASSISTANT:"),
        (
            [
                {"role": "system", "content": "Be kind."},
                user("q1"),
                {"role": "assistant", "content": "a1"},
                user("q2"),
            ],
            "Be kind. USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
        ),
    ],
)
def test_prompts_are_the_originals(processor, messages, prompt):
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == f"<s>{prompt}"


def test_golden_conversations_give_the_originals_prompts_and_ids(golden_dir):
    processor = make()
    cases = json.loads((golden_dir("A") / "e2e" / "e2e.json").read_text())["cases"]
    for case in cases:
        messages, images = [], iter(case["images"])
        for number, turn in enumerate(turn for turn in case["turns"] if turn is not None):
            parts = []
            for index, piece in enumerate(turn.split("<|image|>")):
                parts += (
                    [picture(Image.open(golden_dir("A") / "e2e" / next(images)))] if index else []
                )
                parts += [text(piece)] if piece else []
            messages.append({"role": "assistant" if number % 2 else "user", "content": parts})
        assert (
            processor.apply_chat_template(messages, add_generation_prompt=True)
            == "<s>" + case["prompt"]
        )
        from_chat = encode(processor, messages)
        pictures = [Image.open(golden_dir("A") / "e2e" / name) for name in case["images"]]
        from_string = processor(text=case["prompt"], images=pictures or None, return_tensors="pt")
        assert from_chat.keys() == from_string.keys()
        assert all(torch.equal(from_chat[key], from_string[key]) for key in from_chat)


def test_assistant_masks_cover_the_answers(processor):
    messages = [
        user(picture(RED), "What </s> is it?"), {"role": "assistant", "content": "A dog."},
        user(picture(BLUE), "And?"), {"role": "assistant", "content": "a </s> cat"},
    ]  # fmt: skip
    out = encode(
        processor, messages, add_generation_prompt=False, return_assistant_tokens_mask=True
    )
    learned = out["input_ids"][0][out["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(learned) == "A dog.</s> a </s> cat</s>"
    assert (learned == processor.tokenizer.eos_token_id).sum() == 2


@pytest.mark.parametrize("num_images", [1, 3])
def test_assistant_masks_cover_answers_of_any_length(num_images):
    processor = make()
    processor.num_image_tokens = 30
    for length in range(1, 40):
        answer = " ".join(["a"] * length)
        turns = [user(*[picture(RED)] * num_images, "q"), {"role": "assistant", "content": answer}]
        options = {"add_generation_prompt": False, "return_assistant_tokens_mask": True}
        out = encode(processor, 2 * turns, **options)
        learned = out["input_ids"][0][out["assistant_masks"][0].bool()]
        assert processor.tokenizer.decode(learned) == f"{answer}</s> {answer}</s>"


def test_tokens_of_an_image_stand_in_its_placeholder():
    # "<s>" and "a<|image|>b<|image|>c", each image two placeholders of 9 characters.
    tokens = [(0, 0), (0, 1), (1, 10), (10, 19), (19, 20), (20, 29), (29, 38), (38, 39)]
    images = [{"span": (1, 10), "new_span": (1, 19)}, {"span": (11, 20), "new_span": (20, 38)}]
    spans = [(-1, -1), (0, 1), (1, 10), (10, 10), (10, 11), (11, 20), (20, 20), (20, 21)]
    assert _unexpand(tokens, images) == spans


def test_assistant_masks_need_no_help_from_the_template():
    processor = make(legacy=False)
    template = "{%- for m in messages -%}{%- generation -%}{{ m.content }}</s>{%- endgeneration -%}{%- endfor -%}"
    messages = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "bb"}]
    out = encode(
        processor,
        messages,
        chat_template=template,
        add_generation_prompt=False,
        return_assistant_tokens_mask=True,
    )
    assert out["assistant_masks"].tolist() == [[0, *[1] * (out["input_ids"].shape[1] - 1)]]


def test_an_empty_system_message_adds_nothing(processor):
    messages = [{"role": "system", "content": ""}, user("q")]
    assert processor.apply_chat_template(messages) == "<s>USER: q "


def test_a_chat_part_may_be_a_placeholder_for_an_image(processor):
    for kind in ("image", "video"):
        assert processor.apply_chat_template([user({"type": kind}, "a")]) == "<s>USER: <|image|>a "
    out = encode(processor, [user({"type": "image"}, "a")], processor_kwargs={"images": [RED]})
    assert out["pixel_values"].shape[0] == 1
    keys = {"type": "image", "image": RED, "url": None}
    assert encode(processor, [user(keys, "a")])["pixel_values"].shape[0] == 1


@dataclass
class Said:
    role: str
    content: object
    tool_calls: object = None


@dataclass
class Part:
    type: str
    text: str | None = None
    image: object = None


def test_messages_may_be_objects(processor):
    expected = encode(processor, [user(picture(RED), "What is it?")])
    for message in (
        Said("user", [Part("image", image=RED), Part("text", text="What is it?")]),
        UserDict(
            role="user",
            content=(UserDict(type="image", image=RED), {"type": "text", "text": "What is it?"}),
        ),
        {"role": "user", "content": [picture(RED), Part("text", text="What is it?")], "name": None},
    ):
        out = encode(processor, [message])
        assert out.keys() == expected.keys()
        assert all(torch.equal(out[key], expected[key]) for key in out)
    batch = processor.apply_chat_template([[Said("user", "a")], [Said("user", "b")]])
    assert batch == processor.apply_chat_template([[user("a")], [user("b")]])


def test_the_positions_of_an_image_may_be_set_while_loading(processor, tmp_path):
    owl2_hf.load_default()[1].save_pretrained(tmp_path)
    shutil.copy(default_dir() / "config.json", tmp_path)
    assert (
        owl2_hf.MplugOwl2Processor.from_pretrained(tmp_path, num_image_tokens=9).num_image_tokens
        == 9
    )


def test_an_answer_can_be_continued(processor):
    messages = [user(picture(RED), "What is it?"), {"role": "assistant", "content": "It is"}]
    out = encode(processor, messages, add_generation_prompt=False, continue_final_message=True)
    prompt = processor(
        text="USER: <|image|>What is it? ASSISTANT: It is", images=RED, return_tensors="pt"
    )
    assert torch.equal(out["input_ids"], prompt["input_ids"])


# Text stays text


@pytest.mark.parametrize("token", CONTROL)
def test_names_of_control_tokens_in_messages_are_text(processor, token):
    said = f"What does {token} mean?"
    for messages in (
        [user(said)],
        [{"role": "user", "content": said}],
        [{"role": "system", "content": said}, user("hi")],
        [user("hi"), {"role": "assistant", "content": said}, user("go on")],
        [user(picture(RED), said)],
    ):
        out = encode(processor, messages)
        ids = out["input_ids"][0].tolist()
        assert ids.count(processor.image_token_id) == 3 * ("pixel_values" in out)
        assert processor.tokenizer.unk_token_id not in ids
        assert ids.count(1) == 1
        assert ids.count(2) == len([m for m in messages if m["role"] == "assistant"])
        assert token in processor.tokenizer.decode([i for i in ids if i > 2])


@given(
    st.lists(
        st.sampled_from([*CONTROL, " ", "a", "\n", "é", ESCAPE, NO_PREFIX, "▁", "<", "|image|>"]),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_text_never_becomes_a_control_token(pieces):
    processor = PROCESSORS[len(pieces) % 2]
    content = "".join(pieces)
    ids = encode(processor, [user(picture(RED), content)])["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 3
    assert [i for i in ids if i in (0, 1, 2)] == [1]


PROCESSORS = [make(True), make(False)]
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9)]
PARTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(CONTROL),
    st.sampled_from(COLOURS).map(lambda colour: picture(Image.new("RGB", (3, 2), colour))),
)
TURNS = st.lists(
    st.lists(PARTS, max_size=5).map(lambda parts: user(*parts)), min_size=1, max_size=3
)


@given(TURNS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_conversation_keeps_its_text_and_its_pictures(questions, legacy):
    processor = PROCESSORS[legacy]
    answer = {"role": "assistant", "content": "yes"}
    chat = [turn for question in questions for turn in (question, answer)][:-1]
    parts = [part for question in questions for part in question["content"]]
    pictures = [part["image"].getpixel((0, 0)) for part in parts if part["type"] == "image"]
    out = encode(processor, chat)
    ids = out["input_ids"][0]
    assert (
        int(out["mm_token_type_ids"].sum())
        == ids.eq(processor.image_token_id).sum()
        == 3 * len(pictures)
    )
    # Each answer's end, and none that somebody wrote.
    assert int(ids.eq(2).sum()) == len(questions) - 1
    shown = out["pixel_values"] if pictures else []
    for values, colour in zip(shown, pictures, strict=True):
        expected = processor.image_processor(
            Image.new("RGB", (3, 2), colour), return_tensors="pt"
        ).pixel_values[0]
        assert torch.equal(values, expected)
    again = encode(processor, chat)
    assert all(torch.equal(again[key], out[key]) for key in out)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ messages.append('more') }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_a_malicious_chat_template_runs_no_code_and_changes_nothing(
    processor, tmp_path, monkeypatch, template
):
    monkeypatch.chdir(tmp_path)
    messages = [user(picture(RED), "hi")]
    try:
        prompt = processor.apply_chat_template(messages, chat_template=template)
    except (ValueError, TypeError) as error:
        prompt = str(error)
    assert "<class" not in prompt and "root:" not in prompt
    assert len(messages) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_spread_over_parts_are_text(processor, token):
    for cut in range(1, len(token)):
        ids = encode(processor, [user(picture(RED), token[:cut], token[cut:], " a")])["input_ids"][
            0
        ].tolist()
        assert ids.count(processor.image_token_id) == 3
        assert [i for i in ids if i in (0, 1, 2)] == [1]


def test_sanitising_is_always_in_force(processor):
    messages = [user(picture(RED), "<s>")]
    out = encode(processor, messages, sanitize_control_tokens=True)
    assert torch.equal(out["input_ids"], encode(processor, messages)["input_ids"])


def test_the_escaped_prompt_may_be_handed_on_as_a_string(processor):
    messages = [user(picture(RED), "Is <|image|> an image? </s>")]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    out = processor(text=prompt, images=RED, return_tensors="pt")
    assert torch.equal(out["input_ids"], encode(processor, messages)["input_ids"])


def test_in_a_raw_prompt_they_are_control_tokens(processor):
    ids = processor(text="a</s>b<|image|>", images=RED)["input_ids"][0]
    assert (ids.count(2), ids.count(processor.image_token_id)) == (1, 3)


def test_a_tokenizer_that_cannot_keep_them_apart_is_refused():
    processor = make()
    backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    backend["normalizer"]["normalizers"] = backend["normalizer"]["normalizers"][:1]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    processor = MplugOwl2Processor(processor.image_processor, plain, num_image_tokens=3)
    assert encode(processor, [user("hello")], return_tensors=None)["input_ids"]
    with pytest.raises(ValueError, match=r"deletes U\+FDD0"):
        encode(processor, [user("what is </s>?")])
    with pytest.raises(ValueError, match="legacy=False needs a tokenizer"):
        MplugOwl2Processor(processor.image_processor, plain, legacy=False)


# Placeholders, indicators, batches


def test_one_placeholder_becomes_the_positions_of_one_picture(processor):
    out = processor(
        text="USER: <|image|>a<|image|> ASSISTANT:", images=[RED, BLUE], return_tensors="pt"
    )
    is_image = out["input_ids"].eq(processor.image_token_id)
    assert is_image.sum() == 6
    assert torch.equal(out["mm_token_type_ids"], is_image.long())
    assert out["pixel_values"].shape == (2, 3, 14, 14)
    assert (
        set(out)
        == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}
        == set(processor.model_input_names)
    )


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_indicators_are_those_of_transformers(processor, kind):
    image = processor.image_token_id
    for rows in ([[image, 4, image], [4, 5, 6]], [[image]], [[]]):
        expected = ProcessorMixin.create_mm_token_type_ids(processor, kind(rows))
        assert processor.create_mm_token_type_ids(kind(rows)) == expected
    assert processor.create_mm_token_type_ids([[image, 4], [image]]) == [[1, 0], [1]]


def test_text_only_needs_no_picture(processor):
    out = processor(text=["USER: hi ASSISTANT:", "a"], padding=True, return_tensors="pt")
    assert "pixel_values" not in out
    assert out["mm_token_type_ids"].sum() == 0
    assert (
        processor(text=["hi", "ho"], images=[[], []]).keys() == processor(text=["hi", "ho"]).keys()
    )


def test_batches_are_padded_on_the_left(processor):
    rows = ["USER: <|image|>a ASSISTANT:", "USER: b ASSISTANT:", "<|image|><|image|>c"]
    out = processor(text=rows, images=[[RED], [], [BLUE, RED]], padding=True, return_tensors="pt")
    for row, own, ids, mask in zip(
        rows, [[RED], [], [BLUE, RED]], out["input_ids"], out["attention_mask"], strict=True
    ):
        alone = processor(text=row, images=own or None)["input_ids"][0]
        assert ids[mask.bool()].tolist() == alone
        assert mask.tolist() == sorted(mask.tolist())
    none = processor(text=rows, images=[RED, None, [BLUE, RED]], padding=True, return_tensors="pt")
    assert torch.equal(none["pixel_values"], out["pixel_values"])
    array = np.stack([np.asarray(BLUE)] * 2)
    stacked = processor(
        text=rows, images=[np.asarray(RED)[None], None, array], padding=True, return_tensors="pt"
    )
    assert torch.equal(stacked["input_ids"], out["input_ids"])
    flat = processor(text=rows, images=[RED, BLUE, RED], padding=True, return_tensors="pt")
    assert torch.equal(flat["pixel_values"], out["pixel_values"])


def test_the_frames_of_a_video_follow_one_another(processor):
    frames = [RED, BLUE, RED]
    video = encode(processor, [user({"type": "video", "video": frames}, "What happens?")])
    stacked = np.stack([np.asarray(RED), np.asarray(RED)])
    assert (
        encode(processor, [user({"type": "video", "video": stacked})])["pixel_values"].shape[0] == 2
    )
    pictures = encode(processor, [user(*map(picture, frames), "What happens?")])
    assert all(torch.equal(video[key], pictures[key]) for key in video)
    runs = video["input_ids"][0].eq(processor.image_token_id).nonzero().flatten()
    assert (runs.diff() == 1).all()
    assert len(runs) == 9


def test_conversations_come_in_batches(processor):
    batch = [[user(picture(RED), "a")], [user("b, and more")]]
    out = encode(processor, batch, processor_kwargs={"padding": True})
    assert out["input_ids"].shape[0] == 2
    assert out["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("part", ["image", "url", "path"])
def test_pictures_of_a_chat_come_in_many_forms(processor, part, tmp_path):
    path = tmp_path / "red.png"
    RED.save(path)
    for value in (str(path), path):
        out = encode(processor, [user({"type": "image", part: value}, "a")])
        assert torch.equal(
            out["pixel_values"], encode(processor, [user(picture(RED), "a")])["pixel_values"]
        )
    openai = {"type": "image_url", "image_url": {"url": str(path)}}
    assert encode(processor, [user(openai, "a")])["pixel_values"].shape[0] == 1


def test_the_processor_does_not_change_its_inputs(processor):
    messages = [user(picture(RED), "a </s>"), {"role": "assistant", "content": "b"}]
    images, prompts = [[RED]], ["USER: <|image|>"]
    before = copy.deepcopy((messages, images, prompts))
    encode(processor, messages)
    encode(processor, messages)
    processor(text=prompts, images=images)
    assert (messages, images, prompts) == before


def test_options_reach_the_image_processor(processor):
    kwargs = {
        "text": "<|image|>",
        "images": Image.effect_noise((30, 10), 90),
        "return_tensors": "pt",
    }
    padded = processor(**kwargs, image_aspect_ratio="pad")["pixel_values"]
    assert not torch.equal(padded, processor(**kwargs)["pixel_values"])
    assert torch.equal(
        padded, processor(**kwargs, images_kwargs={"image_aspect_ratio": "pad"})["pixel_values"]
    )


def test_the_limit_of_pixels_reaches_what_is_opened(processor, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    for picture_or_path in (str(path), Image.open(path)):
        with pytest.raises(ValueError, match="has 40 x 30 pixels, the limit is 1,000"):
            processor(text="<|image|>", images=picture_or_path, max_image_pixels=1000)
    strict = make()
    strict.image_processor.max_image_pixels = 1000
    assert strict(text="<|image|>", images=str(path), max_image_pixels=2000)["pixel_values"]


def test_servers_can_ask_for_the_length(processor):
    sizes = processor._get_num_multimodal_tokens(image_sizes=[(5, 9), (400, 2)])
    assert (sizes["num_image_tokens"], sizes["num_image_patches"]) == ([3, 3], [1, 1])


def test_settings_survive_three_rounds_of_saving(tmp_path, processor):
    loaded = processor
    for round_number in range(3):
        loaded.save_pretrained(tmp_path / str(round_number))
        loaded = MplugOwl2Processor.from_pretrained(tmp_path / str(round_number))
    kwargs = {"text": "USER: <|image|>a</s>b", "images": RED, "return_tensors": "pt"}
    before, after = processor(**kwargs), loaded(**kwargs)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (loaded.num_image_tokens, loaded.chat_template) == (3, processor.chat_template)


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "<|image|>", "images": [RED, BLUE]}, "has 1 .* but 2 images"),
        ({"text": "<|image|>"}, "has 1 .* but 0 images"),
        (
            {"text": ["<|image|>", "<|image|>"], "images": [[RED, BLUE], []]},
            r"Prompt 0 of the batch has 1 .* 2 images",
        ),
        ({"text": ["<|image|><|image|>"], "images": [[RED], [BLUE]]}, "for 2 prompts, but 1"),
        ({"text": []}, "Expected a prompt or a list of at least one, got none"),
        ({"text": ["<|image|>", "a"], "images": [RED, BLUE]}, "has 1 .* but 2 images"),
        ({"text": "<|image|>", "images": [np.zeros((2, 4, 4, 3))]}, "has 1 .* but 2 images"),
        ({"text": 5}, "Prompt 0 must be a string, got int"),
        ({"text": ["a", ["b"]]}, "Prompt 1 must be a string, got list"),
        ({"text": "a\ud800"}, "not valid Unicode at character 1"),
        ({}, "got neither"),
        ({"text": "a", "audio": np.zeros(3)}, "Audio is not supported"),
        ({"text": "a", "videos": [[RED]]}, "as a list of its frames"),
        ({"text": "<|image|>", "images": "nowhere.png"}, r"nowhere\.png"),
        ({"text": "<|image|>", "images": np.full((4, 4, 3), np.nan)}, "NaN"),
        (
            {"text": "<|image|>abc", "images": RED, "truncation": True, "max_length": 3},
            "truncation",
        ),
    ],
)
def test_inputs_that_do_not_match_raise_a_value_error(processor, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        processor(**call)
    assert " at 0x" not in str(caught.value)


def test_tools_and_documents_are_refused_if_the_template_lacks_them(processor):
    tools = [{"type": "function", "function": {"name": "add"}}]
    for options in ({"tools": tools}, {"documents": [{"title": "a", "text": "b"}]}):
        (name,) = options
        with pytest.raises(ValueError, match=f"The chat template does not support {name}"):
            processor.apply_chat_template([user("hello")], **options)
        assert processor.apply_chat_template([user("hello")], **{name: None}) == "<s>USER: hello "
    with pytest.raises(ValueError, match="does not support tools"):
        processor.apply_chat_template([user("hello")], None, tools)
    template = "{{ tools[0].function.name }}"
    assert (
        processor.apply_chat_template([user("hello")], chat_template=template, tools=tools) == "add"
    )


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "conversation is empty"),
        ([[]], "conversation is empty"),
        (["hi"], "got 'str'"),
        ([{"role": "user", "content": 5}], "a string or a list of parts, got int"),
        ([{"role": "user", "content": None}], "a string or a list of parts, got NoneType"),
        ([{"role": "system"}, user("hello")], "a string or a list of parts, got NoneType"),
        ([user({"type": "text"})], "of type 'text' with a string"),
        ([user({"type": "image", "image": [RED, BLUE]})], "must hold a single image, got list"),
        ([user({"type": "video", "video": []})], "at least one frame"),
        ([{"role": "narrator", "content": "a"}], "got 'narrator'"),
        ([user({"type": "audio", "audio": "a.wav"})], "got 'audio'"),
        (
            [user({"type": "video", "video": "film.mp4"})],
            "must hold a list of at least one frame, got str",
        ),
    ],
)
def test_a_conversation_that_makes_no_sense_is_refused(processor, conversation, message):
    with pytest.raises(ValueError, match=message) as caught:
        encode(processor, conversation)
    assert " at 0x" not in str(caught.value)


def test_a_tokenizer_without_placeholder_is_refused():
    processor = make()
    with pytest.raises(ValueError, match="has no token '<frame>'"):
        MplugOwl2Processor(processor.image_processor, processor.tokenizer, image_token="<frame>")


def test_a_processor_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="expected a tokenizer, got none"):
        MplugOwl2Processor(MplugOwl2ImageProcessor())
