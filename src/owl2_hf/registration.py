"""Register the package's classes with transformers' Auto classes, at the first look-up.

Registering a class needs the class, so torch and transformers' modeling code: seconds that `import
owl2_hf` should not take. Registering when transformers imports its Auto classes is no way either,
for it does so in the middle of importing what our classes are made of. So `import owl2_hf`
registers nothing, and everything happens at the first use:

1. An import hook waits for the modules that hold the tables in which ours are looked up by a name:
a model type, the
   name of a processor's class. It imports nothing, it only makes the table's user entries lazy
   (`_LazyEntries`).
2. The first look into them that could find ours imports `owl2_hf.modeling` and
`owl2_hf.processing`. 3. Each of the two, however it came to be imported, ends with `register()`,
which is transformers' public way. The
   tables of models need no hook: they are looked up by the configuration's class, which comes from
   `owl2_hf.modeling`.

The entries of a table have a private name, `_extra_content`. A release of transformers without it
is slower and just as right: our classes are imported before the first `from_pretrained` of an Auto
class (`_load_first`).
"""

import functools
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPES = ("mplug_owl2", "mplug_owl2_1", "mplug_docowl")
# Module -> its lookup table and its Auto class.
TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING", "AutoConfig"),
    "transformers.models.auto.image_processing_auto": (
        "IMAGE_PROCESSOR_MAPPING",
        "AutoImageProcessor",
    ),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING", "AutoProcessor"),
}


def register() -> None:
    """Enter our classes in the tables; they may stand there already."""
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForPreTraining,
        AutoModelForSequenceClassification,
        AutoProcessor,
    )

    # Without torchvision transformers 5.17 offers only a stand-in under the public name.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .modeling import (
        MplugDocOwlConfig,
        MplugOwl2Config,
        MplugOwl2ForConditionalGeneration,
        MplugOwl2ForSequenceClassification,
        MplugOwl2Model,
        MplugOwl21Config,
    )
    from .processing import MplugOwl2ImageProcessor, MplugOwl2Processor

    # The last two are the originals' names; what they read is an MplugOwl2Config, which finds the
    # classes below.
    for model_type, config in zip(
        MODEL_TYPES, (MplugOwl2Config, MplugOwl21Config, MplugDocOwlConfig), strict=True
    ):
        AutoConfig.register(model_type, config, exist_ok=True)
    AutoModel.register(MplugOwl2Config, MplugOwl2Model, exist_ok=True)
    auto_classes: tuple[Any, ...] = (
        AutoModelForPreTraining,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )
    if hasattr(transformers, "AutoModelForDecision"):  # since 5.23
        auto_classes += (transformers.AutoModelForDecision,)
    for auto_class in auto_classes:
        auto_class.register(MplugOwl2Config, MplugOwl2ForConditionalGeneration, exist_ok=True)
    AutoModelForSequenceClassification.register(
        MplugOwl2Config, MplugOwl2ForSequenceClassification, exist_ok=True
    )
    AutoImageProcessor.register(
        MplugOwl2Config, image_processor_classes={"pil": MplugOwl2ImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(MplugOwl2Config, MplugOwl2Processor, exist_ok=True)


def register_in_vllm() -> None:
    """Name our class to vLLM, which calls this in each of its processes; the class is imported when
    it is needed.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model(
        "MplugOwl2ForConditionalGeneration", "owl2_hf.integrations.vllm:MplugOwl2ForVllm"
    )


def register_when_looked_up() -> None:
    """Make our entries lazy in the tables that are there, and in the others as soon as they are."""
    if not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())
    for name in TABLES.keys() & sys.modules.keys():
        # import_module waits if another thread is still importing it.
        if not _make_lazy(import_module(name)):
            register()


def _make_lazy(module: ModuleType) -> bool:
    """Whether the module's table is as we know it: what users register lies in a dict of its
    own.
    """
    table = getattr(module, TABLES[module.__name__][0], None)
    entries = getattr(table, "_extra_content", None)
    if isinstance(entries, dict) and not isinstance(entries, _LazyEntries):
        table._extra_content = _LazyEntries(entries)  # type: ignore[union-attr]
    return isinstance(entries, dict)


def _load_first(module: ModuleType) -> None:
    """Import our classes before the first `from_pretrained` of the module's Auto class.

    Right now is too early: transformers may be in the middle of importing what our classes are made
    of.
    """
    auto_class = getattr(module, TABLES[module.__name__][1])
    original = auto_class.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _load()
        return original(cls, *args, **kwargs)

    auto_class.from_pretrained = classmethod(from_pretrained)


def _load() -> None:
    """Import our classes, which registers them; another thread that does so is waited for."""
    import_module("owl2_hf.modeling")
    import_module("owl2_hf.processing")


class _LazyEntries(dict[Any, Any]):
    """Entries that users of transformers registered in a table; ours come with the first look that
    could find them.
    """

    def __contains__(self, key: object) -> bool:
        return key in MODEL_TYPES or super().__contains__(key)

    def __missing__(self, key: object) -> Any:
        if key in MODEL_TYPES:
            _load()
        if super().__contains__(key):
            return self[key]
        raise KeyError(key)

    def __iter__(self) -> Iterator[Any]:
        _load()
        return super().__iter__()

    def keys(self) -> Any:
        _load()
        return super().keys()

    def values(self) -> Any:
        _load()
        return super().values()

    def items(self) -> Any:
        _load()
        return super().items()


class _TableFinder(MetaPathFinder):
    """Finds the modules of `TABLES` as the other finders do, and has their tables made lazy."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in TABLES:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _TableFinder))
        spec = next(
            (spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None
        )
        if spec is not None and spec.loader is not None:
            spec.loader = _TableLoader(spec.loader)
        return spec


class _TableLoader(Loader):
    """Loads a module as `loader` does, then makes its table lazy."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # Restore the original loader.
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if not _make_lazy(module):
            _load_first(module)
