"""`docs/results.md`: figures of the log, pictures with a command, commands, commits, files and headings that exist."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TEXT = (DOCS / "results.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted({*DOCS.glob("*.md"), *DOCS.glob("plans/*.md")})]
SOURCES = ("log.md", "scaling.md", "reliability.md", "paper_notes.md", "plans/README.md")  # whose figures it may quote
FIELDS = ("Command", "Commit", "Device", "Date", "Seeds")
PICTURES = "Pictures"  # the section that lists them


def sections(text: str) -> dict[str, str]:
    """Title to text of every section, the text of its subsections left out."""
    parts = re.split(r"(?m)^##+ (.*)$", text)
    assert len(set(parts[1::2])) == len(parts[1::2])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


SECTIONS = sections(TEXT)
MEASURED = {title: text for title, text in SECTIONS.items() if "Command: " in text}


def provenance(text: str) -> dict[str, str]:
    """The fields of the paragraph `Command: ... · Commit: ... · Device: ... · Date: ... · Seeds: ...`."""
    paragraph = re.search(r"(?ms)^Command: .*?(?=\n\n|\Z)", text)[0]
    return dict(re.split(r":\s", field.strip(), maxsplit=1) for field in re.split(r"·\s", paragraph))


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]


def numbers(text: str) -> set[str]:
    """Numbers as they are written, with their signs."""
    return set(re.findall(r"(?:(?<=[\s|(])[-+])?\d+(?:[.,]\d+)*(?:e-?\d+)?", text))


def commands(text: str) -> list[list[str]]:
    """The words of every `python ...` command in back quotes."""
    quoted = re.findall(r"`([^`]+)`", text.replace("\n", " "))
    return [shlex.split(code) for code in quoted if code.startswith("python ")]


def test_every_section_with_a_table_or_picture_says_where_it_is_from():
    for title, text in SECTIONS.items():
        if rows(text) or "![" in text:
            assert title in MEASURED or title.startswith("The paper's") or title == PICTURES, title
    assert len(MEASURED) > 10


@pytest.mark.parametrize("title", MEASURED)
def test_a_result_has_command_commit_device_date_and_seeds(title):
    fields = provenance(MEASURED[title])
    assert tuple(fields) == FIELDS
    assert all(fields.values())
    assert commands(fields["Command"])
    assert re.match(r"[0-9a-f]{7}\b", fields["Commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", fields["Date"])
    assert re.match(r"\d+|none, \w", fields["Seeds"])


def test_commits_are_in_the_history():
    named = {
        commit for text in MEASURED.values() for commit in re.findall(r"\b[0-9a-f]{7}\b", provenance(text)["Commit"])
    }
    assert len(named) > 10
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("no git history, or a shallow one")
    for commit in named:
        assert subprocess.run([*git, "merge-base", "--is-ancestor", commit, "HEAD"]).returncode == 0, commit


def test_what_the_commands_name_exists():
    found = commands(TEXT)
    assert len(found) > 10
    for words in found:
        if words[1] == "-m":
            assert words[2] == "pytest" or importlib.util.find_spec(words[2]), words
        else:
            assert (ROOT / words[1]).is_file(), words
        for word in words:
            path = word.removeprefix("--config=").split(":")[0]
            if path.startswith(("configs/", "tests/")):
                assert (ROOT / path).is_file(), words
    for path in re.findall(r"`(configs/\w+\.py)", TEXT):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("title", MEASURED)
def test_every_number_of_a_table_is_one_of_the_pages_it_is_from(title):
    known = numbers("\n".join((DOCS / source).read_text(encoding="utf-8") for source in SOURCES))
    found = numbers("\n".join(rows(MEASURED[title])))
    assert found <= known, found - known


def test_every_picture_is_shown_and_has_a_command():
    shown = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    listed = {re.search(r"\((.*?)\)", row)[1]: row for row in rows(SECTIONS[PICTURES])[1:]}
    assert set(listed) == {path.relative_to(DOCS).as_posix() for path in (DOCS / "images").iterdir()}
    for path, row in listed.items():
        assert re.search(rf"!\[[^]]*\]\([^)]*{re.escape(path)}\)", shown), path
        assert commands(row), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_heading_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "#")):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path
        assert target.is_file(), link
        titles = re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8")) if heading else []
        assert not heading or heading in {slug(title) for title in titles}, link


def slug(title: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
