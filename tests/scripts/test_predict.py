import csv
import json

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from qat.data import ArraysData, DigitsData
from qat.export.runtime import OnnxModel
from qat.predict.batches import Batches
from qat.predict.inputs import Inputs
from qat.predict.reader import Reader

MEAN, STD = 0.3056, 0.3765


@pytest.fixture(scope="module")
def digits():
    """Twenty test digits as pixels, uint8 (N, H, W)."""
    x = next(iter(DigitsData(batch_size=20).test_dataloader()))[0][:, 0]
    return ((x * STD + MEAN) * 255).round().to(torch.uint8).numpy()


def logits(folder, pixels):
    """Return what the file says to grey pixels (N, H, W), in this test's own arithmetic."""
    x = (torch.from_numpy(pixels).float() / 255 - MEAN) / STD
    return OnnxModel(folder / "model.onnx")(x[:, None].repeat(1, 3, 1, 1))


def save_images(folder, pixels):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")


def read(path):
    return json.loads(path.read_text())


def test_images_of_a_folder(image_run, digits, call, tmp_path):
    save_images(tmp_path / "a", digits[:12])
    save_images(tmp_path / "a" / "b", digits[12:])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    target = tmp_path / "out.json"
    given = [image_run / "model.onnx", tmp_path / "a", "--batch", 7, "--top", 3, "--json", target]
    status, out, error = call("predict", *given)
    assert (status, error) == (0, "")

    files = [tmp_path / "a" / f"{i:02}.png" for i in range(12)]
    files += [tmp_path / "a" / "b" / f"{i:02}.png" for i in range(8)]
    rows = read(target)
    assert [row["file"] for row in rows] == [str(f) for f in files]
    expected = logits(image_run, digits)
    assert [row["classes"][0] for row in rows] == [str(i) for i in expected.argmax(1).tolist()]
    best = expected.double().softmax(1).topk(3).values
    torch.testing.assert_close(
        torch.tensor([row["probabilities"] for row in rows]).double(), best, rtol=1e-3, atol=1e-4
    )
    first = rows[0]
    assert out.splitlines()[0].startswith(
        f"{files[0]}: {first['classes'][0]} {first['probabilities'][0]:.2%}, {first['classes'][1]} "
    )


def test_test_digits_are_predicted_as_in_training(image_run, digits, call, tmp_path):
    x, _ = next(iter(DigitsData(batch_size=20).test_dataloader()))
    reference = OnnxModel(image_run / "model.onnx")(x)
    np.save(tmp_path / "x.npy", digits)
    call("predict", image_run / "model.onnx", tmp_path / "x.npy", "--json", tmp_path / "out.json")
    rows = read(tmp_path / "out.json")
    assert [row["classes"][0] for row in rows] == [str(i) for i in reference.argmax(1).tolist()]


def test_every_form_of_the_same_pixels_gives_the_same(image_run, digits, call, tmp_path):
    rgb = np.repeat(digits[..., None], 3, axis=-1)
    floats = np.repeat(digits[:, None].astype(np.float64) / 255, 3, axis=1)
    np.save(tmp_path / "grey.npy", digits)
    np.save(tmp_path / "grey1.npy", digits[..., None])
    np.save(tmp_path / "float.npy", floats)
    np.savez(tmp_path / "rgb.npz", rgb)
    np.savez(tmp_path / "several.npz", x_test=rgb, y_test=np.zeros(20))
    save_images(tmp_path / "images", digits)
    names = ["grey.npy", "grey1.npy", "float.npy", "rgb.npz", "several.npz", "images"]
    given = [tmp_path / name for name in names]
    status, _, error = call(
        "predict", image_run / "model.onnx", *given, "--json", tmp_path / "out.json"
    )
    assert (status, error) == (0, "")
    rows = read(tmp_path / "out.json")
    assert len(rows) == 6 * 20
    assert rows[3]["file"] == f"{tmp_path / 'grey.npy'}[3]"
    best = [row["classes"][0] for row in rows]
    assert all(best[i] == best[i % 20] for i in range(len(rows)))


def test_other_sizes_and_modes(image_run, digits, call, tmp_path):
    large = Image.fromarray(digits[0]).resize((40, 40), Image.Resampling.NEAREST)
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        large.convert(mode).save(tmp_path / f"{mode}.png")
    large.save(tmp_path / "photo.JPEG")
    status, out, error = call("predict", image_run / "model.onnx", tmp_path, "--crop")
    assert (status, error) == (0, "")
    assert len(out.splitlines()) == 6
    status, out, _ = call("predict", image_run / "model.onnx", tmp_path / "L.png")
    size = (digits.shape[2], digits.shape[1])
    pixels = np.array(large.resize(size, Image.Resampling.BILINEAR))
    label = logits(image_run, pixels[None]).argmax(1).item()
    assert out.startswith(f"{tmp_path / 'L.png'}: {label} ")


def test_grey_model():
    """A model with one channel gets the grey pixels themselves."""
    reader = Reader((1, 4, 4), [0.5], [0.25])
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    got = reader._pixels(Image.fromarray(pixels).convert("RGB"), None)
    assert torch.equal(got, torch.from_numpy(pixels)[None])
    expected = (torch.from_numpy(pixels) / 255 - 0.5) / 0.25
    torch.testing.assert_close(reader._normalise(got)[0], expected)


def test_images_are_normalised_exactly_as_the_arrays_data_do(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
    y = np.arange(6) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = ArraysData(tmp_path / "a.npz", augment="none")
    expected = next(iter(data.test_dataloader()))[0]
    reader = Reader(data.input_shape, data.mean, data.std)
    got = Batches(Inputs([tmp_path / "a.npz"], reader), 6)[0].samples
    assert torch.equal(got, expected)


def test_table(table_run, call, tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4))
    x[7, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    target = tmp_path / "out.csv"
    given = [table_run / "model.onnx", tmp_path / "x.npy", "--top", 2, "--csv", target]
    status, out, error = call("predict", *given)
    assert status == 0
    assert f"left out {tmp_path / 'x.npy'}[7]: expected numbers" in error
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = OnnxModel(table_run / "model.onnx")(torch.from_numpy(np.delete(x, 7, 0)).float())
    got = [row["class"] for row in rows if row["rank"] == "1"]
    assert got == [str(i) for i in expected.argmax(1).tolist()]
    shares = torch.tensor([float(row["probability"]) for row in rows]).view(49, 2)
    torch.testing.assert_close(shares, expected.softmax(1).topk(2).values)
    assert len(out.splitlines()) == 49


def broken_files(folder, image):
    """Fill a folder with what is no image in spite of its name."""
    folder.mkdir()
    Image.fromarray(image).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    Image.fromarray(np.repeat(image, 20, axis=0)).save(folder / "whole.tiff")
    for suffix in ("jpg", "webp", "bmp", "ppm", "tiff"):
        (folder / f"text.{suffix}").write_text("no image at all")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.tiff").write_bytes((folder / "whole.tiff").read_bytes()[:200])
    (folder / "empty.png").write_bytes(b"")
    return 2, 8


def test_unreadable_images_are_left_out_and_listed(image_run, digits, call, refuse, tmp_path):
    good, bad = broken_files(tmp_path / "mixed", digits[0])
    status, out, error = call("predict", image_run / "model.onnx", tmp_path / "mixed")
    assert status == 0
    assert len(out.splitlines()) == good
    assert error.count("left out ") == bad
    assert f"left out {tmp_path / 'mixed' / 'cut.png'}: expected a readable image" in error
    status, out, error = call("predict", image_run / "model.onnx", tmp_path / "mixed" / "cut.png")
    assert (status, out) == (1, "")
    assert "left out" in error
    assert error.endswith(
        "qat: expected at least one input that can be read, got none: see above.\n"
    )


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 4, 4, 2), np.uint8), "1 or 3 channels"),
        (np.zeros((3, 4), np.uint8), "uint8 of shape (3, 4)"),
        (np.zeros((3, 8, 8, 3), np.float32), "floats (N, 3, 8, 8)"),
        (np.zeros((3, 3, 8, 8), np.int64), "int64 of shape (3, 3, 8, 8)"),
        (np.zeros((3, 3, 8, 8), np.uint16), "uint16"),
        (np.float32(1), "float32 of shape ()"),
        (np.array([{}], dtype=object), "ValueError"),
    ],
)
def test_unsuitable_arrays(array, reason, image_run, call, tmp_path):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    status, out, error = call("predict", image_run / "model.onnx", tmp_path / "x.npy")
    assert (status, out) == (1, "")
    assert reason in error
    assert "Traceback" not in error


def test_damaged_or_ambiguous_arrays(image_run, table_run, digits, call, tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "text.npz").write_text("no array")
    np.savez(tmp_path / "two.npz", a=digits, b=digits)
    np.savez(tmp_path / "cut.npz", digits)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    files = [tmp_path / name for name in ("text.npy", "text.npz", "two.npz", "cut.npz")]
    status, _, error = call("predict", image_run / "model.onnx", *files)
    assert status == 1
    assert error.count("left out ") == 4
    assert "one named x or x_test" in error
    save_images(tmp_path / "images", digits[:1])
    status, _, error = call("predict", table_run / "model.onnx", tmp_path / "images")
    assert status == 1
    assert "expected float samples of shape (4,)" in error


def test_wrong_files(image_run, table_run, digits, refuse, tmp_path):
    save_images(tmp_path / "images", digits[:1])
    model, images = image_run / "model.onnx", tmp_path / "images"
    assert "does not exist" in refuse("predict", model, tmp_path / "none.png")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refuse("predict", model, tmp_path / "empty")
    assert "got none at" in refuse("predict", tmp_path / "none.onnx", images)
    checkpoint = image_run / "checkpoints" / "last.ckpt"
    assert "an ONNX model that onnxruntime runs" in refuse("predict", checkpoint, images)
    proto = onnx.load(model)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    assert "without classes, mean, std" in refuse("predict", tmp_path / "foreign.onnx", images)
    proto.metadata_props.add(key="author", value="somebody else")
    onnx.save(proto, tmp_path / "foreign.onnx")
    assert "metadata that qat wrote" in refuse("predict", tmp_path / "foreign.onnx", images)


@pytest.mark.parametrize(
    "given", [["--top", "0"], ["--batch", "x"], ["--workers", "-1"], ["--json", "a", "--csv", "b"]]
)
def test_wrong_options(given, call):
    status, _, error = call("predict", "model.onnx", "a.png", *given)
    assert status == 2
    assert "usage:" in error
