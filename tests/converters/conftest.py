"""Checkpoints in the formats of others, small, from the networks in tests/data/edm_networks."""

import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

NETWORKS = Path(__file__).parent.parent / "data" / "edm_networks"


class Persistent:
    """What makes an object pickle as those of NVIDIA's `torch_utils.persistence` do."""

    source = "raise RuntimeError('the source code of a pickle was run')\n"

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": self.__dict__},), None


class PersistentModule(Persistent, nn.Module):
    def __init__(self, class_name: str, **init_kwargs):
        nn.Module.__init__(self)
        self.class_name = class_name
        self._init_args = ()
        self._init_kwargs = init_kwargs


class PersistentObject(Persistent):
    def __init__(self, class_name: str):
        self.class_name = class_name
        self._init_args, self._init_kwargs = (), {}


def _reconstruct_persistent_obj(meta):
    raise AssertionError("unpickled")


def _module_tree(weights: dict[str, torch.Tensor], class_name: str) -> PersistentModule:
    root = PersistentModule(class_name)
    for name, tensor in weights.items():
        *parents, leaf = name.split(".")
        module = root
        for depth, part in enumerate(parents):
            if part not in module._modules:
                kind = ["UNetBlock", "Conv2d"][depth - 1] if parents[0] in ("enc", "dec") else "Linear"
                is_dict = depth == 0 and part in ("enc", "dec")
                child = nn.ModuleDict() if is_dict else PersistentModule(kind, init_weight=np.sqrt(1 / 3), bias=True)
                if not is_dict:
                    child.skip_scale = np.sqrt(0.5)
                module.add_module(part, child)
            module = module._modules[part]
        if leaf in ("weight", "bias"):
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(leaf, tensor)
    return root.eval()


@pytest.fixture(scope="session")
def edm_network():
    """The arguments and weights of a network in tests/data/edm_networks."""

    def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        kwargs = json.loads((NETWORKS / name / "init_kwargs.json").read_text())
        return kwargs, load_file(NETWORKS / name / "model.safetensors")

    return load


@pytest.fixture(scope="session")
def write_edm_pickle(edm_network):
    """Writes a network as `network-snapshot-*.pkl` of EDM's training; changes go to the arguments and weights."""

    def write(path: Path, name: str = "ddpmpp_cond", source: str | None = None, weights: dict | None = None, **kwargs):
        arguments, state_dict = edm_network(name)
        arguments |= kwargs
        precond = arguments.pop("precond")
        ema = PersistentModule(precond, **arguments)
        ema.sigma_min, ema.sigma_max = 0, float("inf")
        ema.model = _module_tree({**state_dict, **(weights or {})}, arguments["model_type"])
        augment = PersistentModule("AugmentPipe")
        augment.register_buffer("Hz_geom", torch.ones(12))
        data = {"ema": ema, "loss_fn": PersistentObject("EDMLoss"), "augment_pipe": augment, "dataset_kwargs": {}}
        module = types.ModuleType("torch_utils.persistence")
        module._reconstruct_persistent_obj = _reconstruct_persistent_obj
        _reconstruct_persistent_obj.__module__ = module.__name__
        modules = {"torch_utils": types.ModuleType("torch_utils"), module.__name__: module}
        sys.modules.update(modules)
        Persistent.source, before = source or Persistent.source, Persistent.source
        try:
            path.write_bytes(pickle.dumps(data, protocol=4))
        finally:
            Persistent.source = before
            for each in modules:
                del sys.modules[each]
        return path

    return write
