"""NVIDIA's EDM networks: what a pickle, a folder or a bare state dict holds of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .safe_pickle import Record, TensorRecord, UnreadableFile, shorten

PRECONDITIONINGS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
NETWORKS = ("SongUNet", "DhariwalUNet")
# what the two classes take where an argument is not given
_DEFAULTS = {
    "SongUNet": {
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": [16],
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}
_INTEGERS = ("img_resolution", "img_channels", "label_dim", "augment_dim", "model_channels", "channel_mult_emb")
_INTEGERS += ("num_blocks", "channel_mult_noise", "in_channels", "out_channels")
_CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


@dataclass
class EDMNetwork:
    """A network of EDM's code: the arguments of its preconditioning and the inner network's parameters."""

    init_kwargs: dict
    state_dict: dict

    @property
    def architecture(self) -> str:
        kwargs = self.init_kwargs
        if kwargs["model_type"] == "DhariwalUNet":
            return "DhariwalUNet (ADM)"
        kind = {"positional": "DDPM++", "fourier": "NCSN++"}[kwargs["embedding_type"]]
        return f"SongUNet ({kind})"


def is_edm_state_dict(names) -> bool:
    """Whether these are the parameters of a network of EDM's code, with or without its preconditioning around."""
    names = [name.removeprefix("model.") for name in names]
    return "map_layer0.weight" in names and any(re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name) for name in names)


def from_pickle(content) -> EDMNetwork:
    """
    The network `ema` in EDM's pickle, as [`read_checkpoint`] gives it.

    Raises:
        UnreadableFile: if it holds no such network, or one with a preconditioning other than EDM's.
    """
    record = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(record, Record) or record.class_name not in PRECONDITIONINGS:
        kind = shorten(record.class_name) if isinstance(record, Record) else type(record).__name__
        raise UnreadableFile(
            f"holds no network of EDM: its 'ema' is a {kind}, not one of {', '.join(PRECONDITIONINGS)}"
        )
    check_preconditioning(record.class_name)
    kwargs, arguments = record.state.get("_init_kwargs"), record.state.get("_init_args", ())
    network = _modules(record).get("model")
    if not isinstance(kwargs, dict) or arguments not in ((), None) or not isinstance(network, Record):
        raise UnreadableFile("is an EDM pickle without the arguments or the inner network of its EDMPrecond")
    kwargs = complete({"model_type": "DhariwalUNet", **kwargs})
    if network.class_name != kwargs["model_type"]:
        raise UnreadableFile(
            f"is damaged: its network is a {shorten(network.class_name)}, but its arguments say {kwargs['model_type']}"
        )
    return EDMNetwork(kwargs, _state_dict(network))


def from_state_dict(tensors: Mapping) -> EDMNetwork:
    """
    The network of a bare state dict, with the arguments that its names and shapes tell.

    Raises:
        UnreadableFile: if they do not tell a network.
    """
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = {}  # resolution: how many blocks the encoder has there
    for name in shapes:
        if match := re.fullmatch(r"enc\.(\d{1,5})x\1_block(\d{1,3})\.conv0\.weight", name):
            resolution = int(match[1])
            found[resolution] = max(found.get(resolution, 0), int(match[2]) + 1)
    resolutions = sorted(found, reverse=True)
    try:
        first = shapes[f"enc.{resolutions[0]}x{resolutions[0]}_conv.weight"]
        song = f"dec.{resolutions[0]}x{resolutions[0]}_aux_conv.weight" in shapes
        widths = [shapes[f"enc.{r}x{r}_block0.conv0.weight"][0] for r in resolutions]
        noise_channels = shapes["map_layer0.weight"][1]
        model_channels = first[0] if song else noise_channels
        kwargs = {
            "model_type": "SongUNet" if song else "DhariwalUNet",
            "img_resolution": resolutions[0],
            "img_channels": first[1],
            "label_dim": shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0,
            "augment_dim": shapes["map_augment.weight"][1] if "map_augment.weight" in shapes else 0,
            "model_channels": model_channels,
            "channel_mult": [width // model_channels for width in widths],
            "channel_mult_emb": shapes["map_layer0.weight"][0] // model_channels,
            "num_blocks": found[resolutions[0]],
            "attn_resolutions": [r for r in resolutions if f"enc.{r}x{r}_block0.qkv.weight" in shapes],
        }
        if song:
            taps = next((s[-1] for n, s in shapes.items() if n.endswith("_down.conv0.resample_filter")), 2)
            kwargs |= {
                "embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
                "channel_mult_noise": noise_channels // model_channels,
                "encoder_type": "residual" if any("_aux_residual." in n for n in shapes) else "standard",
                "resample_filter": {2: [1, 1], 4: [1, 3, 3, 1]}[taps],
            }
            if any("_aux_skip." in n for n in shapes):
                kwargs["encoder_type"] = "skip"
            if any("_aux_up." in n for n in shapes) or sum("_aux_conv.weight" in n for n in shapes) > 1:
                kwargs["decoder_type"] = "skip"
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UnreadableFile("has parameters named as EDM's, but not all that tell the network's shape") from error
    return EDMNetwork(complete(kwargs), tensors)


def check_preconditioning(name) -> None:
    """
    Raises:
        UnreadableFile: unless it is EDM's own.
    """
    if name == "EDMPrecond":
        return
    if name in PRECONDITIONINGS:
        raise UnreadableFile(
            f"has a network with {name}, whose noise levels and scaling are not EDM's and are not supported",
            "pass a file with EDMPrecond, NVIDIA's edm-*.pkl instead of its baseline-*.pkl",
        )
    raise UnreadableFile(f"has the preconditioning {shorten(_text(name))}, not one of {', '.join(PRECONDITIONINGS)}")


def complete(kwargs: dict) -> dict:
    """
    The arguments of an EDMPrecond with the defaults of its network filled in.

    Raises:
        UnreadableFile: if one of them is missing or cannot be.
    """
    if not all(isinstance(name, str) for name in kwargs):
        raise UnreadableFile("has a network whose arguments have no names")
    model_type = kwargs.get("model_type")
    if model_type not in NETWORKS:
        raise UnreadableFile(f"has a network of type {shorten(_text(model_type))}, not one of {', '.join(NETWORKS)}")
    kwargs = {"label_dim": 0, "sigma_data": 0.5, **_DEFAULTS[model_type], **kwargs}
    for name in ("channel_mult", "attn_resolutions", "resample_filter"):
        if isinstance(kwargs.get(name), tuple):
            kwargs[name] = list(kwargs[name])
    checks = {name: _is_integer(kwargs.get(name)) for name in _INTEGERS if name in kwargs or name.startswith("img")}
    checks |= {name: kwargs[name] in choices for name, choices in _CHOICES.items() if name in kwargs}
    checks["num_blocks"] = checks["num_blocks"] and 1 <= kwargs["num_blocks"] <= 32
    for name in ("img_resolution", "img_channels", "model_channels", "channel_mult_emb"):
        checks[name] = checks[name] and kwargs[name] >= 1
    checks["channel_mult"] = _is_list(kwargs["channel_mult"], 1, 10) and min(kwargs["channel_mult"]) >= 1
    checks["attn_resolutions"] = _is_list(kwargs["attn_resolutions"], 0, 10)
    if "resample_filter" in kwargs:
        checks["resample_filter"] = _is_list(kwargs["resample_filter"], 1, 8) and sum(kwargs["resample_filter"]) > 0
    sigma_data = kwargs["sigma_data"]
    checks["sigma_data"] = type(sigma_data) in (int, float) and 0 < sigma_data < 1e6
    for name, fits in checks.items():
        if not fits:
            raise UnreadableFile(f"has a network whose argument {name} is {shorten(_text(kwargs.get(name)))}")
    return kwargs


def _modules(record: Record) -> dict:
    modules = record.state.get("_modules")
    return modules if isinstance(modules, dict) else {}


def _state_dict(network: Record) -> dict[str, TensorRecord]:
    """All parameters and buffers, by the names that torch gives them."""
    result, seen = {}, set()
    todo = [("", network)]
    while todo:
        prefix, module = todo.pop()
        if module is None:
            continue
        if not isinstance(module, Record) or id(module) in seen:
            raise UnreadableFile("is damaged: its modules are no tree")
        seen.add(id(module))
        for group in ("_parameters", "_buffers"):
            members = module.state.get(group, {})
            for name, tensor in members.items() if isinstance(members, dict) else ():
                if isinstance(tensor, TensorRecord):
                    result[f"{prefix}{name}"] = tensor
        if len(prefix) > 200:
            raise UnreadableFile("is damaged: its modules are nested too deeply")
        todo += [(f"{prefix}{name}.", child) for name, child in _modules(module).items()]
    return result


def _is_integer(value) -> bool:
    return type(value) is int and 0 <= value < 2**20


def _is_list(value, shortest: int, longest: int) -> bool:
    return isinstance(value, list) and shortest <= len(value) <= longest and all(map(_is_integer, value))


def _text(value) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
