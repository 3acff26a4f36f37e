import errno
import re
import shutil
import stat
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.episodes.download import Unpacked, download, unpack

BODY = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """A file server that can be told to misbehave; `requests` holds the Range of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.etag = '"one"'
        self.ranges = True
        self.cut = []  # how many bytes to send before hanging up, one an answer; None sends all
        self.status = None
        self.wrong_offset = False
        self.send_length = True
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/walker/rnd.zip"

    def handle_error(self, request, client_address):
        """The tests hang up on purpose."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Keeps the tests' output clean."""

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        if server.status is not None:
            self.send_error(server.status)
            return
        body, offset = server.body, 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            offset = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if offset >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            first = offset + 1 if server.wrong_offset else offset
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.send_length:
            self.send_header("Content-Length", str(len(body) - offset))
        self.end_headers()
        cut = server.cut.pop(0) if server.cut else None
        self.wfile.write(body[offset:] if cut is None else body[offset : offset + cut])
        self.close_connection = True


@pytest.fixture
def server():
    each = Server()
    thread = threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield each
    each.shutdown()
    each.server_close()
    thread.join()


def fetch(server, path, *, attempts=1):
    return download(server.url, path, attempts=attempts, timeout_seconds=5.0, progress=True)


def test_a_file_arrives(server, tmp_path):
    path = fetch(server, tmp_path / "rnd.zip")
    assert path.read_bytes() == BODY
    assert [each.name for each in tmp_path.iterdir()] == ["rnd.zip"]


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.cut = [1000, 0]
    with pytest.raises(OSError, match=r"closed after 1000 of 10240 bytes; 1000 bytes are kept, run the same command"):
        fetch(server, tmp_path / "rnd.zip")
    assert (tmp_path / "rnd.zip.part").stat().st_size == 1000
    assert not (tmp_path / "rnd.zip").exists()
    assert fetch(server, tmp_path / "rnd.zip").read_bytes() == BODY
    assert server.requests == [None, "bytes=1000-", "bytes=1000-"]
    assert [each.name for each in tmp_path.iterdir()] == ["rnd.zip"]


def test_attempts_that_bring_something_do_not_count(server, tmp_path):
    server.cut = [1000, 1000, 1000, 1000]
    assert fetch(server, tmp_path / "rnd.zip", attempts=2).read_bytes() == BODY
    assert server.requests == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-", "bytes=4000-"]


def test_attempts_that_bring_nothing_end(server, tmp_path):
    server.cut = [1000, 0, 0, 0, 0, 0]
    with pytest.raises(OSError, match="1000 bytes are kept"):
        fetch(server, tmp_path / "rnd.zip", attempts=3)
    assert len(server.requests) == 4


def test_a_server_that_does_not_resume_sends_everything_again(server, tmp_path):
    server.ranges = False
    server.cut = [1000]
    assert fetch(server, tmp_path / "rnd.zip", attempts=2).read_bytes() == BODY


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_reliable_name_for_the_file_the_download_starts_again(server, tmp_path, etag):
    server.etag = etag
    server.cut = [1000]
    assert fetch(server, tmp_path / "rnd.zip", attempts=2).read_bytes() == BODY
    assert server.requests == [None, None]


def test_a_file_that_changed_is_not_glued_to_the_old_one(server, tmp_path):
    server.cut = [1000, 0]
    with pytest.raises(OSError, match="1000 bytes are kept"):
        fetch(server, tmp_path / "rnd.zip")
    server.body, server.etag = BODY[::-1], '"two"'
    assert fetch(server, tmp_path / "rnd.zip").read_bytes() == BODY[::-1]


def test_a_part_of_another_url_is_not_resumed(server, tmp_path):
    server.cut = [1000, 0]
    with pytest.raises(OSError, match="1000 bytes are kept"):
        fetch(server, tmp_path / "rnd.zip")
    server.url += "?other"
    fetch(server, tmp_path / "rnd.zip")
    assert server.requests == [None, "bytes=1000-", None]


def test_a_part_that_is_complete_is_taken(server, tmp_path):
    server.cut = [1000, 0]
    with pytest.raises(OSError, match="1000 bytes are kept"):
        fetch(server, tmp_path / "rnd.zip")
    (tmp_path / "rnd.zip.part").write_bytes(BODY)  # killed between the last byte and the rename
    assert fetch(server, tmp_path / "rnd.zip").read_bytes() == BODY
    assert server.requests[-1] == "bytes=10240-"


def test_a_server_that_resumes_elsewhere_is_not_believed(server, tmp_path):
    server.cut = [1000, 0]
    with pytest.raises(OSError, match="1000 bytes are kept"):
        fetch(server, tmp_path / "rnd.zip")
    server.wrong_offset = True
    with pytest.raises(OSError, match="resumes elsewhere than asked"):
        fetch(server, tmp_path / "rnd.zip")


def test_an_unknown_length_is_accepted(server, tmp_path):
    server.send_length = False
    assert fetch(server, tmp_path / "rnd.zip").read_bytes() == BODY


def test_an_existing_file_is_not_fetched(server, tmp_path):
    path = tmp_path / "rnd.zip"
    path.write_bytes(b"mine")
    assert fetch(server, path) == path
    assert path.read_bytes() == b"mine"
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (404, FileNotFoundError, r"rnd\.zip is not on the server \(HTTP 404\)"),
        (403, OSError, "refuses with HTTP 403"),
        (503, OSError, "answers HTTP 503; 0 bytes are kept"),
    ],
)
def test_refusals_are_one_line(server, tmp_path, status, kind, message):
    server.status = status
    with pytest.raises(kind, match=message) as caught:
        fetch(server, tmp_path / "rnd.zip")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_server_and_bad_input(tmp_path):
    options = {"attempts": 2, "timeout_seconds": 1.0, "progress": False}
    with pytest.raises(OSError, match="no connection"):
        download("http://127.0.0.1:9/x.zip", tmp_path / "x.zip", **options)
    with pytest.raises(ValueError, match="must start with http"):
        download("file:///etc/passwd", tmp_path / "x.zip", **options)
    with pytest.raises(FileNotFoundError, match="create it first"):
        download("http://127.0.0.1:9/x.zip", tmp_path / "nowhere" / "x.zip", **options)


def test_a_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="10240 bytes are wanted and 100 are free") as caught:
        fetch(server, tmp_path / "rnd.zip")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "rnd.zip").exists()


FILES = {"buffer/episode_000000_8.npz": b"a" * 300, "buffer/episode_000001_8.npz": b"b" * 10, "video/0.mp4": b""}


def make_archive(path, files, *, compression=zipfile.ZIP_DEFLATED):
    """`files` maps names, or prepared ZipInfos, to contents."""
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that occur twice
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, content)
    return path


def unpack_here(archive, folder, *, largest_bytes=10_000):
    folder.mkdir(exist_ok=True)
    return unpack(archive, folder, largest_bytes=largest_bytes, progress=True)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_archive_is_unpacked(tmp_path):
    archive = make_archive(tmp_path / "a.zip", {"buffer/": b"", **FILES})
    assert unpack_here(archive, tmp_path / "to") == Unpacked(written=3, already_there=0)
    assert tree(tmp_path / "to") == FILES


def test_unpacking_again_and_after_an_interruption(tmp_path):
    archive = make_archive(tmp_path / "a.zip", FILES)
    unpack_here(archive, tmp_path / "to")
    (tmp_path / "to" / "video" / "0.mp4").unlink()
    assert unpack_here(archive, tmp_path / "to") == Unpacked(written=1, already_there=2)
    assert tree(tmp_path / "to") == FILES


@pytest.mark.parametrize("mine", [b"mine", b"c" * 10])
def test_a_file_with_other_content_is_not_overwritten(tmp_path, mine):
    archive = make_archive(tmp_path / "a.zip", FILES)
    path = tmp_path / "to" / "buffer" / "episode_000001_8.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(mine)
    with pytest.raises(FileExistsError, match=r"episode_000001_8\.npz exists and is not overwritten"):
        unpack_here(archive, tmp_path / "to")
    assert path.read_bytes() == mine


def link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        ("../outside", "'../outside' leaves the folder"),
        ("buffer/../../outside", "leaves the folder"),
        ("/etc/outside", "leaves the folder"),
        ("C:/outside", "leaves the folder"),
        ("..\\outside", "leaves the folder"),
        (link("buffer/link"), "is a link or a device"),
        ("buffer/episode_000000_8.npz", "occurs twice"),
        ("buffer/./episode_000000_8.npz", "occurs twice"),
    ],
)
def test_evil_members_are_refused_before_anything_is_written(tmp_path, evil, message):
    archive = make_archive(tmp_path / "a.zip", [*FILES.items(), (evil, b"evil")])
    with pytest.raises(ValueError, match=message) as caught:
        unpack_here(archive, tmp_path / "to")
    assert str(archive) in str(caught.value)
    assert tree(tmp_path / "to") == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "to"]


def test_encrypted_members_are_refused(tmp_path):
    archive = make_archive(tmp_path / "a.zip", {"secret": b"x"})
    content = bytearray(archive.read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1  # the flags in the central directory
    archive.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="'secret' is encrypted"):
        unpack_here(archive, tmp_path / "to")


def test_a_folder_that_is_a_link_elsewhere_is_not_followed(tmp_path):
    archive = make_archive(tmp_path / "a.zip", FILES)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "buffer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link that leaves"):
        unpack_here(archive, tmp_path / "to")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_bomb_is_refused(tmp_path):
    archive = make_archive(tmp_path / "a.zip", {"buffer/bomb": b"\0" * 1_000_000})
    assert archive.stat().st_size < 5000
    with pytest.raises(ValueError, match="would unpack to 1000000 bytes, more than the limit of 10000"):
        unpack_here(archive, tmp_path / "to")
    assert tree(tmp_path / "to") == {}


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path):
    archive = make_archive(tmp_path / "a.zip", {"bomb": b"\0" * 1_000_000})
    content = archive.read_bytes().replace((1_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no zip archive"):
        unpack_here(archive, tmp_path / "to")
    assert tree(tmp_path / "to") == {}


def test_too_little_space_is_noticed_before_unpacking(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "a.zip", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="310 bytes are wanted and 100 are free"):
        unpack_here(archive, tmp_path / "to")
    assert tree(tmp_path / "to") == {}


@given(st.data())
def test_a_cut_archive_is_refused_whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    archive = make_archive(folder / "a.zip", FILES)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="is damaged or no zip archive; remove it and fetch it again"):
        unpack_here(archive, folder / "to")
    assert tree(folder / "to") == {}


def test_a_damaged_member_stops_everything(tmp_path):
    archive = make_archive(tmp_path / "a.zip", FILES, compression=zipfile.ZIP_STORED)
    archive.write_bytes(archive.read_bytes().replace(b"b" * 10, b"b" * 9 + b"c"))
    with pytest.raises(ValueError, match="is damaged or no zip archive"):
        unpack_here(archive, tmp_path / "to")
    assert tree(tmp_path / "to") == {}  # the sound members came first and were not written either


def test_what_is_no_archive_and_missing_things(tmp_path):
    page = tmp_path / "page.zip"
    page.write_text("<html>not what you asked for</html>")
    with pytest.raises(ValueError, match="is damaged or no zip archive"):
        unpack_here(page, tmp_path / "to")
    with pytest.raises(FileNotFoundError, match="no such archive"):
        unpack_here(tmp_path / "none.zip", tmp_path / "to")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        unpack(page, tmp_path / "nowhere", largest_bytes=1, progress=False)
