"""`vlmtune serve-ui`: a page in the browser to talk to a model."""

import argparse
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import closing
from errno import EADDRINUSE
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..core.errors import ConfigError
from ..core.logging import note, say
from .inference_flags import (
    add_model_flags,
    add_sampling_flags,
    add_tools_flag,
    check_model,
    load_inference,
    sampling_of,
    tools_of,
)

if TYPE_CHECKING:
    import gradio

HERE = ("127.0.0.1", "::1")

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy: the browser asks this server and no other, whatever the page does."""


def main(argv: Sequence[str]) -> None:
    """Serve the page until a signal ends it.

    Raises:
        ConfigError: Gradio is missing, or there is no such address or it is taken.
        VLMTuneError: the model cannot be loaded, or the flags are wrong.
        KeyboardInterrupt: after Ctrl-C and, as `Terminated`, after SIGTERM.
        SystemExit: 0 after `--help`, 2 for an unknown flag or one without a proper value.
    """
    given = _parser().parse_args(argv)
    if find_spec("gradio") is None:
        raise ConfigError("vlmtune serve-ui", "Gradio is missing", "pip install 'vlmtune[ui]'")
    check_model(given)
    sampling = sampling_of(given)
    with (
        _bound(given.host, given.port) as listening,
        TemporaryDirectory(prefix="vlmtune-ui-") as uploads,
    ):
        inference = load_inference(given)
        # Gradio reads both when it is imported: nothing is sent anywhere, nothing stays behind.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        from .ui import Page

        with closing(Page(inference, sampling, bool(given.thinking), tools_of(given))) as page:
            serve(page.blocks(" + ".join([given.model, *given.adapter])), listening)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmtune serve-ui",
        usage="vlmtune serve-ui --model M [--adapter A] [--port 7860] [flags]",
        description="Talk to a model in the browser. The page loads nothing from elsewhere and is "
        "for this machine alone, unless --host says otherwise; its settings begin with the flags.",
        epilog="More: docs/inference.md",
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="default: 7860; 0 takes a free one"
    )
    add_tools_flag(parser)
    return parser


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; connections wait until the model is loaded.

    Raises:
        ConfigError: the port is taken, or there is no such address.
    """
    where = f"--host {host} --port {port}"
    if not 0 <= port < 65_536:  # the system would take the rest of a division
        raise ConfigError(where, "ports are numbers from 0 to 65535", "give another --port")
    listening = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        if listening:
            listening.close()
        if error.errno == EADDRINUSE:
            what, fix = "another program serves there", "give another --port; 0 takes a free one"
        else:
            what = f"cannot be served: {error.strerror}"
            fix = "give an address of this machine, and a port above 1023"
        raise ConfigError(where, what, fix) from None
    return listening


def serve(page: "gradio.Blocks", listening: socket.socket) -> None:
    """Serve the page until Ctrl-C or SIGTERM, which is then raised as `main` says."""
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from .ui import CSS, THEME

    host, port = listening.getsockname()[:2]
    app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=0,
        headers=[("Content-Security-Policy", POLICY)],
    )
    if host not in HERE:
        note("everyone who reaches this address can use the page")
    say(f"http://{f'[{host}]' if ':' in host else host}:{port} serves the page; Ctrl-C ends it")

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Open pages hold connections: that they are cut is no error.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    Server(config).run([listening])
