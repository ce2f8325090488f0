"""What is never written: secrets of the environment, and what looks like a credential."""

from __future__ import annotations

import os

import pytest

from gemma_qat.cli.told import asked_for
from gemma_qat.config import BlendConfig, DataConfig, ExperimentConfig, apply, from_json, to_json
from gemma_qat.config.values import encode
from gemma_qat.redaction import (
    Secret,
    is_redacted,
    marked,
    redacted,
    secrets_in,
    secrets_within,
    shown,
)

VALUE = "correct-horse"
CREDENTIALS = {
    "a password in a URL": ("s3://me:" + "pa:ss@host/x", "s3://me:<redacted: password>@host/x"),
    "a parameter of a URL": ("https://h/x?v=1&sig=aB%3D&w=2", "https://h/x?v=1&sig=<redacted: sig>&w=2"),
    "a signed URL": ("gs://b?X-Goog-Signature=abc", "gs://b?X-Goog-Signature=<redacted: X-Goog-Signature>"),
    "Hugging Face": ("hub hf_" + "aB" * 17 + " end", "hub <redacted: token> end"),
    "GitHub": ("ghp_" + "x1" * 18, "<redacted: token>"),
    "AWS": ("id AKIA" + "A1B2" * 4, "id <redacted: token>"),
    "Google": ("AIza" + "x" * 35, "<redacted: token>"),
    "a JWT": ("eyJhbGciOiJI.eyJzdWIiOiIx.sig_n", "<redacted: token>"),
    "a header": ("Authorization: Bearer abcdefgh.ijklmnop", "Authorization: Bearer <redacted: token>"),
    "a named value": ("wandb_api_key=0123456789abcdef0123", "wandb_api_key=<redacted: wandb_api_key>"),
    "a key file": ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "<redacted: private key>"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_of_known_shape_are_covered(text: str, expected: str) -> None:
    """If it fails, a credential that is typed into a config lies in its run's folder and in logs."""
    assert redacted(text) == expected
    assert redacted(expected) == expected, "covering twice garbles it"


@pytest.mark.parametrize(
    "text",
    [
        "data/tokenizer.model", "tokenizer=/data/tokenizers/v3/tokenizer.model", "gs://bucket/run@3:7", "hf_models/a",
        "/data/hf_export_of_the_twelfth_of_may", "step 5: the loss is nan on rows 10, 11", "runs/sk-learn-baseline-of-may",
        "https://host:8080/a?page=3&tokenizer=v3#top", "key = parameters['layers/0/attn/q/kernel']", "token=<bos>", "127.0.0.1:1234",
    ],
)  # fmt: skip
def test_ordinary_texts_stay(text: str) -> None:
    """If it fails, a run cannot be resumed because of a path that was no secret."""
    assert redacted(text) == text


def test_variables_are_secret_by_their_names() -> None:
    """If it fails, a secret's value is written, or a folder's name is taken for one."""
    environment = {
        "HF_TOKEN": VALUE, "WANDB_API_KEY": VALUE + "2", "db_password": VALUE, "GOOGLE_CREDENTIALS": VALUE,
        "TOKENIZERS_PARALLELISM": "nothing", "HOME": "/home/me", "TOKEN_FILE": "/run/token", "SSH_KEY_PATH": "/home/me",
        "SHORT_KEY": "12345", "MONKEYS": "bananas", "PGPASSWORD": VALUE,
    }  # fmt: skip
    assert list(secrets_in(environment)) == [
        "WANDB_API_KEY", "HF_TOKEN", "db_password", "GOOGLE_CREDENTIALS", "PGPASSWORD",
    ]  # fmt: skip


def config(secret: str = VALUE) -> ExperimentConfig:
    blend = (BlendConfig(kind="text", path=f"/mnt/{secret}"),)
    data = DataConfig(kind="text", path=f"/mnt/{secret}/text", tokenizer="t.model", blend=blend)
    return ExperimentConfig(name="run", model="tiny_e2b", data=data)


def test_a_marked_config_is_itself_but_where_it_is_written() -> None:
    """If it fails, the secret is in config.json or on the console, or what it unlocks is no longer found."""
    plain, found = config(), marked(config(), {"MOUNT_SECRET": VALUE})
    assert found == plain and os.fspath(found.data.path) == f"/mnt/{VALUE}/text"
    overlaid = apply(found, ["train.steps=3"])
    assert isinstance(overlaid.data.path, Secret)
    assert secrets_within(overlaid) == {"MOUNT_SECRET": VALUE}
    written = [to_json(overlaid), repr(overlaid), *asked_for("c.py", found, overlaid, True)]
    assert not any(VALUE in text for text in written)
    again = from_json(ExperimentConfig, written[0])
    assert again.data.path == "/mnt/<redacted: MOUNT_SECRET>/text" and is_redacted(again.data.path)
    assert again.data.blend[0].path == "/mnt/<redacted: MOUNT_SECRET>"
    assert apply(again, [f"data.path={plain.data.path}"]).data.path == plain.data.path


def test_a_config_without_secrets_is_left_as_it_is() -> None:
    """If it fails, configs are rebuilt, or changed, that hold nothing to hide."""
    plain = config()
    assert marked(plain, {"MOUNT_SECRET": "something else"}) is plain
    assert secrets_within(plain) == {}
    assert from_json(ExperimentConfig, to_json(plain)) == plain


def test_a_digest_does_not_follow_a_secret() -> None:
    """If it fails, a new password makes every cell of a sweep stale, or digests give one away to who can guess it."""
    one = marked(config(), {"MOUNT_SECRET": VALUE})
    other = marked(config("another-one"), {"MOUNT_SECRET": "another-one"})
    assert one != other
    assert encode(one, ExperimentConfig) == encode(other, ExperimentConfig)


def test_what_is_shown_keeps_its_form() -> None:
    """If it fails, run.json has other keys or numbers than were measured."""
    found = {"a": [1, 2.5, None, True], "b": {"url": "s3://me:" + "pw@h"}, "c": ("x", 3)}
    assert shown(found) == {
        "a": [1, 2.5, None, True],
        "b": {"url": "s3://me:<redacted: password>@h"},
        "c": ["x", 3],
    }
