"""The vLLM plugin: its entry point anywhere, and the model itself where vLLM is installed."""

import importlib.util
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

import owl2_hf
from owl2_hf.default import default_dir
from owl2_hf.modeling.modeling_mplug_owl2 import RESERVED_LOGIT

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; docs/scale-out.md says how it was run",
)
PICTURES = [
    Image.open(path).convert("RGB") for path in list(owl2_hf.default_pictures().values())[:4]
]
QUESTIONS = [
    *(("USER: <|image|>What is this? ASSISTANT:", [picture]) for picture in PICTURES),
    ("USER: <|image|>and <|image|>What is the difference? ASSISTANT:", PICTURES[:2]),
    ("USER: What is this? ASSISTANT:", []),
]
CHAT = [{"type": "image_pil", "image_pil": PICTURES[0]}, {"type": "text", "text": "What is this?"}]


def test_the_entry_point_names_the_model_class(monkeypatch):
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    [entry] = re.findall(r'entry-points\."vllm\.general_plugins"\]\nowl2_hf = "(.*)"', pyproject)
    named = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=named.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    module, _, function = entry.partition(":")
    getattr(import_module(module), function)()
    assert named == {
        "MplugOwl2ForConditionalGeneration": "owl2_hf.integrations.vllm:MplugOwl2ForVllm"
    }
    assert owl2_hf.MplugOwl2Config.from_pretrained(default_dir()).architectures == [*named]


def test_importing_the_package_does_not_import_vllm():
    assert "vllm" not in Path(owl2_hf.__file__).read_text()
    assert "owl2_hf.integrations.vllm" not in sys.modules or importlib.util.find_spec("vllm")


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int], list[float]]]:
    """Of each question the prompt's ids, the greedy answer's, and their log-probabilities, by
    transformers.
    """
    model, processor = owl2_hf.load_default(dtype="float32")
    answers = []
    for text, pictures in QUESTIONS:
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        settings = {
            "max_new_tokens": 8,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        output = model.generate(**inputs, **settings)
        prompt = inputs["input_ids"][0].tolist()
        ids = output.sequences[0, len(prompt) :].tolist()
        scores = [
            logits.log_softmax(-1)[0, chosen].item()
            for logits, chosen in zip(output.logits, ids, strict=True)
        ]
        answers.append((prompt, ids, scores))
    return answers


@pytest.fixture(scope="module")
def engine(expected):
    """vLLM in this process, with prompts cut into chunks of 16 tokens; transformers' model does not
    run after it.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    limits = {
        "max_model_len": 256,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 16,
        "limit_mm_per_prompt": {"image": 2},
    }
    return LLM(
        str(default_dir()),
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        **limits,
    )


def greedy():
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=8, logprobs=1)


def model_of(engine):
    return engine.llm_engine.model_executor.driver_worker.model_runner.model


@needs_vllm
def test_vllm_answers_as_transformers(engine, expected):
    prompts = [{"prompt": text, "multi_modal_data": {"image": own}} for text, own in QUESTIONS[:-1]]
    prompts.append({"prompt": QUESTIONS[-1][0]})
    for output, (prompt, ids, scores) in zip(
        engine.generate(prompts, greedy()), expected, strict=True
    ):
        answer = output.outputs[0]
        assert (list(output.prompt_token_ids), list(answer.token_ids)) == (prompt, ids)
        got = [step[chosen].logprob for step, chosen in zip(answer.logprobs, ids, strict=True)]
        assert got == pytest.approx(scores, abs=1e-4)


@needs_vllm
def test_a_chat_begins_as_transformers_begins_it(engine, expected):
    [output] = engine.chat([{"role": "user", "content": CHAT}], greedy())
    assert (list(output.prompt_token_ids), list(output.outputs[0].token_ids)) == expected[0][:2]


@needs_vllm
@torch.no_grad()
def test_reserved_ids_are_never_predicted(engine):
    model = model_of(engine)
    logits = model.compute_logits(torch.randn(3, model.config.text_config.hidden_size))
    ids = torch.arange(logits.shape[-1])
    reserved = ids.eq(model.config.image_token_id) | ids.ge(
        model.config.output_vocab_size or len(ids)
    )
    assert (
        logits[:, reserved].eq(RESERVED_LOGIT).all()
        and logits[:, ~reserved].gt(RESERVED_LOGIT).all()
    )


@needs_vllm
def test_embeddings_without_token_ids_are_refused(engine):
    assert model_of(engine).requires_raw_input_tokens
    with pytest.raises(ValueError, match="without token ids"):
        model_of(engine).forward(None, torch.arange(3), inputs_embeds=torch.zeros(3, 160))


def settings(
    stages: int = 1, length: int = 4096, ntk: int | None = None, **config
) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        model_config=SimpleNamespace(
            max_model_len=length,
            hf_config=owl2_hf.MplugOwl2Config(
                text_config={"rope_dynamic_ntk_length": ntk}, **config
            ),
        ),
    )


@needs_vllm
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": 2}, r"pipeline_parallel_size must be 1, got 2.*Use tensor_parallel_size"),
        ({"ntk": 2048}, r"at most 2048, got 4096.*--max-model-len 2048"),
        ({"connector_type": "h_reducer"}, r"connector_type 'h_reducer'.*Use owl2-hf serve"),
    ],
)
def test_settings_that_would_change_the_text_are_refused(given, message):
    from owl2_hf.integrations.vllm import MplugOwl2ForVllm, _check_settings

    with pytest.raises(ValueError, match=message):
        MplugOwl2ForVllm(vllm_config=settings(**given))
    _check_settings(settings(ntk=2048, length=2048))


@needs_vllm
def test_vllm_tries_itself_out_with_a_picture_that_is_accepted(monkeypatch):
    from owl2_hf.integrations.vllm import MplugOwl2ProcessingInfo

    processor = owl2_hf.MplugOwl2Processor.from_pretrained(default_dir())
    info = MplugOwl2ProcessingInfo(SimpleNamespace())
    monkeypatch.setattr(info, "get_hf_processor", lambda: processor)
    size = info.get_image_size_with_most_features()
    assert {"height": size.height, "width": size.width} == dict(processor.image_processor.size)
