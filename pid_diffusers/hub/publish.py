"""What `--push_to_hub` does in a run."""

import logging

from huggingface_hub import HfApi, get_token

from ..errors import InputError
from ..training.config import TrainingConfig
from .push import PushFailed, advice, check_repo_id, describe, limit_waiting, name_of, push, push_command

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
        return self.config.hub_model_id or name_of(self.config.output_dir)

    def announce(self):
        """Says where the result will go, or warns that the Hub would refuse it by now."""
        if not self.config.push_to_hub:
            return
        limit_waiting()
        try:
            account = HfApi().whoami()
            user = account["name"]
        except Exception as error:  # the run goes on: there may be a network, or another token, when it ends
            logger.warning(f"nothing could be pushed to the Hub by now ({describe(error)}); the run goes on.")
        else:
            repo_id = self.repo_id if "/" in self.repo_id else f"{user}/{self.repo_id}"
            print(f"Will be pushed to {repo_id}, logged in as {user}.", flush=True)
            namespaces = [user, *(org["name"] for org in account.get("orgs", []))]
            if repo_id.split("/")[0] not in namespaces:
                logger.warning(f"{repo_id} is in nobody's namespace that you are known to be part of ({namespaces}).")

    def checkpoint(self, step: int):
        """Pushes the folder as it is at a step, once: the next checkpoint is another attempt."""
        try:
            print(f"\nPushed step {step} to {self._push(delays=())}", flush=True)
        except (PushFailed, InputError) as error:
            logger.warning(f"step {step} could not be pushed ({error}); the run goes on.")

    def finish(self) -> str:
        """Pushes the folder, and returns what to print."""
        config = self.config
        try:
            return f"Pushed to {self._push()}"
        except (PushFailed, InputError) as error:
            reason = str(error).removesuffix(".")
        except KeyboardInterrupt:
            reason = "interrupted"
        command = push_command(config.output_dir, config.hub_model_id, config.hub_private_repo)
        return (
            f"The push to the Hub failed ({reason}{advice(reason)}). All files are in {config.output_dir}; push them"
            f" later with\n\n    {command}\n"
        )

    def _push(self, **kwargs) -> str:
        return push(self.config.output_dir, self.config.hub_model_id, self.config.hub_private_repo, **kwargs)
