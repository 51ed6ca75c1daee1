"""Makes this package's classes known to `DiffusionPipeline.from_pretrained`."""

import os
from types import ModuleType

import diffusers
from diffusers import DiffusionPipeline


def register(package: ModuleType, pipeline_classes: list[type[DiffusionPipeline]]):
    """
    Has `DiffusionPipeline.from_pretrained` take this package's classes instead of asking for a repository's code.

    A saved pipeline names its class as `["pipeline", "OneStepPIDPipeline"]`: the class in the file `pipeline.py` of
    its folder, which diffusers runs if `trust_remote_code=True` is passed, and else says so. Once the package is
    imported there is no need for that: the same class is here. The scheduler's library, `pid_diffusers`, is looked up
    among the modules of `diffusers.pipelines`, a pipeline's bare name in `diffusers`.

    Args:
        package (`ModuleType`): where the schedulers are looked up.
        pipeline_classes (`list[type[DiffusionPipeline]]`): the pipelines.
    """
    setattr(diffusers.pipelines, package.__name__, package)
    for pipeline_class in pipeline_classes:
        setattr(diffusers, pipeline_class.__name__, pipeline_class)
    names = [["pipeline", pipeline_class.__name__] for pipeline_class in pipeline_classes]
    read_json = DiffusionPipeline._dict_from_json_file.__func__

    def read_json_and_prefer_imported(cls, json_file: str | os.PathLike) -> dict:
        config = read_json(cls, json_file)
        if config.get("_class_name") in names:
            config["_class_name"] = config["_class_name"][1]
        return config

    DiffusionPipeline._dict_from_json_file = classmethod(read_json_and_prefer_imported)
