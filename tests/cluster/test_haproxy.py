"""The stand-in for HAProxy: what it changes in Serve's configuration, and that it becomes the program."""

import subprocess
from pathlib import Path

import pytest

from cluster.haproxy import mend, write_wrapper
from engine import ConfigError

CONFIGURATION = """\
defaults
    option abortonclose
    option splice-request
    option splice-response
    errorfile 503 /tmp/500.http
frontend prometheus
    bind :9101
frontend http
    bind 0.0.0.0:8000
frontend http6
    bind :::8000
listen stats
  bind *:8404
"""


def test_the_unprotected_pages_stay_on_loopback_whatever_host_the_api_has() -> None:
    lines = [line.strip() for line in mend(CONFIGURATION, "/d/e.http").splitlines()]
    assert [line for line in lines if line.startswith("bind")] == [
        "bind 127.0.0.1:9101",
        "bind 0.0.0.0:8000",
        "bind :::8000",
        "bind 127.0.0.1:8404",
    ]
    assert lines[:3] == ["defaults", "option abortonclose", "errorfile 503 /d/e.http"]


def test_the_api_takes_no_odd_request_ids() -> None:
    text = mend("frontend http_frontend\n    bind 0.0.0.0:8000\n    mode http\n", "/d/e.http")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[:2] == ["frontend http_frontend", "bind 0.0.0.0:8000"] and lines[3] == "mode http"
    assert lines[2].startswith("http-request del-header x-request-id if ")
    assert mend(text, "/d/e.http") == text, "a file that was mended before stays as it is"


def test_the_wrapper_mends_the_file_and_runs_the_program_with_its_arguments(tmp_path: Path) -> None:
    directory = tmp_path / "with space"
    directory.mkdir()
    file = directory / "haproxy.cfg"
    file.write_text(CONFIGURATION)
    wrapper = write_wrapper(directory, "/bin/echo", "10.0.0.7")
    outcome = subprocess.run([wrapper, "-db", "-f", str(file), "-x", "a b"], capture_output=True, text=True, check=True)
    assert outcome.stdout == f"-db -f {file} -x a b\n"
    assert "bind 127.0.0.1:8404" in file.read_text()
    assert "bind 10.0.0.7:9101" in file.read_text(), "where Prometheus is told to look"
    head, _, body = (directory / "unavailable.http").read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b'"service_unavailable"' in body


def test_one_that_was_written_before_is_not_wrapped_again(tmp_path: Path) -> None:
    """As where a server is started below another, or in the image: RAY_SERVE_HAPROXY_BINARY_PATH names a wrapper."""
    file, elsewhere = tmp_path / "haproxy.cfg", tmp_path / "elsewhere"
    file.write_text(CONFIGURATION)
    elsewhere.mkdir()
    wrapper = write_wrapper(tmp_path, "/bin/echo")
    once = wrapper.read_text()
    assert write_wrapper(tmp_path, str(wrapper)).read_text() == once
    other = write_wrapper(elsewhere, str(wrapper), "10.0.0.7")
    command = [str(other), "-f", str(file)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert outcome.stdout == f"-f {file}\n"
    assert str(wrapper) not in other.read_text()
    assert "bind 10.0.0.7:9101" in file.read_text(), "and not where the one before had it"


def test_somebody_elses_script_is_a_program(tmp_path: Path) -> None:
    script = tmp_path / "tuned"
    for text in ("#!/bin/sh\nexec /usr/sbin/haproxy\n", '#!/bin/sh\nexec nice -n 5 /usr/sbin/haproxy -L "x" "$@"\n'):
        script.write_text(text)
        assert str(script) in write_wrapper(tmp_path, str(script)).read_text()


def test_one_that_would_only_start_itself_is_refused(tmp_path: Path) -> None:
    wrapper = write_wrapper(tmp_path, "/bin/echo")
    wrapper.write_text(wrapper.read_text().replace("/bin/echo", str(wrapper)))
    with pytest.raises(ConfigError, match="unset RAY_SERVE_HAPROXY_BINARY_PATH"):
        write_wrapper(tmp_path, str(wrapper))
