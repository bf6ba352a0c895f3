"""What the site has beyond the pages in `docs/`: the README and its companions, and every source file they link to.

The pages link to sources by relative paths, as they stand in the repository, so that a link works on GitHub and in an
editor. The site has no repository behind it: each such file becomes a page, and a link whose text is a name in that
file (``[`samplers.ddim`](../gaq_export/diffusion/samplers.py)``) leads to the line where it is defined.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
TO_ROOT = {page: source for source, page in FROM_ROOT.items()}
LANGUAGES = {".py": "python", ".toml": "toml", ".cu": "cuda", ".json": "json", ".txt": "text", "": "make"}
LINK = re.compile(r"(?P<before>\[[^\]]*\]\()(?P<target>[^)#\s]+)")
FAR = re.compile(r"[a-z]+:|/")
NAMED = re.compile(r'(href="[^"]*source/(?P<path>[^"]+\.py)\.html)("><code>(?P<name>[\w.]+)</code>)')


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made of files outside `docs/`."""
    for source, page in FROM_ROOT.items():
        front = "---\nhide: [navigation]\n---\n\n" if page == "index.md" else ""
        files.append(File.generated(config, page, content=front + (ROOT / source).read_text(encoding="utf-8")))
    sources: set[str] = set()
    for file in files.documentation_pages():
        for link in LINK.finditer(file.content_string):
            path = _in_repository(file.src_uri, link["target"])
            if path is None or path.startswith("docs/") or path in FROM_ROOT:
                continue
            if (ROOT / path).is_file():  # MkDocs reports those that are missing
                sources.add(path)
    for path in sorted(sources):
        files.append(File.generated(config, _page_of(path), content=_listing(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside `docs/` into links to their pages."""
    here = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        path = _in_repository(here, link["target"])
        if path is None or (path.startswith("docs/") and here not in TO_ROOT):
            return link[0]
        target = path.removeprefix("docs/") if path.startswith("docs/") else FROM_ROOT.get(path, _page_of(path))
        return link["before"] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    return markdown if here.startswith("source/") else LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Lead links to source files to the line that defines what they name; MkDocs checks no such anchors, hence here."""

    def at_line(link: re.Match[str]) -> str:
        line = _definitions(link["path"]).get(link["name"].split(".")[-1])
        return link[0] if line is None else f"{link[1]}#__codelineno-0-{line}{link[3]}"

    return NAMED.sub(at_line, html)


def _in_repository(page: str, target: str) -> str | None:
    """Return the path from the repository's root of what a page links to; None if that is elsewhere."""
    if FAR.match(target):
        return None
    folder = "" if page in TO_ROOT else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, target))


def _page_of(path: str) -> str:
    return f"source/{path}.md"


def _listing(path: str) -> str:
    """Return a page that shows one source file, with a line number to link to beside each line."""
    file = ROOT / path
    fence = f'```{{ .{LANGUAGES[file.suffix]} linenums="1" }}'
    text = file.read_text(encoding="utf-8").replace("```", "`\u200b``")
    return f"---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n# {path}\n\n{fence}\n{text}\n```\n"


def _definitions(path: str) -> dict[str, int]:
    """Return the line of every function, class, method and table in a module, by name."""
    lines: dict[str, int] = {}
    module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    methods = [node for kind in module.body if isinstance(kind, ast.ClassDef) for node in kind.body]
    for node in (*module.body, *methods):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lines.update({target.id: node.lineno for target in targets if isinstance(target, ast.Name)})
    return lines
