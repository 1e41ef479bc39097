"""Shards of an S3 bucket: moto's server answers as S3 does, s3fs asks it through fsspec."""

from __future__ import annotations

import pytest

from clipkit.data import iter_eval
from clipkit.data.faults import DataError
from clipkit.data.shardset import ShardSet
from tests.data.test_shardset import keys_of, pairs, say_sizes, shards, stream_of, told

pytestmark = pytest.mark.slow
__all__ = ["shards"]


@pytest.fixture
def bucket(monkeypatch):
    """put(path, name=its own): an object of s3://clipkit-test, on a server of this test's own."""
    server = pytest.importorskip("moto.server", reason="pip install clipkit[peers]")
    s3fs = pytest.importorskip("s3fs", reason="pip install clipkit[peers]")
    started = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "a secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("clipkit-test")

    def put(*paths):
        for path in paths:
            files.pipe_file(f"clipkit-test/{path.name}", path.read_bytes())

    put.remove = lambda name: files.rm_file(f"clipkit-test/{name}")
    yield put
    files.rm("clipkit-test", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    started.stop()


TRAIN = "s3://clipkit-test/{00000..00007}.tar"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("counted", [False, True])
def test_a_bucket_is_read_in_the_order_of_the_same_files_on_disk(
    shards, byte_tokenizer, bucket, tmp_path, monkeypatch, workers, counted
):
    expected = keys_of(stream_of(str(shards[0].parent), byte_tokenizer, epochs=2))
    if counted:
        say_sizes(shards)
    bucket(*shards[0].parent.iterdir())
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "other"))
    assert keys_of(stream_of(TRAIN, byte_tokenizer, epochs=2, num_workers=workers)) == expected
    evaluated = [key for batch in iter_eval(TRAIN, image_size=8, batch_size=9) for key in batch["key"]]
    assert sorted(evaluated) == sorted(set(expected))


def test_an_object_written_anew_at_its_size_brings_no_wrong_pair(tmp_path, write_tar, bucket):
    path = pairs(write_tar, tmp_path / "0.tar", [f"a{i:03d}" for i in range(40)])
    size = path.stat().st_size
    bucket(path)
    url = "s3://clipkit-test/0.tar"
    data = ShardSet([url], cache_dir=tmp_path / "cache")
    assert all(told(data, i) == {f"a{i:03d}"} for i in range(40))
    pairs(write_tar, path, [f"b{i:03d}" for i in range(40)], seed=1)
    assert path.stat().st_size == size
    bucket(path)
    again = ShardSet([url], cache_dir=tmp_path / "cache")
    assert all(told(again, i) == {f"b{i:03d}"} for i in range(40))


def test_an_object_that_is_not_there_is_named(shards, byte_tokenizer, bucket):
    bucket(*shards)
    bucket.remove("00003.tar")
    with pytest.raises((DataError, OSError), match=r"00003\.tar"):
        keys_of(stream_of(TRAIN, byte_tokenizer))
