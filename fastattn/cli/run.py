"""`fastattn run`: answers prompts, all at once, and says what it cost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fastattn.cli import _errors, _session
from fastattn.cli import _options as opt
from fastattn.cli._ordered import OrderedWriter
from fastattn.cli._summary import Tally, print_lines

if TYPE_CHECKING:
    from fastattn.engine.intake import Prompt
    from fastattn.engine.llm import LLM

_HEADER_CHARS = 100


@opt.with_engine()
def run(
    model: opt.Model,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="Texts to answer; - reads more from stdin, one a line.")
    ],
    system: opt.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text as it is, without a chat template.")] = False,
    n: Annotated[int, typer.Option("-n", "--n", metavar="N", help="Answers to each prompt.")] = 1,
    max_tokens: opt.MaxTokens = 256,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    top_k: opt.TopK = 0,
    min_p: opt.MinP = 0.0,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    *,
    engine: opt.Engine,
    enable_prefix_caching: opt.EnablePrefixCaching = True,
    batch_invariant: opt.BatchInvariant = False,
    disable_cascade_attn: opt.DisableCascadeAttn = False,
    speculative: opt.Speculative = None,
    trace: opt.Trace = None,
    quiet: opt.Quiet = False,
) -> None:
    """Answer prompts with a model, streaming, all at once.

    With several prompts the first unfinished answer is shown as it is written, the others in order after it. The text
    goes to stdout, everything else to stderr.
    """
    # What can be wrong without the model is found before it is loaded.
    texts = read_prompts(prompts)
    params = _session.make_params(
        n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    if raw and system is not None:
        raise _errors.CLIError("--system needs the chat template that --raw switches off: give one of them")
    loaded = _session.load_llm(
        model,
        **engine,
        enable_prefix_caching=enable_prefix_caching,
        batch_invariant=batch_invariant,
        disable_cascade_attn=disable_cascade_attn,
        speculative=speculative,
        trace=trace,
        quiet=quiet,
    )
    inputs = make_inputs(loaded.llm, texts, system, raw)

    several = len(texts) * n > 1
    headers = [
        _header(i, len(texts), j, n, text) if several else None for i, text in enumerate(texts) for j in range(n)
    ]
    writer = OrderedWriter(headers, _write)
    tally = Tally()
    start = time.perf_counter()
    with _session.Interrupt() as interrupt:
        for index, output in _session.stream(loaded.llm.engine, inputs, params, interrupt):
            tally.add(index, output)
            for completion in output.outputs:
                writer.push(index * n + completion.index, completion.text, completion.finish_reason is not None)
        seconds = time.perf_counter() - start
        if interrupt.hit:
            writer.close()
    if not quiet:
        print_lines(["", *tally.lines(loaded, len(texts), seconds)])
    for index in tally.errors:
        print(f"fastattn: prompt {index + 1}: the model gave logits that are not numbers", file=sys.stderr)
    if interrupt.hit:
        raise typer.Exit(_errors.INTERRUPTED)
    if tally.errors:
        raise typer.Exit(1)


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts of a command line, where "-" stands for the lines of stdin."""
    texts: list[str] = []
    for argument in arguments:
        if argument != "-":
            texts.append(_checked(argument, f"prompt {len(texts) + 1}"))
            continue
        data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        try:
            lines = data.decode().splitlines()
        except UnicodeDecodeError as error:
            raise _errors.CLIError(f"stdin is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None
        found = [line for line in lines if line.strip()]
        if not found:
            raise _errors.CLIError("stdin has no prompt: - expects one a line")
        texts += found
    return texts


def _checked(text: str, what: str) -> str:
    if not text:
        raise _errors.CLIError(f"{what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that were not UTF-8
        raise _errors.CLIError(f"{what} is not UTF-8: {os.fsencode(text)!r}") from None
    return text


def make_inputs(llm: LLM, texts: Sequence[str], system: str | None, raw: bool) -> list[Prompt]:
    """What the engine gets: conversations through the model's template, or plain text."""
    if not raw and llm.tokenizer.has_chat_template:
        first = [{"role": "system", "content": system}] if system is not None else []
        return [llm.chat_prompt([*first, {"role": "user", "content": text}]) for text in texts]
    if system is not None:
        raise _errors.CLIError("--system needs a chat template, and this model has none")
    if not raw:
        print("fastattn: the model has no chat template: completing the text (--raw says the same)", file=sys.stderr)
    return list(texts)


def _header(index: int, count: int, choice: int, n: int, prompt: str) -> str:
    line = " ".join(prompt.split())
    if len(line) > _HEADER_CHARS:
        line = line[: _HEADER_CHARS - 1] + "…"
    which = f"{index + 1}/{count}" + (f" #{choice + 1}" if n > 1 else "")
    return f"[{which}] {line}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
