"""The settings of an evaluation, and the names of what it measures."""

from dataclasses import dataclass, field

METRICS = ("fid", "kid", "inception_score", "precision", "recall", "density", "coverage", "clip_score")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluationConfig:
    """The settings of an evaluation, which are the flags of `pid-diffusers evaluate`."""

    model: str
    reference: str
    output: str = _option("results.json", "the file to write; features are kept in a folder beside it until then")
    num_samples: int = _option(50_000, "how many samples")
    batch_size: int = _option(64, "samples in a call of the model, in each process")
    seed: int = _option(0, "of sample 0; sample i has seed + i")
    repeats: int = _option(1, "how often to draw num_samples, each time with the next seeds")
    extractor: str = _option("inception", "inception, dinov2, clip, digits, or module:Class of your own")
    extractor_weights: str | None = _option(None, "its weights, a file or folder; default: they are downloaded")
    clip_model: str | None = _option(None, "a CLIP for the CLIP score, where the extractor is another one")
    prompts: str | None = _option(None, "of text-to-image models, in turn: a text file with one a line, or a data set")
    caption_column: str = _option("text", "of a data set of prompts")
    sampler: str = _option("pipeline", "of a teacher: heun, euler, or the name of a scheduler of diffusers")
    num_inference_steps: int | None = _option(None, "of a teacher; default: the pipeline's own")
    guidance_scale: float | None = _option(None, "default: the pipeline's own")
    reference_split: str = _option("train", "of a reference that is a data set")
    reference_column: str | None = _option(None, "its column with images; default: the first one that has any")
    save_images: str | None = _option(None, "a folder for the samples, as PNGs named by their numbers")
    save_reference: str | None = _option(None, "a .safetensors file for the reference's features, to be used as one")
    dtype: str = _option("float32", f"what the model computes in: {', '.join(DTYPES)}")
    device: str | None = _option(None, "cpu, cuda, …; default: what accelerate finds")
