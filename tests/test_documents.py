"""What the documents point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")), *(ROOT / "examples").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_tests_exist(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (document.parent / link).exists(), link
    for named in re.findall(r"`((?:tests|examples|docs)/[\w/.-]+)`", text):
        assert (ROOT / named).exists(), named


def test_every_fault_has_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")][1:]
    names = ("test_faults.py", "test_failures.py", "test_elastic.py", "test_any_point.py", "test_checkpoint_faults.py")
    tests = "".join((ROOT / "tests" / "distributed" / name).read_text() for name in names)
    for row in rows:
        (named,) = re.findall(r"`(test_\w+)`", row)
        assert f"def {named}(" in tests, row


def test_every_feature_has_a_test() -> None:
    text = (ROOT / "docs" / "lightning-features.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| feature |")]
    assert len(rows) > 20
    introduction = text.partition("| feature")[0]
    files = {
        marks.count("*"): path for marks, path in re.findall(r"(?:marked ((?:\\\*)+), )?in\s+`(tests/[\w/]+\.py)`", introduction)
    }
    for row in rows:
        *_, cell, _ = row.split("|")
        named = re.findall(r"`(test_\w+)`", cell)
        assert named, row
        own = re.findall(r"`(tests/[\w/]+\.py)`", cell)
        source = (ROOT / (own[0] if own else files[cell.count("*")])).read_text()
        assert all(f"def {name}(" in source for name in named), row
