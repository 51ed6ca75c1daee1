"""The tests' own Hub, asked by the real client."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Repo
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from safetensors.torch import save_file

import pid_diffusers

TEACHER = Path(pid_diffusers.__file__).parent / "assets" / "digits-teacher"

CARD = """---
license: creativeml-openrail-m
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [pid, one-step]
base_model: [ada/teacher]
base_model_relation: finetune
datasets: ylecun/mnist
widget: [{text: seven, output: {url: samples.png}}]
model-index:
- name: student
  results:
  - task: {type: unconditional-image-generation}
    dataset: {type: digits, name: Digits}
    metrics: [{type: distance, value: 0.137}]
---
# A student
"""

LOAD = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
for name in sys.argv[1:]:
    images = DiffusionPipeline.from_pretrained(name)(
        batch_size=2, class_labels=[3, 7], generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    numpy.save(sys.stdout.buffer, images)
"""


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint)


@pytest.fixture
def anyone(hub):
    return HfApi(endpoint=hub.endpoint, token=False)


@pytest.fixture
def folder(tmp_path):
    """A folder with a small text, a card, and weights in a folder of their own."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"size": 8}')
    (folder / "empty.bin").touch()
    save_file({"weight": torch.randn(100, 100)}, folder / "unet" / "weights.safetensors")
    return folder


def contents(folder: str | os.PathLike) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_folder_comes_back_as_it_was_sent(hub, api, folder, tmp_path):
    assert api.whoami()["name"] == hub.user
    assert api.create_repo("model").repo_id == "ada/model"
    commit = api.upload_folder(repo_id="ada/model", folder_path=folder, commit_message="First")

    repo = hub.repos["ada/model"]
    sent = contents(folder)
    assert {path: content for path, content in repo.files.items() if path != ".gitattributes"} == sent
    assert (repo.commits[-1].sha, repo.commits[-1].message) == (commit.oid, "First")
    assert sorted(repo.commits[-1].paths) == sorted(sent)
    assert [path for path, file in repo.head.tree.items() if file.lfs] == ["unet/weights.safetensors"]
    assert all(
        request.authorization == f"Bearer {hub.token}"
        for request in hub.requests
        if request.method == "POST" and request.path.startswith("/api/")
    )

    downloaded = contents(api.snapshot_download("ada/model", local_dir=tmp_path / "copy"))
    assert {path: content for path, content in downloaded.items() if path in repo.files} == repo.files
    assert Path(hf_hub_download("ada/model", "config.json")).read_text() == '{"size": 8}'


def test_the_same_folder_twice_is_one_commit(hub, api, folder):
    api.create_repo("model")
    first = api.upload_folder(repo_id="ada/model", folder_path=folder)
    assert api.upload_folder(repo_id="ada/model", folder_path=folder).oid == first.oid
    assert len(hub.repos["ada/model"].commits) == 2


def test_an_old_revision_stays(hub, api):
    api.create_repo("model")
    for content in (b"old", b"new"):
        operations = [CommitOperationAdd("a.txt", content), CommitOperationAdd("b.bin", content)]
        commit = api.create_commit("ada/model", operations, commit_message=content.decode())
    old = hub.repos["ada/model"].commits[-2].sha
    for name in ("a.txt", "b.bin"):
        assert Path(api.hf_hub_download("ada/model", name, revision=old)).read_bytes() == b"old"
        assert Path(api.hf_hub_download("ada/model", name)).read_bytes() == b"new"
    assert api.model_info("ada/model", revision=old).sha == old
    assert api.list_repo_refs("ada/model").branches[0].target_commit == commit.oid

    operations = [CommitOperationDelete("b.bin")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("ada/model", operations, commit_message="late", parent_commit=old)
    api.create_commit("ada/model", operations, commit_message="in time", parent_commit=commit.oid)
    assert api.list_repo_files("ada/model") == [".gitattributes", "a.txt"]


def test_a_model_is_described_as_the_client_expects(api, folder):
    api.create_repo("model", private=True)
    api.upload_folder(repo_id="ada/model", folder_path=folder, commit_message="First")

    info = api.model_info("ada/model", files_metadata=True)
    assert info.private and info.library_name == "diffusers" and info.pipeline_tag == "unconditional-image-generation"
    assert {"one-step", "diffusers", "base_model:ada/teacher", "license:creativeml-openrail-m"} <= set(info.tags)
    assert info.card_data.eval_results[0].metric_value == 0.137
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    weights = "unet/weights.safetensors"
    assert sizes[weights] == ((folder / weights).stat().st_size, True)
    assert sizes["config.json"] == (11, False)

    assert {entry.path for entry in api.list_repo_tree("ada/model")} == {
        ".gitattributes",
        "README.md",
        "config.json",
        "empty.bin",
        "unet",
    }
    entries = {entry.path: entry for entry in api.list_repo_tree("ada/model", recursive=True, expand=True)}
    assert entries[weights].last_commit.title == "First"
    assert entries[".gitattributes"].last_commit.title == "initial commit"
    assert [entry.path for entry in api.list_repo_tree("ada/model", "unet")] == [weights]
    assert [entry.path for entry in api.get_paths_info("ada/model", [weights, "none"])] == [weights]
    assert ModelCard.load("ada/model").data.license == "creativeml-openrail-m"


def test_a_file_is_served_in_parts_and_not_again(hub, api):
    api.create_repo("model")
    api.create_commit("ada/model", [CommitOperationAdd("a.bin", b"0123456789")], commit_message="First")
    get, url = get_session().get, f"{hub.endpoint}/ada/model/resolve/main/a.bin"
    part = get(url, headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"345", "bytes 3-5/10")
    assert get(url, headers={"Range": "bytes=8-"}).content == b"89"
    assert get(url, headers={"Range": "bytes=10-"}).status_code == 416
    assert get(url, headers={"If-None-Match": part.headers["ETag"]}).status_code == 304
    head = get_session().head(url)
    assert (head.content, head.headers["Content-Length"], head.headers["X-Linked-Size"]) == (b"", "10", "10")


def test_what_is_missing_has_the_client_s_own_error(hub, api, anyone, folder):
    api.create_repo("model")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ada/other")
    with pytest.raises(RepositoryNotFoundError):
        anyone.model_info("ada/other")
    with pytest.raises(RepositoryNotFoundError):
        api.upload_folder(repo_id="ada/other", folder_path=folder)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("ada/model", "config.json", revision="v2")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("ada/model", "config.json")


def test_a_private_repository_is_for_its_owner(hub, api, anyone, folder):
    api.create_repo("model", private=True)
    api.upload_folder(repo_id="ada/model", folder_path=folder)
    for read in (anyone.model_info, anyone.list_repo_files, anyone.snapshot_download):
        with pytest.raises(RepositoryNotFoundError, match="401 Client Error"):
            read("ada/model")
    assert Path(api.hf_hub_download("ada/model", "config.json")).exists()
    stranger = HfApi(endpoint=hub.endpoint, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        stranger.model_info("ada/model")


def test_only_the_owner_writes(hub, api, anyone, folder):
    api.create_repo("model")
    assert anyone.list_repo_files("ada/model") == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="401"):
        anyone.create_repo("other")
    with pytest.raises(HfHubHTTPError, match="401"):
        anyone.upload_folder(repo_id="ada/model", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match='namespace "bob"'):
        api.create_repo("bob/model")
    hub.repos["bob/model"] = Repo("bob/model")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api.upload_folder(repo_id="bob/model", folder_path=folder)


def test_a_repository_is_created_once(hub, api):
    api.create_repo("ada/model", private=True)
    with pytest.raises(HfHubHTTPError, match="409.*\n*.*already created"):
        api.create_repo("ada/model")
    assert api.create_repo("ada/model", exist_ok=True).repo_id == "ada/model"
    assert hub.repos["ada/model"].private


def test_injected_failures_reach_the_client(hub, api):
    api.create_repo("model")

    def commit(content: bytes):
        api.create_commit("ada/model", [CommitOperationAdd("a.txt", content)], commit_message="a")

    failure = hub.fail("POST .*/commit/", 500, times=1)
    with pytest.raises(HfHubHTTPError, match="500(.|\n)*We're working hard"):
        commit(b"a")
    assert failure.count == 1
    cut = hub.fail("POST .*/commit/", "cut", times=1)
    with pytest.raises(Exception, match="reset|Broken pipe"):
        commit(b"a" * 10**6)
    assert (failure.count, cut.count) == (1, 1)
    assert "a.txt" not in hub.repos["ada/model"].files
    commit(b"a")
    assert "a.txt" in hub.repos["ada/model"].files


def test_the_client_sends_a_cut_lfs_object_again(hub, api):
    api.create_repo("model")
    cut = hub.fail("PUT /lfs/", "cut", times=1)
    content = os.urandom(10**6)
    api.create_commit("ada/model", [CommitOperationAdd("a.bin", content)], commit_message="a")
    assert cut.count == 1
    assert hub.repos["ada/model"].files["a.bin"] == content


def test_a_closed_hub_is_out_of_reach(hub, api):
    api.create_repo("model")
    hub.close()
    with pytest.raises(Exception, match="refused|disconnected|reset"):
        api.model_info("ada/model")


def test_a_good_card_is_valid(hub):
    ModelCard(CARD).validate()


@pytest.mark.parametrize(
    "line, message",
    [
        ("license: apache2", '"license" with value "apache2" must be one of'),
        ("pipeline_tag: text-to-picture", '"pipeline_tag" with value'),
        ("library_name: [diffusers]", '"library_name" with value'),
        ("tags: one-step", '"tags" with value'),
        ("base_model: ada/the/teacher", '"base_model" with value'),
        ("base_model: ./teacher", '"base_model" with value'),
        ("base_model_relation: distilled", '"base_model_relation" with value'),
        ("datasets: [ylecun/mnist, my data]", '"datasets" with value'),
        ("widget: [seven]", '"widget" with value'),
        ("model-index: []", '"model-index" must be a non-empty array'),
        (
            "model-index: [{name: a, results: [{task: {type: b}, dataset: {type: c}, metrics: [{type: d}]}]}]",
            r'"model-index\[0\].results\[0\].dataset.name" is required',
        ),
        ("model-index: [{name: 1, results: [1]}]", r'"model-index\[0\].results\[0\]" must be an object'),
    ],
)
def test_a_bad_card_is_refused(hub, api, line, message):
    name = line.split(":")[0]
    metadata = "license: mit\n" * (name != "license") + line
    response = get_session().post(
        f"{hub.endpoint}/api/validate-yaml", json={"content": f"---\n{metadata}\n---\n", "repoType": "model"}
    )
    assert response.status_code == 400 and len(response.json()["errors"]) >= 1
    api.create_repo("model")
    operations = [CommitOperationAdd("README.md", f"---\n{metadata}\n---\n".encode())]
    with pytest.raises(ValueError, match=message):
        api.create_commit("ada/model", operations, commit_message="card")


def test_a_card_that_is_no_yaml_is_refused_and_one_without_metadata_warned_of(hub, api):
    api.create_repo("model")
    for metadata in ("a: [", "- a"):
        with pytest.raises(ValueError, match="YAML metadata"):
            api.upload_file(
                path_or_fileobj=f"---\n{metadata}\n---\n".encode(), path_in_repo="README.md", repo_id="ada/model"
            )
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# A student\n", path_in_repo="README.md", repo_id="ada/model")


def test_a_pipeline_from_the_hub_makes_the_images_of_the_folder(hub, api, tmp_path):
    api.create_repo("teacher")
    api.upload_folder(repo_id="ada/teacher", folder_path=TEACHER)
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, "ada/teacher", str(TEACHER)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    (tmp_path / "images").write_bytes(result.stdout)
    with open(tmp_path / "images", "rb") as file:
        from_hub, from_folder = np.load(file), np.load(file)
    assert from_hub.shape == (2, 8, 8, 1) and np.array_equal(from_hub, from_folder)
    assert any(request.path.endswith("diffusion_pytorch_model.safetensors") for request in hub.requests)
    assert (tmp_path / "home" / "hub" / "models--ada--teacher").is_dir()
