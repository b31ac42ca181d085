"""After `import owl2_hf` alone the Auto classes know the family, and nothing heavy was imported for
it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers.models.auto import configuration_auto
from transformers.utils import is_torchvision_available

import owl2_hf
from owl2_hf import registration
from owl2_hf.default import default_dir

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = f"""
folders = {str(default_dir())!r}, {str(GOLDEN / "A" / "hf")!r}
names = "AutoConfig AutoModelForImageTextToText AutoImageProcessor AutoProcessor AutoTokenizer AutoModel".split()
def kinds(auto_class):
    return [type(auto_class.from_pretrained(folder)).__name__ for folder in folders]
"""
MODEL = ["MplugOwl2ForConditionalGeneration"] * 2
PROCESSOR = ["MplugOwl2Processor"] * 2
# What a program does -> the program, and the value of `result` at its end.
PROGRAMS: dict[str, tuple[str, object]] = {
    "AutoConfig": ("""
import owl2_hf
from transformers import AutoConfig
result = kinds(AutoConfig)
""", ["MplugOwl2Config"] * 2),
    "AutoModel, imported before": ("""
from transformers import AutoModel
import owl2_hf
result = kinds(AutoModel)
""", ["MplugOwl2Model"] * 2),
    "AutoModelForCausalLM, after the layers that import Auto classes": ("""
import owl2_hf, transformers.modeling_layers
from transformers import AutoModelForCausalLM
result = kinds(AutoModelForCausalLM)
""", MODEL),
    "AutoModelForImageTextToText, modeling_utils imported before": ("""
import transformers.modeling_utils, owl2_hf
from transformers import AutoModelForImageTextToText
result = kinds(AutoModelForImageTextToText)
""", MODEL),
    "AutoModelForSequenceClassification": ("""
import owl2_hf
from transformers import AutoModelForSequenceClassification
result = kinds(AutoModelForSequenceClassification)
""", ["MplugOwl2ForSequenceClassification"] * 2),
    "AutoModelForMultimodalLM, modeling_utils imported after": ("""
import owl2_hf, transformers.modeling_utils
from transformers import AutoModelForMultimodalLM
result = kinds(AutoModelForMultimodalLM)
""", MODEL),
    "AutoImageProcessor": ("""
import owl2_hf
from transformers import AutoImageProcessor
result = kinds(AutoImageProcessor)
""", ["MplugOwl2ImageProcessor", "CLIPImageProcessor" if is_torchvision_available() else "CLIPImageProcessorPil"]),
    "AutoProcessor": ("""
import owl2_hf
from transformers import AutoProcessor
result = kinds(AutoProcessor)
""", PROCESSOR),
    "AutoProcessor, our processing imported before": ("""
import owl2_hf.processing
from transformers import AutoProcessor
result = kinds(AutoProcessor)
""", PROCESSOR),
    "AutoTokenizer": ("""
import owl2_hf
from transformers import AutoTokenizer
result = kinds(AutoTokenizer)
""", ["TokenizersBackend", "LlamaTokenizer"]),
    "pipeline": ("""
import owl2_hf
from transformers import pipeline
result = type(pipeline("image-text-to-text", model=folders[0]).processor).__name__
""", PROCESSOR[0]),
    "pipeline, imported before": ("""
from transformers import pipeline
import owl2_hf
result = type(pipeline("image-text-to-text", model=folders[0]).model).__name__
""", MODEL[0]),
    "a configuration of ours finds its classes, pickled or not": ("""
from owl2_hf import MplugOwl2Config
import pickle, torch
from transformers import PROCESSOR_MAPPING, AutoModelForCausalLM
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
assert pickle.loads(pickle.dumps(MplugOwl2Config)) is MplugOwl2Config
config = pickle.loads(pickle.dumps(MplugOwl2Config.from_pretrained(folders[0])))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
pil = IMAGE_PROCESSOR_MAPPING[type(config)]["pil"]
result = [type(model).__name__, PROCESSOR_MAPPING[type(config)].__name__, pil.__name__]
""", [MODEL[0], PROCESSOR[0], "MplugOwl2ImageProcessor"]),
    "our modeling imported before": ("""
import owl2_hf.modeling, torch
from transformers import AutoModel
with torch.device("meta"):
    model = AutoModel.from_config(owl2_hf.modeling.MplugOwl2Config.from_pretrained(folders[0]))
result = type(model).__name__
""", "MplugOwl2Model"),
    "threads are the first to use Auto classes": ("""
import owl2_hf, threading, transformers
found, start = {}, threading.Barrier(len(names))
def load(name):
    start.wait()
    try:
        found[name] = kinds(getattr(transformers, name))[0]
    except ImportError as error:
        found[name] = str(error)
threads = [threading.Thread(target=load, args=[name]) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
result = [found[name] for name in names]
""", ["MplugOwl2Config", MODEL[0], "MplugOwl2ImageProcessor", PROCESSOR[0], "TokenizersBackend", "MplugOwl2Model"]),
    "everything of the package": ("""
import owl2_hf
exec("from owl2_hf import *")
result = [[name for name in owl2_hf.__all__ if name not in globals()]]
result += [owl2_hf.modeling.__name__, owl2_hf.processing.__name__]
""", [[], "owl2_hf.modeling", "owl2_hf.processing"]),
    "the members' model types are known before our classes are imported": ("""
import owl2_hf, sys
from transformers import CONFIG_MAPPING, AutoConfig
types = ["mplug_docowl", "mplug_owl2_1", "mplug_owl2"]
result = [[name in CONFIG_MAPPING for name in [*types, "mplug_owl3"]], "owl2_hf.modeling" in sys.modules]
result += [AutoConfig.for_model("llama").model_type, "owl2_hf.modeling" in sys.modules]
result += [CONFIG_MAPPING[name].__name__ for name in types]
result += [AutoConfig.for_model("mplug_owl2").num_image_tokens, "mplug_docowl" in CONFIG_MAPPING.keys()]
""", [[True, True, True, False], False, "llama", False,
      "MplugDocOwlConfig", "MplugOwl21Config", "MplugOwl2Config", 65, True]),
}  # fmt: skip
# Importing what transformers imports takes most of a program's time, so one process does it and
# branches into them.
BRANCHING = """
import contextlib, importlib, json, os, sys, traceback
for name in ("torch._dynamo", "torch.distributed.tensor", "accelerate", "scipy.optimize", "transformers"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert "transformers.models.auto" not in sys.modules and "owl2_hf" not in sys.modules
for program in json.load(sys.stdin):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        scope = {}
        exec(program, scope)
        print(json.dumps(scope["result"]), flush=True)
    except BaseException:
        print(json.dumps(traceback.format_exc()), flush=True)
    os._exit(0)
"""


def run(code: str, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    """A program of its own, in which a warning about imports is an error."""
    command = [
        sys.executable,
        "-W",
        "error::ImportWarning",
        "-W",
        "error::RuntimeWarning",
        "-c",
        code,
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, input=stdin)


@pytest.fixture(scope="module")
def results() -> dict[str, object]:
    """Name -> result of the programs."""
    ran = run(BRANCHING, stdin=json.dumps([FOLDERS + program for program, _ in PROGRAMS.values()]))
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    return dict(zip(PROGRAMS, lines, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="branches a process")
@pytest.mark.parametrize("name", PROGRAMS)
def test_auto_classes_know_the_family(name, results):
    if "AutoImageProcessor requires the Torchvision library" in str(results[name]):
        pytest.skip("transformers 5.17 hides its AutoImageProcessor where torchvision is missing")
    assert results[name] == PROGRAMS[name][1]


def test_transformers_itself_may_be_imported_later():
    ran = run(
        "import owl2_hf\nfrom transformers import CONFIG_MAPPING\nprint(CONFIG_MAPPING['mplug_owl2'].__name__)"
    )
    assert ran.stdout.strip() == "MplugOwl2Config", ran.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = """
import owl2_hf, sys
heavy = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
print(heavy & sys.modules.keys(), set(owl2_hf.__all__) - set(dir(owl2_hf)))
"""
    assert run(code).stdout.strip() == "set() set()"


def test_unknown_names_of_the_package_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'owl2_hf' has no attribute 'MplugOwl3Model'"):
        owl2_hf.MplugOwl3Model  # noqa: B018
    with pytest.raises(ImportError, match="MplugOwl3Processor"):
        from owl2_hf import MplugOwl3Processor  # noqa: F401


def test_every_public_name_is_what_its_package_has():
    assert callable(owl2_hf.check)
    bundled = {"default_pictures", "default_scorer_images", "load_default", "load_default_scorer"}
    for name in set(owl2_hf.__all__) - {"check", *bundled}:
        package = import_module(
            "owl2_hf.processing" if hasattr(owl2_hf.processing, name) else "owl2_hf.modeling"
        )
        assert getattr(owl2_hf, name) is getattr(package, name)
    assert set(owl2_hf.modeling.__all__) | set(owl2_hf.processing.__all__) < set(owl2_hf.__all__)


def test_registering_again_changes_nothing():
    before = dict(configuration_auto.CONFIG_MAPPING._extra_content.items())
    registration.register()
    registration.register_when_looked_up()
    assert dict(configuration_auto.CONFIG_MAPPING._extra_content.items()) == before
    assert sum(isinstance(finder, registration._TableFinder) for finder in sys.meta_path) == 1


def test_hooked_modules_keep_their_loaders():
    for name in registration.TABLES:
        module = import_module(name)
        assert type(module.__loader__) is type(
            import_module("transformers.modeling_utils").__loader__
        )
        assert module.__spec__.loader is module.__loader__


def test_earlier_registrations_are_kept():
    entries = registration._LazyEntries({"theirs": int})
    assert entries["theirs"] is int and "theirs" in entries and "mplug_owl2" in entries
    with pytest.raises(KeyError, match="nobodys"):
        entries["nobodys"]


def test_a_table_of_an_unknown_kind_is_registered_in_at_once(monkeypatch):
    name = next(iter(registration.TABLES))
    unknown = ModuleType(name)
    unknown.CONFIG_MAPPING = SimpleNamespace(_extra_content=[])
    monkeypatch.setitem(sys.modules, name, unknown)
    calls = []
    monkeypatch.setattr(registration, "register", lambda: calls.append(name))
    registration.register_when_looked_up()
    assert calls == [name]


# Imports transformers with another name for what users register, as a next release may have it.
RENAMING = """
import importlib.machinery
class Renaming(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path).replace(b"_extra_content", b"_registered"), path)
importlib.machinery.SourceFileLoader.get_code = lambda self, name, get=importlib.machinery.SourceFileLoader.get_code: (
    (Renaming.get_code if name.startswith(("transformers.models.auto", "transformers.processing")) else get)(self, name)
)
"""


@pytest.mark.parametrize(
    "first", ["owl2_hf", "transformers", "transformers.models.auto.processing_auto"]
)
def test_auto_classes_know_the_family_where_the_private_name_is_gone(first):
    ran = run(
        f"""{RENAMING}
import {first}
import owl2_hf
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert not hasattr(CONFIG_MAPPING, "_extra_content")
{FOLDERS}
print(kinds(AutoModelForImageTextToText), kinds(AutoProcessor), kinds(AutoConfig))
"""
    )
    assert ran.stdout.strip() == f"{MODEL} {PROCESSOR} {['MplugOwl2Config'] * 2}", ran.stderr


@pytest.mark.parametrize(
    "command", [["--help"], ["describe", "--help"], ["data", "check", "--help"]]
)
def test_help_imports_nothing_heavy(command):
    code = """
import atexit, json, sys
heavy = ["torch", "transformers", "huggingface_hub", "numpy", "PIL"]
atexit.register(lambda: print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr))
import runpy
runpy.run_module("owl2_hf", run_name="__main__")
"""
    shown = run(code, *command)
    assert "Usage" in shown.stdout and json.loads(shown.stderr) == []


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_an_interrupt_while_torch_is_imported_ends_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text(
        "print('importing', flush=True)\nimport time\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "owl2_hf", "info"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "owl2-hf: interrupted\n")
