"""`fastattn chat`: a conversation at the terminal, with a model in this process or with a server.

The prefix cache keeps earlier turns, so each turn computes only what is new.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastattn import config
from fastattn.cli import _errors, _session
from fastattn.cli import _options as opt

if TYPE_CHECKING:
    from fastattn.engine.llm import LLM
    from fastattn.engine.sampling_params import SamplingParams
    from fastattn.openai_http import Server

Messages = list[dict[str, str]]
# Answers a conversation piece by piece, until its end or until the interrupt is hit.
Answer = Callable[[Messages, _session.Interrupt], Iterator[str]]

HELP = """\
/help          this list
/reset         forget the conversation (the system message stays)
/system TEXT   start anew with this system message; without TEXT: with none
/save FILE     write the conversation as JSON
/exit          leave; Ctrl-D does too
A line that ends in \\ goes on in the next. Ctrl-C stops an answer. A message may begin with / after a space."""


@dataclass
class Conversation:
    """The messages so far, and one turn more. write gets the answer's text as it comes."""

    answer: Answer
    system: str | None
    write: Callable[[str], None]
    turns: Messages = field(default_factory=list)

    @property
    def messages(self) -> Messages:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def say(self, text: str) -> bool:
        """Answers a message, and says whether it was let finish. A message that cannot be answered is forgotten again; an interrupted answer is kept as far
        as it was shown, since the person who reads on has seen it."""
        self.turns.append({"role": "user", "content": text})
        answer = ""
        try:
            with _session.Interrupt() as interrupt:
                for piece in self.answer(self.messages, interrupt):
                    answer += piece
                    self.write(piece)
        except BaseException:
            self.turns.pop()
            raise
        if answer:
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.turns.pop()
        return not interrupt.hit


def by_model(llm: LLM, params: SamplingParams) -> Answer:
    """Answers of a model in this process."""

    def answer(messages: Messages, interrupt: _session.Interrupt) -> Iterator[str]:
        for _, output in _session.stream(llm.engine, [llm.chat_prompt(messages)], params, interrupt):
            completion = output.outputs[0]
            yield completion.text
            if completion.finish_reason == "error":
                raise RuntimeError("the model gave logits that are not numbers")

    return answer


def by_server(server: Server, model: str, options: Mapping[str, object]) -> Answer:
    """Answers of an OpenAI-compatible server. A server that is silent is left at the second Ctrl-C."""

    def answer(messages: Messages, interrupt: _session.Interrupt) -> Iterator[str]:
        with closing(server.chat(model, messages, options)) as pieces:
            for piece in pieces:
                yield piece
                if interrupt.hit:
                    break

    return answer


@opt.with_engine("max_num_seqs")
def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="smollm2, gemma3-270m, a folder, or a .gguf file; none with --url."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Talk to this server; OPENAI_BASE_URL, if no MODEL is given."),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="As the server calls it; the first that it lists.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="For the server; OPENAI_API_KEY, if not given.")
    ] = None,
    quick: Annotated[
        str | None, typer.Option("--quick", metavar="TEXT", help="Answer this one message, and leave.")
    ] = None,
    system: opt.System = None,
    max_tokens: opt.MaxTokens = 1024,
    temperature: opt.Temperature = 0.7,
    top_p: opt.TopP = 0.95,
    top_k: opt.TopK = 0,
    min_p: opt.MinP = 0.0,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    *,
    engine: opt.Engine,
    enable_prefix_caching: opt.EnablePrefixCaching = True,
    speculative: opt.Speculative = None,
    quiet: opt.Quiet = False,
) -> None:
    """Talk with a model, here or on a server. /help lists the commands inside."""
    params = _session.make_params(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    if model is None:
        server, name = _find_server(url, served_model, api_key)
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop}
        # Beyond OpenAI's own fields: sent only where they say something, as a server may refuse what it does not know.
        options |= {"top_k": top_k or None, "min_p": min_p or None}
        _talk(Conversation(by_server(server, name, options), system, _write), f"{name} at {server.root}", quick, quiet)
        return
    if url is not None or served_model is not None or api_key is not None:
        raise _errors.CLIError(
            f"MODEL is {model!r}, which runs here: leave it out to talk to a server (--model names its)"
        )
    source = _session.open_source(model)
    if not source.tokenizer().has_chat_template:  # known from the file's header: say so before weights are loaded
        raise _errors.CLIError(
            f'{source.name} has no chat template, so it completes text but does not converse: fastattn run --raw {model} "TEXT"'
        )
    loaded = _session.load_llm(
        source,
        **engine,
        max_num_seqs=1,
        enable_prefix_caching=enable_prefix_caching,
        speculative=speculative,
        quiet=quiet,
    )
    where = f"{source.name} on {loaded.llm.engine.runner.device}"
    _talk(Conversation(by_model(loaded.llm, params), system, _write), where, quick, quiet)


def _find_server(url: str | None, model: str | None, api_key: str | None) -> tuple[Server, str]:
    from fastattn.openai_http import Server

    url = url or config.openai_base_url()
    if url is None:
        raise _errors.CLIError("give a MODEL to run here, or the --url of a server")
    server = Server(url, api_key or config.openai_api_key())
    return server, server.choose_model(model)


def _talk(conversation: Conversation, where: str, quick: str | None, quiet: bool) -> None:
    """One answer, or a conversation to its end."""
    if quick is not None:
        finished = conversation.say(quick)
        conversation.write("\n")
        if not finished:
            raise typer.Exit(_errors.INTERRUPTED)
        return
    if not quiet and sys.stdin.isatty():
        tell(f"{where}. /help lists the commands.")
    repl(conversation, read_messages())


def repl(conversation: Conversation, messages: Iterator[str]) -> None:
    """Takes messages and commands until they end or /exit."""
    for message in messages:
        if message.startswith("/"):
            if not command(conversation, message):
                return
            continue
        if not message.strip():
            continue
        try:
            conversation.say(message.strip())
        except (
            ValueError,
            RuntimeError,
            ConnectionError,
        ) as error:  # a prompt that became too long, a server that is away …
            hint = "" if len(conversation.messages) < 2 else " (/reset starts anew)"
            tell(f"fastattn: {_errors.one_line(error)}{hint}")
        conversation.write("\n")


def command(conversation: Conversation, line: str) -> bool:
    """Obeys a /command; False means leave."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return False
    if name == "/help":
        tell(HELP)
    elif name == "/reset":
        conversation.turns.clear()
        tell("The conversation is empty.")
    elif name == "/system":
        conversation.system = rest or None
        conversation.turns.clear()
        tell("The system message is set, the conversation is empty." if rest else "There is no system message now.")
    elif name == "/save":
        save(conversation, rest)
    else:
        tell(f"fastattn: unknown command {name}, /help lists them (a message may begin with / after a space)")
    return True


def save(conversation: Conversation, path: str) -> None:
    if not path:
        tell("fastattn: /save needs a file name")
        return
    try:
        text = json.dumps(conversation.messages, ensure_ascii=False, indent=2)
        Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
        tell(f"Saved {len(conversation.messages)} messages to {path}.")
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name, or text that is no UTF-8
        tell(f"fastattn: {_errors.one_line(error)}")


def read_messages() -> Iterator[str]:
    """Messages from the terminal, with line editing and history, or the lines of a pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  importing it gives input() editing and history
    lines: list[str] = []
    while True:
        try:
            # input() takes the prompt to stdout; nobody wants it in a pipe.
            line = input(("… " if lines else "> ") if interactive else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            tell("" if lines else "\n(/exit or Ctrl-D leaves)")
            lines.clear()
            continue
        except UnicodeDecodeError as error:
            raise _errors.CLIError(f"stdin is not UTF-8: {error.reason} at byte {error.start} of a line") from None
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        yield "\n".join([*lines, line])
        lines.clear()
    if lines:  # the input ended in a backslash
        yield "\n".join(lines)
    if interactive:
        tell("")


def tell(text: str) -> None:
    """For the person, not part of the conversation."""
    print(text, file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
