"""The page as a visitor has it, in a browser."""

import base64
import io
import re
import socket
import sys

import pytest
from PIL import Image

from pid_diffusers import InputError, OneStepPIDPipeline, PIDScheduler
from pid_diffusers.demo import DemoModel, Sample, launch

pytest.importorskip("gradio")

PICTURES = "#pid-pictures .pid-figure img"


@pytest.fixture(scope="module")
def address(folders):
    blocks = launch(folders / "student", block=False)
    yield blocks.local_url
    blocks.close(verbose=False)


@pytest.fixture
def open_page(browser, address):
    """Opens the page for a visitor; at the end nothing may have gone wrong, and nothing come from elsewhere."""
    contexts, troubles = [], []

    def opened(url=address, **kwargs):
        context = browser.new_context(viewport={"width": 1280, "height": 800}, **kwargs)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: _is_ours(request.url) or troubles.append(request.url))
        page.goto(url)
        page.wait_for_selector(PICTURES)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def _is_ours(url):
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


def picture(page, index=0, selector=PICTURES):
    """What a picture on the page holds, once it has come."""
    source = page.locator(selector).nth(index).get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))


def wait_for_caption(page, text, index=0):
    page.locator(".pid-figure figcaption").nth(index).filter(has_text=text).wait_for()


def choose_class(page, label):
    page.click("#pid-class input")
    page.get_by_role("option", name=str(label), exact=True).click()
    page.wait_for_selector(f'{PICTURES}[alt*="class {label},"]')


def seed_of(page):
    return int(page.input_value("#pid-seed input"))


def move_to(page, position):
    page.focus("#pid-level input[type=range]")
    page.evaluate(
        """position => {
            const slider = document.querySelector("#pid-level input[type=range]");
            slider.value = position;
            slider.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        position,
    )


def saved(page, link):
    with page.expect_download() as download:
        link.click()
    return download.value.suggested_filename, Image.open(download.value.path())


@pytest.fixture(scope="module")
def model(folders):
    return DemoModel.load(folders / "student")


def test_class_and_new_seed_make_the_students_image(open_page, model):
    page = open_page()
    assert picture(page).tobytes() == model.generate(Sample(0, 0)).image.tobytes()
    choose_class(page, 7)
    page.click("#pid-new-seed")
    page.wait_for_function("document.querySelector('#pid-seed input').value !== '0'")
    seed = seed_of(page)
    page.wait_for_selector(f'{PICTURES}[alt*="class 7, seed {seed},"]')
    assert picture(page).tobytes() == model.generate(Sample(seed, 7)).image.tobytes()
    page.fill("#pid-seed input", "123")
    page.wait_for_selector(f'{PICTURES}[alt*="seed 123,"]')
    assert picture(page).tobytes() == model.generate(Sample(123, 7)).image.tobytes()


def test_small_images_are_shown_large_and_crisp(open_page):
    page = open_page()
    assert page.locator(PICTURES).bounding_box()["width"] > 300
    assert page.locator(PICTURES).evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"


def test_the_slider_shows_the_points_of_the_trajectory_while_it_is_dragged(open_page, model):
    page = open_page()
    page.focus("#pid-level input[type=range]")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    t = model.noise_level(0.98)
    wait_for_caption(page, f"t = {t:.2g}")
    assert picture(page).tobytes() == model.point(Sample(0, 0), t).image.tobytes()

    page.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => window.seen.add(document.querySelector(".pid-figure figcaption").textContent);
            new MutationObserver(look).observe(document.querySelector("#pid-pictures"),
                { childList: true, subtree: true, characterData: true });
        }"""
    )
    box = page.locator("#pid-level input[type=range]").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] / 2)
    page.mouse.down()
    for part in range(19, -1, -1):
        page.mouse.move(box["x"] + box["width"] * part / 20, box["y"] + box["height"] / 2)
        page.wait_for_timeout(30)
    wait_for_caption(page, "t = 80")  # the button is still held
    assert picture(page).tobytes() == model.point(Sample(0, 0), 80.0).image.tobytes()
    assert len(page.evaluate("[...window.seen]")) > 3
    page.mouse.up()


def test_the_teacher_stands_beside_the_student_with_both_times(open_page, model):
    page = open_page()
    choose_class(page, 3)
    page.fill("#pid-steps input[type=number]", "12")
    page.click("#pid-compare-button")
    page.wait_for_selector("#pid-times .pid-times")
    tiles = page.inner_text("#pid-times")
    assert re.search(r"[\d.]+ m?s\s+student, 1 call\s+[\d.]+ m?s\s+teacher, 24 calls\s+[\d.]+ ×", tiles), tiles
    teacher = model.compare(Sample(0, 3), 12)
    assert picture(page, 0).tobytes() == model.generate(Sample(0, 3)).image.tobytes()
    assert picture(page, 1).tobytes() == teacher.points[-1][1].tobytes()

    move_to(page, 50)
    t, image = teacher.nearest(model.noise_level(0.5))
    wait_for_caption(page, f"t = {t:.2g}", 1)
    assert picture(page, 1).tobytes() == image.tobytes()

    page.click("#pid-new-seed")  # another start: the old solution is gone
    page.wait_for_selector(".pid-figure .pid-empty")
    assert page.locator(PICTURES).count() == 1 and page.inner_text("#pid-times") == ""


def test_pictures_are_saved_at_their_own_size_and_enlarged(open_page, model):
    page = open_page()
    links = page.locator(".pid-figure .pid-saves a")
    name, image = saved(page, links.nth(0))
    assert name == "student-class0-seed0-student-t0.002.png"
    assert image.format == "PNG" and image.tobytes() == model.generate(Sample(0, 0)).image.tobytes()
    name, enlarged = saved(page, links.nth(1))
    assert name.endswith("-x64.png") and enlarged.size == (512, 512)
    assert enlarged.convert("RGB").tobytes() == image.resize((512, 512), Image.Resampling.NEAREST).tobytes()


def test_many_images_are_drawn_and_saved_as_one(open_page, model):
    page = open_page()
    page.fill("#pid-seed input", "5")
    page.fill("#pid-count input[type=number]", "12")
    page.click("#pid-many-button")
    page.wait_for_selector(".pid-grid img")
    drawn = [picture(page, i, ".pid-grid img").tobytes() for i in range(page.locator(".pid-grid img").count())]
    assert drawn == [image.tobytes() for image in model.grid(model.samples(12, seed=5))]
    _, sheet = saved(page, page.locator("#pid-grid .pid-saves a").first)
    assert sheet.size == (32, 24)
    page.check("#pid-which input[value='The one above']")
    page.click("#pid-many-button")
    page.wait_for_selector('.pid-grid img[alt="class 0, seed 16"]')


def test_a_wrong_path_is_answered_in_a_sentence(open_page):
    page = open_page()
    page.click("#pid-other > button")
    for name, answer in (("/no/such", "which is not a folder"), ("", "model is empty")):
        page.fill("#pid-name input", name)
        page.click("#pid-open")
        page.locator(".pid-status.failed", has_text=answer).wait_for()
    assert "Traceback" not in page.content() and page.locator(".toast-body").count() == 0
    assert page.locator(PICTURES).count() == 1


def test_a_seed_out_of_range_is_answered_in_a_sentence(open_page):
    page = open_page()
    page.fill("#pid-seed input", "-1")
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "seed is -1; choose a whole number" in toast.inner_text() and "Error" not in toast.inner_text()
    assert page.locator(PICTURES).count() == 1


def test_an_empty_seed_is_answered_where_one_is_needed(open_page):
    page = open_page()
    page.fill("#pid-seed input", "")
    page.click("#pid-many-button")
    page.locator(".toast-body", has_text="seed is None; choose a whole number").wait_for()
    assert page.locator(PICTURES).count() == 1


def test_a_text_is_asked_for_only_if_the_pipeline_takes_one(tiny_unet, model):
    class WithPrompt(OneStepPIDPipeline):
        def __call__(self, prompt=None, **kwargs):
            return super().__call__(**kwargs)

    from pid_diffusers.demo.page import build

    for student, asked in ((DemoModel(WithPrompt(tiny_unet(), PIDScheduler())), True), (model, False)):
        boxes = [b for b in build(student).blocks.values() if getattr(b, "label", None) == "Prompt"]
        assert [box.visible for box in boxes] == [asked]


def test_another_student_changes_the_page_of_its_visitor_alone(open_page, folders, model):
    ours, theirs = open_page(), open_page()
    ours.click("#pid-other > button")
    ours.fill("#pid-name input", str(folders / "plain"))
    ours.click("#pid-open")
    ours.wait_for_selector(f'{PICTURES}[alt^="Student, seed 0"]')
    assert ours.inner_text("h1") == "plain"
    assert not ours.is_visible("#pid-class") and not ours.is_visible("#pid-compare-button")
    assert "start the demo with --teacher FOLDER" in ours.inner_text(".pid-empty >> nth=0")
    assert picture(ours).mode == "L"

    choose_class(theirs, 9)
    assert theirs.inner_text("h1") == "student" and theirs.is_visible("#pid-compare-button")
    assert picture(theirs).tobytes() == model.generate(Sample(0, 9)).image.tobytes()
    move_to(ours, 0)
    wait_for_caption(ours, "t = 80")
    assert picture(ours).mode == "L"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_and_pictures_are_not_tiny(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.click("#pid-many-button")
    page.wait_for_selector(".pid-grid img")
    for width in (360, 390, 760, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for selector, least in ((PICTURES, 0.36), ("#pid-level input[type=range]", 0.7), ("#pid-new-seed", 0.7)):
            box = page.locator(selector).first.bounding_box()
            least *= width if width <= 760 else 280
            assert box["width"] >= least and box["x"] >= 0 and box["x"] + box["width"] <= width, (selector, width)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "/no/such"}, "model is '/no/such'"),
        ({"teacher": "/no/teacher"}, "teacher is '/no/teacher'"),
        ({"host": "192.0.2.1"}, "host is '192.0.2.1'"),
        ({"port": 99999}, "port is 99999"),
    ],
)
def test_nothing_is_served_if_an_argument_is_wrong(folders, kwargs, message):
    with pytest.raises(InputError, match=message):
        launch(**{"model": folders / "student", **kwargs}, block=False)


def test_a_port_in_use_is_named(folders):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"port is {port}, where nothing can listen"):
            launch(folders / "student", port=port, block=False)


@pytest.mark.parametrize(("host", "offered"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_other_models_are_offered_only_where_nobody_else_can_reach_the_page(folders, host, offered):
    blocks = launch(folders / "student", host=host, block=False)
    try:
        functions = {function.name for function in blocks.fns.values()}
        assert ("open_other" in functions) == offered
    finally:
        blocks.close(verbose=False)


def test_a_missing_gradio_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name == "pid_diffusers.demo.page"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("pid_diffusers.demo.page", raising=False)
    with pytest.raises(InputError, match="the demo needs gradio; pip install"):
        launch(folders / "student")


def test_a_prompt_is_drawn_when_it_is_entered(open_page, text_folder):
    blocks = launch(text_folder, block=False)
    try:
        page = open_page(blocks.local_url)
        before = picture(page).tobytes()
        page.get_by_label("Prompt").fill("a red fox")
        page.get_by_label("Prompt").press("Enter")
        page.wait_for_selector(f'{PICTURES}[alt*="“a red fox”"]')
        assert picture(page).tobytes() != before
        expected = DemoModel.load(text_folder).generate(Sample(0, None, "a red fox")).image
        assert picture(page).tobytes() == expected.tobytes()
        assert not page.locator("#pid-compare").is_visible() and not page.locator("#pid-class").is_visible()
    finally:
        blocks.close(verbose=False)
