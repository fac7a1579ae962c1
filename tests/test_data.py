# SPDX-License-Identifier: MIT
"""Image sets: formats, layouts, refusals, and the order of an epoch."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from lmtfast.data import Dataset, batches, epoch_order, load_dataset
from lmtfast.errors import (
    ArgumentError,
    DtypeError,
    InputDomainError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
)
from lmtfast.idx import IDX_FILES, read_idx


def arrays(shape=(7, 7), dtype=np.uint8, train=6, test=4):
    rng = np.random.default_rng(0)
    draw = (
        (lambda n: rng.integers(0, 256, (n, *shape)).astype(dtype))
        if dtype == np.uint8
        else (lambda n: rng.random((n, *shape)).astype(dtype))
    )
    return {
        "x_train": draw(train),
        "y_train": np.arange(train, dtype=np.uint8) % 3,
        "x_test": draw(test),
        "y_test": np.arange(test, dtype=np.int64) % 3,
    }


def idx_bytes(array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


@pytest.fixture
def write_npz(tmp_path):
    def write(**content):
        path = tmp_path / "set.npz"
        np.savez(path, **content)
        return path

    return write


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((7, 5), (1, 7, 5)), ((7, 5, 3), (3, 7, 5)), ((3, 7, 5), (3, 7, 5)), ((1, 7, 5), (1, 7, 5))],
)
def test_uint8_images_become_float_channels_first(write_npz, shape, expected):
    content = arrays(shape)
    data = load_dataset(write_npz(**content))
    assert data.input_shape == expected
    assert data.x_train.dtype == torch.float32
    assert data.y_test.dtype == torch.int64
    source = content["x_train"].astype(np.float32) / np.float32(255)
    if shape[-1:] == (3,):
        source = np.moveaxis(source, -1, 1)
    assert np.array_equal(data.x_train.numpy().reshape(source.shape), source)
    assert data.classes == 3


def test_float_images_are_kept_as_they_are(write_npz):
    content = arrays((2, 4, 4), np.float32)
    data = load_dataset(write_npz(**content))
    assert np.array_equal(data.x_test.numpy(), content["x_test"])


def test_grey_images_do_not_pass_for_channels_last(write_npz):
    data = load_dataset(write_npz(**arrays((7, 5))))
    assert data.x_test.stride() == (35, 35, 5, 1)


def test_same_file_same_digest_and_one_pixel_changes_it(write_npz):
    content = arrays()
    first = load_dataset(write_npz(**content)).digest
    assert load_dataset(write_npz(**content)).digest == first
    content["x_test"][0, 0, 0] ^= 1
    assert load_dataset(write_npz(**content)).digest != first


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_directory(tmp_path, suffix):
    content = arrays()
    for key, name in IDX_FILES.items():
        raw = idx_bytes(content[key].astype(np.uint8))
        (tmp_path / (name + suffix)).write_bytes(gzip.compress(raw) if suffix else raw)
    data = load_dataset(tmp_path)
    assert data.input_shape == (1, 7, 7)
    assert data.y_train.tolist() == content["y_train"].tolist()
    assert np.array_equal(data.x_test.numpy()[:, 0] * 255, content["x_test"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "empty"),
        (lambda raw: b"\x00\x00\x0d" + raw[3:], "magic"),
        (lambda raw: raw[:3] + b"\x09" + raw[4:], "magic"),
        (lambda raw: raw[:-1], "bytes"),
        (lambda raw: raw + b"\x00", "bytes"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "bytes"),
    ],
)
def test_damaged_idx_is_refused(tmp_path, damage, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(idx_bytes(arrays()["x_train"])))
    with pytest.raises(ArgumentError, match=message):
        read_idx(path)


def test_damaged_gzip_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="train-images-idx3-ubyte"):
        load_dataset(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(arrays()["x_train"]))[:-9])
    with pytest.raises(ArgumentError, match="readable"):
        load_dataset(tmp_path)


def test_missing_arrays_are_named(write_npz):
    content = arrays()
    del content["y_test"]
    with pytest.raises(ShapeError, match="y_test missing"):
        load_dataset(write_npz(**content))


def test_pickled_arrays_are_refused(write_npz):
    content = arrays() | {"y_test": np.array([{}, {}, {}, {}], dtype=object)}
    with pytest.raises(ArgumentError, match="pickle"):
        load_dataset(write_npz(**content))


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_truncated_npz_is_refused(write_npz, cut):
    path = write_npz(**arrays())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArgumentError, match="intact"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x_train": np.zeros((5, 7, 7), np.uint8)}, ShapeError),
        ({"x_test": np.zeros((4, 8, 7), np.uint8)}, ShapeError),
        ({"x_train": np.zeros((6, 49), np.uint8)}, ShapeError),
        ({"x_train": np.zeros((6, 7, 7), np.int32)}, DtypeError),
        ({"y_train": np.zeros(6, np.float32)}, DtypeError),
        ({"y_train": np.zeros((6, 1), np.int64)}, ShapeError),
        ({"y_train": np.full(6, -1)}, ArgumentError),
        ({"x_test": np.full((4, 7, 7), 1.5, np.float32)}, InputDomainError),
        ({"x_test": np.full((4, 7, 7), np.nan, np.float32)}, NonFiniteError),
    ],
)
def test_arrays_that_do_not_fit_are_refused(write_npz, change, error):
    with pytest.raises(error):
        load_dataset(write_npz(**(arrays() | change)))


def test_a_wider_range_must_be_declared(write_npz):
    path = write_npz(**(arrays() | {"x_test": np.full((4, 7, 7), 1.5, np.float32)}))
    assert load_dataset(path, input_range=(-2.0, 2.0)).input_range == (-2.0, 2.0)


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="digits"):
        load_dataset(tmp_path / "nothing.npz")


def test_digits_split_is_stratified_and_disjoint():
    pytest.importorskip("sklearn", reason="scikit-learn holds the digits")
    data = load_dataset("digits")
    assert data.input_shape == (1, 8, 8)
    assert len(data.x_train) + len(data.x_test) == 1797
    total = torch.bincount(torch.cat([data.y_train, data.y_test]))
    assert torch.equal(torch.bincount(data.y_test), (total + 4) // 5)
    assert data.x_train.min() == 0.0
    assert data.x_train.max() == 1.0
    assert load_dataset("digits").digest == data.digest


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match="demo"):
        load_dataset("digits")


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    x = torch.arange(11.0)[:, None]
    y = torch.arange(11)
    seen = [
        torch.cat([b for _, b in batches(x, y, batch_size=4, seed=5, epoch=e)]) for e in (0, 0, 1)
    ]
    assert seen[0].sort().values.tolist() == list(range(11))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(epoch_order(11, seed=5, epoch=0), epoch_order(11, seed=6, epoch=0))


def test_the_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    epoch_order(100, seed=1, epoch=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_dataset_needs_samples():
    empty = torch.zeros(0, 1, 2, 2)
    with pytest.raises(ShapeError, match="N > 0"):
        Dataset(empty, torch.zeros(0).long(), empty, torch.zeros(0).long(), name="empty")
