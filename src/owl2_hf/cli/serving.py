"""Serve a model to programs and to browsers."""

from typing import Annotated

import typer

from ..naming import DEFAULT_MODEL, naming_model
from .app import app, report_mistakes, say
from .loading import load, place
from .options import Debug, Device, Host, MaxNewTokens, ModelArgument


@app.command()
@report_mistakes
def serve(
    model: ModelArgument = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. Use 0 for any free port.")
    ] = 8000,
    max_image_pixels: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most pixels in all images of a request together. Default: 89,478,485."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest request body, in bytes. Default: 32 MiB.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Most images to score in one forward pass. Default: 8."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OWL2_HF_API_KEY",
            help="API key that clients must send. Default: no key is needed.",
        ),
    ] = None,
    allow_image_urls: Annotated[
        bool,
        typer.Option(
            "--allow-image-urls", help="Also fetch images from http(s) URLs at public addresses."
        ),
    ] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP.

    The server has an OpenAI-compatible API, and also scores images. Stop it with Ctrl-C or SIGTERM.
    """
    from ..scoring.presets import preset_for
    from ..serving import ServerSettings, bind, build_app
    from ..serving import serve as run

    limits = {
        "max_image_pixels": max_image_pixels,
        "max_new_tokens": max_new_tokens,
        "max_body_bytes": max_body_bytes,
        "batch_size": batch_size,
    }
    given = {name: limit for name, limit in limits.items() if limit is not None}
    settings = ServerSettings(**given, allow_image_urls=allow_image_urls, api_key=api_key)
    with bind(host, port) as sock:
        with naming_model(model or DEFAULT_MODEL):
            preset = preset_for(place(model))
        loaded, processor = load(model, device)
        name = model or DEFAULT_MODEL
        served = build_app(name, loaded, processor, settings, preset)
        run(served, sock, lambda url: say(f"serving {name} at {url}"))


@app.command()
@report_mistakes
def demo(
    model: ModelArgument = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. Use 0 for any free port.")
    ] = 7860,
    share: Annotated[
        bool,
        typer.Option(
            "--share", help="Also get a public address from Gradio's servers. Anyone can open it."
        ),
    ] = False,
    max_image_pixels: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most pixels in all images of a chat together. Default: 89,478,485."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Serve a web page to chat about and score images.

    The page also shows what the model attends to. Stop it with Ctrl-C.
    """
    from ..demo import DemoSettings, build_page, show
    from ..limits import bind

    limits = {"max_image_pixels": max_image_pixels, "max_new_tokens": max_new_tokens}
    settings = DemoSettings(**{name: limit for name, limit in limits.items() if limit is not None})
    with bind(host, port) as sock:
        loaded, processor = load(model, device)
        name = model or DEFAULT_MODEL
        page = build_page(loaded, processor, name, settings)
        show(page, sock, share, lambda url: say(f"showing {name} at {url}"))
