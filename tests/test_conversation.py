"""Turns of a conversation: what the model reads, what stays after an error, what a file brings
back.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import owl2_hf
from owl2_hf.conversation import Conversation, OpenedImage, Reply

IMAGES = {name: str(path) for name, path in owl2_hf.default_pictures().items()}
BANANA, TIGER = IMAGES["emoji-banana"], IMAGES["emoji-tiger-face"]


@pytest.fixture
def loaded():
    return owl2_hf.load_default(dtype=torch.float32)


@pytest.fixture
def encoded(loaded):
    """How many images, or crops, each call of the vision encoder took."""
    calls: list[int] = []
    loaded[0].model.vision_tower.register_forward_pre_hook(
        lambda module, args: calls.append(len(args[0]))
    )
    return calls


@pytest.fixture
def endless(loaded):
    """A model that never ends an answer."""
    model, processor = loaded
    model.generation_config.suppress_tokens = [model.generation_config.eos_token_id]
    return model, processor


def ask(conversation, question, *sources, should_stop=lambda: False):
    for source in sources:
        conversation.add_image(source)
    pieces: list[str] = []
    reply = conversation.ask(question, pieces.append, should_stop)
    assert "".join(pieces).strip() == reply.text
    return reply


def answer_to_the_whole_chat(loaded, messages):
    """The answer of a model that reads all messages and encodes all images."""
    model, processor = loaded
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("aspect_ratio", ["resize", "pad", "anchors"])
def test_every_image_is_encoded_once_and_answers_are_those_of_the_whole_chat(
    loaded, encoded, tmp_path, aspect_ratio
):
    loaded[1].image_processor.image_aspect_ratio = aspect_ratio
    Image.open(TIGER).convert("RGB").resize((128, 64)).save(tmp_path / "wide.png")
    wide = str(tmp_path / "wide.png")
    conversation = Conversation(*loaded, system="Answer in a word.")
    turns = [
        ("What is this?", [BANANA]),
        ("What kind of thing is it?", []),
        ("And this?", [wide, TIGER]),
        ("What is it?", []),
    ]
    said = [ask(conversation, question, *sources).text for question, sources in turns]
    crops = [loaded[1].image_processor.num_crops(*size) for size in ((64, 64), (64, 128))]
    assert encoded == [crops[0], crops[1] + crops[0]]
    for turn, answer in enumerate(said):
        messages = conversation.messages[: 2 + 2 * turn]
        assert answer == answer_to_the_whole_chat(loaded, messages)


def test_an_answer_ends_with_max_new_tokens(endless):
    conversation = Conversation(*endless, max_new_tokens=5)
    assert ask(conversation, "What is this?", BANANA).ending == "length"
    model, processor = owl2_hf.load_default()
    assert ask(Conversation(model, processor), "What is this?", BANANA) == Reply(
        "banana", "complete"
    )


def test_an_answer_ends_with_the_context_and_the_next_message_is_refused(endless):
    endless[0].config.text_config.max_position_embeddings = 40
    conversation = Conversation(*endless, max_new_tokens=100)
    assert ask(conversation, "What is this?", BANANA).ending == "context"
    before = list(conversation.messages)
    with pytest.raises(
        ValueError, match=r"expected at most 40 tokens, the context of the model, got \d+\. /clear"
    ):
        ask(conversation, "And this?", TIGER)
    assert conversation.messages == before and conversation.waiting == []
    conversation.clear()
    assert ask(conversation, "Is a tiger an animal?").text


def test_a_stopped_answer_stays_as_far_as_it_came(endless):
    conversation = Conversation(*endless)
    steps = iter(range(100))
    reply = ask(conversation, "What is this?", BANANA, should_stop=lambda: next(steps) >= 6)
    assert reply.ending == "stopped" and reply.text
    assert conversation.messages[-1]["content"] == [{"type": "text", "text": reply.text}]
    assert answer_to_the_whole_chat(endless, conversation.messages[:1]).startswith(reply.text)


def test_an_interrupted_message_is_left_out_and_its_images_wait_again(loaded):
    conversation = Conversation(*loaded)
    conversation.add_image(BANANA)

    def show(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("What is this?", show)
    assert conversation.messages == []
    assert [image.source for image in conversation.waiting] == [BANANA]
    assert ask(conversation, "What is this?").text == "banana"


def test_a_broken_image_changes_nothing(loaded, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(BANANA).read_bytes()[:300])
    conversation = Conversation(*loaded)
    ask(conversation, "What is this?", BANANA)
    before = list(conversation.messages)
    for source in (str(broken), "no-such-file.png"):
        with pytest.raises(ValueError, match=Path(source).name):
            conversation.add_image(source)
    assert conversation.waiting == [] and conversation.messages == before


def test_a_deleted_image_file_stays_in_the_conversation(loaded, tmp_path):
    gone = tmp_path / "image.png"
    gone.write_bytes(Path(BANANA).read_bytes())
    conversation = Conversation(*loaded)
    conversation.add_image(str(gone))
    gone.unlink()
    assert ask(conversation, "What is this?").text == "banana"
    assert ask(conversation, "What kind of thing is it?").text == "food and drink"


def test_the_tilde_is_the_home_folder(loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "image.png").write_bytes(Path(BANANA).read_bytes())
    opened = OpenedImage.open("~/image.png", loaded[1])
    assert opened.source == str(tmp_path / "image.png") and opened.image.size == (64, 64)


def test_the_system_prompt_is_read_and_stays_after_clear(loaded):
    conversation = Conversation(*loaded, system="Answer in a word.")
    prompt = loaded[1].apply_chat_template(conversation.messages, tokenize=False)
    assert "Answer in a word. " in prompt
    ask(conversation, "Is a tiger an animal?")
    conversation.clear()
    assert [message["role"] for message in conversation.messages] == ["system"]


def test_a_temperature_samples(endless):
    torch.manual_seed(0)
    answers = {
        ask(Conversation(*endless, max_new_tokens=12, temperature=5.0), "What is this?").text
        for _ in range(3)
    }
    assert len(answers) == 3
    nearly_greedy = Conversation(*endless, max_new_tokens=12, temperature=5.0, top_p=1e-6)
    greedy = Conversation(*endless, max_new_tokens=12)
    assert ask(nearly_greedy, "What is this?").text == ask(greedy, "What is this?").text
    with pytest.raises(ValueError, match=r"top_p=0\.5 has no effect at temperature 0"):
        Conversation(*endless, top_p=0.5)


def test_another_family_s_model_is_refused(loaded):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="got a LlamaForCausalLM"):
        Conversation(LlamaForCausalLM(config), loaded[1])


# Files


def test_a_saved_conversation_goes_on_where_it_was(loaded, tmp_path):
    conversation, loaded_again = Conversation(*loaded), Conversation(*loaded)
    ask(conversation, "What is this?", BANANA)
    file = conversation.save(tmp_path / "chat.json")
    messages = json.loads(file.read_text())
    assert messages == conversation.messages
    asked = {"role": "user", "content": "What kind of thing is it?"}
    in_python = answer_to_the_whole_chat(loaded, [*messages, asked])
    loaded_again.load(file)
    assert ask(loaded_again, "What kind of thing is it?").text == in_python == "food and drink"


def test_saving_replaces_no_other_file(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversation = Conversation(*loaded)
    with pytest.raises(ValueError, match="there is nothing to save yet"):
        conversation.save()
    ask(conversation, "Is a tiger an animal?")
    Path("other.json").write_text("mine")
    with pytest.raises(ValueError, match=r"other\.json already exists: choose another name"):
        conversation.save(Path("other.json"))
    first = conversation.save()
    ask(conversation, "Is a car an animal?")
    assert conversation.save() == conversation.save(Path(first.name)) == first
    assert len(json.loads(first.read_text())) == 4
    conversation.clear()
    ask(conversation, "Is a car an animal?")
    with pytest.raises(ValueError, match="already exists: choose another name"):
        conversation.save(first)
    with pytest.raises(OSError, match="no-folder"):
        conversation.save(Path("no-folder/chat.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"other.json", first.name}
    assert Path("other.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "expected a list of messages"),
        ("[]", "expected a list of messages"),
        ('["hello"]', "message 1: expected role"),
        ('[{"role": "user", "content": "a"}, {"role": "tool"}]', "message 2: expected role"),
        ('[{"role": "user", "content": 1}]', "message 1: expected text, or parts"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "message 1: expected text, or parts"),
        (
            '[{"role": "user", "content": [{"type": "image", "image": "no-such.png"}]}]',
            r"no-such\.png",
        ),
    ],
)
def test_a_file_without_a_conversation_is_refused_and_changes_nothing(
    loaded, tmp_path, text, message
):
    file = tmp_path / "chat.json"
    file.write_text(text)
    conversation = Conversation(*loaded)
    ask(conversation, "Is a tiger an animal?")
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=message):
        conversation.load(file)
    assert conversation.messages == before and conversation.file is None
