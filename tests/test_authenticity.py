"""Whose bytes they are: keyed digests and manifests, as other tools make them, and every way not to match."""

import hashlib
import hmac
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import tensorwire
from tensorwire.cli import main
from tensorwire.errors import AuthError, EncodeError, FormatError, LimitError, UnsupportedError
from tensorwire.files import authenticity
from tensorwire.files.authenticity import Tagged, check_manifest, check_tag, digest, manifest, tag

KEY = bytes(range(32))
MODEL = {"w": np.arange(1000, dtype=np.float32), "steps": 3}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensorwire.save_file(MODEL, tmp_path / "model.tw")
    return tmp_path / "model.tw"


def test_known_answer() -> None:
    """RFC 4231, test case 3."""
    expected = "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"
    assert tag(io.BytesIO(b"\xdd" * 50), b"\xaa" * 20) == expected


def test_tags_equal_those_of_openssl(model: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    command = ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{KEY.hex()}", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == tag(model, KEY)


@pytest.mark.parametrize("codec", ["raw", "nf4|zstd"])
def test_a_tag_made_while_sending_matches_the_received_bytes(codec: str, tmp_path: Path) -> None:
    outgoing = Tagged(tensorwire.encode(MODEL, codec=codec), KEY)
    with pytest.raises(AuthError, match="not passed to its end"):
        _ = outgoing.tag
    (tmp_path / "received").write_bytes(b"".join(outgoing))
    check_tag(tmp_path / "received", KEY, outgoing.tag)
    assert hmac.digest(KEY, (tmp_path / "received").read_bytes(), "sha256").hex() == outgoing.tag
    check_tag(tmp_path / "received", bytearray(KEY), outgoing.tag.upper())


def test_an_open_file_keeps_its_position_when_checked(model: Path) -> None:
    expected = tag(model, KEY)
    with open(model, "rb") as file:
        check_tag(file, KEY, expected)
        model.rename(model.with_name("old"))
        model.write_bytes(b"another file under its name")
        assert tensorwire.loads(file)["steps"] == 3


def test_every_change_of_the_bytes_is_detected(model: Path) -> None:
    expected, data = tag(model, KEY), bytearray(model.read_bytes())
    for place in range(0, len(data), 41):
        data[place] ^= 1
        with pytest.raises(AuthError):
            check_tag(io.BytesIO(data), KEY, expected)
        data[place] ^= 1
    for changed in (data[:-1], data + b"\0", b""):
        with pytest.raises(AuthError):
            check_tag(io.BytesIO(changed), KEY, expected)


def test_a_wrong_key_and_every_wrong_tag_are_refused(model: Path) -> None:
    good = tag(model, KEY)
    with pytest.raises(AuthError, match="does not have this tag"):
        check_tag(model, KEY[::-1], good)
    for length in range(64):
        with pytest.raises(AuthError):
            check_tag(model, KEY, good[:length])
    for place in range(64):
        with pytest.raises(AuthError):
            check_tag(model, KEY, good[:place] + ("0" if good[place] != "0" else "1") + good[place + 1 :])
    for wrong in (
        good + "0",
        good + "\n",
        f" {good[1:]}",
        "é" * 64,
        "٣" * 64,
        bytes.fromhex(good),
        None,
        "0x" + good[2:],
    ):
        with pytest.raises(AuthError):
            check_tag(model, KEY, wrong)


def test_tags_are_compared_in_constant_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or True)
    check_tag(model, KEY, "0" * 64)
    assert compared == [(bytes.fromhex(tag(model, KEY)), bytes(32))]


@pytest.mark.parametrize("key", [b"", b"x" * 15])
def test_short_keys_are_refused_before_anything_is_read(key: bytes, model: Path) -> None:
    for use in (lambda: tag("missing", key), lambda: check_tag("missing", key, "0" * 64), lambda: Tagged([], key)):
        with pytest.raises(AuthError, match="at least 16"):
            use()
    with pytest.raises(TypeError):
        tag(model, "a text of more than 16 letters")  # type: ignore[arg-type]


# Manifests


def test_a_manifest_is_an_in_toto_statement(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_bytes(b"x")
    text = manifest([model, tmp_path / "a file"])
    statement = json.loads(text)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://model_signing/Digests/v0.1" and statement["predicate"]
    subjects = [("a file", b"x"), ("model.tw", model.read_bytes())]
    expected = [{"name": name, "digest": {"sha256": hashlib.sha256(data).hexdigest()}} for name, data in subjects]
    assert statement["subject"] == expected
    check_manifest(text, [model])
    check_manifest(text.encode(), [tmp_path / "a file", str(model)])
    assert manifest([tmp_path / "a file", model]) == text  # the same files, the same bytes


def test_files_not_in_the_manifest_are_refused(model: Path, tmp_path: Path) -> None:
    text = manifest([model])
    other = tmp_path / "other.tw"
    shutil.copy(model, other)
    with pytest.raises(AuthError, match="'other.tw' is not in the manifest"):
        check_manifest(text, [model, other])
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(AuthError, match="not the file that the manifest describes"):
        check_manifest(text, [model])
    with pytest.raises(FileNotFoundError):
        check_manifest(text, [tmp_path / "missing" / "model.tw"])


def test_a_manifest_needs_files_of_different_names(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="two files"):
        manifest([model, tmp_path / "folder" / "model.tw"])
    with pytest.raises(EncodeError, match="at least one file"):
        manifest([])


def test_names_in_a_manifest_are_never_opened(model: Path) -> None:
    statement = json.loads(manifest([model]))
    statement["subject"] += [
        {"name": name, "digest": {"sha256": "0" * 64}} for name in ("/etc/passwd", "../x", "", "\x1b[2J")
    ]
    statement["unknown"] = statement["predicate"]["unknown"] = 1
    statement["subject"][0]["digest"]["sha512"] = "anything"
    check_manifest(json.dumps(statement), [model])


def test_broken_manifests(model: Path) -> None:
    good = json.loads(manifest([model]))
    subject = good["subject"][0]
    cases = [
        ("", FormatError),
        ("[]", FormatError),
        ("null", FormatError),
        ("[" * 100_000, FormatError),
        (b"\xff", FormatError),
        (manifest([model])[:-5], FormatError),
        ('{"_type": 1, "_type": 2}', FormatError),
        (json.dumps(good | {"subject": {}}), FormatError),
        (json.dumps(good | {"_type": "https://in-toto.io/Statement/v2"}), UnsupportedError),
        (json.dumps(good | {"predicateType": "https://slsa.dev/provenance/v1"}), UnsupportedError),
        (json.dumps({"subject": []}), UnsupportedError),
        (json.dumps(good | {"subject": [subject, subject]}), FormatError),
        (" " * (authenticity.MAX_MANIFEST + 1), LimitError),
        *(
            (json.dumps(good | {"subject": [broken]}), FormatError)
            for broken in (
                None, "x", {}, {"name": "model.tw"}, subject | {"name": 1}, subject | {"digest": "0"},
                subject | {"digest": {}}, subject | {"digest": {"sha256": "0" * 63}},
                subject | {"digest": {"sha256": 0}},
            )
        ),
    ]  # fmt: skip
    for text, error in cases:
        with pytest.raises(error):
            check_manifest(text, [model])


def test_openssl_signs_a_manifest(model: Path, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")

    def openssl(*arguments: object) -> int:
        return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, cwd=tmp_path).returncode

    (tmp_path / "manifest.json").write_text(manifest([model]))
    assert openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem") == 0
    assert openssl("ec", "-in", "key.pem", "-pubout", "-out", "public.pem") == 0
    assert openssl("dgst", "-sha256", "-sign", "key.pem", "-out", "signature", "manifest.json") == 0
    verify = ["dgst", "-sha256", "-verify", "public.pem", "-signature", "signature", "manifest.json"]
    assert openssl(*verify) == 0
    model.write_bytes(b"another")
    (tmp_path / "manifest.json").write_text(manifest([model]))  # fits the file, but nobody signed it
    check_manifest((tmp_path / "manifest.json").read_text(), [model])
    assert openssl(*verify) == 1


# The command line


def test_the_verbs_together(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_file, listed = tmp_path / "key", tmp_path / "manifest.json"
    key_file.write_bytes(KEY)
    assert main(["digest", str(model), str(key_file)]) == 0
    assert capsys.readouterr().out == f"{digest(model)}  {model}\n{digest(key_file)}  {key_file}\n"
    assert main(["digest", str(model), "--key-file", str(key_file)]) == 0
    printed = capsys.readouterr().out.split()[0]
    assert printed == tag(model, KEY)
    assert main(["digest", str(model), "--manifest"]) == 0
    listed.write_text(capsys.readouterr().out)
    origin = ["--key-file", str(key_file), "--tag", printed, "--manifest", str(listed)]
    assert main(["verify", str(model), *origin]) == 0
    assert capsys.readouterr().out.startswith("ok: ")
    model.write_bytes(tensorwire.dumps({"w": "a stream as good as any"}))
    assert main(["verify", str(model)]) == 0
    capsys.readouterr()
    for wrong in (origin[:4], origin[4:]):
        assert main(["verify", str(model), "--json", *wrong]) == 1
        result = json.loads(capsys.readouterr().out)
        assert not result["ok"] and result["error"]["kind"] == "AuthError"


def test_nothing_is_decoded_before_its_origin_is_checked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_bytes(KEY)
    model.write_bytes(b"no stream at all")
    assert main(["verify", str(model), "--key-file", str(tmp_path / "key"), "--tag", "0" * 64]) == 1
    assert "does not have this tag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["verify", "model.tw", "--tag", "0" * 64], 2),
        (["verify", "model.tw", "--key-file", "key"], 2),
        (["verify", "-", "--key-file", "key", "--tag", "0" * 64], 2),
        (["verify", "-", "--manifest", "manifest.json"], 2),
        (["digest", "-", "--manifest"], 2),
        (["verify", "model.tw", "--manifest", "missing"], 3),
        (["digest", "model.tw", "--key-file", "missing"], 3),
        (["digest", "missing"], 3),
        (["digest", "model.tw", "--key-file", os.devnull], 1),
        (["digest", "model.tw", "--key-file", "model.tw"], 1),
        (["verify", "model.tw", "--manifest", "model.tw"], 1),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tensorwire.save_file({"w": np.zeros(2000)}, "model.tw")
    Path("key").write_bytes(KEY)
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err
