"""TLS for clients: which files are taken, what is said of others, and what a reload changes."""

from __future__ import annotations

import os
import re
import select
import shutil
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from llmux.errors import LlmuxError
from llmux.gateway.client.tls import Tls

PASSPHRASE = "secret"


def made(directory: Path, name: str) -> tuple[str, str]:
    certificate, key = str(directory / f"{name}.pem"), str(directory / f"{name}.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two certificates with their keys, the first key once more under a passphrase, and rubbish."""
    directory = tmp_path_factory.mktemp("certificates")
    _, key = made(directory, "one")
    made(directory, "two")
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", key, "-out", str(directory / "locked.key"),
         "-passout", f"pass:{PASSPHRASE}"],
        check=True, capture_output=True,
    )  # fmt: skip
    (directory / "rubbish.pem").write_text("not a certificate")
    return directory


def shown(context: ssl.SSLContext) -> str:
    """The certificate that a new client is shown."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_alpn_protocols(["h2", "http/1.1"])
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(to_client, to_server)
    there = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(5):
        for end in (here, there):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert here.selected_alpn_protocol() == "http/1.1"
    return ssl.DER_cert_to_PEM_cert(here.getpeercert(binary_form=True) or b"")


def test_clients_see_the_certificate_and_speak_tls_1_2_at_least(files: Path) -> None:
    certificate, key = str(files / "one.pem"), str(files / "one.key")
    context = Tls(certificate, key).context
    assert shown(context) == Path(certificate).read_text()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("certificate", "key", "cause"),
    [
        ("absent.pem", "one.key", "No such file or directory"),
        ("one.pem", "absent.key", "No such file or directory"),
        ("rubbish.pem", "one.key", ".+"),
        ("one.pem", "rubbish.pem", ".+"),
        ("one.pem", "two.key", "KEY_VALUES_MISMATCH"),
        ("one.pem", "o\0ne.key", "embedded null byte"),
    ],
)
def test_why_files_cannot_be_used_is_said(
    files: Path, certificate: str, key: str, cause: str
) -> None:
    names = (str(files / certificate), str(files / key))
    with pytest.raises(LlmuxError) as caught:
        Tls(*names)
    start = f"cannot use {names[0]} and {names[1]} for TLS: "
    assert re.fullmatch(re.escape(start) + cause, str(caught.value))


def test_nobody_is_asked_for_a_passphrase(files: Path) -> None:
    """Without a terminal, OpenSSL would ask at the standard input; once, as it sees its end."""
    names = (str(files / "one.pem"), str(files / "locked.key"))
    told, tells = os.pipe()
    says, hears = os.pipe()
    os.write(hears, f"{PASSPHRASE}\n".encode())
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(says, 0)
        try:
            Tls(*names)
        except LlmuxError as error:
            os.write(tells, str(error).encode())
        os._exit(7)
    _, status = os.waitpid(pid, 0)
    os.close(tells)
    with open(told, encoding="utf-8") as text:
        assert text.read().startswith(f"cannot use {names[0]} and {names[1]} for TLS: ")
    assert os.waitstatus_to_exitcode(status) == 7
    assert select.select([says], [], [], 0)[0], "nothing was read"
    os.close(says)
    os.close(hears)


def test_a_reload_shows_the_new_certificate_or_keeps_the_whole_former_one(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(one: str, other: str) -> None:
        shutil.copy(files / one, certificate)
        shutil.copy(files / other, key)

    put("one.pem", "one.key")
    tls = Tls(str(certificate), str(key))
    context = tls.context
    first, second = (files / "one.pem").read_text(), (files / "two.pem").read_text()
    for one, other in (("two.pem", "one.key"), ("rubbish.pem", "one.key"), ("two.pem", "two.key")):
        assert shown(context) == first
        put(one, other)
        tls.reload()
    assert shown(context) == second
    certificate.unlink()
    tls.reload()
    assert shown(context) == second
    assert tls.context is context
    start = "cannot reload the certificate, the current one stays in use: cannot use "
    for message in (caplog.messages[0], caplog.messages[1], caplog.messages[3]):
        assert message.startswith(f"{start}{certificate} and {key} for TLS: ")
    assert caplog.messages[2:3] == ["certificate reloaded"]
    assert len(caplog.messages) == 4
