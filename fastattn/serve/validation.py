"""From what pydantic finds wrong in a request to the one error that its client gets."""

from __future__ import annotations

from pydantic import ValidationError

from fastattn.serve.contract import APIError


def validation_error(error: ValidationError) -> APIError:
    """A 400 that names the first field that is wrong, what is allowed there, and how many more are wrong."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    param = _param(first["loc"])
    if first["type"] == "none_required":
        text, same = "it is not supported here, allowed is null", [first]
    elif first["type"] == "extra_forbidden":
        text = f"the field {repr(first['loc'][-1])[:100]} is not known"
        same = [first]
    else:
        same = [e for e in found if e["loc"][:1] == first["loc"][:1] and _param(e["loc"]).startswith(param)]
        # A union gives one error for each of its branches: what is allowed is any of them.
        text = " or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in same[:4]))
        if param and isinstance(first["input"], str | int | float | None):
            text += f", got {repr(first['input'])[:100]}"
    where = f"{param[:200]}: " if param else ""
    more = len({_param(e["loc"]) for e in found} - {_param(e["loc"]) for e in same})
    text = f"{where}{text}{f' (and {more} more)' if more else ''}"
    return APIError(400, _printable(text), param=_printable(param[:200]) or None, code="invalid_value")


def _param(location: tuple[int | str, ...]) -> str:
    """messages[0].content; steps through a union name its branches, which are no fields."""
    param = ""
    for step in location:
        if isinstance(step, int):
            param += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int") and not step[:1].isupper():
            param += f".{step}" if param else step
    return param


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
