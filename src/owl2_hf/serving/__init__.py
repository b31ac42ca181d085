"""transformers' OpenAI-compatible server for one model of the family; needs the extra `serve`.

gate.py stands in front of transformers' application (who may ask, where, and how much), requests.py
says what a request may hold, pictures.py opens its images, scores.py scores images, and server.py
puts everything together.
"""

from importlib.util import find_spec

from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    raise ValueError("the server needs fastapi, uvicorn and openai: pip install 'owl2_hf[serve]'.")
if find_spec("python_multipart") is None:
    raise ValueError("the server needs python-multipart: pip install 'owl2_hf[serve]'.")

from ..limits import bind
from .server import ServerSettings, build_app, serve

__all__ = ["ServerSettings", "bind", "build_app", "serve"]
