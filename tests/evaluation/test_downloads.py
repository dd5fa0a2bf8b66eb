import errno
import hashlib
import os
import socket
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from iet_sd.errors import UserError
from iet_sd.evaluation import downloads
from iet_sd.evaluation.downloads import (
    PUBLISHED,
    Published,
    cached_path,
    fetch,
    is_torchscript,
    sha256_of,
)
from iet_sd.files import atomic_file

NAME, UNPINNED = "sscd_disc_mixup", "sscd_disc_large"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The bytes of a TorchScript file, of several blocks of a download."""
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(torch.nn.Linear(600, 1000)).save(path)
    assert path.stat().st_size > 2 * downloads._CHUNK
    return path.read_bytes()


@pytest.fixture
def serve(monkeypatch):
    """A loopback server at whose address the published files are; counts its requests."""
    servers = []

    def start(content=b"", status=200, announced=None, sha256=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.paths.append(self.path)
                self.send_response(status)
                length = len(content) if announced is None else announced
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.paths = []
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        publish(f"http://127.0.0.1:{server.server_port}", sha256)
        return server

    def publish(address, sha256=None):
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setitem(PUBLISHED, NAME, Published(f"{address}/mixup.pt", sha256))
        monkeypatch.setitem(PUBLISHED, UNPINNED, Published(f"{address}/large.pt", None))

    start.publish = publish
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_downloaded_once_and_checked(serve, tmp_path, weights):
    server = serve(weights, sha256=sha256(weights))
    cache = tmp_path / "new" / "cache"
    assert fetch(NAME, cache) == (cache / "mixup.pt", sha256(weights))
    assert (cache / "mixup.pt").read_bytes() == weights
    assert fetch(NAME, cache) == (cache / "mixup.pt", sha256(weights))
    assert server.paths == ["/mixup.pt"]
    assert names(cache) == ["mixup.pt"]


def test_processes_at_the_same_time_download_once(serve, tmp_path, weights):
    server = serve(weights, sha256=sha256(weights))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch(NAME, tmp_path), range(4)))
    assert found == [(tmp_path / "mixup.pt", sha256(weights))] * 4
    assert server.paths == ["/mixup.pt"]


def test_truncated_body(serve, tmp_path, weights):
    serve(weights[:-10], announced=len(weights), sha256=sha256(weights))
    with pytest.raises(UserError, match=r"could not be downloaded: .*10 .*put it at .*mixup\.pt"):
        fetch(NAME, tmp_path)
    assert names(tmp_path) == []


def test_truncated_body_without_a_checksum(serve, tmp_path, weights):
    serve(weights[:-10], announced=len(weights))
    with pytest.raises(UserError, match="could not be downloaded: "):
        fetch(UNPINNED, tmp_path)
    assert names(tmp_path) == []


def test_wrong_checksum(serve, tmp_path, weights):
    serve(weights, sha256="0" * 64)
    with pytest.raises(UserError, match=rf"has the sha256 {sha256(weights)}, not 0{{64}} as publi"):
        fetch(NAME, tmp_path)
    assert names(tmp_path) == []


def test_server_that_has_no_such_file(serve, tmp_path):
    serve(status=404)
    with pytest.raises(UserError, match="could not be downloaded: Not Found"):
        fetch(NAME, tmp_path)
    assert names(tmp_path) == []


def test_offline(serve, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    serve.publish(f"http://127.0.0.1:{port}")
    with pytest.raises(UserError) as caught:
        fetch(NAME, tmp_path)
    message = str(caught.value)
    assert f"http://127.0.0.1:{port}/mixup.pt is not in the cache" in message
    assert "refused" in message
    assert message.endswith(f"put it at {tmp_path / 'mixup.pt'}.")
    assert names(tmp_path) == []


def test_full_disk(serve, tmp_path, weights, monkeypatch):
    serve(weights, sha256=sha256(weights))

    class FullDisk:
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def on_a_full_disk(path):
        with atomic_file(path) as file:
            file.write(weights[:100])
            yield FullDisk()

    monkeypatch.setattr(downloads, "atomic_file", on_a_full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(NAME, tmp_path)
    assert not isinstance(caught.value, UserError)  # the network is not to blame
    assert names(tmp_path) == []


def test_damaged_file_in_the_cache(serve, tmp_path, weights):
    server = serve(weights, sha256=sha256(weights))
    (tmp_path / "mixup.pt").write_bytes(weights[:-1] + b"!")
    with pytest.raises(UserError, match=r"mixup\.pt is damaged or another file: .* Delete it"):
        fetch(NAME, tmp_path)
    assert server.paths == []


def test_unpublished_checksum_is_kept_at_the_first_download(
    serve, tmp_path, weights, caplog, monkeypatch
):
    monkeypatch.setattr(downloads, "_CHUNK", 1000)  # less than a file keeps back when written
    serve(weights)
    assert fetch(UNPINNED, tmp_path) == (tmp_path / "large.pt", sha256(weights))
    assert names(tmp_path) == ["large.pt", "large.pt.sha256"]
    assert "No checksum of large.pt is published" in caplog.text
    caplog.clear()
    assert fetch(UNPINNED, tmp_path)[1] == sha256(weights)
    assert caplog.text == ""
    (tmp_path / "large.pt").write_bytes(weights + b"!")
    with pytest.raises(UserError, match=rf"{sha256(weights)} is kept in .*large\.pt\.sha256"):
        fetch(UNPINNED, tmp_path)


def test_unpublished_checksum_of_a_file_put_there_is_kept(serve, tmp_path, weights):
    server = serve(weights)
    (tmp_path / "large.pt").write_bytes(weights)
    fetch(UNPINNED, tmp_path)
    assert (tmp_path / "large.pt.sha256").read_text() == sha256(weights) + "\n"
    assert server.paths == []


def test_deleted_file_must_come_back_the_same(serve, tmp_path, weights):
    serve(weights)
    fetch(UNPINNED, tmp_path)
    (tmp_path / "large.pt").unlink()
    serve(weights + b"!")
    with pytest.raises(UserError, match="is kept in"):
        fetch(UNPINNED, tmp_path)


def test_what_is_no_torchscript_is_not_trusted(serve, tmp_path):
    serve(b"<html>please log in to this network</html>")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        fetch(UNPINNED, tmp_path)
    assert names(tmp_path) == []


def test_default_is_the_cache_of_torch_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    expected = tmp_path / "hub" / "checkpoints" / "sscd_disc_mixup.torchscript.pt"
    assert cached_path(NAME, None) == expected


def test_published_files():
    assert {name: published.filename for name, published in PUBLISHED.items()} == {
        "sscd_disc_mixup": "sscd_disc_mixup.torchscript.pt",
        "sscd_disc_large": "sscd_disc_large.torchscript.pt",
        "inception": "weights-inception-2015-12-05-6726825d.pth",
    }
    assert all(published.url.startswith("https://") for published in PUBLISHED.values())
    # The name of the file carries the beginning of its checksum, by the custom of torch hub.
    assert PUBLISHED["inception"].sha256.startswith("6726825d")
    assert {len(published.sha256 or 64 * "x") for published in PUBLISHED.values()} == {64}


def test_sha256_of_several_files(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * (downloads._CHUNK + 1))
    (tmp_path / "b").write_bytes(b"b")
    both = b"a" * (downloads._CHUNK + 1) + b"b"
    assert sha256_of(tmp_path / "a", tmp_path / "b") == sha256(both)


def test_layout_of_torchscript(tmp_path, weights):
    (tmp_path / "script.pt").write_bytes(weights)
    assert is_torchscript(tmp_path / "script.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pt")
    assert not is_torchscript(tmp_path / "pickle.pt")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not is_torchscript(tmp_path / "old.pt")
    (tmp_path / "empty.pt").touch()
    assert not is_torchscript(tmp_path / "empty.pt")
