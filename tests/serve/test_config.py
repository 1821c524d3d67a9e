"""Settings from flags, environment and file: which goes first, and that everything wrong is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fastattn.serve.auth import load_keys
from fastattn.serve.config import ServeConfig, load
from fastattn.serve.yaml_file import load_yaml

DIGEST = "0" * 64


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_flag_before_environment_before_file_before_default(tmp_path: Path) -> None:
    file = write(tmp_path, "model: file\nport: 1\nmax-num-seqs: 2\nblock_size: 32\n")
    config = load({"model": "flag", "port": None}, {"port": "3", "block_size": "64"}, file)
    assert (config.model, config.port, config.max_num_seqs, config.block_size, config.seed) == ("flag", 3, 2, 64, 0)


def test_sizes_and_lists() -> None:
    config = load({"model": "m", "max_model_len": "32K", "served_model_name": ["a"]}, {"allowed_hosts": "x, y"}, None)
    assert config.max_model_len == 32768 and config.names == ["a"] and config.allowed_hosts == ["x", "y"]
    assert load({"model": "m"}, {}, None).names == ["m"]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path, "port: 70000\nnot_a_setting: 1\nmodels: {x: {model: y, dtype: int3}}\nrouter: {model_list: []}\n"
    )
    with pytest.raises(ValueError) as caught:
        load({"max_num_seqs": "0", "api_key": ["short"]}, {}, file)
    message = str(caught.value)
    for part in ("model is not given", "port: ", "not_a_setting is not", "models.x.dtype", "max_num_seqs", "api_key", "router.model_list"):  # fmt: skip
        assert part in message
    assert "\n" not in message and "'short'" not in message


def test_kv_cache_dtypes_are_the_engines() -> None:
    from fastattn.nn import check_kv_cache_dtype

    names = get_args(ServeConfig.model_fields["kv_cache_dtype"].annotation)
    for name in names:
        check_kv_cache_dtype(name)
        assert load({"model": "m", "kv_cache_dtype": name}, {}, None).engine_options()["kv_cache_dtype"] == name
    with pytest.raises(ValueError, match=r"kv_cache_dtype: .*'int8_per_token_head', got 'fp4'"):
        load({"model": "m", "kv_cache_dtype": "fp4"}, {}, None)


def test_template_kwargs_leave_the_servers_own_alone() -> None:
    assert load({"model": "m"}, {"template_kwargs": "a, b"}, None).template_kwargs == ["a", "b"]
    with pytest.raises(ValueError, match="messages, tools: what the server itself gives"):
        load({"model": "m", "template_kwargs": ["tools", "messages"]}, {}, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nport: 2", "twice"),
        ("- a", "by name"),
        ("a: [", "config.yaml"),
        ("1: b", "by name"),
        ("port: !!python/object/apply:os.system [id]", "config.yaml"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load({"model": "m"}, {}, write(tmp_path, text))


def test_on_is_a_word_and_true_is_none() -> None:
    assert load_yaml("on: [off, yes, No]\nx: true\ny: false") == {"on": ["off", "yes", "No"], "x": True, "y": False}


def test_secrets_do_not_show() -> None:
    config = load({"model": "m", "api_key": ["a-secret-key"]}, {}, None)
    assert "a-secret-key" not in repr(config) + str(config.model_dump())


def test_engine_options_are_the_engines() -> None:
    from fastattn.engine.setup import EngineOptions

    options = ServeConfig(model="m").engine_options()
    assert set(options) <= set(EngineOptions.__dataclass_fields__)
    EngineOptions(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"keys: [{{name: a, sha256: {DIGEST[1:]}x}}]", "sha256"),
        (f"keys: [{{name: a, sha256: '{DIGEST}'}}, {{name: a, sha256: '{DIGEST}'}}]", "'a' is there twice"),
        (f"keys: [{{name: a, sha256: '{DIGEST}', scopes: [root]}}]", "scopes"),
        (f"keys: [{{name: a, sha256: '{DIGEST}', key: x}}]", "key: Extra"),
        ("keys: []", "keys"),
        ("nothing", "api_keys_file"),
    ],
)
def test_bad_keys_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_keys([], write(tmp_path, text))
