"""Which names and values are secrets, and that nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import cluster, compose
from harness.config.schema import all_keys
from harness.record.folder import RunFolder
from harness.record.schema import METRICS, SUMMARY_KEYS
from harness.redaction import (
    REDACTED,
    is_secret_name,
    redact_argv,
    redact_paths,
    redact_secrets,
    redact_text,
    secret_in,
)

SECRET = [
    "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "wandb_api_key", "WANDB_API_KEY", "DB_PASSWD", "HF_TOKENS",
    "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "MY_PRIVATE_KEY", "my.private-key", "privateKey", "apiKey",
    "APIKEY", "authToken", "PGPASSWORD", "MYSQL_PWD", "SMTP_PASS", "GITHUB_PAT", "OPENAI_KEY", "OPENAI_KEY2",
    "HFTOKEN", "HUGGING_FACE_HUB_TOKEN", "token", "access_token_2", "SENTRY_DSN", "SLACK_WEBHOOK_URL",
    "BASIC_AUTH", "client_secret", "ssh-key", "Passphrase",
]  # fmt: skip
HARMLESS = [
    "PATH", "PWD", "OLDPWD", "NCCL_SOCKET_IFNAME", "TOKENIZERS_PARALLELISM", "eval.tokens", "MAX_TOKENS", "eos_token",
    "pad_token_id", "train_tokens_available", "comparison_key", "KEYBOARD", "MONKEY", "SEED", "OMP_NUM_THREADS",
    "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "PASSIVE", "SSH_AUTH_SOCK", "PUBLIC_KEY", "tokens", "tokens_per_s", "AUTHOR",
    "data.tokenizer", "num_key_value_heads", "key", "forward_pass", "backward_passes",
]  # fmt: skip
FORMS = [
    "hf_abcdefghijklmnopqrstuvwx", "ghp_abcdefghijklmnopqrstuvwxyz0123456789", "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc", "sk-proj-abcdefghijklmnopqrst",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)
    assert redact_secrets({"outer": [{name: "s3cr3t"}]}) == {"outer": [{name: REDACTED}]}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_names(name: str) -> None:
    assert not is_secret_name(name)
    assert redact_secrets({name: "value"}) == {name: "value"}


def test_no_key_of_ours_looks_secret() -> None:
    """A key of the schema that did would vanish from config.yaml."""
    names = [*all_keys(), *cluster.known(), *METRICS, *SUMMARY_KEYS]
    assert [name for name in names if is_secret_name(name)] == []


@pytest.mark.parametrize(
    "text",
    [
        "export DB_PASSWD=s3cr3t",
        "apptainer exec --env wandb_api_key=s3cr3t image.sif",
        "--export=ALL,HF_TOKENS=s3cr3t",
        "curl --password s3cr3t host",
        "git clone https://me:s3cr3t@host/repo",
        "Authorization: Basic s3cr3t0123456789",
        "Authorization: Bearer s3cr3t0123456789",
        "{'client_secret': 's3cr3t'}",
        '{"client_secret":"s3cr3t"}',
        "my.apiKey = 's3cr3t and more'",
        "APPTAINERENV_HF_TOKEN='s3cr3t'",
    ],
)
def test_values_in_a_text(text: str) -> None:
    assert secret_in(text) is not None
    assert "s3cr3t" not in redact_text(text)
    assert redact_text(text) == redact_text(redact_text(text))
    assert secret_in(redact_text(text)) is None


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_show_by_themselves(form: str) -> None:
    assert secret_in(f"echo {form}") == "a secret"
    assert redact_secrets(["x", (f"echo {form}", 3)]) == ["x", [f"echo {REDACTED}", 3]]


@pytest.mark.parametrize(
    "text",
    [
        "export HF_TOKEN=$HF_TOKEN",
        "export HF_TOKEN=$(cat ~/.token)",
        'export HF_TOKEN="${HF_TOKEN}"',
        "source /etc/profile; module load cuda/12.8",
        "optbench train data.tokenizer=gpt2 eval.tokens=4096 group=token-study",
        "https://arxiv.org/abs/2203.15556",
        "step 100/200  loss 3.1  1,024 tokens/s",
        "--container-image=nvcr.io#nvidia/pytorch:25.01 --mem=0",
        "4f2d1c7b9a8e6f5d3c2b1a0f9e8d7c6b5a4f3e2d",
    ],
)
def test_control_all_else_stays(text: str) -> None:
    assert secret_in(text) is None
    assert redact_text(text) == text


def test_numbers_and_none_stay_under_any_name() -> None:
    assert redact_secrets({"token": 5, "password": None, "api_key": ""}) == {
        "token": 5,
        "password": None,
        "api_key": "",
    }


def test_a_word_of_a_command_line_loses_its_whole_value() -> None:
    words = [
        "train",
        "cluster.env.DB_PASSWD=s3 cr;3t'",
        "steps=5",
        "+model.config.api_key=s3cr3t",
        "x.token=$TOKEN",
    ]
    assert redact_argv(words) == [
        "train", f"cluster.env.DB_PASSWD={REDACTED}", "steps=5", f"+model.config.api_key={REDACTED}", "x.token=$TOKEN",
    ]  # fmt: skip


def test_a_run_keeps_no_secret_in_any_of_its_texts(tmp_path: Path) -> None:
    """config.yaml, config.diff.yaml, log.txt and what W&B gets; numbers and other keys stay."""
    words = ["optimizer.target=torch.optim.SGD", "+optimizer.auth_token=s3cr3t", "optimizer.lr=0.125"]
    config = compose.load([*words, f"runs_dir={tmp_path}", "wandb.entity=https://me:s3cr3t@host"])
    folder = RunFolder(tmp_path / "run", config, "0" * 12)
    folder.add_log("RuntimeError: HTTP 401 with Authorization: Bearer s3cr3t0123456789")
    folder.set_state("failed", step=0, reason="x")
    folder.close()
    kept = "".join(path.read_text() for path in sorted((tmp_path / "run").iterdir()))
    assert "s3cr3t" not in kept
    assert "0.125" in kept
    assert compose.load_file(tmp_path / "run" / "config.yaml").optimizer.auth_token == REDACTED  # pyright: ignore[reportAttributeAccessIssue]
    assert "s3cr3t" not in str(redact_paths(config.model_dump(mode="json")))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/users/alice/data/text.jsonl", "text.jsonl"),
        ("/users/alice/My Texts/a.txt", "a.txt"),
        ("[Errno 2] No such file: '/users/alice/x.bin'", "[Errno 2] No such file: 'x.bin'"),
        (
            "optbench train data.files=[/a/b/c.txt,/a/d.txt] runs_dir=/scratch/alice/",
            "optbench train data.files=[c.txt,d.txt] runs_dir=alice",
        ),
        ("~/runs/one went", "one went"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text: str, kept: str) -> None:
    assert redact_paths({"a": [text]}) == {"a": [kept]}


@pytest.mark.parametrize(
    "text",
    [
        "val/loss and/or train/loss", "https://arxiv.org/abs/2203.15556", "1 / 2", "runs/quickstart/sumo-seed0",
        "± 0.01 tokens/s", "× ddp × fp32", "../shared/x", "",
    ],
)  # fmt: skip
def test_texts_without_paths_stay(text: str) -> None:
    assert redact_paths(text) == text


def test_values_that_are_no_text_stay() -> None:
    assert redact_paths({"n": 3, "x": None, "t": (1.5, True)}) == {"n": 3, "x": None, "t": [1.5, True]}
