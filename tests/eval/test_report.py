"""The report as text: what it holds, what it must not hold, and its size."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from molora.errors import ConfigError
from molora.eval.page.report import render, write_report
from molora.eval.page.tables import SECTIONS, key_figures, other_data, site_labels
from tests.support import documents

LIMIT = 8_000_000  # bytes; what mail and code hosts still take


@pytest.fixture(scope="module")
def mixture(root: Path) -> dict[str, Any]:
    return documents.document("mixlora", root)


def shown_sections(page: str) -> list[str]:
    return re.findall(r'<section id="r0-(\w+)"', page)


def data_of(page: str, run: int = 0) -> dict[str, Any]:
    found = re.search(rf'id="r{run}-json">(.*?)</script>', page, re.DOTALL)
    assert found
    value: dict[str, Any] = json.loads(found.group(1))
    return value


def test_a_whole_document_has_every_section_and_the_same_bytes(mixture: dict[str, Any]):
    page = render([mixture])
    assert shown_sections(page) == list(SECTIONS)
    assert page == render([json.loads(json.dumps(mixture))])
    assert all(f'href="#r0-{key}"' in page for key in SECTIONS)


def test_sections_without_data_are_left_out(mixture: dict[str, Any]):
    assert shown_sections(render([{"schema": 1, "name": "empty"}])) == ["provenance"]
    parts = {key: mixture[key] for key in ("name", "scores", "provenance")}
    assert shown_sections(render([parts])) == ["scores", "provenance"]
    one_domain = {**mixture["routing"], "specialisation": None, "lift": None, "divergence": None, "samples": []}
    assert not {"specialisation", "text"} & set(shown_sections(render([{"routing": one_domain}])))


def test_names_from_the_data_are_text(mixture: dict[str, Any]):
    page = render([{**mixture, "name": documents.HOSTILE}])
    assert "alert(&#39;1&#39;)" in page
    assert "<script>alert" not in page
    assert "{{ 7 * 7 }}" in page
    assert page.count("</script>") == page.count("<script")
    assert data_of(page)["name"] == documents.HOSTILE


def test_half_a_character_and_not_a_number_do_not_break_the_page(mixture: dict[str, Any], tmp_path: Path):
    odd = {**mixture, "name": "half \ud83d", "tokens": {"3": "\udc00"}, "training": [{"step": 1, "loss": float("inf")}]}
    write_report([odd], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert data_of(page)["training"] == [{"step": 1, "loss": None}]


def test_the_page_asks_for_nothing(mixture: dict[str, Any]):
    page = render([mixture, {**mixture, "name": "again"}])
    own = re.sub(r'<script type="[^>]*>.*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest", own)
    assert set(re.findall(r'\s(?:src|href)="([^"#]*)', own)) <= {"", "data:,"}
    assert "default-src 'none'" in own


def test_the_largest_document_fits():
    page = render([documents.largest()])
    assert len(page.encode()) < LIMIT
    shown = data_of(page)["shown"]["samples"]
    assert 1 <= shown["shown"] < shown["of"] == 8
    assert f"it has {shown['shown']} of 8 sampled documents" in page


def test_several_documents_are_compared(mixture: dict[str, Any], root: Path):
    other = documents.document("mixlora", root, name="other", seed=3)
    page = render([mixture, other])
    assert 'id="comparison"' in page
    assert 'id="comparison"' not in render([mixture])
    rows = {row["label"]: row for row in key_figures([mixture, other])}
    losses = [d["scores"]["perplexity"]["code"]["loss"]["value"] for d in (mixture, other)]
    assert rows["Loss, code"]["best"] == [losses.index(min(losses))]
    assert rows["Load entropy, mean over sites"]["best"] == []
    assert other_data([mixture, other]) == []
    data = {**mixture["provenance"]["data"], "code": {"sha256": "else"}}
    moved = {**mixture, "provenance": {**mixture["provenance"], "data": data}}
    assert other_data([mixture, moved]) == ["code"]
    assert "cannot be compared" in render([mixture, moved])


def test_kinds_of_routers_have_names_that_differ():
    kinds = ["encoder.#.q", "decoder.#.q", "decoder.#.k"]
    assert site_labels(kinds) == {"encoder.#.q": "encoder.#.q", "decoder.#.q": "decoder.#.q", "decoder.#.k": "k"}


def test_an_unfinished_write_leaves_the_old_page(
    mixture: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "sub" / "report.html"
    write_report([{"name": "old"}], path)
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("molora.eval.page.report.os.replace", fail)
    with pytest.raises(ConfigError, match="could not be written"):
        write_report([mixture], path)
    assert path.read_bytes() == old


def test_no_document_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="at least one"):
        render([])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"jinja2: pip install 'molora\[eval\]'"):
        render([{"name": "x"}])
