"""Commands as a user types them: what comes out, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import Result

from fastattn import LLM, SamplingParams, __version__
from fastattn.cli.serve import ServeCommand, _with_flags
from tests.cli.conftest import Invoke
from tests.engine.tiny import TinySource

RUN = ("run", "tiny", "--device", "cpu", "--max-tokens", "12")


def expected(*prompts: str, raw: bool = True, **params: object) -> list[list[str]]:
    """For each prompt the texts of its completions, by the library."""
    llm = LLM(TinySource(), device="cpu", quiet=True)
    inputs = list(prompts) if raw else [llm.chat_prompt([{"role": "user", "content": p}]) for p in prompts]
    options = {"temperature": 0.0, "max_tokens": 12} | params
    outputs = llm.generate(inputs, SamplingParams(**options), use_tqdm=False)  # type: ignore[arg-type]
    return [[completion.text for completion in output.outputs] for output in outputs]


def one_line_error(result: Result, code: int = 2) -> str:
    """The single line that a failed command leaves on stderr."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in lines[0]
    return lines[0]


# ---- run ----


def test_one_prompt_gives_its_text_and_nothing_else_on_stdout(invoke: Invoke) -> None:
    result = invoke(*RUN, "--raw", "hello")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == expected("hello")[0][0].strip()
    assert "12 new tokens" in result.stderr and "tokens/s" in result.stderr and "first token" in result.stderr


def test_several_prompts_come_in_order_with_headers(invoke: Invoke) -> None:
    prompts = ["first", "the second one", "3"]
    result = invoke(*RUN, "--raw", *prompts)
    assert result.exit_code == 0
    at = -1
    for index, (prompt, (text,)) in enumerate(zip(prompts, expected(*prompts), strict=True)):
        header = result.stdout.index(f"[{index + 1}/3] {prompt}")
        assert header > at
        at = result.stdout.index(text.strip(), header)


def test_the_chat_template_is_used_unless_raw(invoke: Invoke) -> None:
    (with_template,), (without,) = expected("hi", raw=False)[0], expected("hi")[0]
    assert with_template != without
    assert with_template.strip() in invoke(*RUN, "hi").stdout
    assert without.strip() in invoke(*RUN, "--raw", "hi").stdout
    assert invoke(*RUN, "--system", "be brief", "hi").stdout != invoke(*RUN, "hi").stdout


def test_a_dash_reads_stdin_line_by_line(invoke: Invoke) -> None:
    result = invoke(*RUN, "--raw", "-", stdin="one\n\n  \ntwo\n")
    assert "[1/2] one" in result.stdout and "[2/2] two" in result.stdout


def test_several_answers_to_one_prompt(invoke: Invoke) -> None:
    result = invoke(*RUN, "--raw", "-n", "2", "--temperature", "1", "--seed", "3", "hello")
    texts = expected("hello", n=2, temperature=1.0, seed=3)[0]
    assert texts[0] != texts[1]
    assert all(text.strip() in result.stdout for text in texts)
    assert "#1" in result.stdout and "#2" in result.stdout


def test_a_stop_string_cuts_the_text(invoke: Invoke) -> None:
    text = expected("hello")[0][0]
    assert invoke(*RUN, "--raw", "--stop", text[4], "hello").stdout.strip() == text[: text.index(text[4])].strip()


def test_quiet_leaves_the_text_alone(invoke: Invoke) -> None:
    result = invoke(*RUN, "--raw", "--quiet", "hello")
    assert result.stderr == "" and result.stdout.strip() == expected("hello")[0][0].strip()


def test_options_change_speed_and_memory_but_not_the_text(invoke: Invoke) -> None:
    options = ("--block-size", "8", "--num-kv-blocks", "64", "--max-model-len", "64", "--max-num-batched-tokens", "5")
    more = (*options, "--max-num-seqs", "2", "--no-enable-prefix-caching")
    assert invoke(*RUN, "--raw", "-q", *more, "hello").stdout == invoke(*RUN, "--raw", "-q", "hello").stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (("run", "tiny"), "", ("PROMPT",)),
        (("run", "tiny", ""), "", ("prompt 1 is empty",)),
        (("run", "tiny", "-"), "\n \n", ("stdin has no prompt",)),
        (("run", "tiny", "-"), b"ok\n\xff\n", ("not UTF-8", "byte 3", "0xff")),
        (("run", "tiny", "--raw", "--system", "x", "hi"), "", ("--system", "--raw")),
        (("run", "no-such-model", "hi"), "", ("no-such-model", "smollm2", "gemma3-270m")),
        (("run", "model.bin", "hi"), "", ("model.bin",)),
        (("run", "tiny", "--temperature", "-1", "hi"), "", ("temperature", "-1")),
        (("run", "tiny", "--temperature", "hot", "hi"), "", ("--temperature", "hot")),
        (("run", "tiny", "--top-p", "0", "hi"), "", ("top_p", "above 0")),
        (("run", "tiny", "--top-p", "1.5", "hi"), "", ("top_p", "1.5")),
        (("run", "tiny", "--min-p", "2", "hi"), "", ("min_p", "2")),
        (("run", "tiny", "-n", "0", "hi"), "", ("n is 0", "1 to 256")),
        (("run", "tiny", "--max-tokens", "0", "hi"), "", ("max", "0")),
        (("run", "tiny", "--device", "tpu", "hi"), "", ("device", "tpu", "cpu")),
        (("run", "tiny", "--device", "cpu", "--dtype", "int3", "hi"), "", ("dtype", "int3", "float32")),
        (("run", "tiny", "--max-model-len", "100000", "hi"), "", ("max_model_len", "100000", "512")),
        (("run", "tiny", "--device", "cpu", "--block-size", "7", "hi"), "", ("7",)),
        (("run", "tiny", "--device", "cpu", "--num-kv-blocks", "2", "hi"), "", ("32 KV blocks", "room for 2")),
        (("run", "tiny", "--device", "cpu", "--max-model-len", "16", "x" * 40), "", ("tokens, allowed are up to 15",)),
        (("run", "tiny", "--device", "cpu", "--max-model-len", "16", "a", "x" * 40), "", ("prompt 2", "up to 15")),
        (("chat", "no-such-model"), "", ("no-such-model",)),
        (("plan", "no-such-model"), "", ("no-such-model",)),
        (("plan", "tiny", "--memory", "lots"), "", ("lots",)),
        (("run", "tiny", "--no-such-option", "hi"), "", ("--no-such-option",)),
        (("no-such-command",), "", ("no-such-command",)),
        (("serve",), "", ("model is not given",)),
        (("bench", "serve", "--plot", "load.xyz"), "", ("--plot", ".xyz", ".svg")),
        (("bench", "serve", "--plot", "no-such-folder/load.png"), "", ("no-such-folder",)),
        (("bench", "serve", "--save-result", "--result-dir", "no-such-folder"), "", ("no-such-folder",)),
        (("bench", "serve", "--goodput", "speed:9"), "", ("--goodput", "speed:9", "ttft")),
        (("bench", "kernels", "--min-seconds", "-1"), "", ("--min-seconds", "from 0")),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(
    invoke: Invoke, arguments: tuple[str, ...], stdin: str | bytes, says: tuple[str, ...]
) -> None:
    line = one_line_error(invoke(*arguments, stdin=stdin))
    assert all(word in line for word in says), line


def test_broken_files_are_one_line(invoke: Invoke, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\3\0\0\0")
    assert str(cut) in one_line_error(invoke("run", str(cut), "hi"))
    assert "config.json" in one_line_error(invoke("run", str(tmp_path), "hi"))
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04")
    assert "pickled weights are programs" in one_line_error(invoke("run", str(pickle), "hi"))


# ---- chat ----


def test_chat_remembers_and_resets(invoke: Invoke, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    chat = ("chat", "tiny", "--device", "cpu", "--max-tokens", "8", "--temperature", "0", "-q")
    result = invoke(*chat, stdin=f"hello\nhello\n/save {saved}\n/reset\nhello\n/exit\nnever read\n")
    assert result.exit_code == 0, result.output
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    first, second, third = (line for line in result.stdout.split("\n") if line.strip())
    assert messages[1]["content"] == first and messages[3]["content"] == second
    assert third == first != second


def test_chat_commands(invoke: Invoke) -> None:
    chat = ("chat", "tiny", "--device", "cpu", "--max-tokens", "4", "-q")
    result = invoke(*chat, stdin="/help\n/system be kind\n/save\n/nonsense\n/system\n\n/quit\n")
    assert result.exit_code == 0 and result.stdout == ""
    for words in ("/reset", "system message is set", "needs a file name", "unknown command /nonsense", "no system"):
        assert words in result.stderr


def test_chat_goes_on_after_a_message_that_is_too_long(invoke: Invoke) -> None:
    chat = ("chat", "tiny", "--device", "cpu", "--max-tokens", "4", "--max-model-len", "64", "--temperature", "0", "-q")
    result = invoke(*chat, stdin=f"{'x' * 100}\nhi\n")
    assert result.exit_code == 0
    assert "allowed are up to 63" in result.stderr
    assert result.stdout.strip()


def test_chat_joins_lines_that_end_in_a_backslash(invoke: Invoke, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    invoke("chat", "tiny", "--device", "cpu", "--max-tokens", "4", "-q", stdin=f"a\\\nb\n/save {saved}\n")
    assert json.loads(saved.read_text())[0] == {"role": "user", "content": "a\nb"}


# ---- plan, doctor, help ----


def test_plan_says_what_the_engine_then_takes(invoke: Invoke) -> None:
    options = ("--device", "cpu", "--max-model-len", "128", "--max-num-seqs", "3", "--block-size", "8")
    result = invoke("plan", "tiny", *options, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    llm = LLM(TinySource(), device="cpu", max_model_len=128, max_num_seqs=3, block_size=8, quiet=True)
    runner = llm.engine.runner
    assert plan["num_kv_blocks"] == runner.config.num_kv_blocks == 3 * 128 // 8
    assert plan["kv_bytes"] == runner.kv_memory.nbytes
    model = runner.model
    held = [t for t in (*model.parameters(), *model.buffers()) if t is not None]
    held += [getattr(m, name) for m in model.modules() for name in ("packed", "packed_head") if hasattr(m, name)]
    assert sum(plan["weight_bytes"].values()) == sum(t.numel() * t.element_size() for t in held if t is not None)
    assert plan["num_parameters"] == sum(_numel(info.shape) for info in TinySource().tensors().values())


def test_8_bits_in_the_kv_cache(invoke: Invoke) -> None:
    """The option reaches plan and run; tiny's heads are too small for it, which all say before anything is loaded."""
    message = "kv_cache_dtype is 'int8' with head_dim 8, allowed is head_dim a multiple of 16"
    for command in (("plan", "tiny"), ("run", "tiny", "a")):
        assert message in one_line_error(invoke(*command, "--device", "cpu", "--kv-cache-dtype", "int8"))
    result = invoke("run", "tiny", "a", "--device", "cpu", "--kv-cache-dtype", "fp4")
    assert "kv_cache_dtype is 'fp4', allowed are 'auto', 'float32', " in one_line_error(result)
    plan = json.loads(invoke("plan", "tiny", "--device", "cpu", "--kv-cache-dtype", "auto", "--json").stdout)
    assert plan["kv_cache_dtype"] == "auto"


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def test_plan_says_what_does_not_fit(invoke: Invoke) -> None:
    result = invoke("plan", "tiny", "--device", "cuda", "--memory", "100M")
    assert result.exit_code == 1
    assert "Does not fit" in result.stdout
    assert invoke("plan", "tiny", "--device", "cuda", "--memory", "80G").exit_code == 0


def test_doctor(invoke: Invoke) -> None:
    text, data = invoke("doctor"), invoke("doctor", "--json")
    assert text.exit_code == data.exit_code
    report = json.loads(data.stdout)
    assert report["facts"]["fastattn_version"] == __version__
    assert {v["subject"] for v in report["verdicts"]} >= {"packages", "runtime", "gpu", "memory"}
    assert all(v["remedy"] for v in report["verdicts"] if v["status"] != "ok")
    assert __version__ in text.stdout and "Traceback" not in text.output
    assert invoke("collect-env").stdout.splitlines()[0] == text.stdout.splitlines()[0]


def test_doctor_says_what_of_an_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.doctor import collect_facts, facts

    lines = ["torch>=2", "httpx>=0.27; extra == 'server'", "no-such-thing; extra == 'server'", "rich; extra == 'bench'"]
    monkeypatch.setattr(facts.importlib.metadata, "requires", lambda _: [*lines, 'mypy==2; extra == "lint"'])
    assert collect_facts().extras == {"server": ["no-such-thing"], "bench": []}


_COMMANDS = """run, chat, serve, router, router evaluate, quantize, prune, distill, plan, inspect, eval, bench, bench latency,
bench throughput, bench startup, bench serve, bench kernels, doctor, collect-env, version"""


@pytest.mark.parametrize("command", re.split(r",\s", _COMMANDS))
def test_help(invoke: Invoke, command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0 and "Usage: " in result.stdout


def test_help_of_all_has_whole_sentences_in_groups(invoke: Invoke) -> None:
    """What a line has no room for is cut to "...", which helps nobody."""
    for group in ((), ("bench",), ("router",)):
        assert "..." not in invoke(*group, "--help").stdout.replace("[ARGS]...", "")
    assert "\nGenerate text:\n  run " in invoke("--help").stdout
    assert "\nSampling:\n  --max-tokens N " in invoke("run", "--help").stdout
    assert "[default: 256]" in invoke("run", "--help").stdout


@pytest.mark.parametrize("group", ["bench", "router"])
def test_a_group_without_a_command_says_what_there_is(invoke: Invoke, group: str) -> None:
    result = invoke(group)
    assert result.exit_code == 2 and "\nCommands:\n" in result.stderr


def test_serve_without_its_packages_says_so(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastattn.serve.config", None)
    monkeypatch.delattr("fastattn.serve.config", raising=False)
    monkeypatch.setattr(ServeCommand, "_full", property(lambda _: _with_flags()))  # not what an earlier test cached
    result = invoke("serve", "tiny", "--port", "8000")
    assert result.exit_code == 2 and "pip install 'fastattn[server]'" in result.stderr


def test_help_loads_neither_torch_nor_the_server() -> None:
    code = "import sys, fastattn.cli.main; print({'torch', 'pydantic', 'httpx', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_version(invoke: Invoke) -> None:
    assert invoke("version").stdout == invoke("--version").stdout == f"fastattn {__version__}\n"


# ---- a process of its own ----

_PROGRAM = """
import time
import fastattn.engine.setup, fastattn.models.loader
from fastattn.engine.engine import Engine
from tests.engine.tiny import TinySource
step = Engine.step
Engine.step = lambda self: time.sleep(0.02) or step(self)  # an answer takes longer than we may have to wait
open_model = lambda name: TinySource()
fastattn.models.loader.open_model = fastattn.engine.setup.open_model = open_model
from fastattn.cli.main import app
app()
"""


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = start("run", "tiny", "--device", "cpu", "--raw", "-q", "--max-tokens", "400", "hello")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert process.wait(60) in (141, -signal.SIGPIPE)
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_it_with_what_there_is() -> None:
    process = start("run", "tiny", "--device", "cpu", "--raw", "--max-tokens", "480", *["hello"] * 8)
    assert process.stdout is not None
    process.stdout.read(20)  # it is under way
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - began < 20
    assert b"Traceback" not in err and b"tokens/s" in err


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fastattn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastattn {__version__}\n"
