import gc
import hashlib
import multiprocessing
import resource
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load, load_file, save_file
from tiny_text import MAX_LENGTH, tiny_sd, tiny_sdxl, tiny_text_encoder, tiny_tokenizer

from pid_diffusers import InputError
from pid_diffusers.text import PromptEmbeddings, PromptEncoder

PROMPTS = ["a fox", "", "ein Füchschen", "キツネ", "🦊\x00\u2028\t\x7f é", "long " * 500, "a  fox", "A FOX", "fox"]


@pytest.fixture(params=[tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def pipeline(request):
    return request.param()


@pytest.fixture
def compute(tmp_path):
    """Embeddings with a cache of this test's own; more arguments are `PromptEmbeddings.compute`'s."""

    def embeddings(pipeline, prompts=PROMPTS, **settings) -> PromptEmbeddings:
        settings = {"cache_dir": tmp_path / "cache", "progress": False, **settings}
        return PromptEmbeddings.compute(PromptEncoder(pipeline), prompts, **settings)

    return embeddings


def own(pipeline, prompt: str, **settings) -> dict[str, torch.Tensor]:
    """What the pipeline itself has for a prompt, or for what guidance moves away from."""
    guided = bool(settings)
    with torch.no_grad():
        found = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided, **settings
        )
    return dict(zip(("encoder_hidden_states", "text_embeds"), found[1::2] if guided else found[::2], strict=False))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def count_prompts(encoder) -> list[int]:
    """To which every call of a text encoder adds how many prompts it was given."""
    counts = []
    encoder.register_forward_hook(lambda module, inputs, output: counts.append(len(output[0])))
    return counts


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_embedding_is_what_the_pipeline_itself_computes(pipeline, compute):
    encoder, embeddings = PromptEncoder(pipeline), compute(pipeline)
    width = {"encoder_hidden_states": (MAX_LENGTH, 16)}
    if encoder.is_xl:
        width = {"encoder_hidden_states": (MAX_LENGTH, 16 + 24), "text_embeds": (24,)}
    for index, prompt in enumerate(PROMPTS):
        expected = own(pipeline, prompt)
        assert_equal(encoder.encode([prompt]), expected)
        assert_equal(embeddings.batch([index]), expected)
        assert {name: value.shape[1:] for name, value in expected.items()} == width


def test_embeddings_form_a_sequence_of_prompts_with_their_duplicates(pipeline, compute):
    prompts = ["a", "b", "a", "c"]
    embeddings = compute(pipeline, prompts)
    assert len(embeddings) == 4
    assert embeddings.prompts == prompts
    batch = embeddings.batch(torch.tensor([3, 0, 1, 2, 3]))
    assert_equal(batch, {name: torch.cat([own(pipeline, p)[name] for p in "cabac"]) for name in batch})
    assert_equal(batch, embeddings.batch([3, 0, 1, 2, 3]))
    assert not any(value.requires_grad for value in batch.values())


def test_the_unconditional_embedding_is_that_of_classifier_free_guidance(pipeline):
    encoder = PromptEncoder(pipeline)
    assert_equal(encoder.encode_unconditional(), own(pipeline, "a fox", negative_prompt=None))
    assert_equal(encoder.encode_unconditional("ugly"), own(pipeline, "a fox", negative_prompt="ugly"))


def test_the_unconditional_embedding_of_sdxl_is_zero_only_if_its_configuration_says_so():
    pipeline = tiny_sdxl()
    encoder = PromptEncoder(pipeline)
    fingerprint = encoder.fingerprint
    assert all(value.count_nonzero() == 0 for value in encoder.encode_unconditional().values())
    assert all(value.count_nonzero() > 0 for value in encoder.encode_unconditional("ugly").values())
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert_equal(PromptEncoder(pipeline).encode_unconditional(), own(pipeline, ""))
    assert PromptEncoder(pipeline).fingerprint != fingerprint


def test_over_long_prompts_are_truncated_as_the_tokenizer_does_and_counted(pipeline, compute, caplog):
    fits, too_long = "a" * (MAX_LENGTH - 2), "a" * (MAX_LENGTH - 1)
    encoder = PromptEncoder(pipeline)
    assert encoder.count_over_long([fits, too_long, "", "b " * 40, too_long]) == 3
    assert encoder.count_over_long([fits]) == 0
    embeddings = compute(pipeline, [fits, too_long + "bc", too_long + "de" * 40])
    assert not torch.equal(*(embeddings.batch([i])["encoder_hidden_states"] for i in (0, 1)))
    assert_equal(embeddings.batch([1]), embeddings.batch([2]))
    assert not caplog.records
    assert_equal(embeddings.batch([1]), own(pipeline, too_long + "bc"))
    assert len([record for record in caplog.records if "truncated" in record.message]) == len(encoder.encoders)


def test_the_shorter_of_two_tokenizers_counts():
    pipeline = tiny_sdxl()
    pipeline.tokenizer_2 = tiny_tokenizer(max_length=6)
    assert PromptEncoder(pipeline).count_over_long(["abcd", "abcde", "abcdefghijklmn"]) == 2


def test_a_prompt_is_encoded_once_and_by_itself(pipeline, compute):
    counts = count_prompts(pipeline.text_encoder)
    compute(pipeline, ["a", "b", "a"])
    assert counts == [1, 1]
    compute(pipeline, ["c", "b", "a", "c"])
    assert counts == [1, 1, 1]
    compute(pipeline, ["c", "b"])
    assert counts == [1, 1, 1]
    compute(pipeline, list("cdefgh"), batch_size=3)
    assert counts == [1, 1, 1, 3, 2]


def test_embeddings_have_the_same_bits_from_a_cold_a_warm_and_a_half_filled_cache(pipeline, compute, tmp_path):
    everything = range(len(PROMPTS))
    cold = compute(pipeline, cache_dir=tmp_path / "a").batch(everything)
    warm = compute(pipeline, cache_dir=tmp_path / "a").batch(everything)
    compute(pipeline, PROMPTS[5:2:-1], cache_dir=tmp_path / "b")
    half = compute(pipeline, cache_dir=tmp_path / "b").batch(everything)
    assert_equal(cold, warm)
    assert_equal(cold, half)


def test_the_fingerprint_is_that_of_the_same_encoders_in_another_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "a")
    first = type(pipeline).from_pretrained(tmp_path / "a")
    fingerprint = PromptEncoder(first).fingerprint
    PromptEncoder(first).encode(PROMPTS)
    first.save_pretrained(tmp_path / "b")
    assert PromptEncoder(type(pipeline).from_pretrained(tmp_path / "b")).fingerprint == fingerprint
    assert PromptEncoder(first).fingerprint == fingerprint == PromptEncoder(pipeline).fingerprint


def test_whatever_changes_embeddings_changes_the_fingerprint():
    def changed(pipeline, **components) -> str:
        for name, value in components.items():
            setattr(pipeline, name, value)
        return PromptEncoder(pipeline).fingerprint

    other_weights, other_type = tiny_text_encoder(), tiny_text_encoder().to(torch.bfloat16)
    with torch.no_grad():
        next(reversed(list(other_weights.parameters())))[0] += 1e-6
    renumbered = tiny_tokenizer()
    renumbered.add_tokens(["padding"])
    fingerprints = [
        changed(tiny_sd()),
        changed(tiny_sd(), text_encoder=other_weights),
        changed(tiny_sd(), text_encoder=other_type),
        changed(tiny_sd(), text_encoder=tiny_text_encoder(hidden_act="gelu")),
        changed(tiny_sd(), tokenizer=tiny_tokenizer(max_length=10)),
        changed(tiny_sd(), tokenizer=renumbered),
        changed(tiny_sdxl()),
        changed(tiny_sdxl(), text_encoder_2=tiny_sdxl().text_encoder_2.half()),
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_two_encoders_share_no_entry(compute, tmp_path):
    pipelines = [tiny_sd(), tiny_sd(), tiny_sd()]
    with torch.no_grad():
        pipelines[1].text_encoder.get_input_embeddings().weight.mul_(2)
    pipelines[2].text_encoder.to(torch.bfloat16)
    for pipeline in pipelines:
        assert_equal(
            compute(pipeline, ["a fox"]).batch([0]), {name: v.float() for name, v in own(pipeline, "a fox").items()}
        )
    assert len(entries(tmp_path)) == 3


def test_embeddings_are_stored_in_the_encoders_type_and_given_in_float32(compute, tmp_path):
    pipeline = tiny_sdxl().to(torch.bfloat16)
    batch = compute(pipeline, ["a fox"]).batch([0])
    assert {value.dtype for value in batch.values()} == {torch.float32}
    assert {value.dtype for value in compute(pipeline, ["a fox"]).batch([0], torch.float16).values()} == {
        torch.float16
    }
    (path,) = entries(tmp_path)
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}
    assert_equal({name: value.to(torch.bfloat16) for name, value in batch.items()}, own(pipeline, "a fox"))


def damage_by_cutting(path: Path, other: Path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_emptying(path: Path, other: Path):
    path.write_bytes(b"")


def damage_a_bit(path: Path, other: Path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_by_nonsense(path: Path, other: Path):
    path.write_bytes(b"\xff" * 500)


def damage_by_another_prompt(path: Path, other: Path):
    path.write_bytes(other.read_bytes())


def damage_by_foreign_tensors(path: Path, other: Path):
    save_file({"encoder_hidden_states": torch.zeros(3, 3)}, path)


DAMAGES = [
    damage_by_cutting,
    damage_by_emptying,
    damage_a_bit,
    damage_by_nonsense,
    damage_by_another_prompt,
    damage_by_foreign_tensors,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_entry_is_computed_again(damage, compute, tmp_path):
    pipeline = tiny_sd()
    expected = compute(pipeline, ["a fox", "a dog"]).batch([0, 1])
    content = {path: load(path.read_bytes()) for path in entries(tmp_path)}
    damage(*content)
    counts = count_prompts(pipeline.text_encoder)
    assert_equal(compute(pipeline, ["a fox", "a dog"]).batch([0, 1]), expected)
    assert counts == [1]
    assert entries(tmp_path) == list(content)
    for path, tensors in content.items():
        assert_equal(load_file(path), tensors)


def test_an_entry_lies_where_the_documentation_says(compute, tmp_path):
    pipeline = tiny_sd()
    compute(pipeline, ["ein Füchschen"])
    key = hashlib.sha256("ein Füchschen".encode()).hexdigest()
    folder = f"{PromptEncoder(pipeline).fingerprint}-cpu"
    assert entries(tmp_path) == [tmp_path / "cache" / folder / key[:2] / f"{key}.safetensors"]


def test_the_cache_is_where_the_environment_says_at_the_time(monkeypatch, compute, tmp_path):
    pipeline = tiny_sd()
    for name in ("a", "b"):
        monkeypatch.setenv("PID_DIFFUSERS_CACHE", str(tmp_path / name))
        compute(pipeline, ["a fox"], cache_dir=None)
        assert len(entries(tmp_path / name / "embeddings")) == 1
    monkeypatch.delenv("PID_DIFFUSERS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    compute(pipeline, ["a fox"], cache_dir=None)
    assert len(entries(tmp_path / "c" / "pid_diffusers" / "embeddings")) == 1


def test_processes_at_the_same_time_share_a_cache(compute, tmp_path):
    prompts = [f"a fox {i}" for i in range(20)]
    pipeline = tiny_sd()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=compute, args=(pipeline, prompts)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(entries(tmp_path)) == 20
    counts = count_prompts(pipeline.text_encoder)
    embeddings = compute(pipeline, prompts)
    assert counts == []
    for index, prompt in enumerate(prompts):
        assert_equal(embeddings.batch([index]), own(pipeline, prompt))


@pytest.mark.parametrize("memory_limit", [0, 3000])
def test_embeddings_that_do_not_fit_in_memory_are_read_from_the_disk(memory_limit, pipeline, compute):
    indices = [0, 3, 8, 3, 0, 1, 2, 2]
    embeddings = compute(pipeline, memory_limit=memory_limit)
    assert_equal(embeddings.batch(indices), compute(pipeline).batch(indices))


def test_only_embeddings_in_memory_outlive_their_files(compute, tmp_path):
    pipeline = tiny_sd()
    held, read = compute(pipeline), compute(pipeline, memory_limit=0)
    for path in entries(tmp_path):
        path.unlink()
    assert_equal(held.batch([0]), own(pipeline, PROMPTS[0]))
    with pytest.raises(InputError, match="cache_dir has lost the embeddings .*; start again to have them computed"):
        read.batch([0])


def test_a_full_disk_gives_a_sentence_and_leaves_whole_entries_only(compute, tmp_path):
    pipeline = tiny_sd()
    compute(pipeline, ["a"])
    before = entries(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"cache_dir is '.*', where .* written \(File too large\); make room there"
        ):
            compute(pipeline, ["a", "b"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == before


def test_a_cache_that_cannot_be_written_gives_a_sentence(compute, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"where embeddings cannot be written \(Not a directory\)"):
        compute(tiny_sd(), cache_dir=tmp_path / "file")


def test_prompts_that_cannot_be_encoded_are_refused(compute):
    with pytest.raises(InputError, match="prompts is empty"):
        compute(tiny_sd(), [])
    with pytest.raises(InputError, match=r"prompts\[1\] is '\\udcff', which is not Unicode text"):
        compute(tiny_sd(), ["a", "\udcff"])


def test_pipelines_without_text_encoders_are_refused(tiny_unet):
    with pytest.raises(InputError, match="teacher is a DDPMPipeline, whose prompts cannot be encoded"):
        PromptEncoder(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    for cls, name in [(tiny_sd, "text_encoder"), (tiny_sdxl, "tokenizer_2")]:
        pipeline = cls()
        setattr(pipeline, name, None)
        with pytest.raises(InputError, match="without its text encoder or tokenizer; load it with both"):
            PromptEncoder(pipeline)


def test_the_second_encoder_alone_is_enough_for_sdxls_refiner(compute):
    pipeline = tiny_sdxl()
    pipeline.tokenizer = pipeline.text_encoder = None
    assert_equal(compute(pipeline, ["a fox"]).batch([0]), own(pipeline, "a fox"))


@pytest.mark.parametrize("create", [tiny_sd, tiny_sdxl])
def test_the_encoders_can_leave_memory_afterwards(create, compute):
    pipeline = create()
    encoders = [weakref.ref(encoder) for encoder in PromptEncoder(pipeline).encoders]
    expected = own(pipeline, PROMPTS[0])
    embeddings = compute(pipeline)
    del pipeline
    gc.collect()
    assert [encoder() for encoder in encoders] == [None] * len(encoders)
    assert_equal(embeddings.batch([0]), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_encoders_are_put_back_after_computing_on_a_gpu(pipeline, compute, tmp_path):
    compute(pipeline, ["a fox"])
    embeddings = compute(pipeline, ["a fox"], device="cuda")
    assert {encoder.device.type for encoder in PromptEncoder(pipeline).encoders} == {"cpu"}
    expected = own(pipeline, "a fox")
    for name, value in embeddings.batch([0]).items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, expected[name], atol=1e-2, rtol=1e-2)
    assert len(entries(tmp_path)) == 2
