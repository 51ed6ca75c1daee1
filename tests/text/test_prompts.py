import json
import re

import datasets
import pytest
from huggingface_hub import HfApi, HfFileSystem

from pid_diffusers import InputError
from pid_diffusers.text import load_prompts

ROWS = {"text": ["a red fox", "a blue fox", "a red fox"], "number": [1, 2, 3]}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Where `datasets` keeps its copies of what it reads."""
    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def save(tmp_path):
    """Writes a table in the format that the name of the file says."""

    def write(name: str, columns: dict | None = None) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(columns or ROWS)
        if path.suffix == ".jsonl":
            table.to_json(path)
        elif path.suffix == ".json":
            table.to_json(path, lines=False)
        else:
            getattr(table, f"to_{path.suffix[1:]}")(path)
        return str(path)

    return write


def refusal(*args, **kwargs) -> str:
    """The message of the error, which is one sentence."""
    with pytest.raises(InputError) as caught:
        load_prompts(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


def test_a_text_file_has_a_prompt_a_line_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox\r\n\r\n \t\n  ein Fuchs \nキツネ\u2028\x0bлиса\x85x\na fox".encode())
    expected = ["a fox", "ein Fuchs", "キツネ\u2028\x0bлиса\x85x", "a fox"]
    assert load_prompts(str(path)) == expected
    assert load_prompts(str(path), max_prompts=2) == expected[:2]
    assert load_prompts(str(path), max_prompts=9, streaming=True) == expected


def test_a_text_file_is_read_only_as_far_as_needed(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(b"a fox\n" * 100_000 + b"\xff\n")
    assert load_prompts(str(path), max_prompts=3) == ["a fox"] * 3
    assert "which is not UTF-8 text (invalid start byte); save it as UTF-8" in refusal(str(path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.json", "rows.jsonl", "ROWS[1]*.CSV"])
def test_tables_are_read_in_order_with_their_duplicates(name, streaming, save):
    path = save(name.lower())
    assert load_prompts(path, max_prompts=9, streaming=streaming) == ROWS["text"]
    assert load_prompts(path, max_prompts=2, streaming=streaming) == ROWS["text"][:2]


def test_a_folder_is_read_by_split(save, tmp_path):
    save("folder/train.parquet")
    save("folder/test.parquet", {"text": ["a test"]})
    assert load_prompts(str(tmp_path / "folder")) == ROWS["text"]
    assert load_prompts(str(tmp_path / "folder"), split="test") == ["a test"]
    assert load_prompts(str(tmp_path / "folder"), split="train[1:]") == ROWS["text"][1:]


def test_a_stream_is_read_only_as_far_as_needed(save, tmp_path):
    save("folder/part-0.parquet")
    (tmp_path / "folder" / "part-1.parquet").write_bytes(b"damaged")
    folder = str(tmp_path / "folder")
    assert load_prompts(folder, max_prompts=3, streaming=True) == ROWS["text"]
    assert "minimum file footer" in refusal(folder, max_prompts=4, streaming=True)
    assert "minimum file footer" in refusal(folder)


def test_a_list_of_captions_counts_one_each(save):
    path = save("rows.parquet", {"captions": [["a fox", " "], [], ["a dog", "a hound"]]})
    assert load_prompts(path, "captions") == ["a fox", "a dog", "a hound"]
    assert load_prompts(path, "captions", max_prompts=2, streaming=True) == ["a fox", "a dog"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_answered_with_those_there_are(streaming, save):
    path = save("rows.csv")
    assert refusal(path, "txt", 3, streaming).endswith("are text, number; did you mean 'text'?")
    assert refusal(path, "caption", 3, streaming) == (
        f"caption_column is 'caption', but the columns of {path!r} are text, number; name the one with the captions."
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "what"), [(5, "of type int, not text"), (None, "missing"), (["a dog", 1.5], "of type float, not text")]
)
def test_a_caption_that_is_not_text_is_named_by_its_row(value, what, streaming, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["a fox", value]))
    message = refusal(str(path), "text", 9, streaming)
    assert f"caption_column is 'text', in whose row 1 (the first is 0) a caption is {what};" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_not_there_is_answered_with_those_that_are(streaming, save):
    path = save("rows.csv")
    message = refusal(path, max_prompts=1, streaming=streaming, split="test")
    assert re.search(r"split is 'test', which .* does not have \(.*\['train'\]\); pass one that it has", message)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "\n \n"), ("a.txt", ""), ("a.csv", ""), ("a.csv", "text\n"), ("a.jsonl", "")]
)
def test_an_empty_file_is_refused(name, content, streaming, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    assert refusal(str(path), max_prompts=1, streaming=streaming).startswith(
        f"prompts is {str(path)!r}, which is empty"
    )


def test_a_table_without_rows_is_refused(tmp_path):
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": []}).to_parquet(path)
    assert "which is empty; pass one with a prompt at least." in refusal(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"text\n\xff\xfe\n", "'utf-8' codec can't decode"),
        ("a.jsonl", b'{"text":', "JSON parse error"),
        ("a.parquet", b"nothing", "Parquet"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(name, content, reason, streaming, tmp_path, caplog):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(str(path), max_prompts=1, streaming=streaming)
    assert message.startswith(f"prompts is {str(path)!r}, which cannot be loaded ({reason}")
    assert not [record for record in caplog.records if record.name.startswith("datasets")]


def test_a_folder_without_data_is_refused_with_the_reason(tmp_path):
    assert "doesn't contain any data files" in refusal(str(tmp_path))
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    assert "save_to_disk" in refusal(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "name", ["no-such-file.txt", "no/such/folder", "./nothing", "nothing.parquet", "what is it?", ""]
)
def test_a_path_that_is_not_there_is_not_asked_for_on_the_hub(name):
    assert refusal(name).startswith(f"prompts is {name!r}, which is no file or folder; pass a text file")


def test_numbers_of_prompts_and_streams_without_end_are_refused(tmp_path):
    assert refusal("prompts.txt", max_prompts=0) == "max_prompts is 0; pass 1 or more, or leave it out for all."
    assert refusal("prompts.txt", streaming=True).startswith(
        "streaming is on and max_prompts is None; set max_prompts"
    )


@pytest.fixture
def foxes(hub, monkeypatch, save):
    """The id of a data set on the Hub of this machine."""
    # `datasets` has read the Hub's address already, when it was imported; the file system keeps its connections
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    HfFileSystem.clear_instance_cache()
    api = HfApi(endpoint=hub.endpoint)
    api.create_repo("foxes", repo_type="dataset", private=True)
    files = {"train.parquet": save("rows.parquet"), "test.parquet": save("test.parquet", {"text": ["a test"]})}
    for name, path in files.items():
        api.upload_file(path_or_fileobj=path, path_in_repo=f"data/{name}", repo_id="ada/foxes", repo_type="dataset")
    yield "ada/foxes"
    HfFileSystem.clear_instance_cache()


def test_a_dataset_comes_from_the_hub_by_its_id(foxes):
    assert load_prompts(foxes) == ROWS["text"]
    assert load_prompts(foxes, max_prompts=2, streaming=True) == ROWS["text"][:2]
    assert load_prompts(foxes, split="test") == ["a test"]


def test_what_is_missing_on_the_hub_is_named(foxes):
    assert refusal(foxes, "texts").endswith("the columns of 'ada/foxes' are text, number; did you mean 'text'?")
    assert "split is 'validation', which 'ada/foxes' does not have" in refusal(foxes, split="validation")
    start = "prompts is 'ada/wolves', which is no file or folder here and cannot be loaded from the Hub ("
    assert refusal("ada/wolves").startswith(start)
