"""The private CA: its files, their permissions, what is refused, and the command line on top."""

from __future__ import annotations

import datetime
import json
import shutil
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from privinf.cli.keys import app
from privinf.transport import keys
from privinf.transport.keys import ROLES, add_client, init_keys, load_credentials, renew_keys, show_keys
from protocols.errors import ConfigError

RUNNER = CliRunner()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    init_keys(tmp_path / "keys")
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_layout_and_permissions(directory: Path) -> None:
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {"ca.key", "ca.pem"} | {f"{role}/{name}" for role in ROLES for name in ("ca.pem", "cert.pem", "key.pem")}
    assert {mode(path) for path in directory.rglob("*") if path.is_file()} == {0o600}
    assert {mode(path) for path in (directory, *(directory / role for role in ROLES))} == {0o700}
    for role in ROLES:
        assert b"PRIVATE" not in (directory / role / "ca.pem").read_bytes()


@pytest.mark.parametrize("role", ROLES)
def test_a_role_loads_from_the_whole_directory_and_from_its_bundle(directory: Path, tmp_path: Path, role: str) -> None:
    assert load_credentials(directory, role).role == role
    shutil.copytree(directory / role, tmp_path / "carried")
    assert load_credentials(tmp_path / "carried", role).cert == tmp_path / "carried" / "cert.pem"


def test_show(directory: Path) -> None:
    infos = show_keys(directory)
    assert [info.role for info in infos] == ["ca", *ROLES]
    assert len({info.fingerprint for info in infos}) == 4 and all(len(info.fingerprint) == 64 for info in infos)
    now = datetime.datetime.now(datetime.UTC)
    for info in infos[1:]:
        assert info.hosts == ("localhost", "127.0.0.1", "::1")
        assert datetime.timedelta(minutes=4) < now - info.not_before < datetime.timedelta(minutes=6)
        assert datetime.timedelta(days=396) < info.not_after - now <= datetime.timedelta(days=397)
    assert [info.role for info in show_keys(directory / "client")] == ["ca", "client"]


def test_two_parties_alone_have_no_dealers_certificate(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    assert RUNNER.invoke(app, ["init", "--keys", str(directory), "--no-dealer"]).exit_code == 0
    before = {info.role: info.fingerprint for info in show_keys(directory)}
    assert list(before) == ["ca", "server", "client"] and not (directory / "dealer").exists()
    renew_keys(directory)
    after = {info.role: info.fingerprint for info in show_keys(directory)}
    assert list(after) == list(before) and after["server"] != before["server"]
    with pytest.raises(ConfigError):
        load_credentials(directory, "dealer")


def test_further_clients_keep_their_names(directory: Path) -> None:
    """A server knows a client by the common name, which a renewed certificate keeps; its fingerprint changes."""
    bundle = add_client(directory, "alice")
    assert bundle == directory / "clients" / "alice" and mode(bundle) == mode(bundle.parent) == 0o700
    assert load_credentials(bundle, "client").cert == bundle / "cert.pem"
    before = show_keys(directory)
    assert [info.subject for info in before[1:]] == [f"CN=privinf {who}" for who in ("server", "client", "dealer", "client alice")]
    renew_keys(directory)
    after = show_keys(directory)
    assert [info.subject for info in after] == [info.subject for info in before]
    assert not {info.fingerprint for info in after[1:]} & {info.fingerprint for info in before[1:]}
    with pytest.raises(ConfigError, match="exists already"):
        add_client(directory, "alice")
    for name in ("", "../up", "Alice", "a b", "x" * 41, "-x"):
        with pytest.raises(ConfigError, match="no name for a client"):
            add_client(directory, name)
    with pytest.raises(ConfigError, match="does not hold the CA's key"):
        add_client(bundle, "bob")
    done = RUNNER.invoke(app, ["add", "bob", "--keys", str(directory)])
    assert done.exit_code == 0 and "client  bob valid until" in done.stdout


def test_an_existing_ca_is_not_overwritten(directory: Path) -> None:
    before = (directory / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        init_keys(directory)
    assert (directory / "ca.key").read_bytes() == before
    (directory / "ca.key").unlink()
    with pytest.raises(ConfigError, match="exists already"):
        init_keys(directory)


def test_renew_keeps_the_ca_and_the_hosts(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    init_keys(directory, ["server.example.org", "10.0.0.5"])
    before = {info.role: info.fingerprint for info in show_keys(directory)}
    renew_keys(directory)
    after = {info.role: info for info in show_keys(directory)}
    assert after["ca"].fingerprint == before["ca"]
    for role in ROLES:
        assert after[role].fingerprint != before[role]
        assert after[role].hosts == ("server.example.org", "10.0.0.5")
        load_credentials(directory, role)
    renew_keys(directory, ["::1"])
    assert show_keys(directory)[1].hosts == ("::1",)
    shutil.rmtree(directory / "client")
    renew_keys(directory)
    assert load_credentials(directory, "client")


def test_renew_without_the_ca_key(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.key"):
        renew_keys(directory / "server")
    other = directory.parent / "other"
    init_keys(other)
    shutil.copy(other / "ca.key", directory / "ca.key")
    with pytest.raises(ConfigError, match="does not belong"):
        renew_keys(directory)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602])
def test_a_ca_key_that_others_can_read_is_not_used(directory: Path, mode: int) -> None:
    """Whoever has read it can make itself any party: so neither `renew` nor `add` goes on, and nothing is written."""
    key = directory / "ca.key"
    key.chmod(mode)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for words in (["renew"], ["add", "alice"]):
        error = RUNNER.invoke(app, [*words, "--keys", str(directory)]).exception
        assert isinstance(error, ConfigError) and error.exit_code == 2 and "\n" not in str(error)
        assert f"{key} can be read or written by other users" in str(error) and "chmod 600" in str(error) and "make a new CA" in str(error)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    key.chmod(0o600)
    renew_keys(directory)
    add_client(directory, "alice")


@pytest.mark.parametrize("host", ["a b", "", "host:7000", "1.2.3.4.5", "https://x", "a" * 300, "-x-", "x\ny", "ünicode"])
def test_what_is_not_a_host(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an address"):
        init_keys(tmp_path / "keys", [host])
    assert not (tmp_path / "keys").exists()


def test_no_hosts_and_no_days(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host"):
        init_keys(tmp_path / "keys", [])
    with pytest.raises(ConfigError, match="0 days"):
        init_keys(tmp_path / "keys", days=0)
    assert not list(tmp_path.rglob("*.key"))


def test_an_address_may_stand_in_brackets_and_names_lose_their_capitals(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys", ["[fe80::1]", "Server.Example", "*.example.org"])
    assert show_keys(tmp_path / "keys")[1].hosts == ("fe80::1", "server.example", "*.example.org")


def test_what_load_refuses(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no role"):
        load_credentials(directory, "auditor")
    with pytest.raises(ConfigError, match="keys init"):
        load_credentials(directory / "nowhere", "server")
    with pytest.raises(ConfigError, match="for the role client, not server"):
        load_credentials(directory / "client", "server")

    key = directory / "server" / "key.pem"
    for mode in (0o644, 0o640):
        key.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            load_credentials(directory, "server")
    key.chmod(0o600)
    load_credentials(directory, "server")
    shutil.copy(directory / "client" / "key.pem", key)
    with pytest.raises(ConfigError, match="does not belong"):
        load_credentials(directory, "server")
    key.write_text("-----BEGIN PRIVATE KEY-----\nnot one\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match="not an open private key"):
        load_credentials(directory, "server")
    key.unlink()
    with pytest.raises(ConfigError, match=r"no key\.pem"):
        load_credentials(directory, "server")

    (directory / "dealer" / "cert.pem").write_bytes(b"\x00\x01")
    with pytest.raises(ConfigError, match="not a certificate"):
        load_credentials(directory, "dealer")

    init_keys(directory.parent / "other")
    shutil.copy(directory.parent / "other" / "ca.pem", directory / "client" / "ca.pem")
    with pytest.raises(ConfigError, match="was not signed by"):
        load_credentials(directory, "client")


def test_expired_and_not_yet_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = keys._now()
    for name, days, reason in (("old", -398, "has expired"), ("new", 2, "not valid before")):
        monkeypatch.setattr(keys, "_now", lambda days=days: now + datetime.timedelta(days=days))
        init_keys(tmp_path / name)
        monkeypatch.undo()
        with pytest.raises(ConfigError, match=f"{reason}.* UTC, and the clock here shows 20"):
            load_credentials(tmp_path / name, "server")
    assert show_keys(tmp_path / "old")[1].expired
    renew_keys(tmp_path / "old")
    assert load_credentials(tmp_path / "old", "server")


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write keys"):
        init_keys(tmp_path / "file" / "keys")


def test_command_line(tmp_path: Path) -> None:
    where = str(tmp_path / "keys")
    made = RUNNER.invoke(app, ["init", "--keys", where, "--host", "server.example.org", "--host", "10.0.0.5"])
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ca", *ROLES]
    assert "localhost, 127.0.0.1, ::1, server.example.org, 10.0.0.5" in lines[1] and "valid until" in lines[1]

    shown = RUNNER.invoke(app, ["show", "--keys", where, "--json"])
    document = json.loads(shown.stdout)
    assert [one["role"] for one in document["certificates"]] == ["ca", *ROLES]
    assert document["certificates"][1]["expired"] is False

    renewed = RUNNER.invoke(app, ["renew", "--keys", where, "--json"])
    after = json.loads(renewed.stdout)
    assert after["certificates"][1]["hosts"] == document["certificates"][1]["hosts"]
    assert after["certificates"][1]["fingerprint"] != document["certificates"][1]["fingerprint"]

    assert isinstance(RUNNER.invoke(app, ["init", "--keys", where]).exception, ConfigError)
    assert isinstance(RUNNER.invoke(app, ["show", "--keys", where + "x"]).exception, ConfigError)


@pytest.mark.parametrize("verb", ["init", "show", "renew"])
def test_help_has_an_example(verb: str) -> None:
    assert f"Example: privinf keys {verb}" in RUNNER.invoke(app, [verb, "--help"]).stdout
