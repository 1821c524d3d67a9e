"""README and docs say what is so: their examples run, their links lead somewhere, and what is public is in them."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import fastattn
from fastattn import ops
from fastattn.cli.main import app
from fastattn.models.loader import ModelFileError, open_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import docs_reference  # noqa: E402

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
# Made at each build out of the code; links may lead there.
GENERATED = {ROOT / "docs" / name: make for name, make in docs_reference.PAGES.items()}
# Signatures without bodies: a contract to read, not a program to run.
NOT_PROGRAMS = {ROOT / "docs/design/foundation.md"}

ADDRESS = "http://127.0.0.1:8000"  # of the server that pages start

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_SNIPPET = re.compile(r'^--8<-- "([^":]+)(?::(\w+))?"$', re.M)
_PATH = re.compile(r"`((?:csrc|docs|fastattn|tests|tools|bench|requirements|\.ci)/[\w./-]*\w)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """(line of its first line, text) of each fenced block in one of these languages."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        if match[1] in languages:
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


def prose(page: Path) -> str:
    """The page as its readers see it, with its snippets, without code blocks."""

    def include(match: re.Match[str]) -> str:
        text = (ROOT / match[1]).read_text()
        if match[2] is None:
            return text
        return text.split(f"--8<-- [start:{match[2]}] -->")[1].split(f"<!-- --8<-- [end:{match[2]}]")[0]

    text = GENERATED[page]() if page in GENERATED else page.read_text()
    return _FENCE.sub("", _SNIPPET.sub(include, text))


def anchors(page: Path) -> set[str]:
    """Ids of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.fixture(scope="module")
def server_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the tiny model, under the name that the pages use."""
    from tests.serve.harness import running, save_tiny

    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    with running(folder, "--served-model-name", "smollm2", "--num-kv-blocks", "256", "--render-workers", "1") as server:
        yield server.url


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in NOT_PROGRAMS and next(blocks(page, "python"), None) is not None],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples_run(page: Path, request: pytest.FixtureRequest) -> None:
    """The Python blocks of a page, in one namespace from top to bottom, on the CPU."""
    programs = list(blocks(page, "python"))
    if any(ADDRESS in code for _, code in programs):  # the page has started a server before
        url = request.getfixturevalue("server_address")
        programs = [(line, code.replace(ADDRESS, url)) for line, code in programs]
    if any('"smollm2"' in code for _, code in programs):
        try:
            open_model("smollm2")
        except ModelFileError as error:
            pytest.skip(f"smollm2 cannot be had here: {error}")
    namespace: dict[str, Any] = {"__name__": "docs_example"}
    for line, code in programs:
        # The blank lines make a traceback point into the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists() or linked in GENERATED, f"{page.relative_to(ROOT)} links to {target}"
        assert linked.is_relative_to(ROOT), f"{page.relative_to(ROOT)} links to {target}, outside the repository"
        if anchor:
            assert anchor in anchors(linked), f"{page.relative_to(ROOT)} links to {target}: no such heading"


@each_page
def test_paths_exist(page: Path) -> None:
    for path in _PATH.findall(prose(page)):
        built = path.endswith(".so")  # there only where it was built
        assert built or (ROOT / path).exists(), f"{page.relative_to(ROOT)} names {path}"


def public_names() -> list[tuple[str, Any]]:
    # An operator that the package has under its own name too is documented among the operators.
    found = [(f"fastattn.{name}", getattr(fastattn, name)) for name in fastattn.__all__ if name not in ops.__all__]
    found += [(f"fastattn.ops.{name}", getattr(ops, name)) for name in ops.__all__]
    for module in (m for _, m in list(found) if inspect.ismodule(m) and m is not ops):
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    return [(name, value) for name, value in found if inspect.isclass(value) or inspect.isfunction(value)]


def documented_names() -> set[str]:
    """What mkdocstrings is told to show."""
    return {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)}


@pytest.mark.parametrize(("name", "value"), public_names(), ids=lambda value: value if isinstance(value, str) else "")
def test_public_names_are_documented(name: str, value: Any) -> None:
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own and not own.startswith(f"{value.__name__}("), f"{name} has no docstring of its own"
    assert name in documented_names(), f"{name} is in no page: it needs a line '::: {name}' under docs/"


def test_public_names_are_all_kinds_we_know() -> None:
    """What `public_names` leaves out is known: the version and the modules."""
    left = {*fastattn.__all__, *ops.__all__} - {name.rpartition(".")[2] for name, _ in public_names()}
    assert left == {"__version__", "bert_padding", "compat", "cupy", "fa3", "flashinfer", "ops", "rotary"}


def test_documented_names_exist() -> None:
    names = documented_names()
    assert names
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def test_readme_names_every_operator() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in ops.__all__ if name != "has_cuda_kernels" and f"`{name}`" not in text]
    assert not missing


def test_readme_has_the_speed_of_the_results_files() -> None:
    """A row that begins with a geometric mean and the lowest ratio has those of its file as it is today."""
    row = re.compile(r"^\|[^|]+\|[^|]+\| (\d\.\d\d) \((\d\.\d\d) to [^|]*\| `(\w+\.md)` \|$", re.M)
    rows = row.findall((ROOT / "README.md").read_text())
    assert len(rows) > 8
    for mean, lowest, name in rows:
        assert f"lowest {lowest}, geometric mean {mean}," in (ROOT / "bench/results" / name).read_text(), name


@each_page
def test_commands_exist(page: Path) -> None:
    """`fastattn …` and `make …` in shell blocks: the command, its options, the target."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for _, text in blocks(page, "sh"):
        for line in text.splitlines():
            words = re.sub(r'"[^"]*"', "TEXT", line.partition("#")[0]).split()
            if "fastattn" in words and "pip" not in words:
                name, *rest = words[words.index("fastattn") + 1 :]
                command = commands[name]
                while hasattr(command, "commands") and rest:  # a group, such as bench
                    name, rest = f"{name} {rest[0]}", rest[1:]
                    command = command.commands[name.rpartition(" ")[2]]
                known = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
                unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word not in known]
                assert not unknown, f"{page.relative_to(ROOT)}: fastattn {name} has no {unknown}"
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{page.relative_to(ROOT)}: make {words[1]}"


def test_the_reference_has_every_command_and_setting() -> None:
    pytest.importorskip("pydantic", reason="pydantic comes with fastattn[server]")
    from fastattn.engine.setup import EngineOptions
    from fastattn.serve.config import SECTIONS, ServeConfig

    commands = docs_reference.cli_page()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for path in [f"{name} {sub}" for sub in getattr(command, "commands", ())] or [name]:
            assert f"\n## fastattn {path}\n" in commands
    assert "`--num-kv-blocks N`" in commands and "[OPTIONS]" in commands
    settings = docs_reference.settings_page()
    for name in set(ServeConfig.model_fields) - {"model", *SECTIONS}:
        assert f"| `--{name.replace('_', '-')}` | `FASTATTN_{name.upper()}` |" in settings
    for name in EngineOptions.__dataclass_fields__:
        assert f"\n| `{name}` |" in settings
    for line in settings.splitlines():  # a table that is cut by a bar in a cell
        assert not line.startswith("|") or re.sub(r"\\\|", "", line).count("|") in (3, 4, 5, 6), line


def contracts() -> tuple[dict[str, str], dict[str, str]]:
    """(arguments of the public functions, schemas of the operators) by name, from the table of docs/design/foundation.md."""
    functions: dict[str, str] = {}
    schemas: dict[str, str] = {}
    for row in re.findall(r"^\| `.* -> .*$", (ROOT / "docs/design/foundation.md").read_text(), re.M):
        public, schema = row.split(" | ", 1)
        functions.update(re.findall(r"`(\w+)\(([^`…]*)\)`", public))
        schemas.update((name, f"{name}({rest}") for name, rest in re.findall(r"`(\w+)\(([^`…]* -> [^`…]*)`", schema))
    return functions, schemas


def test_the_contracts_have_every_schema() -> None:
    _, documented = contracts()
    sources = "".join(path.read_text() for path in (ROOT / "fastattn/ops").glob("*.py"))
    # Abridged in the table: the row of the operator beside each has the rest.
    names = set(re.findall(r'"(\w+)\(Tensor', sources)) - {"paged_attention_out", "rms_norm_quantize_fp8"}
    assert names and not names - documented.keys()
    for name, text in documented.items():
        schema = str(getattr(torch.ops.fastattn, name).default._schema).removeprefix("fastattn::")
        assert re.sub(r"[\s\"']", "", text) == re.sub(r"[\s\"']", "", schema), name


def test_the_contracts_have_the_signatures() -> None:
    functions, _ = contracts()
    assert len(functions) > 30
    for name, arguments in functions.items():
        written: dict[str, Any] = {}
        exec(f"def {name}({arguments}): ...", written)
        pairs = zip(
            *(inspect.signature(f).parameters.values() for f in (written[name], getattr(ops, name))), strict=True
        )
        for ours, theirs in pairs:
            assert (ours.name, ours.kind, ours.default) == (theirs.name, theirs.kind, theirs.default), name


def test_environment_variables_are_listed() -> None:
    """docs/environment.md has exactly those that are read."""
    run_time = re.findall(r'_read\(\s*"(\w+)"', (ROOT / "fastattn/config.py").read_text())
    sources = [ROOT / "setup.py", *(ROOT / "tools/build").glob("*.py")]
    build_time = re.findall(r'environ\.get\(\s*"(\w+)"', "".join(source.read_text() for source in sources))
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/environment.md").read_text(), re.M)
    assert sorted(listed) == sorted({*run_time, *build_time})
    assert len(set(run_time)) < 10


def test_versions_agree() -> None:
    assert f"\nversion: {fastattn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_site_builds(tmp_path: Path) -> None:
    """As `make docs` builds it: a warning is an error."""
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason=f"{module} comes with fastattn[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "operators/index.html").read_text()
    assert 'id="fastattn.ops.rms_norm"' in page
    assert "<li><code>weight</code>: (N), x's dtype, multiplied as it is.</li>" in page
