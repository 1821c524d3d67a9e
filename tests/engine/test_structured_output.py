"""Outputs that are held to a form: they have it when they are complete, whatever else the engine does; and what a stranger
may ask for hurts nobody else."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
import re2
import torch

from fastattn import AsyncEngine, SamplingParams, StructuredOutput
from fastattn.engine.engine import Engine
from fastattn.engine.outputs import CompletionOutput
from fastattn.engine.structured_output import MAX_BYTES
from fastattn.models.registry import load_model
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.tiny import EOS, drain, run

pytestmark = pytest.mark.usefixtures("one_thread")

MakeEngine = Callable[..., Engine]
SPACE = 98
# A model with random weights is fond of blanks; less of them leaves room for more of everything else.
DRAWN = SamplingParams(temperature=1, seed=5, max_tokens=240, logit_bias={SPACE: -3.0})


@pytest.fixture(scope="module")
def long_engine() -> Engine:
    """Room for 240 tokens of output."""
    source = tiny.TinySource()
    network = load_model(source, torch.device("cpu"), torch.float32, 512)
    return tiny.make_engine(network, source.tokenizer(), max_model_len=300, num_kv_blocks=700, debug_checks=False)


def complete(engine: Engine, wish: StructuredOutput, count: int = 1, **changes: Any) -> list[CompletionOutput]:
    """Completions with as many seeds."""
    params = [replace(DRAWN, structured_output=wish, seed=seed, **changes) for seed in range(count)]
    return [output.outputs[0] for output in run(engine, ["say"] * count, params)]


def schema(value: Any) -> StructuredOutput:
    return StructuredOutput("json_schema", json.dumps(value))


# ---- what is asked for is what comes ----


def draw_schema(rng: random.Random, depth: int = 0) -> Any:
    """A schema of what people write: bounded strings and numbers, objects, arrays, unions, references."""
    plain = ["integer", "number", "boolean", "null", "string", "enum", "const", "pattern", "either", "format"]
    kind = rng.choice(plain + (["object", "array", "anyOf", "ref"] * 3 if depth < 3 else []))
    if kind == "integer":
        low = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "exclusiveMinimum": -rng.random(), "maximum": rng.randint(1, 99)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "string":
        shortest = rng.randint(0, 3)
        return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 6)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2.5, None, True, "a b", {"k": [1]}], rng.randint(1, 5))}
    if kind == "const":
        return {"const": rng.choice(["x", 17, False, [1, "two"], {"a": None}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-f]{2,5}$", "^v[0-9]+$", "^(ab|c)*d$", "^[^x]{3}$"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])}
    if kind == "either":
        return {"type": rng.sample(["integer", "null", "boolean"], 2), "maximum": 10_000, "minimum": 0}
    if kind == "array":
        fewest = rng.randint(0, 2)
        return {
            "type": "array",
            "items": draw_schema(rng, depth + 1),
            "minItems": fewest,
            "maxItems": fewest + rng.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [draw_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "ref":
        return {"$ref": f"#/$defs/d{rng.randint(0, 1)}"}
    names = rng.sample(["a", "b", "name", "the id", "0"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: draw_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def test_drawn_schemas_give_valid_instances(long_engine: Engine) -> None:
    rng = random.Random(0)
    schemas = []
    for _ in range(220):
        definitions = {"d0": {"type": "boolean"}, "d1": draw_schema(rng, 3)}
        schemas.append({"$defs": definitions} | draw_schema(rng))
    params = [replace(DRAWN, structured_output=schema(s), seed=i) for i, s in enumerate(schemas)]
    outputs = [output.outputs[0] for output in run(long_engine, ["say"] * len(schemas), params)]
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert len(ended) >= 205, [(o.finish_reason, o.stop_reason) for o in outputs if o.finish_reason != "stop"]
    for wanted, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "stop":
            jsonschema_rs.validator_for(wanted, validate_formats=True).validate(json.loads(output.text))
        else:
            assert output.finish_reason == "length", (wanted, output)
    assert len({output.text for output in ended}) > 120


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}, "v": {"type": "boolean"}}, "required": ["v"]},
        {"type": "array", "prefixItems": [{"type": "null"}, {"const": "é€"}], "items": False, "minItems": 2},
        {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}}, {"required": ["a"]}]},
        {"type": "object", "properties": {'"quoted"\\': {"enum": ['"', "\\", "/"]}}, "required": ['"quoted"\\']},
        {"oneOf": [{"type": "integer", "minimum": 5, "maximum": 9}, {"type": "boolean"}]},
    ],
    ids=str,
)
def test_schemas_by_hand(long_engine: Engine, wanted: Any) -> None:
    ended = [o for o in complete(long_engine, schema(wanted), 6, logit_bias={SPACE: -9.0}) if o.finish_reason == "stop"]
    assert ended
    for output in ended:
        jsonschema_rs.validator_for(wanted).validate(json.loads(output.text))


def test_any_object(long_engine: Engine) -> None:
    bias = {SPACE: -9.0} | {long_engine.tokenizer.encode(text, add_special_tokens=False)[0]: 4.0 for text in '"}'}
    ended = [o for o in complete(long_engine, StructuredOutput("json_object"), 12, logit_bias=bias)]
    assert all(isinstance(json.loads(o.text), dict) for o in ended if o.finish_reason == "stop")
    assert sum(o.finish_reason == "stop" for o in ended) > 6
    assert any(len(o.text) > 5 for o in ended)


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-c]{3,8}",
        "(red|green|blue)( (light|dark))?",
        r"\d{3}-\d{4}",
        r"[A-Z]\w*[.!?]",
        r"(\+?1 )?\(\d{3}\) \d{3}",
        r"[^a-z]{5,9}",
        "(a|b)*abb",
        r"((0|1){4} ){1,3}x",
        r"/usr/(bin|lib)/[a-z]+",
        r'"[^"\\]*"',
        r"\p{Lu}\p{Ll}{2,4}",
        "(?i)yes|no",
        "é+€?",
    ],
)
def test_patterns_match_as_re2_says(long_engine: Engine, pattern: str) -> None:
    outputs = complete(long_engine, StructuredOutput("regex", pattern), 8, max_tokens=60)
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert ended
    for text in ended:
        assert re2.fullmatch(pattern, text), (pattern, text)


def test_choices(long_engine: Engine) -> None:
    choices = ("yes", "yes and no", "no", 'a "quoted" one', "back\\slash", "/slash/", "é")
    texts = [o.text for o in complete(long_engine, StructuredOutput("choice", choices), 60)]
    assert set(texts) <= set(choices)
    assert len(set(texts)) >= 4


def test_a_grammar(long_engine: Engine) -> None:
    """Sums in parentheses, which no regular expression can hold to."""
    lark = 'start: sum\nsum: term ("+" term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,3}/'
    bias = {SPACE: -3.0} | {long_engine.tokenizer.encode("(", add_special_tokens=False)[0]: 2.0}
    outputs = complete(long_engine, StructuredOutput("grammar", lark), 20, logit_bias=bias)
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert any("(" in text for text in ended)
    for text in ended:
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)


# ---- together with everything else ----

POINT = schema(
    {
        "type": "object",
        "properties": {
            "x": {"type": "integer", "minimum": 0, "maximum": 999},
            "tags": {"enum": ["one", "two", "thr€e"]},
        },
        "required": ["x", "tags"],
        "additionalProperties": False,
    }
)
HELD = replace(DRAWN, structured_output=POINT, max_tokens=70)


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0}, {"presence_penalty": 1.0, "repetition_penalty": 1.2}, {"top_k": 3}, {"min_tokens": 30}],
    ids=str,
)
def test_the_batch_changes_nothing(make_engine: MakeEngine, changes: dict[str, Any]) -> None:
    """Free and held requests side by side, chunked and preempted: each as if alone."""
    params = [
        replace(HELD, seed=1, **changes),
        replace(HELD, structured_output=None, seed=2, ignore_eos=True),
        replace(HELD, seed=3),
    ]
    prompts = ["a point", "anything at all", "a point, and another one, and so on and on"]
    alone = [run(make_engine(), [prompt], p)[0].outputs[0] for prompt, p in zip(prompts, params, strict=True)]
    engine = make_engine(num_kv_blocks=15, max_num_batched_tokens=5)
    together = [output.outputs[0] for output in run(engine, prompts, params)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert engine.stats().num_preemptions > 0
    for output in (together[0], together[2]):
        if output.finish_reason == "stop":
            assert json.loads(output.text)["tags"] in ("one", "two", "thr€e")
    assert any(o.finish_reason == "stop" for o in together)


def test_n_and_logprobs(make_engine: MakeEngine) -> None:
    (output,) = run(make_engine(), ["a point"], replace(HELD, n=5, logprobs=3))
    free = run(make_engine(), ["a point"], replace(HELD, structured_output=None, max_tokens=1, logprobs=3))[0]
    assert len({completion.text for completion in output.outputs}) == 5
    for completion in output.outputs:
        assert completion.finish_reason == "stop"
        json.loads(completion.text)
        assert completion.logprobs is not None
        assert all(token in row for token, row in zip(completion.token_ids, completion.logprobs, strict=True))
    # They are the model's own: its favourites are in them, though the grammar forbids them.
    assert output.outputs[0].logprobs is not None
    assert free.outputs[0].logprobs is not None
    best = {token for token, row in free.outputs[0].logprobs[0].items() if row.rank <= 3}
    assert best <= set(output.outputs[0].logprobs[0])


def test_resumed_at_every_token(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = run(engine, ["a point"], HELD)[0].outputs[0]
    for cut in range(len(whole.token_ids) + 1):
        engine.add_request("r", "a point", HELD, resume_token_ids=[whole.token_ids[:cut]])
        rest = drain(engine)[-1].outputs[0]
        assert (rest.token_ids, rest.text, rest.finish_reason) == (whole.token_ids, whole.text, "stop"), cut
    wrong = engine.tokenizer.encode("[", add_special_tokens=False)
    with pytest.raises(ValueError, match=r"resume_token_ids\[0\] cannot be"):
        engine.add_request("r", "a point", HELD, resume_token_ids=[wrong])
    assert engine.step() == []


def test_the_end_token_comes_when_the_text_is_complete(make_engine: MakeEngine) -> None:
    bias = {EOS: 50.0}
    for wish, expected in (
        (StructuredOutput("regex", "cd*"), "c"),
        (StructuredOutput("regex", "(abc)+"), "abc"),
        (StructuredOutput("choice", ("the", "them")), "the"),
    ):
        (output,) = complete(make_engine(), wish, logit_bias=bias)
        assert (output.text, output.finish_reason, output.stop_reason) == (expected, "stop", EOS)
        # min_tokens holds the end back for as long as something else can come.
        (output,) = complete(make_engine(), wish, logit_bias=bias, min_tokens=6)
        assert output.finish_reason == "stop"
        assert output.text == "them" or len(output.token_ids) >= 6
    (output,) = complete(make_engine(), StructuredOutput("regex", "a{4}"), ignore_eos=True)
    assert (output.text, output.finish_reason, output.stop_reason) == ("aaaa", "stop", None)


def test_stop_strings_still_stop(make_engine: MakeEngine) -> None:
    (output,) = complete(make_engine(), StructuredOutput("regex", "a{5}xa{5}"), stop="x")
    assert (output.text, output.finish_reason, output.stop_reason) == ("aaaaa", "stop", "x")


def test_a_text_that_no_token_spells_is_an_error(make_engine: MakeEngine) -> None:
    """The tiny vocabulary has no way to write ü beyond its first byte."""
    (output,) = complete(make_engine(), StructuredOutput("choice", ("ü",)))
    assert output.finish_reason == "error"
    assert "no token that can go on" in str(output.stop_reason)


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("xml", "x", "kind is 'xml', allowed are 'json_object', 'json_schema', 'regex', 'grammar', 'choice'"),
        ("json_object", "{}", "value is '{}', allowed is no value for 'json_object'"),
        ("regex", "", "value is '', allowed is a non-empty string for 'regex'"),
        ("regex", ("a",), "value is ('a',), allowed is a non-empty string"),
        ("regex", "a" * (MAX_BYTES + 1), f"has {MAX_BYTES + 1} bytes, allowed are up to {MAX_BYTES}"),
        ("grammar", "é" * MAX_BYTES, f"has {2 * MAX_BYTES} bytes"),
        ("json_schema", "{", "the JSON schema is no JSON"),
        ("json_schema", "[" * 30_000, "the JSON schema is no JSON"),
        ("json_schema", "[1]", "the JSON schema is [1], allowed are an object, true and false"),
        ("json_schema", '{"a":' * 65 + "{}" + "}" * 65, "over 64 levels deep, allowed are 64"),
        ("json_schema", json.dumps({"enum": list(range(10_001))}), "an enum of 10001 values, allowed are 10000"),
        ("choice", "yes", "value is 'yes', allowed is a tuple of non-empty strings"),
        ("choice", (), "has 0 choices, allowed are 1 to 10000"),
        ("choice", ("a", ""), "allowed is a tuple of non-empty strings"),
        ("choice", ("a",) * 10_001, "has 10001 choices"),
    ],
)
def test_refused_when_it_is_made(kind: Any, value: Any, says: str) -> None:
    with pytest.raises(ValueError) as raised:
        StructuredOutput(kind, value)
    assert says in str(raised.value)
    assert len(str(raised.value)) < 200


def test_refused_as_a_parameter() -> None:
    with pytest.raises(ValueError, match="structured_output is 'x', allowed is None or a StructuredOutput"):
        SamplingParams(structured_output="x")  # type: ignore[arg-type]


HOSTILE: dict[str, tuple[str, str]] = {
    "brackets": ("regex", "(" * 30_000),
    "more brackets": ("regex", "(" * 15_000 + ")" * 15_000),
    "brackets in a grammar": ("grammar", "start: " + "(" * 15_000 + '"a"' + ")" * 15_000),
    "a chain of rules": ("grammar", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(4500)) + 'a4500: "x"'),
    "a chain of references": (
        "json_schema",
        json.dumps({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1800)}, "$ref": "#/$defs/d0"}),
    ),
    "a remote reference": ("json_schema", '{"$ref": "http://169.254.169.254/latest/meta-data"}'),
    "a file": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "a remainder": ("json_schema", '{"type": "integer", "multipleOf": 999983}'),
    "optional letters": ("regex", "a?" * 10_000),
    "repetition": ("regex", "a{1000000}"),
    "nested repetition": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "backtracking": ("regex", "(a+)+b"),
    "many states": ("regex", "(a|b)*a(a|b){200}"),
    "look-ahead": ("regex", "(?=a)b"),
    "an intersection": ("grammar", "start: A\nA: /.*a.{50}/ & /.*b.{60}/ & /.*c.{70}/ & ~/.*d.{20}/"),
    "exponential": ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a"'),
    "ambiguous": (
        "grammar",
        "start: r0\n" + "".join(f'r{i}: r{i + 1} r{i + 1} | "a"\n' for i in range(900)) + 'r900: "b"',
    ),
    "a huge enum": ("json_schema", json.dumps({"enum": [f"v{i * 7919 % 100_000}" for i in range(5000)]})),
    "many properties": ("json_schema", json.dumps({"properties": {f"p{i}": {"type": "null"} for i in range(1900)}})),
    "long": ("json_schema", json.dumps({"type": "string", "minLength": 10**9})),
    "keywords that nobody knows": ("json_schema", '{"not": {"type": "object"}, "uniqueItems": true}'),
    "nothing can be it": ("json_schema", "false"),
    "no JSON type": ("json_schema", '{"type": "nope"}'),
    "an unknown rule": ("grammar", "start: nowhere"),
    "no grammar": ("grammar", "¡"),
    "NUL": ("regex", "\x00\x01"),
    "surrogate": ("choice", "\ud800"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_hurt_nobody_else(long_engine: Engine, name: str) -> None:
    """Refused with one line to their owner, or run in bounded time; another request goes on with the same text."""
    kind, value = HOSTILE[name]
    wish = StructuredOutput(kind, (value,) if kind == "choice" else value)  # type: ignore[arg-type]
    friend = replace(DRAWN, max_tokens=12, seed=1)
    expected = run(long_engine, ["hello"], friend)[0].outputs[0].token_ids
    start = time.process_time()
    long_engine.add_request("friend", "hello", friend)
    refusal = None
    try:
        long_engine.add_request("stranger", "hello", replace(DRAWN, structured_output=wish, max_tokens=10))
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal
        assert refusal.startswith(f"structured_output: this {kind} cannot be used: ")
    last = {output.request_id: output for output in drain(long_engine)}
    assert time.process_time() - start < 3  # this process alone: what the sandbox takes is limited there
    assert last["friend"].outputs[0].token_ids == expected


def test_a_server_goes_on_while_grammars_are_compiled(make_engine: MakeEngine) -> None:
    front = AsyncEngine(make_engine(max_model_len=250))

    async def answer(request_id: str, wish: StructuredOutput | None, num_tokens: int) -> CompletionOutput:
        params = replace(DRAWN, structured_output=wish, max_tokens=num_tokens, ignore_eos=wish is None)
        async for output in front.generate("hello", params, request_id):
            last = output.outputs[0]
        return last

    async def all_at_once() -> list[Any]:
        slow = StructuredOutput("json_schema", '{"type": "integer", "multipleOf": 999983}')
        return await asyncio.gather(
            answer("slow", slow, 5), answer("free", None, 200), answer("point", POINT, 120), return_exceptions=True
        )

    slow, free, point = asyncio.run(asyncio.wait_for(all_at_once(), 100))
    front.close()
    assert isinstance(slow, ValueError)
    assert "CPU time" in str(slow)
    assert len(free.token_ids) == 200
    assert point.finish_reason == "stop"
    json.loads(point.text)


def test_speculation_changes_nothing(make_engine: MakeEngine) -> None:
    """Drafts are verified under the masks that they lead to."""
    wish = StructuredOutput("regex", "((ab|cd){3} ){4}x")
    params = replace(DRAWN, structured_output=wish, max_tokens=60)
    prompt = "ab ab cd cd ababab cdcdcd ababab "
    plain = run(make_engine(), [prompt] * 2, [params, replace(params, temperature=0)])
    spec = SpeculativeConfig(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3, adaptive_draft_length=False)
    engine = make_engine(speculative=spec)
    guessed = run(engine, [prompt] * 2, [params, replace(params, temperature=0)])
    assert [o.outputs[0].token_ids for o in guessed] == [o.outputs[0].token_ids for o in plain]
    assert engine.stats().num_accepted_tokens > 0
    for output in guessed:
        assert output.outputs[0].finish_reason != "stop" or re2.fullmatch(wish.value, output.outputs[0].text)
