"""What the site has beyond the pages in `docs/`: the README and its companions, and every source file that a page names.

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
LINK = re.compile(r"(?P<before>\[(?P<text>[^\]]*)\]\(|\bsrc=\")(?P<target>[^)\"#\s]+)(?P<anchor>#[^)\"\s]*)?")
FAR = re.compile(r"[a-z]+:|/")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made of files outside `docs/`."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    sources: set[str] = set()
    for file in files.documentation_pages():
        for link in LINK.finditer(file.content_string):
            path = _in_repository(file.src_uri, link["target"])
            if path is not None and not path.startswith("docs/") and path not in FROM_ROOT:
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
        anchor = link["anchor"] or (_line_anchor(path, link["text"] or "") if path.endswith(".py") else "")
        return link["before"] + posixpath.relpath(target, posixpath.dirname(here) or ".") + anchor

    return markdown if here.startswith("source/") else LINK.sub(rewritten, markdown)


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


def _line_anchor(path: str, text: str) -> str:
    """Return the anchor of the line that defines the last name in a link's text; "" if none does."""
    names = re.findall(r"\w+", text)
    lines = _definitions(path)
    return f"#__codelineno-0-{lines[names[-1]]}" if names and names[-1] in lines else ""


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
