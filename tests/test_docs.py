"""The pages are true: links lead somewhere, what they name is in the code, commands and Python calls exist."""

import ast
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

import gaq_export
from gaq_export.cli import choices
from gaq_export.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gaq_export", "calib", "engines")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
)
# Pages that say where things are in the code; the others use code marks for options and files as well.
NAMING = [p for p in PAGES if p.startswith(("docs/guide/", "docs/architecture", "docs/glossary", "docs/method"))]
FOREIGN = {"UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "GAQ_EXPORT_MODELS", "GAQ_EXPORT_PRESET"}
SUFFIXES = "plan|json|onnx|html|md|py|png|npz|npy|safetensors|toml|txt|ckpt|th|data"


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _prose(page: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", _text(page), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: str) -> set[str]:
    """Return what the headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def _links(text: str) -> list[tuple[str, str, str]]:
    """Return text, path and anchor of every relative link."""
    return re.findall(r"\[([^\]]*)\]\((?![a-z]+:)([^)#\s]*)(#[^)\s]*)?\)", text)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for text, path, anchor in _links(_prose(page)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        assert (ROOT / target).is_file(), f"{page}: [{text}]({path})"
        if anchor and target.endswith(".md"):
            assert anchor[1:] in _anchors(target), f"{page}: [{text}]({path}{anchor})"


@cache
def _modules() -> dict[str, Path]:
    """Return the modules of the three packages by dotted name; a package's `__init__` by the package's."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@cache
def _names(module: str) -> frozenset[str]:
    """Return what a module defines: its functions, classes and tables, and as `Class.name` what is in its classes."""
    return frozenset(_defined(ast.parse(_modules()[module].read_text(encoding="utf-8")).body))


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{name}" for name in _defined(node.body))
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def _exists(name: str) -> bool:
    """Tell whether a dotted name is a module, or something in one; a room of `gaq_export` needs no prefix."""
    modules = _modules()
    for whole in (name, f"gaq_export.{name}"):
        parts = whole.split(".")
        for split in range(len(parts), 0, -1):
            module, rest = ".".join(parts[:split]), ".".join(parts[split:])
            if module in modules and (not rest or rest in _names(module)):
                return True
    return any(name in _names(module) for module in modules)


def _claims(page: str) -> list[str]:
    """Return what is marked as code and looks like a dotted name, a class or a table of ours."""
    return [mark for mark in re.findall(r"`([^`]+)`", _prose(page)) if _is_dotted(mark) or _is_class_or_table(mark)]


def _is_dotted(mark: str) -> bool:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", mark) or re.search(rf"\.({SUFFIXES})$", mark):
        return False
    first = mark.split(".")[0]
    return first != "NAME" and (first[0].isupper() or any(first in module.split(".") for module in _modules()))


def _is_class_or_table(mark: str) -> bool:
    return mark not in FOREIGN and bool(re.fullmatch(r"[A-Z][A-Z_]{3,}|[A-Z][a-z0-9]+[A-Z]\w*", mark))


@pytest.mark.parametrize("page", NAMING)
def test_every_name_of_the_code_exists(page: str) -> None:
    assert [name for name in _claims(page) if not _exists(name)] == []


@pytest.mark.parametrize("page", NAMING)
def test_every_path_exists(page: str) -> None:
    ours = re.compile(rf"({'|'.join(PACKAGES)}|tests|benchmarks|examples|docs/results)/[\w./-]*\w")
    paths = [mark for mark in re.findall(r"`([^`]+)`", _prose(page)) if ours.fullmatch(mark) and "NAME" not in mark]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", NAMING)
def test_a_link_that_names_something_leads_to_the_file_that_defines_it(page: str) -> None:
    for text, path, _ in _links(_prose(page)):
        name = re.fullmatch(r"`([\w.]+)`", text)
        if name is None or not path.endswith(".py") or name[1].endswith(".py"):
            continue
        source = (ROOT / posixpath.dirname(page) / path).resolve().read_text(encoding="utf-8")
        last = re.escape(name[1].split(".")[-1])
        defined = re.search(rf"^ *(?:(?:def|class) {last}\b|{last}(?::.*)? = )", source, flags=re.MULTILINE)
        assert defined or path.endswith(f"{last}.py"), f"{page}: {name[1]} is not defined in {path}"


@pytest.mark.parametrize("page", [p for p in PAGES if "results" not in p])
def test_every_command_and_option_exists(page: str) -> None:
    commands = get_command(app).commands
    for name, rest in re.findall(r"^gaq-export ([a-z-]+)(.*?)(?:#.*)?$", _text(page), flags=re.MULTILINE):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{page}: gaq-export {name}{rest}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.startswith("docs/guide/")])
def test_every_option_in_prose_is_one_of_a_command(page: str) -> None:
    known = {option for c in get_command(app).commands.values() for p in c.params for option in p.opts}
    known |= {option for c in get_command(app).commands.values() for p in c.params for option in p.secondary_opts}
    others = {"--no-deps", "--labels", "--model-repository"}
    assert set(re.findall(r"`(--[a-z-]+)", _prose(page))) <= known | others


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", _text(page), flags=re.MULTILINE)
    assert {name for pair in named for name in pair if name} <= targets


@pytest.mark.parametrize("page", PAGES)
def test_python_on_a_page_uses_what_there_is(page: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", _text(page), flags=re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                known = set(gaq_export.__all__) if node.module == "gaq_export" else _names(str(node.module))
                assert {alias.name for alias in node.names} <= known
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gaq":
                assert node.attr in gaq_export.__all__


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/guide/build.md", (*choices.SAMPLERS.names, *choices.SPACINGS.names, *choices.BACKENDS.names)),
        ("docs/guide/choose-a-recipe.md", tuple(gaq_export.RECIPES)),
    ],
)
def test_the_guide_has_every_name_of_a_table(page: str, names: tuple[str, ...]) -> None:
    assert [name for name in names if f"`{name}`" not in _prose(page)] == []


def test_the_python_page_has_all_of_the_public_face() -> None:
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", _text("docs/python.md"), re.M)}
    tables = {"MODELS", "RECIPES", "__version__"}
    assert documented == set(gaq_export.__all__) - tables


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    navigation = set(re.findall(r"^ +- .+: (\S+\.md)$", _text("mkdocs.yml"), flags=re.MULTILINE))
    made = {"index.md", "contributing.md", "changelog.md"}
    pages = {p.removeprefix("docs/") for p in PAGES if p.startswith("docs/") and not p.startswith("docs/results/")}
    assert navigation - made - {"results/README.md"} == pages
