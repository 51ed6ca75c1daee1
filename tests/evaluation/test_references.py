"""What samples can be compared to, and what cannot be compared."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from pid_diffusers import InputError
from pid_diffusers.evaluation.digits import load_digits
from pid_diffusers.evaluation.references import load_reference, save_features


def picture(number, size=(8, 8), mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(number).integers(256, size=(size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


@pytest.fixture
def folder(tmp_path):
    """Six images at different depths, and a file that is none."""
    path = tmp_path / "real"
    for number in range(6):
        place = path / f"class-{number % 2}" / "deep"
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number}.png")
    (path / "notes.txt").write_text("not an image")
    return path


def all_images(reference):
    return torch.cat(list(reference.images.stream(0, len(reference.images))))


def test_a_folder_gives_its_images_at_any_depth_in_order(folder):
    reference = load_reference(str(folder))
    assert (reference.kind, len(reference.images), reference.shape) == ("folder", 6, (3, 8, 8))
    expected = np.stack([np.asarray(picture(number)) for number in (0, 2, 4, 1, 3, 5)])
    assert torch.equal(all_images(reference).permute(0, 2, 3, 1), torch.from_numpy(expected))
    assert torch.equal(torch.cat(list(reference.images.stream(2, 4))), all_images(reference)[2:4])


def test_gray_images_among_rgb_ones_count_as_rgb_and_alone_as_gray(folder, tmp_path):
    picture(9, mode="L").save(folder / "gray.png")
    reference = load_reference(str(folder))
    assert reference.shape == (3, 8, 8)
    last = all_images(reference)[-1]
    assert torch.equal(last, torch.from_numpy(np.array(picture(9, mode="L"))).expand(3, 8, 8))
    (tmp_path / "gray").mkdir()
    picture(9, mode="L").save(tmp_path / "gray" / "0.png")
    assert load_reference(str(tmp_path / "gray")).shape == (1, 8, 8)


def test_images_that_cannot_be_read_are_named_and_counted(folder):
    for number in range(6):
        (folder / f"broken-{number}.jpg").write_bytes(b"no image")
    content = (folder / "class-0" / "deep" / "0.png").read_bytes()
    (folder / "class-0" / "deep" / "0.png").write_bytes(content[: len(content) // 2])
    names = r"broken-0.jpg, broken-1.jpg, broken-2.jpg, broken-3.jpg, broken-4.jpg and 2 more"
    with pytest.raises(InputError, match=f"of whose 12 images 7 cannot be read \\({names}\\)"):
        load_reference(str(folder))


def test_an_image_that_ends_too_early_is_named_when_it_is_read(folder):
    content = (folder / "class-0" / "deep" / "0.png").read_bytes()
    (folder / "class-0" / "deep" / "0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"of whose 6 images 1 cannot be read \(class-0/deep/0.png\)"):
        all_images(load_reference(str(folder)))


def test_the_digest_of_a_folder_is_that_of_its_names_and_bytes_wherever_it_is(folder, tmp_path):
    digest = load_reference(str(folder)).digest
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    first = tmp_path / "copy" / "class-0" / "deep" / "0.png"
    os.utime(first, (0, 0))
    assert load_reference(str(tmp_path / "copy")).digest == digest
    first.rename(first.with_name("00.png"))  # in the same place of the order
    assert load_reference(str(tmp_path / "copy")).digest != digest
    first.with_name("00.png").rename(first)
    assert load_reference(str(tmp_path / "copy")).digest == digest
    content = bytearray(first.read_bytes())
    content[-5] ^= 1  # neither the size nor the time changes
    first.write_bytes(content)
    os.utime(first, (0, 0))
    assert load_reference(str(tmp_path / "copy")).digest != digest


def test_sizes_that_differ_transparency_and_an_empty_folder_are_refused(folder, tmp_path):
    picture(1, size=(9, 8)).save(folder / "wide.png")
    with pytest.raises(InputError, match="2 different sizes, such as 8 × 8 .* and 9 × 8"):
        load_reference(str(folder))
    picture(1, mode="RGBA").save(folder / "wide.png")
    with pytest.raises(InputError, match="wide.png is of Pillow's mode RGBA"):
        load_reference(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="in which there are no images"):
        load_reference(str(tmp_path / "empty"))


def test_a_data_set_in_a_file_gives_its_images(tmp_path):
    features = Features({"label": Value("int64"), "img": ImageColumn()})
    rows = {"label": [0, 1, 2], "img": [picture(number) for number in range(3)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    for name in ("train.parquet", "."):  # the file, or its folder
        reference = load_reference(str(tmp_path / name))
        assert (reference.kind, reference.shape) == ("dataset", (3, 8, 8))
        expected = np.stack([np.asarray(picture(number)) for number in range(3)])
        assert torch.equal(all_images(reference).permute(0, 2, 3, 1), torch.from_numpy(expected))
    with pytest.raises(InputError, match="reference_column is 'label', but .* has images in img"):
        load_reference(str(tmp_path / "train.parquet"), column="label")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_reference(str(tmp_path / "train.parquet"), split="test")


def png(number):
    content = io.BytesIO()
    picture(number).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def test_rows_of_a_data_set_without_an_image_or_with_a_broken_one_are_named_and_counted(tmp_path):
    images = [png(number) for number in range(12)]
    images[2] = None
    for number in (1, 4, 7, 8, 11):
        images[number] = {"bytes": b"no image", "path": None}
    images[9] = {"bytes": png(9)["bytes"][:100], "path": None}  # ends too early
    stored = Dataset.from_dict({"img": images}, features=Features({"img": ImageColumn()}))
    stored.to_parquet(tmp_path / "train.parquet")
    rows = "row 1, row 2, row 4, row 7, row 8 and 2 more; the first is row 0"
    with pytest.raises(InputError, match=f"of whose 12 images 7 cannot be read \\({rows}\\); repair or remove them"):
        load_reference(str(tmp_path / "train.parquet"))
    stored.select([0, 2, 3]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="of whose 3 images 1 cannot be read \\(row 1; the first is row 0\\)"):
        load_reference(str(tmp_path / "train.parquet"))


def test_edms_file_gives_its_statistics(tmp_path):
    mu, sigma = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    reference = load_reference(str(tmp_path / "edm.npz"))
    reference.check((3, 8, 8), 3, "any")
    assert reference.images is None and reference.gaussian.sigma.dtype == torch.float64
    np.testing.assert_array_equal(reference.gaussian.mu, mu)
    np.testing.assert_array_equal(reference.gaussian.sigma, sigma)
    with pytest.raises(InputError, match="whose mu has 3 numbers, but the extractor gives 2048 features"):
        reference.check((3, 8, 8), 2048, "any")


@pytest.mark.parametrize("dtype", ["<f8", ">f8", ">f4", "f2", ">i8", "u1"])
def test_statistics_can_be_numbers_of_any_real_type_and_order(tmp_path, dtype):
    mu, sigma = np.arange(3).astype(dtype), np.array([[2, 1, 0], [1, 2, 0], [0, 0, 1]]).astype(dtype)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=np.asfortranarray(sigma))
    reference = load_reference(str(tmp_path / "edm.npz"))
    assert reference.gaussian.mu.tolist() == mu.tolist() and reference.gaussian.sigma.tolist() == sigma.tolist()
    np.savez(tmp_path / "float64.npz", mu=mu.astype(float), sigma=sigma.astype(float))
    assert reference.digest == load_reference(str(tmp_path / "float64.npz")).digest


def test_a_covariance_that_is_indefinite_by_rounding_alone_is_one(tmp_path):
    factor = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    sigma = factor @ factor.T  # of rank 3
    assert np.linalg.eigvalsh(sigma.astype(float))[0] < 0
    np.savez(tmp_path / "edm.npz", mu=np.zeros(8), sigma=sigma)
    assert load_reference(str(tmp_path / "edm.npz")).gaussian is not None


def test_images_in_fortran_order_have_the_digest_of_the_same_in_c_order(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "c.npz", arr_0=images)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images))
    c, fortran = (load_reference(str(tmp_path / name)) for name in ("c.npz", "fortran.npz"))
    assert c.digest == fortran.digest and torch.equal(all_images(c), all_images(fortran))


def test_adms_file_gives_its_statistics_and_images(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    parts = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(7), "sigma_s": np.eye(7), "arr_0": images}
    np.savez(tmp_path / "adm.npz", **parts)
    reference = load_reference(str(tmp_path / "adm.npz"))
    assert reference.shape == (3, 8, 8) and len(reference.gaussian.mu) == 3
    assert torch.equal(all_images(reference).permute(0, 2, 3, 1), torch.from_numpy(images))
    reference.check((3, 8, 8), 4, "any")
    assert reference.gaussian is None  # of another extractor: the images remain


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "has NaN"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "has NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"shape \(2,\) and type float64 .* shape \(3, 3\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"shape \(0,\) .* D above 0"),
        ({"mu": np.float64(1), "sigma": np.eye(1)}, r"shape \(\) "),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "type <U1 .* must be real numbers"),
        ({"mu": np.zeros(2, complex), "sigma": np.eye(2)}, "type complex128"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 5.0], [0.0, 1.0]])}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1.0])}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "sigma has the eigenvalue -1, so is no"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "no covariance"),
        ({"x": np.zeros(2)}, "neither mu and sigma nor arr_0"),
        ({"arr_0": np.zeros((2, 8, 8))}, "must be uint8 images"),
    ],
)
def test_statistics_that_are_none_get_a_sentence(tmp_path, arrays, reason):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(InputError, match=reason):
        load_reference(str(tmp_path / "file.npz"))


def test_saved_features_are_a_reference_for_the_extractor_that_made_them(tmp_path):
    features = torch.randn(5, 3)
    save_features(tmp_path / "real.safetensors", features, (3, 8, 8), "abc", "of the images")
    reference = load_reference(str(tmp_path / "real.safetensors"))
    assert torch.equal(reference.features, features) and reference.digest == "of the images"
    assert [path.name for path in tmp_path.iterdir()] == ["real.safetensors"]
    reference.check((3, 8, 8), 3, "abc")
    with pytest.raises(InputError, match="made by another extractor"):
        reference.check((3, 8, 8), 3, "abd")
    with pytest.raises(InputError, match="8 × 8 and RGB, but the model's are 8 × 8 and gray"):
        reference.check((1, 8, 8), 3, "abc")
    with pytest.raises(InputError, match="8 × 8 and RGB, but the model's are 32 × 16 and RGB"):
        reference.check((3, 16, 32), 3, "abc")


def test_what_is_no_reference_gets_a_sentence(tmp_path):
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of that kind")
        with pytest.raises(InputError, match="is no"):
            load_reference(str(tmp_path / name))
        with pytest.raises(InputError, match="does not exist"):
            load_reference(str(tmp_path / "missing" / name))
    with pytest.raises(InputError, match="does not exist"):
        load_reference("")


def test_the_built_in_digits_are_those_of_a_folder_with_them(tmp_path):
    built_in = load_reference("digits")
    real = load_digits()[0]
    (tmp_path / "real").mkdir()
    for number, image in enumerate(real[:20]):
        pixels = ((image[0] + 1) / 2 * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "real" / f"{number:02}.png")
    folder = load_reference(str(tmp_path / "real"))
    assert (built_in.shape, len(built_in.images)) == ((1, 8, 8), 1797)
    assert torch.equal(torch.cat(list(built_in.images.stream(0, 20))), torch.cat(list(folder.images.stream(0, 20))))
    assert built_in.digest == load_reference("digits").digest != folder.digest
