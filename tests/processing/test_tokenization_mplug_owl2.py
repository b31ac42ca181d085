"""Token ids and decoded text of the original's tokenizers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from owl2_hf.processing import MplugOwl2ImageProcessor, MplugOwl2Processor
from owl2_hf.processing.tokenization_mplug_owl2 import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "T"
IDS = json.loads((GOLDEN / "ids.json").read_text())
MARKER = -200
# Raw strings that start with the marker (the original puts `<s>` behind it) and the empty one (it
# gives nothing).
OTHER_THAN_THE_ORIGINALS = {"raw_image_first", "raw_image_only", "raw_empty"}


@pytest.fixture(scope="session")
def llama_tokenizer_file():
    path = Path(__file__).parents[3] / "shared" / "assets" / "llama_tokenizer" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("LLaMA-2's tokenizer is not ours to ship and not here")
    return path


def make_processor(source, legacy):
    tokenizer, _ = load_tokenizer(source)
    image_processor = MplugOwl2ImageProcessor(size={"height": 14, "width": 14})
    return MplugOwl2Processor(image_processor, tokenizer, num_image_tokens=3, legacy=legacy)


def original_form(processor, prompt):
    """Ids with every image's run of placeholders put back into one marker."""
    from PIL import Image

    pictures = [Image.new("RGB", (3, 3))] * prompt.count("<|image|>")
    ids = processor(text=prompt, images=pictures)["input_ids"][0]
    assert ids.count(processor.image_token_id) == 3 * len(pictures)
    collapsed = []
    while ids:
        is_picture = ids[0] == processor.image_token_id
        collapsed.append(MARKER if is_picture else ids[0])
        ids = ids[3:] if is_picture else ids[1:]
    return collapsed


def check_ids(processor, name, legacy):
    expected = dict(IDS["ids"][f"{name}_legacy_{str(legacy).lower()}"])
    if not legacy:
        expected.update(IDS["ids_since_4.36"][name])
    for prompt_name, prompt in IDS["prompts"].items():
        if prompt_name not in OTHER_THAN_THE_ORIGINALS:
            assert original_form(processor, prompt) == expected[prompt_name], prompt_name


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_the_originals(legacy):
    check_ids(make_processor(GOLDEN / "tiny.model", legacy), "tiny", legacy)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_ids_are_the_originals_with_llamas_tokenizer(llama_tokenizer_file, file, legacy):
    check_ids(make_processor(llama_tokenizer_file.with_name(file), legacy), "llama2", legacy)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_survive_three_rounds_of_saving(tmp_path, legacy):
    processor = make_processor(GOLDEN / "tiny.model", legacy)
    for round_number in range(3):
        folder = tmp_path / str(round_number)
        processor.save_pretrained(folder)
        processor = MplugOwl2Processor.from_pretrained(folder)
        assert processor.legacy is legacy
    check_ids(processor, "tiny", legacy)
    assert (
        AutoTokenizer.from_pretrained(folder)("USER: hi").input_ids
        == processor.tokenizer("USER: hi").input_ids
    )
    # A generic class obeys tokenizer.json; LLaMA's own would rebuild the tokenizer from its pieces.
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")


def test_prompts_that_start_with_a_picture_get_the_begin_token_first():
    processor = make_processor(GOLDEN / "tiny.model", True)
    assert original_form(processor, "<|image|>Describe.")[:2] == [1, MARKER]


def test_ascii_bytes_survive_broken_utf8_beside_them():
    tokenizer, _ = load_tokenizer(GOLDEN / "tiny.model")
    ids = tokenizer.convert_tokens_to_ids(["<0x5C>", "<0x4F>", "<0x83>", "T", "<0xC3>", "<0xA9>"])
    assert tokenizer.decode(ids) == "\\O\ufffdTé"


def test_the_control_tokens_and_settings():
    tokenizer, legacy = load_tokenizer(GOLDEN / "tiny.model")
    assert legacy
    assert (
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ) == (
        0,
        1,
        2,
        0,
    )
    assert tokenizer.convert_tokens_to_ids("<|image|>") == 1000
    assert tokenizer.padding_side == "left"


def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = ["the quick brown fox jumps over the lazy dog"] * 50
    for kind, extra in (
        ("unigram", {}),
        ("bpe", {"add_dummy_prefix": False, "byte_fallback": True}),
    ):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), model_type=kind,
            vocab_size=40 if kind == "unigram" else 300,
            hard_vocab_limit=False, minloglevel=2, **extra,
        )  # fmt: skip
        with pytest.raises(
            ValueError, match="is not a LLaMA tokenizer: for a test text it gives the ids"
        ):
            load_tokenizer(tmp_path)


def test_the_legacy_flag_and_length_are_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tiny.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false, "model_max_length": 77}')
    tokenizer, legacy = load_tokenizer(tmp_path)
    assert not legacy
    assert tokenizer.model_max_length == 77


def bpe(vocab, merges=(), **others):
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": list(merges)}
    return json.dumps({"model": model, **others}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"no model", "not a sentencepiece model"),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"[]", "expected an object, got list"),
        (
            "tokenizer.json",
            b'{"model": {"type": "WordPiece"}}',
            "expected a byte-pair encoding, got 'WordPiece'",
        ),
        ("tokenizer.json", b'{"model": []}', "expected a byte-pair encoding, got None"),
        (
            "tokenizer.json",
            b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
            "expected byte_fallback",
        ),
        ("tokenizer.json", bpe({"a": 0}), "not a LLaMA tokenizer: expected <unk>"),
        ("tokenizer.json", bpe({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 9}), "some are missing"),
        (
            "tokenizer.json",
            bpe({"<unk>": 0, "<s>": 1, "</s>": 2}, ["a b c"]),
            "merges must be pairs",
        ),
        (
            "tokenizer.json",
            bpe({"<unk>": 0, "<s>": 1, "</s>": 2}, ["a b"]),
            "valid byte-pair encoding",
        ),
        (
            "tokenizer.json",
            bpe({"<unk>": 0}, added_tokens=[{"content": "<pad>"}]),
            r"does not have: \['<pad>'\]",
        ),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)


def test_a_legacy_flag_that_is_none_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tiny.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": "false"}')
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: legacy must be true or false, got 'false'"
    ):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
