"""A web page to chat about images, score them, and see attention. Needs the extra `demo`.

chat.py turns a chat of the page into messages, worker.py has the model answer, score and analyse,
page.py lays out the page and shows it.
"""

from importlib.util import find_spec

if find_spec("gradio") is None:
    raise ValueError("the web page needs gradio: pip install 'owl2_hf[demo]'.")

from .page import LAUNCH_OPTIONS, build_page, show
from .worker import DemoSettings, ModelWorker

__all__ = ["LAUNCH_OPTIONS", "DemoSettings", "ModelWorker", "build_page", "show"]
