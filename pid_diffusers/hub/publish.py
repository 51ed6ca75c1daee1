"""What `--push_to_hub` does in a run."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, get_token

from ..errors import InputError
from ..training.config import TrainingConfig
from .push import PushFailed, check_repo_id, describe, push, push_command

logger = logging.getLogger(__name__)


class Publisher:
    """
    Pushes the output folder of a run, and never costs the run anything.

    Args:
        config (`TrainingConfig`): `push_to_hub`, `hub_model_id`, `hub_private_repo`, `output_dir`.

    Raises:
        InputError: if there is no token, or a repo cannot have that name; nothing is asked of the Hub for that.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        if config.push_to_hub:
            check_repo_id(self.repo_id)
            if get_token() is None:
                raise InputError(
                    "push_to_hub is set, but there is no token for the Hub; run 'hf auth login', or set HF_TOKEN."
                )

    @property
    def repo_id(self) -> str:
        return self.config.hub_model_id or Path(self.config.output_dir).resolve().name

    def announce(self):
        """Says where the result will go, or warns that the Hub would refuse it by now."""
        if not self.config.push_to_hub:
            return
        try:
            user = HfApi().whoami()["name"]
        except Exception as error:  # the run goes on: there may be a network, or another token, when it ends
            logger.warning(f"nothing could be pushed to the Hub by now ({describe(error)}); the run goes on.")
        else:
            repo_id = self.repo_id if "/" in self.repo_id else f"{user}/{self.repo_id}"
            print(f"Will be pushed to {repo_id}, logged in as {user}.", flush=True)

    def checkpoint(self, step: int):
        """Pushes the folder as it is at a step, once: the next checkpoint is another attempt."""
        try:
            self._push(delays=())
        except PushFailed as error:
            logger.warning(f"step {step} could not be pushed ({error}); the run goes on.")

    def finish(self) -> str:
        """Pushes the folder, and returns what to print."""
        try:
            return f"Pushed to {self._push()}"
        except PushFailed as error:
            config = self.config
            command = push_command(config.output_dir, config.hub_model_id, config.hub_private_repo)
            return (
                f"The push to the Hub failed ({error}). All files are in {config.output_dir}; push them later with\n\n"
                f"    {command}\n"
            )

    def _push(self, **kwargs) -> str:
        return push(self.config.output_dir, self.config.hub_model_id, self.config.hub_private_repo, **kwargs)
