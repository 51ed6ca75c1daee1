"""Opens the page."""

import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .model import DemoModel

if TYPE_CHECKING:
    import gradio as gr


def launch(
    model: str | Path,
    teacher: str | Path | None = None,
    host: str | None = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
    title: str | None = None,
    other_models: bool | None = None,
    block: bool = True,
) -> "gr.Blocks":
    """
    Serves a page that shows a student, until it is interrupted.

    Args:
        model (`str` or `Path`): a student's folder or Hub id, or `"digits"` for the one that comes with this package.
        teacher (`str` or `Path`, *optional*): to compare with; by default as
            [`~pid_diffusers.demo.DemoModel.load`] finds it.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): the address to listen at; `"0.0.0.0"` is reached from
            other machines; `None` is what `GRADIO_SERVER_NAME` says, as on a Space.
        port (`int`, *optional*): by default the first free one from 7860.
        share (`bool`, defaults to `False`): a public address, by gradio's tunnel.
        open_browser (`bool`, defaults to `False`): opens the page in a browser of this machine.
        title (`str`, *optional*): the page's heading; by default the model's name.
        other_models (`bool`, *optional*): whether visitors can open other folders and Hub ids. By default only where
            the page is reached from this machine alone.
        block (`bool`, defaults to `True`): returns only when the page is closed; `False` for notebooks.

    Returns:
        `gr.Blocks`: the page, with its address in `local_url`.

    Raises:
        InputError: before anything is served, if gradio is missing, the model or the teacher does not load, or nothing
            can listen at `host` and `port`.
    """
    try:
        from . import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError("the demo needs gradio; pip install -e '.[demo]'") from error
    _check_address(host, port)
    loaded = DemoModel.load(model, teacher)
    if other_models is None:
        other_models = not share and _is_loopback(host)
    blocks = page.build(loaded, title=title, other_models=other_models)
    blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=open_browser,
        prevent_thread_lock=not block,
        **page.LOOK,
    )
    return blocks


def _check_address(host: str | None, port: int | None):
    try:
        socket.create_server((host or "127.0.0.1", port or 0)).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"host is {host!r} and port is {port}, where nothing can listen ({error}); pass an address of this machine"
            " and a free port."
        ) from error


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:  # a name
        return False
