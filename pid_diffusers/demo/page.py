"""The page: controls on one side, student and teacher on the other. The only module here that imports gradio."""

import base64
import functools
import html
import io
import math
from collections.abc import Sequence

import gradio as gr
from PIL import Image

from ..errors import InputError
from .model import Comparison, DemoModel, Picture, Sample, contact_sheet

LEVELS = 100  # positions of the slider between T and ε
HEUN_STEPS = 35
MAX_IMAGES = 64
ENLARGED = 512  # pixels, about; images that are smaller can be saved enlarged, too

CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto; }
.gradio-container .main.app { padding: clamp(14px, 4vw, 32px) !important; }
.gradio-container .html-container { padding: 0; }
#pid-head h1 { font-size: 1.6rem; font-weight: 650; margin: 0 0 .3rem; overflow-wrap: anywhere; }
#pid-head p, #pid-many-head p { color: var(--body-text-color-subdued); line-height: 1.5; max-width: 105ch; margin: 0; }
#pid-head sub { color: inherit; }
#pid-main { display: grid; grid-template-columns: 280px minmax(0, 1fr); grid-template-rows: auto 1fr;
  grid-template-areas: "controls stage" "compare stage"; gap: 16px 32px; align-items: start; margin-top: 4px; }
#pid-controls { grid-area: controls; min-width: 0 !important; }
#pid-stage { grid-area: stage; min-width: 0 !important; gap: 8px; }
#pid-compare { grid-area: compare; min-width: 0 !important; }
.pid-pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 24px; }
.pid-figure { margin: 0; min-width: 0; }
.pid-figure figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 10px; margin-bottom: 8px;
  font-size: .9rem; }
.pid-figure figcaption b { font-weight: 650; font-size: 1rem; }
.pid-figure figcaption span:last-child { margin-left: auto; }
.pid-figure figcaption span, .pid-saves { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.pid-frame { width: 100%; border-radius: 8px; overflow: hidden; background: var(--background-fill-secondary);
  box-shadow: 0 0 0 1px var(--border-color-primary); }
.pid-frame img { display: block; width: 100%; height: auto; }
.pid-crisp { image-rendering: pixelated; }
.pid-empty { display: flex; align-items: center; justify-content: center; text-align: center; padding: 24px 12px;
  box-sizing: border-box; background: none; box-shadow: none; border: 1px dashed var(--border-color-primary);
  color: var(--body-text-color-subdued); font-size: .9rem; line-height: 1.45; overflow-wrap: anywhere; }
.pid-saves { margin-top: 6px; font-size: .85rem; }
.pid-saves a { color: inherit; text-decoration: underline; text-underline-offset: 3px; white-space: nowrap;
  display: inline-block; padding: 4px 1px; }
.pid-saves a:hover { color: var(--body-text-color); }
.pid-times { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px 20px; padding: 6px 13px; }
.pid-times div { font-size: .85rem; line-height: 1.35; color: var(--body-text-color-subdued); }
.pid-times b { display: block; font-size: 1.3rem; font-weight: 650; color: var(--body-text-color);
  font-variant-numeric: tabular-nums; }
#pid-stage .form { background: none; border: none; box-shadow: none; }
#pid-level { border: none; background: none; padding: 4px 0 0; box-shadow: none; }
#pid-level .tab-like-container, #pid-level .min_value, #pid-level .max_value { display: none; }
#pid-level input[type=range] { height: 24px; }
.pid-ticks { position: relative; height: 1.3rem; margin: -6px 8px 0; font-size: .8rem;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.pid-ticks i { position: absolute; transform: translateX(-50%); font-style: normal; white-space: nowrap; }
.pid-ticks i:first-child { transform: translateX(-8px); }
.pid-ticks i:last-child { transform: translateX(calc(-100% + 8px)); }
.pid-note { font-size: .85rem; line-height: 1.5; color: var(--body-text-color-subdued); margin: 6px 0 0;
  max-width: 100ch; }
.pid-grid { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 12px; }
.pid-grid figure { margin: 0; min-width: 0; }
.pid-grid figcaption { font-size: .75rem; margin-top: 4px; color: var(--body-text-color-subdued); white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; font-variant-numeric: tabular-nums; }
#pid-many { display: grid; grid-template-columns: 280px minmax(0, 1fr); gap: 16px 32px; align-items: start; }
#pid-many > .column { min-width: 0 !important; }
#pid-many-head { margin-top: 20px; padding-top: 20px; border-top: 1px solid var(--border-color-primary); }
#pid-many-head h2 { font-size: 1.2rem; font-weight: 650; margin: 0 0 .2rem; }
#pid-other { margin-top: 20px; }
.pid-status { font-size: .9rem; line-height: 1.5; overflow-wrap: anywhere; margin: 0; }
.pid-status.failed { border-left: 3px solid #dc2626; padding-left: 10px; }
@media (max-width: 760px) {
  #pid-main, #pid-many { grid-template-columns: minmax(0, 1fr); grid-template-rows: none; }
  #pid-main { grid-template-areas: "controls" "stage" "compare"; }
  #pid-controls .form { flex-direction: row; flex-wrap: wrap; }
  #pid-class, #pid-seed { flex: 1 1 0; min-width: 120px; }
  .pid-pair { gap: 12px; }
  .pid-near-end { display: none; }
  .pid-figure figcaption { font-size: .8rem; gap: 0 6px; }
  .pid-figure figcaption b { font-size: .9rem; }
  .pid-figure figcaption span:last-child { margin-left: 0; flex-basis: 100%; }
  .pid-saves { font-size: .8rem; }
  .pid-saves a { padding: 8px 1px; }
  .pid-grid { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px; }
}
"""

# Saves the picture that is shown: its own bytes, or with each pixel as a square of `scale` pixels.
HEAD = """
<script>
function pidSave(link, scale) {
  const picture = link.closest(".pid-picture");
  const image = picture.querySelector("img[hidden]") || picture.querySelector("img");
  if (scale === 1) { link.href = image.src; return; }
  const canvas = document.createElement("canvas");
  canvas.width = scale * image.naturalWidth;
  canvas.height = scale * image.naturalHeight;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  link.href = canvas.toDataURL("image/png");
}
</script>
"""

# of the visitor's own system: nothing is fetched from elsewhere
FONTS = ("system-ui", "sans-serif")

THEME = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=("monospace",)).set(
    body_text_color_subdued="*neutral_600",  # the theme's own grays and its button are hard to read
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
)

LOOK = {
    "theme": THEME,
    "css": CSS,
    "head": HEAD,
    "footer_links": [],
}


def build(model: DemoModel, title: str | None = None, other_models: bool = False) -> gr.Blocks:
    """
    The page for a model; `build(model).launch(**LOOK)` serves it.

    Args:
        model (`DemoModel`): what it shows at first.
        title (`str`, *optional*): its heading; by default the name of the model that is shown.
        other_models (`bool`, defaults to `False`): whether a visitor can open other folders and Hub ids. Only for a
            page that nobody else can reach: it opens any folder of this machine.
    """

    @_warns
    def show(opened, seed, label, prompt, position, comparison):
        if seed is None:  # about to be typed
            return gr.skip()
        current = opened or model
        sample, t = Sample(seed, label, prompt), current.noise_level(position / LEVELS)
        fits = comparison is not None and comparison.model is current and comparison.sample == sample
        fitting = comparison if fits else None
        return stage_html(current, sample, current.point(sample, t), fitting), times_html(fitting)

    @_warns
    def compare(opened, seed, label, prompt, heun_steps, progress=gr.Progress()):  # noqa: B008 - gradio's way
        current = opened or model
        report = functools.partial(progress, desc="Solving the teacher's ODE")
        return current.compare(Sample(seed, label, prompt), heun_steps, report)

    @_warns
    def many(opened, seed, label, prompt, count, one_class):
        current = opened or model
        samples = current.samples(count, seed, label if one_class == ONE_CLASS else None, prompt)
        return grid_html(current, samples, current.grid(samples))

    def open_other(name, teacher):
        try:
            opened = DemoModel.load(name, teacher.strip() or None)
        except InputError as error:
            return [_status(f"Could not open it: {error}", failed=True), *[gr.skip()] * len(of_model)]
        return [
            _status(f"{opened.name} is open."),
            opened,
            None,
            *(gr.update(**properties) for properties in model_properties(opened, opened.name)),
        ]

    first = model_properties(model, title or model.name)
    with gr.Blocks(title=title or model.name, analytics_enabled=False) as blocks:
        opened, comparison = gr.State(None), gr.State(None)
        head = gr.HTML(**first[0], elem_id="pid-head")
        with gr.Row(elem_id="pid-main"):
            with gr.Column(elem_id="pid-controls"):
                label = gr.Dropdown(**first[1], label="Class", elem_id="pid-class")
                prompt = gr.Textbox(**first[2], label="Prompt", placeholder="Press Enter to generate", lines=1)
                seed = gr.Number(0, label="Seed", precision=0, elem_id="pid-seed")
                new_seed = gr.Button("New random seed", variant="primary", elem_id="pid-new-seed")
            with gr.Column(elem_id="pid-stage"):
                stage = gr.HTML(elem_id="pid-pictures")
                level = gr.Slider(0, LEVELS, LEVELS, step=0.5, label="Noise level t", buttons=[], elem_id="pid-level")
                ticks = gr.HTML(**first[3])
            with gr.Column(elem_id="pid-compare", visible=first[4]["visible"]) as compare_column:
                heun_steps = gr.Slider(
                    *(1, 100, HEUN_STEPS),
                    step=1,
                    label="Teacher’s Heun steps",
                    info="Two network calls each",
                    buttons=[],
                    elem_id="pid-steps",
                )
                compare_button = gr.Button("Compare with the teacher", elem_id="pid-compare-button")
                times = gr.HTML(elem_id="pid-times")
        gr.HTML(
            "<h2>Many images</h2><p>The seeds from the one above on, all in one network call.</p>",
            elem_id="pid-many-head",
        )
        with gr.Row(elem_id="pid-many"):
            with gr.Column():
                one_class = gr.Radio(**first[5], label="Classes", elem_id="pid-which")
                count = gr.Slider(1, MAX_IMAGES, 16, step=1, label="Number of images", buttons=[], elem_id="pid-count")
                many_button = gr.Button("Draw them", elem_id="pid-many-button")
            with gr.Column():
                grid = gr.HTML(EMPTY_GRID, elem_id="pid-grid")
        if other_models:
            with gr.Accordion("Open another student", open=False, elem_id="pid-other"):
                with gr.Row():
                    name = gr.Textbox(
                        label="Student",
                        placeholder="a folder or a Hub id",
                        max_lines=1,
                        min_width=220,
                        elem_id="pid-name",
                    )
                    teacher = gr.Textbox(
                        label="Teacher",
                        placeholder="by default as the student’s files say",
                        max_lines=1,
                        min_width=220,
                        elem_id="pid-teacher",
                    )
                open_button = gr.Button("Open", elem_id="pid-open")
                status = gr.HTML(elem_id="pid-status")

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        shown_by = [opened, seed, label, prompt, level, comparison]
        triggers = [blocks.load, seed.change, label.input, prompt.submit, level.input]
        gr.on(triggers, show, shown_by, [stage, times], trigger_mode="always_last", **quiet)
        new_seed.click(None, None, seed, js="() => Math.floor(Math.random() * 100000)", **quiet)
        gr.on(
            compare_button.click,
            compare,
            [opened, seed, label, prompt, heun_steps],
            comparison,
            show_progress="full",
            show_progress_on=compare_button,
            api_visibility="private",
        ).success(show, shown_by, [stage, times], **quiet)
        gr.on(
            many_button.click,
            many,
            [opened, seed, label, prompt, count, one_class],
            grid,
            show_progress="minimal",
            api_visibility="private",
        )
        if other_models:
            of_model = [opened, comparison, head, label, prompt, ticks, compare_column, one_class]
            gr.on(
                [open_button.click, name.submit, teacher.submit],
                open_other,
                [name, teacher],
                [status, *of_model],
                show_progress="minimal",
                api_visibility="private",
            ).then(show, shown_by, [stage, times], **quiet)
    return blocks


ALL_CLASSES, ONE_CLASS = "All in turn", "The one above"
EMPTY_GRID = '<div class="pid-frame pid-empty">The images come here.</div>'


def model_properties(model: DemoModel, title: str) -> list[dict]:
    """What depends on the model: heading, class, prompt, ticks, comparison, classes of the grid."""
    conditional = model.num_classes is not None
    classes = list(range(model.num_classes or 1))
    return [
        {"value": head_html(title)},
        {"choices": [(str(label), label) for label in classes], "value": 0 if conditional else None}
        | {"visible": conditional},
        {"value": "", "visible": model.takes_prompt},
        {"value": ticks_html(model)},
        {"visible": model.teacher is not None},
        {"choices": [ALL_CLASSES, ONE_CLASS], "value": ALL_CLASSES, "visible": conditional},
    ]


def head_html(title: str) -> str:
    return (
        f"<h1>{html.escape(title)}</h1>"
        "<p>Physics Informed Distillation trains a student x<sub>θ</sub>(z,&nbsp;t) to be the solution of a diffusion"
        " model’s own differential equation, from that equation alone. One network call then turns noise z into an"
        " image, where its teacher needs dozens.</p>"
    )


def stage_html(model: DemoModel, sample: Sample, picture: Picture, comparison: Comparison | None) -> str:
    """Student and teacher beside each other at the same noise level, as nearly as the teacher's steps allow."""
    took = "1 call" if comparison is None else f"1 call, {_duration(comparison.student_seconds)}"
    student = _figure(model, sample, "Student", picture.t, took, picture.image)
    if comparison is not None:
        took = f"{2 * comparison.heun_steps} calls, {_duration(comparison.teacher_seconds)}"
        t, image = comparison.nearest(picture.t)
        return f'<div class="pid-pair">{student}{_figure(model, sample, "Teacher", t, took, image)}</div>'
    empty = html.escape(
        model.no_teacher or "Press “Compare with the teacher” to solve the teacher’s equation from the same noise."
    )
    width, height = picture.image.size
    return (
        f'<div class="pid-pair">{student}<figure class="pid-figure"><figcaption><b>Teacher</b><span>&nbsp;</span>'
        f'</figcaption><div class="pid-frame pid-empty" style="aspect-ratio: {width} / {height}">{empty}</div>'
        "</figure></div>"
    )


def times_html(comparison: Comparison | None) -> str:
    """What student and teacher took, and how far their images are from each other."""
    if comparison is None:
        return ""
    ratio = comparison.speedup
    tiles = (
        (_duration(comparison.student_seconds), "student, 1 call"),
        (_duration(comparison.teacher_seconds), f"teacher, {2 * comparison.heun_steps} calls"),
        (f"{ratio:.0f} ×" if ratio >= 10 else f"{ratio:.1f} ×", "as fast, measured on this machine"),
        (f"{comparison.rms_distance:.2g}", "rms distance of the images in [−1, 1]"),
    )
    return f'<div class="pid-times">{"".join(f"<div><b>{value}</b>{name}</div>" for value, name in tiles)}</div>'


def ticks_html(model: DemoModel) -> str:
    """The slider's scale: T, the powers of ten, ε; and what it shows."""
    high, low = model.sigma_max, model.sigma_min
    powers = [10.0**k for k in range(math.floor(math.log10(high)), math.ceil(math.log10(low)) - 1, -1)]
    span = math.log(high / low)
    middle = [t for t in powers if 0.1 < math.log(high / t) / span < 0.9]
    marks = [(0, _number(high)), *((math.log(high / t) / span, _number(t)) for t in middle), (1, _number(low))]
    scale = "".join(
        f'<i class="{"pid-near-end" if 0.8 < position < 1 else ""}" style="left: {100 * position:.2f}%">{text}</i>'
        for position, text in marks
    )
    return (
        f'<div class="pid-ticks" aria-hidden="true">{scale}</div>'
        '<p class="pid-note">Drag from noise, on the left, to the image: every position is one new network call from'
        " the same z. Shown is x / √(1 + t²), which keeps noise as bright as an image; the teacher at its step nearest"
        " to t.</p>"
    )


def grid_html(model: DemoModel, samples: Sequence[Sample], images: Sequence[Image.Image]) -> str:
    """The images with their seeds, and links that save all of them as one."""
    figures = []
    for sample, image in zip(samples, images, strict=True):
        name = f"seed {sample.seed}" if sample.label is None else f"{sample.label} · seed {sample.seed}"
        frame = f'<div class="pid-frame">{_img(image, _sample_words(sample))}</div>'
        figures.append(f"<figure>{frame}<figcaption>{name}</figcaption></figure>")
    sheet = contact_sheet(images, math.ceil(math.sqrt(len(images))))
    source = f'<img hidden alt="" src="{_data_uri(sheet)}">'
    saves = _saves(sheet, _file_name(model, samples[0], f"{len(images)}-images"), min(images[0].size))
    return f'<div class="pid-picture"><div class="pid-grid">{"".join(figures)}</div>{source}{saves}</div>'


def _figure(model: DemoModel, sample: Sample, name: str, t: float, took: str, image: Image.Image) -> str:
    level = _number(t)
    file_name = _file_name(model, sample, f"{name.lower()}-t{level}")
    return (
        f'<figure class="pid-figure pid-picture"><figcaption><b>{name}</b><span>t = {level}</span><span>{took}</span>'
        f'</figcaption><div class="pid-frame">{_img(image, f"{name}, {_sample_words(sample)}, t = {level}")}</div>'
        f"{_saves(image, file_name, min(image.size))}</figure>"
    )


def _img(image: Image.Image, alt: str) -> str:
    crisp = ' class="pid-crisp"' if max(image.size) < ENLARGED // 2 else ""
    return f'<img{crisp} alt="{html.escape(alt)}" src="{_data_uri(image)}">'


def _saves(image: Image.Image, file_name: str, size: int) -> str:
    """Links that save the picture at its own size and, if `size` is small, enlarged."""
    scales = [1, *([ENLARGED // size] if ENLARGED // size > 1 else [])]
    links = (
        f'<a href="#" download="{html.escape(file_name)}{"" if scale == 1 else f"-x{scale}"}.png"'
        f' title="Save as PNG" onclick="pidSave(this, {scale})">{scale * image.width} × {scale * image.height}</a>'
        for scale in scales
    )
    return f'<div class="pid-saves">PNG {" · ".join(links)}</div>'


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sample_words(sample: Sample) -> str:
    condition = "" if sample.label is None else f"class {sample.label}, "
    condition += f"“{sample.prompt}”, " if sample.prompt else ""
    return f"{condition}seed {sample.seed}"


def _file_name(model: DemoModel, sample: Sample, ending: str) -> str:
    label = "" if sample.label is None else f"-class{sample.label}"
    return f"{model.name.replace('/', '-')}{label}-seed{sample.seed}-{ending}"


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{seconds:.2g} s"


def _status(text: str, failed: bool = False) -> str:
    return f'<p class="pid-status{" failed" if failed else ""}" role="status">{html.escape(text)}</p>'


def _warns(function):
    """What the visitor asked for and cannot be had is said, and what is shown stays as it is."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except InputError as error:
            gr.Warning(str(error), title="Please check")
            return gr.skip()

    return wrapped
