"""Text embeddings, computed once by the teacher's own encoders and kept on disk by prompt and encoder."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm.auto import tqdm

from ..errors import InputError

# of an encoder's configuration, where and how it was saved (its class and the type of its weights are noted by
# themselves); of a tokenizer, how the last call wanted its tokens
_INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_INCIDENTAL |= {"padding", "truncation"}


class PromptEncoder:
    """
    The text encoders of a pipeline, as its own `encode_prompt` uses them.

    Args:
        pipeline ([`StableDiffusionPipeline`] or [`StableDiffusionXLPipeline`]):
            is not changed, and held as long as this object lives. LoRA adapters of its text encoders must be fused:
            their scales are not part of the fingerprint.

    Raises:
        InputError: if it is another pipeline, or was loaded without its text encoders.
    """

    def __init__(self, pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline):
        name = type(pipeline).__name__
        if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
            raise InputError(
                f"teacher is a {name}, whose prompts cannot be encoded; pass a StableDiffusionPipeline or a"
                " StableDiffusionXLPipeline."
            )
        names = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
        parts = [tuple(getattr(pipeline, name, None) for name in pair) for pair in names]
        self.parts = [part for part in parts if part != (None, None)]  # SDXL's refiner has the second ones only
        if not self.parts or any(None in part for part in self.parts):
            raise InputError(f"teacher is a {name} without its text encoder or tokenizer; load it with both.")
        self.pipeline = pipeline
        self.is_xl = isinstance(pipeline, StableDiffusionXLPipeline)

    @property
    def encoders(self) -> list[nn.Module]:
        return [encoder for _, encoder in self.parts]

    @property
    def device(self) -> torch.device:
        return next(self.encoders[0].parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """
        A hex digest of all that embeddings depend on: the kind of pipeline, `force_zeros_for_empty_prompt`, each
        encoder's class, configuration and weights, and each tokenizer's vocabulary and settings.

        Encoders loaded from another folder have the same. The same ones in another type (float16 instead of float32)
        have another, since they give other embeddings.
        """
        settings = {"xl": self.is_xl, "zeros": self.pipeline.config.get("force_zeros_for_empty_prompt")}
        digest = hashlib.sha256(_canonical(settings))
        for tokenizer, encoder in self.parts:
            digest.update(_canonical([type(tokenizer).__name__, _tokenizer_settings(tokenizer)]))
            digest.update(_canonical([type(encoder).__name__, _essential(encoder.config.to_dict())]))
            digest.update(_digest(encoder.state_dict()).encode())
        return digest.hexdigest()

    def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """
        The embeddings of prompts, on the CPU in the encoder's type: `encoder_hidden_states` of shape `(B, L, D)`, and
        of SDXL `text_embeds` of shape `(B, P)`. What is too long is truncated as the tokenizer does, silently.
        """
        embeddings = self._encode(list(prompts), do_classifier_free_guidance=False)
        return self._condition(*embeddings[::2])

    def encode_unconditional(self, negative_prompt: str = "") -> dict[str, torch.Tensor]:
        """
        What the pipeline's classifier-free guidance moves away from, as [`~PromptEncoder.encode`] has it with B = 1.

        Without a negative prompt it is the embedding of an empty text, or with `force_zeros_for_empty_prompt` (SDXL's
        own setting) zeros.
        """
        embeddings = self._encode("", do_classifier_free_guidance=True, negative_prompt=negative_prompt or None)
        return self._condition(*embeddings[1::2])

    def count_over_long(self, prompts: list[str]) -> int:
        """How many of the prompts are truncated, by one of the tokenizers at least."""
        over_long = torch.zeros(len(prompts), dtype=torch.bool)
        with _silence():
            for tokenizer, _ in self.parts:
                texts = self.pipeline.maybe_convert_prompt(list(prompts), tokenizer)
                lengths = [len(ids) for ids in tokenizer(texts).input_ids]
                over_long |= torch.tensor(lengths) > tokenizer.model_max_length
        return int(over_long.sum())

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Has the encoders on a device for a while, and puts them back where they were."""
        homes = [next(encoder.parameters()).device for encoder in self.encoders]
        try:
            for encoder in self.encoders:
                encoder.to(device)
            yield
        finally:
            for encoder, home in zip(self.encoders, homes, strict=True):
                encoder.to(home)

    @torch.no_grad()
    def _encode(self, prompt: str | list[str], **settings) -> tuple[torch.Tensor | None, ...]:
        """A prompt's and the negative prompt's embeddings; of SDXL both pooled ones, too."""
        with _silence():
            return self.pipeline.encode_prompt(prompt, device=self.device, num_images_per_prompt=1, **settings)

    def _condition(self, *embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        names = ("encoder_hidden_states", "text_embeds") if self.is_xl else ("encoder_hidden_states",)
        return {name: value.cpu() for name, value in zip(names, embeddings, strict=True)}


class PromptEmbeddings:
    """
    A sequence of prompts with their embeddings, made by [`~PromptEmbeddings.compute`]. It needs no encoder.

    Attributes:
        prompts (`list[str]`): as they were given, duplicates included.
    """

    def __init__(self, prompts: list[str], files: dict[str, Path], memory_limit: int):
        self.prompts = prompts
        self._files = list(files.values())
        places = {prompt: place for place, prompt in enumerate(files)}
        self._places = [places[prompt] for prompt in prompts]  # of each prompt among the distinct ones
        entry = self._read(0)
        size = sum(value.numel() * value.element_size() for value in entry.values())
        self._memory = None
        if size * len(files) <= memory_limit:
            self._memory = {name: value.new_empty(len(files), *value.shape) for name, value in entry.items()}
            for place in range(len(files)):
                for name, value in self._read(place).items():
                    self._memory[name][place] = value
        self._recent = lru_cache(maxsize=memory_limit // size)(self._read)

    @classmethod
    def compute(
        cls,
        encoder: PromptEncoder,
        prompts: list[str],
        cache_dir: str | os.PathLike | None = None,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        progress: bool = True,
        memory_limit: int = 2 * 1024**3,
    ) -> "PromptEmbeddings":
        """
        Encodes each distinct prompt that is not on the disk yet, and reads all from there.

        An entry is a file `<cache_dir>/<fingerprint>-<device type>/<two hex>/<SHA-256 of the prompt>.safetensors` with
        the embeddings in the encoder's type. It is written beside its place and moved in, so that processes may
        share a cache, and it says what it holds: one that is cut short, damaged or of something else is made again.

        What is used is always what was stored, and by default a prompt is encoded by itself: matrix products may round
        differently in batches of other sizes, and then an embedding would depend on which prompts were on the disk
        already. So a run gives the same bits with a cold cache, a warm one, and one that was half filled when the run
        was killed. (Entries of CPU and GPU are kept apart for the same reason.)

        Args:
            encoder ([`PromptEncoder`]): is not kept.
            prompts (`list[str]`): what to encode. Duplicates are encoded once.
            cache_dir (`str` or `os.PathLike`, *optional*):
                defaults to `embeddings` in `$PID_DIFFUSERS_CACHE`, or else in `pid_diffusers` in the user's cache
                folder (`$XDG_CACHE_HOME` or `~/.cache`).
            batch_size (`int`, defaults to 1):
                prompts a call. On a GPU more than 1 is faster, at the price of what is said above.
            device (`torch.device` or `str`, defaults to `"cpu"`):
                where the encoders do it. They are put back where they were.
            progress (`bool`, defaults to `True`): show a bar while encoding.
            memory_limit (`int`, defaults to 2 GiB):
                how many bytes of embeddings may be held in memory. If all fit they are, otherwise those used last are,
                and the files must stay.

        Raises:
            InputError: if there are no prompts, one is not Unicode text, or the cache cannot be written.
        """
        if not prompts:
            raise InputError("prompts is empty; pass one at least.")
        device = torch.device(device)
        owner = f"{encoder.fingerprint}-{device.type}"
        folder = _default_cache() if cache_dir is None else Path(cache_dir)
        files = {}
        for number, prompt in enumerate(prompts):
            try:
                key = hashlib.sha256(prompt.encode()).hexdigest()
            except UnicodeEncodeError as error:
                raise InputError(f"prompts[{number}] is {prompt!r}, which is not Unicode text; correct it.") from error
            files[prompt] = folder / owner / key[:2] / f"{key}.safetensors"
        missing = [prompt for prompt, path in files.items() if not _is_entry(path, prompt, owner)]
        if missing:
            bar = tqdm(total=len(missing), desc="Prompts", unit="prompt", disable=not progress)
            with encoder.on(device), bar:
                for start in range(0, len(missing), batch_size):
                    some = missing[start : start + batch_size]
                    embeddings = encoder.encode(some)
                    for row, prompt in enumerate(some):
                        entry = {name: value[row].contiguous() for name, value in embeddings.items()}
                        _write(files[prompt], entry, prompt, owner, folder)
                    bar.update(len(some))
        return cls(list(prompts), files, memory_limit)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, indices: torch.Tensor | list[int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """
        The embeddings of the prompts with these indices, one row each, on the CPU.

        Raises:
            InputError: if they are read from the disk, and a file is no longer there.
        """
        places = [self._places[index] for index in torch.as_tensor(indices).tolist()]
        if self._memory is not None:
            return {name: value[places].to(dtype) for name, value in self._memory.items()}
        entries = [self._recent(place) for place in places]
        return {name: torch.stack([entry[name] for entry in entries]).to(dtype) for name in entries[0]}

    def _read(self, place: int) -> dict[str, torch.Tensor]:
        path = self._files[place]
        try:
            return _read(path)[0]
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cache_dir has lost the embeddings {str(path)!r} ({error}); start again to have them computed."
            ) from error


def _default_cache() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PID_DIFFUSERS_CACHE") or f"{caches}/pid_diffusers").expanduser() / "embeddings"


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors in a file, and its metadata."""
    with safe_open(path, framework="pt") as file:
        # copies, since the tensors hold on to a mapping of the file, of which a process may have 65,530 only
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}


def _is_entry(path: Path, prompt: str, owner: str) -> bool:
    """Whether a file holds what `_write` wrote there, to the last bit."""
    try:
        tensors, metadata = _read(path)
    except (OSError, SafetensorError):
        return False
    return metadata == {"encoder": owner, "prompt": prompt, "sha256": _digest(tensors)}


def _write(path: Path, tensors: dict[str, torch.Tensor], prompt: str, owner: str, cache_dir: Path):
    content = save(tensors, metadata={"encoder": owner, "prompt": prompt, "sha256": _digest(tensors)})
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")  # other processes may write the same entry
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            if partial.exists():
                partial.unlink()
    except OSError as error:
        raise InputError(
            f"cache_dir is {str(cache_dir)!r}, where embeddings cannot be written ({error.strerror}); make room there,"
            " or set PID_DIFFUSERS_CACHE to another folder."
        ) from error


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of the names, types, shapes and bits of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(_canonical([name, str(value.dtype), list(value.shape)]))
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _canonical(settings: object) -> bytes:
    """Nested settings as bytes that do not depend on the order of keys."""
    return json.dumps(settings, sort_keys=True, default=str).encode()


def _essential(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in _INCIDENTAL}


def _tokenizer_settings(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, object]:
    """Vocabulary, merges and all else that decides which tokens a text becomes."""
    names = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**{name: getattr(tokenizer, name) for name in names}, "rules": _essential(rules)}


@contextmanager
def _silence() -> Iterator[None]:
    """Without the warnings that diffusers and transformers have for every prompt that is too long."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
