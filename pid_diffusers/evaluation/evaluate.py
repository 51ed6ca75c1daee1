"""How good a model is, by the same protocol for every pipeline: samples, their features, and the metrics of these."""

import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from torch import nn

from ..errors import InputError
from ..precision import widest_float
from ..text import load_prompts
from .config import DTYPES, METRICS, EvaluationConfig
from .extractors import extract, extractor_settings, load_extractor
from .features import PART, open_work_folder, read_features, write_features
from .generate import Samples, digest, load_model, model_digest
from .metrics import (
    DENSITY_NEIGHBOURS,
    INCEPTION_SCORE_SPLITS,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    PRECISION_NEIGHBOURS,
    Gaussian,
    clip_similarity,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbour_metrics,
    neighbour_radii,
)
from .provenance import describe_compute, versions
from .references import Reference, holds_features, load_reference, save_features

logger = logging.getLogger(__name__)

LOWER_IS_BETTER = ("fid", "kid")
_NEIGHBOUR_METRICS = ("precision", "recall", "density", "coverage")


def evaluate(config: EvaluationConfig, pipeline: DiffusionPipeline | None = None) -> dict | None:
    """
    Draws samples, compares their features to the reference's, and writes what it found to `config.output`.

    Every sample depends on its own seed alone ([`Samples`]). Features are written to a folder beside the output as
    they are computed, so that the same call continues one that was interrupted; it is removed at the end. Under
    `accelerate launch` the processes share the work and give the same result as one.

    Args:
        config (`EvaluationConfig`): the settings.
        pipeline (`DiffusionPipeline`, *optional*): the model, instead of loading `config.model`, which names it then.

    Returns:
        `dict`: what the output holds: `fid`, `kid`, `inception_score`, `precision`, `recall`, `density`, `coverage`
        and `clip_score`, each the best of the repeats, `None` where `reasons` says why; `mean` and `repeats`, the mean
        and each one; and the `protocol`. `None` in all processes but the first.

    Raises:
        InputError: if a setting cannot work, or model, reference and extractor do not fit together; before the work.
    """
    start = time.perf_counter()
    output = Path(config.output)
    work = _check(config, output)
    # the first process may be alone for hours, with the metrics or with files that others have done already
    on_cpu = config.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    device = _device(config.device, state)
    reference = load_reference(config.reference, config.reference_split, config.reference_column)
    if config.save_reference is not None and reference.images is None:
        raise InputError(
            f"save_reference is {config.save_reference!r}, but the reference has no images to extract features of;"
            " leave it out."
        )
    prompts = None if config.prompts is None else load_prompts(config.prompts, config.caption_column)
    extractor = load_extractor(config.extractor, config.extractor_weights).to(device)
    scorer = _load_scorer(config, extractor, device)
    if pipeline is None:
        pipeline = load_model(config.model, getattr(torch, config.dtype))
    pipeline.to(device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        samples = [
            Samples(
                pipeline,
                config.num_samples,
                config.batch_size,
                config.seed + repeat * config.num_samples,
                prompts,
                config.sampler,
                config.num_inference_steps,
                config.guidance_scale,
            )
            for repeat in range(config.repeats)
        ]
        image, calls = samples[0].probe()
        shape = tuple(image.shape[1:])
        probe = extract(extractor, image.expand(PART, -1, -1, -1).to(device))
        width = probe["features"].shape[1]
        made_by = digest(extractor, settings=extractor_settings(extractor, config.extractor))
        reference.check(shape, width, made_by)
        reasons = _reasons(config, reference, width, "logits" in probe, scorer is not None)
        if state.is_main_process:
            for metric, reason in reasons.items():
                logger.warning("%s will be null: %s", metric, reason)

        settings = {
            "model": _last_part(config.model),
            "pipeline": type(pipeline).__name__,
            "model_sha256": model_digest(pipeline),
            **samples[0].describe(),
            "network_calls_per_sample": calls,
            "num_samples": config.num_samples,
            "seed": config.seed,
            "repeats": config.repeats,
            "image_shape": list(shape),
            "dtype": str(samples[0].network.dtype).removeprefix("torch."),
            "reference": _last_part(config.reference),
            "reference_kind": reference.kind,
            "reference_digest": reference.digest,
            "extractor": config.extractor,
            "extractor_weights": config.extractor_weights and _last_part(config.extractor_weights),
            "extractor_sha256": made_by,
            "num_features": width,
            "clip_model": config.clip_model and _last_part(config.clip_model),
            "clip_sha256": None if scorer is None else digest(scorer),
            "prompts": None if prompts is None else _last_part(config.prompts),
            "prompts_sha256": None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        }
        _check_pictures(config, work)
        _check_saved_reference(config, made_by, settings["reference_digest"])
        # figures do not depend on where samples are saved, nor samples on the batch size but for their last bits
        work_settings = settings | {
            "batch_size": config.batch_size,
            "save_images": config.save_images and os.path.abspath(config.save_images),
        }
        open_work_folder(work, json.loads(json.dumps(work_settings)), state)
        if reference.images is not None:
            write_features(reference.images, extractor, work / "reference", state, device, "reference")
        for repeat, drawn in enumerate(samples):
            write_features(
                drawn,
                extractor,
                work / f"samples-{repeat}",
                state,
                device,
                "samples" if config.repeats == 1 else f"samples, {repeat + 1} of {config.repeats}",
                None if config.save_images is None else Path(config.save_images),
                None if scorer is None else _Scorer(scorer, drawn, device),
                repeat * config.num_samples,
            )
    if not state.is_main_process:
        return None

    if reference.images is not None:
        reference.features = read_features(work / "reference")["features"]
    wide = device if widest_float(device) == torch.float64 else torch.device("cpu")
    repeats = _measure(config, reference, work, wide, set(reasons))
    results = {
        **_over(repeats, lambda name: min if name in LOWER_IS_BETTER else max),
        "reported": "the best of the repeats, metric by metric; mean is the mean over them",
        "mean": _over(repeats, lambda _: lambda values: math.fsum(values) / len(values)),
        "repeats": repeats,
        "reasons": reasons,
        "protocol": settings | _constants(config, reference, prompts, state),
        **describe_compute(device, state.num_processes, (time.perf_counter() - start) * state.num_processes),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }
    # the output comes last: until then the same command continues
    if config.save_reference is not None and not os.path.exists(config.save_reference):
        save_features(config.save_reference, reference.features, shape, made_by, settings["reference_digest"])
    partial = Path(f"{output}.partial")
    partial.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(output)
    shutil.rmtree(work)
    return results


class _Scorer:
    """The similarity of samples to their prompts."""

    def __init__(self, clip: nn.Module, samples: Samples, device: torch.device):
        self.clip, self.samples, self.device = clip, samples, device

    def __call__(self, images: torch.Tensor, numbers: range) -> torch.Tensor:
        found = self.clip(images.expand(-1, 3, -1, -1))
        features = found[0] if isinstance(found, tuple) else found
        return clip_similarity(features.cpu(), self.clip.text_features(self.samples.prompts_of(numbers)).cpu())


def _check(config: EvaluationConfig, output: Path) -> Path:
    """Raises for what can be told from the settings alone; returns the work folder."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise InputError(
            "evaluate needs the package 'torch_fidelity', which is not installed; pip install"
            " 'pid_diffusers[evaluation]'."
        )
    lowest = {"num_samples": 2, "batch_size": 1, "repeats": 1, "num_inference_steps": 1, "seed": 0}
    for name, least in lowest.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; pass {least} or more.")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype is {config.dtype!r}; choose one of {', '.join(DTYPES)}.")
    if output.exists():
        raise InputError(f"output is {config.output!r}, which exists already; pass another, or remove it.")
    work = output.with_suffix(".work")
    if work == output:
        raise InputError(
            f"output is {config.output!r}, which is also the name of its work folder; pass one that ends otherwise."
        )
    if work.is_file():
        raise InputError(
            f"output is {config.output!r}, which needs a folder {work.name} beside it, but that is a file; pass"
            " another, or remove it."
        )
    for name in ("output", "save_reference"):
        value = getattr(config, name)
        if value is not None and not Path(value).absolute().parent.is_dir():
            raise InputError(f"{name} is {value!r}, whose folder does not exist; make it, or pass another.")
    if config.save_reference is not None:
        if not config.save_reference.endswith(".safetensors"):
            raise InputError(f"save_reference is {config.save_reference!r}; pass a name that ends in .safetensors.")
        if os.path.exists(config.save_reference) and not work.exists():
            _refuse_saved_reference(config)
    if config.save_images is not None:
        places = Path(os.path.abspath(config.save_images))
        places = (places, *places.parents)
        if Path(os.path.abspath(work)) in places:
            raise InputError(
                f"save_images is {config.save_images!r}, which is removed at the end with {work.name}; pass another"
                " folder."
            )
        nearest = next(place for place in places if place.exists())
        if not nearest.is_dir():
            raise InputError(
                f"save_images is {config.save_images!r}, but {nearest.name} is a file; pass another folder."
            )
    return work


def _check_pictures(config: EvaluationConfig, work: Path):
    folder = None if config.save_images is None else Path(config.save_images)
    if folder is None or work.exists():  # of the evaluation that continues
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"save_images is {config.save_images!r}, which exists and is not empty; pass another folder.")


def _check_saved_reference(config: EvaluationConfig, extractor: str, images_digest: str):
    path = config.save_reference
    # an evaluation that was interrupted at its very end has written it
    if path is not None and os.path.exists(path) and not holds_features(path, extractor, images_digest):
        _refuse_saved_reference(config)


def _refuse_saved_reference(config: EvaluationConfig):
    raise InputError(f"save_reference is {config.save_reference!r}, which exists already; pass another, or remove it.")


def _device(name: str | None, state: PartialState) -> torch.device:
    if name is None:
        return state.device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, which is not there; pass cpu, or leave it out.") from error
    return state.device if device.type == state.device.type and device.index is None else device


def _load_scorer(config: EvaluationConfig, extractor: nn.Module, device: torch.device) -> nn.Module | None:
    if config.prompts is None:
        if config.clip_model is not None:
            raise InputError(
                f"clip_model is {config.clip_model!r}, but there are no prompts; pass some, or leave it out."
            )
        return None
    if config.clip_model is not None:
        try:
            return load_extractor("clip", config.clip_model).to(device)
        except InputError as error:
            raise InputError(str(error).replace("extractor_weights", "clip_model")) from error
    return extractor if hasattr(extractor, "text_features") else None


def _reasons(
    config: EvaluationConfig, reference: Reference, width: int, has_logits: bool, has_scorer: bool
) -> dict[str, str]:
    """Why a metric cannot be computed, or would mislead, for those of which this is so."""
    reasons, n = {}, config.num_samples
    m = len(reference.images) if reference.images is not None else None
    m = len(reference.features) if reference.features is not None else m
    least = width + 1  # of fewer samples a covariance has no full rank
    if n < least:
        reasons["fid"] = f"{n} samples are too few for the covariance of {width} features; draw {least} or more."
    elif reference.gaussian is None and m < least:
        reasons["fid"] = f"the reference's {m} images are too few for the covariance of {width} features."
    if m is None:
        for name in ("kid", *_NEIGHBOUR_METRICS):
            reasons[name] = "the reference is mean and covariance alone; pass one with images or features."
    elif m < 2:
        reasons["kid"] = "the reference has one image alone."
    if m is not None and min(n, m) <= DENSITY_NEIGHBOURS:
        for name in _NEIGHBOUR_METRICS:
            reasons[name] = f"{n} samples and {m} reference images; {DENSITY_NEIGHBOURS + 1} of each are needed."
    if not has_logits:
        reasons["inception_score"] = f"extractor {config.extractor!r} offers no logits of a classifier."
    elif n < 10 * INCEPTION_SCORE_SPLITS:
        reasons["inception_score"] = f"{n} samples are too few for {INCEPTION_SCORE_SPLITS} parts of 10 or more."
    if config.prompts is None:
        reasons["clip_score"] = "there are no prompts."
    elif not has_scorer:
        reasons["clip_score"] = f"extractor {config.extractor!r} reads no text; pass a clip_model."
    return reasons


def _measure(
    config: EvaluationConfig, reference: Reference, work: Path, device: torch.device, omitted: set[str]
) -> list[dict]:
    """The metrics of every repeat, and the seeds of its samples."""
    real = None if reference.features is None else reference.features.to(device)
    gaussian = reference.gaussian
    if gaussian is None and "fid" not in omitted:
        gaussian = Gaussian.of(real)
    elif gaussian is not None:
        gaussian = Gaussian(gaussian.mu.to(device), gaussian.sigma.to(device))
    if "precision" not in omitted:
        radii = neighbour_radii(real, (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS))
    repeats = []
    for repeat in range(config.repeats):
        found = read_features(work / f"samples-{repeat}")
        features = found["features"].to(device)
        values = dict.fromkeys(METRICS)
        if "fid" not in omitted:
            values["fid"] = frechet_distance(Gaussian.of(features), gaussian)
        if "kid" not in omitted:
            size = min(KID_SUBSET_SIZE, len(features), len(real))
            values["kid"] = kernel_distance(features, real, subset_size=size)
        if "inception_score" not in omitted:
            values["inception_score"] = inception_score(found["logits"])
        if "precision" not in omitted:
            values |= neighbour_metrics(features, real, radii)
        if "clip_score" not in omitted:
            values["clip_score"] = float(found["similarity"].double().mean())
        first = config.seed + repeat * config.num_samples
        repeats.append(values | {"seeds": [first, first + config.num_samples - 1]})
    return repeats


def _over(repeats: list[dict], reduction) -> dict:
    """Every metric over the repeats, by what `reduction` says for its name; `None` stays."""
    over = {}
    for name in METRICS:
        values = [repeat[name] for repeat in repeats]
        over[name] = None if None in values else reduction(name)(values)
    return over


def _constants(config: EvaluationConfig, reference: Reference, prompts: list[str] | None, state: PartialState) -> dict:
    """What else the figures depend on, or should not."""
    m = None if reference.features is None else len(reference.features)
    return {
        "num_reference_images": m,
        "reference_statistics": "from the file" if reference.gaussian is not None else "from the images",
        "num_prompts": None if prompts is None else len(prompts),
        "batch_size": config.batch_size,
        "num_processes": state.num_processes,
        "quantisation": "8 bits",
        "kid_subsets": KID_SUBSETS,
        "kid_subset_size": None if m is None else min(KID_SUBSET_SIZE, config.num_samples, m),
        "inception_score_splits": INCEPTION_SCORE_SPLITS,
        "precision_recall_neighbours": PRECISION_NEIGHBOURS,
        "density_coverage_neighbours": DENSITY_NEIGHBOURS,
    }


def _last_part(place: str) -> str:
    """Of a path on this machine the last part, of a Hub id all of it."""
    return os.path.basename(os.path.abspath(place)) if os.path.exists(place) else place
