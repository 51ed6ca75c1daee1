"""Pushing a folder to the Hub: what belongs into a repository, and a failure that costs nothing."""

import json
import logging
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, validate_repo_id

from ..errors import InputError
from .card import CARD_FILE, is_generated, lora_files, render_card

logger = logging.getLogger(__name__)

INDEX_FILE = "model_index.json"
# at the top of the folder, beside the pipeline's components
OTHER_FILES = (
    *(CARD_FILE, "LICENSE", "pipeline.py", "config.yaml", "results.json", "metrics.jsonl", "validation.jsonl"),
    *("samples.png", "trajectory.png", "loss.png"),
)
# what save_pretrained writes of a component: configurations, weights, tokenizers, and the code that travels along
COMPONENT_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")
# of an optimizer, should somebody have put it there
NOT_WEIGHTS = ("optimizer", "scheduler", "training_args")
# seconds before another attempt
DELAYS = (2, 8, 32)
# timeouts, another commit at the same time, too many requests, and troubles of the server's own
TRANSIENT_STATUS = (408, 409, 412, 429, 500, 502, 503, 504)
# seconds without any answer, after which a request has failed; by default the client waits for ever
TIMEOUT = 30
NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")


class PushFailed(RuntimeError):
    """The Hub could not be reached or refused. The message says why, in one sentence without its end."""


def push(
    folder: str | Path,
    repo_id: str | None = None,
    private: bool = False,
    delays: Sequence[float] = DELAYS,
    api: HfApi | None = None,
) -> str:
    """
    Makes a model repo of a folder, or adds a commit to it; returns its address.

    Only what [`repository_files`] lists is uploaded. Nothing in the folder is changed. A card that was generated and
    not edited since is uploaded with the repo's id in its snippets.

    Args:
        folder (`str` or `Path`): an output folder of training, or any folder written by `save_pretrained`.
        repo_id (`str`, *optional*): `user/name`, or a name in the namespace of the token's owner; default: the
            folder's name.
        private (`bool`, defaults to `False`): who may see a repo that is new. One that is there stays as it is.
        delays (`Sequence[float]`): seconds to wait before each further attempt after a failure that may pass.
        api (`HfApi`, *optional*): the client, with its endpoint and token.

    Raises:
        InputError: if there is no pipeline in the folder, no such name is possible, or nobody is logged in.
        PushFailed: if the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    files = repository_files(folder)
    repo_id = check_repo_id(repo_id or name_of(folder))
    api = HfApi() if api is None else api
    if not (api.token or get_token()):
        raise InputError("there is no token for the Hub; run 'hf auth login', or set HF_TOKEN.")
    limit_waiting()
    for delay in (*delays, None):
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            operations = [
                CommitOperationAdd(name, _content(folder, path, name, address.repo_id)) for name, path in files.items()
            ]
            if private and not api.model_info(address.repo_id).private:
                logger.warning(
                    f"{address.repo_id} was there already and is public, and stays so: change that in its settings."
                )
            api.create_commit(address.repo_id, operations, commit_message=f"Add {name_of(folder)}")
            return str(address)
        except Exception as error:  # whatever it is, it must not cost a run
            if delay is None or not _is_transient(error):
                raise PushFailed(describe(error)) from error
            logger.warning(f"pushing to {repo_id} failed ({describe(error)}); trying again in {delay:g} s.")
        time.sleep(delay)


def push_command(folder: str | Path, repo_id: str | None = None, private: bool = False) -> str:
    """The command that pushes a folder later."""
    command = ["pid-diffusers", "push", str(folder)]
    command += ["--hub_model_id", repo_id] if repo_id else []
    command += ["--hub_private_repo"] if private else []
    return shlex.join(command)


def repository_files(folder: str | Path) -> dict[str, Path]:
    """
    What of a folder is uploaded, by its name in the repo: the pipeline's components, its card, pictures, metrics and
    configuration; no checkpoints, no trackers' files, nothing hidden. Of a LoRA it is its own file and the scheduler,
    since the base model has all the other components.

    Raises:
        InputError: if the folder holds no pipeline.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        components = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"the folder to push is {str(folder)!r}, which"
            f" {'holds no diffusers pipeline (' + INDEX_FILE + ')' if folder.is_dir() else 'is no folder'}; pass the"
            " output folder of a finished run."
        ) from error
    lora = lora_files(folder)
    components = ["scheduler"] if lora else components
    paths = [folder / name for name in (*(lora or [INDEX_FILE]), *OTHER_FILES)]
    for component in components:
        found = (folder / component).rglob("*")
        paths += sorted(path for path in found if path.suffix in COMPONENT_FILES and path.stem not in NOT_WEIGHTS)
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return {name: path for name, path in names.items() if not any(part[0] in "._" for part in name.split("/"))}


def name_of(folder: str | Path) -> str:
    """A folder's own name, also of `.` and of a link."""
    return os.path.basename(os.path.abspath(folder))


def limit_waiting():
    """Has every request of huggingface_hub in this process fail after `TIMEOUT` seconds without an answer."""
    get_session().timeout = TIMEOUT


def check_repo_id(repo_id: str) -> str:
    """
    The id, if a repo can have it.

    Raises:
        InputError: if it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"hub_model_id, by default the folder's name, is {repo_id!r}, which no repo on the Hub can have; pass"
            " --hub_model_id user/name, of letters, digits, '-', '_' and '.'."
        ) from error
    return repo_id


def describe(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or error.response.reason_phrase
        return f"the Hub answered {error.response.status_code}: {_in_one_line(said)}"
    return f"{type(error).__name__}: {_in_one_line(str(error))}"


def advice(reason: str) -> str:
    """What to do about a failure that trying again would not mend, as the end of a sentence, or nothing."""
    if "answered 401" in reason:
        return "; run 'hf auth login', or correct HF_TOKEN"
    return "; choose a --hub_model_id in a namespace that the token may write to" if "answered 403" in reason else ""


def _content(folder: Path, path: Path, name: str, repo_id: str) -> bytes | str:
    """A file as it is uploaded: its path, or its content where that differs."""
    if name == CARD_FILE and is_generated(path.read_text(encoding="utf-8")):
        return render_card(folder, repo_id).encode()
    if path.suffix == ".json":
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            # where the component was once loaded from, a folder of this machine
            return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return str(path)


def _in_one_line(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    of_network = type(error).__module__.split(".")[0] in NETWORK_LIBRARIES
    return of_network or isinstance(error, ConnectionError | TimeoutError)
