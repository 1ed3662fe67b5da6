"""What a secret is, by its name or by its looks, and that no text that leaves the study folder has one."""

import json
from dataclasses import replace

import pytest

from tests import studies
from tuner.cli import read
from tuner.export.formats import FORMATS, export
from tuner.record.secrets import hide, is_secret, secrets
from tuner.report.terminal import trial_view
from tuner.spec.study import EngineSpec
from tuner.study.outcome import Infeasible, Measured

KEY = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0\n-----END KEY-----"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "x"),
        ("api-key", "x"),
        ("S3_SECRET", "x"),
        ("SSH_PASSPHRASE", "x"),
        ("DB_PASS", "x"),
        ("DB_PWD", "x"),
        ("SIGNING_KEY", "x"),
        ("AZURE_STORAGE_KEY", "x"),
        ("AUTHORIZATION", "x"),
        ("PROXY_AUTH_HEADER", "x"),
        ("SLACK_WEBHOOK", "x"),
        ("DATABASE_URL", "postgresql://bob:hunter2@db/x"),
        ("HTTPS_PROXY", "http://bob:hunter2@proxy:3128"),
        ("HEADERS", "x-forwarded=1, Authorization: Bearer abcdefgh1234"),
        ("WHATEVER", "hf_abcdefghijklmnopqrstuv"),
    ],
)
def test_a_name_or_a_value_tells_a_secret(name, value):
    assert is_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max-num-batched-tokens", "8192"),
        ("tokenizer", "org/model"),
        ("KEYBOARD", "de"),
        ("PWD", "/home/bob"),
        ("AUTHOR", "bob"),
        ("compilation-config.pass_config", "{}"),
        ("MONKEY", "1"),
        ("MASTER_ADDR", "http://db:5432/x@y"),
        ("STORAGE", "postgresql://bob:${PASSWORD}@db/x"),
        ("basic", "a basic setup"),
        ("model", "sk-learn"),
    ],
)
def test_other_names_and_values_do_not(name, value):
    assert not is_secret(name, value)


def test_a_secret_is_hidden_as_text_as_json_as_yaml_and_in_pieces(tmp_path):
    env = {"A_SECRET": "it's\"\\ü", "PEM_KEY": KEY, "P": "http://b:hunt%402@h", "Q": "http://b:${HOME}@h"}
    study = studies.study(tmp_path, frozen={"engine": {"env": env}, "search_space": {"env": {"B_TOKEN": "of-a-space"}}})
    known = secrets(study, ())
    for value in (*env.values(), "of-a-space", "hunt@2"):
        for text in (value, json.dumps(value), json.dumps(value, ensure_ascii=False), value.replace("'", "''")):
            said = hide(text, known)
            assert said == text if "HOME" in value else "(secret)" in said
    indented = "  key: |\n" + "".join(f"    {line}\n" for line in KEY.splitlines())
    assert "MIIE" not in hide(indented, known)


def test_neither_an_export_nor_the_screen_shows_one(tmp_path, capsys):
    env = {"DATABASE_URL": "postgresql://bob:hunter2@db/x", "HEADER": "Authorization: Bearer abcdefgh1234", "A": "b"}
    flags = {"max-model-len": 4096, "admin-api-key": "topsecret", "ssl-keyfile": "key.pem", "no-a-key": None}
    study, store = studies.write(tmp_path / "s", trials=1, engine=EngineSpec("vllm", env=env, args=flags))
    config = replace(store.trials()[0].config, flags=flags, env=env)
    store.start_trial(1, config, config.params, baseline=True)
    store.end_trial(1, Measured((studies.step(2.0, study.objective, tokens_per_s=90_000),)))
    store.start_trial(2, config, config.params)
    store.end_trial(2, Infeasible("crash", "no hunter2", "topsecret", "abcdefgh1234"))
    texts = ["".join(export(store, study, form).values()) for form in FORMATS]
    from tuner.report.console import printer

    for number in (1, 2):
        printer().print(trial_view(store, study, number))
    texts.append(capsys.readouterr().out)
    for text in texts:
        assert not any(secret in text for secret in ("hunter2", "topsecret", "abcdefgh1234")), text
    assert all("key.pem" in text and "a-key" in text for text in (texts[0], texts[-1]))
    for name in ("DATABASE_URL", "HEADER", "--admin-api-key"):
        assert all(f"# {name} was set during the study and is a secret" in text for text in texts[:-1])


def test_a_secret_that_is_a_common_word_leaves_json_what_it_is(tmp_path, monkeypatch, capsys):
    env = {"ENABLE_AUTH": "false", "DB_PASSWORD": "trial", "A_TOKEN": "measured", "B_SECRET": "12345678"}
    known = studies.write(tmp_path / "s", engine=EngineSpec("vllm", env=env))
    monkeypatch.setattr(read, "opened", lambda _: known)
    read.front(tmp_path, json=True)
    assert json.loads(capsys.readouterr().out)["trials"]["measured"]
    read.show(tmp_path, 0, json=True)
    assert json.loads(capsys.readouterr().out)["emulated"] is False
    assert hide("false, trial 12345678", secrets(known[0], ())) == "false, (secret) (secret)"
