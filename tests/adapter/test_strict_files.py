"""The readers by themselves: strict JSON and safetensors, each fault by its own words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.adapter.folder import read_adapter
from molora.adapter.safetensors_file import TensorFile
from molora.adapter.strict_json import MAX_DEPTH, open_regular, parse_object, read_object
from molora.errors import AdapterError
from tests.support import attacks, behaviours
from tests.support.folders import contents, forge, joined, parts, save, small_sites, small_tensors

WEIGHTS = "adapter_model.safetensors"

BAD_JSON = {
    "array": (b"[]", "a JSON list"),
    "text": (b'"a"', "a JSON str"),
    "empty": (b"", "Expecting value"),
    "cut": (b'{"a"', "delimiter"),
    "trailing": (b"{} {}", "Extra data"),
    "not UTF-8": (b'{"a": "\xff"}', "can't decode"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "NaN": (b'{"a": NaN}', "it holds NaN"),
    "infinity": (b'{"a": [-Infinity]}', "it holds -Infinity"),
    "overflow": (b'{"a": 1e400}', "1e400 is too large"),
    "many digits": (b'{"a": ' + b"1" * 19 + b"}", "19 digits"),
    "very many digits": (b'{"a": ' + b"1" * 5000 + b"}", "5000 digits"),
    "repeated key": (b'{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
    "long key": (b'{"' + b"k" * 1001 + b'": 1}', "is too long"),
    "many keys": (json.dumps({f"k{i}": 0 for i in range(65)}).encode(), "65 entries"),
    "deep": (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "deeper than"),
    "very deep": (b"[" * 100_000, "too deep"),
    "half a pair": (b'{"a": ["\\ud800"]}', "surrogates not allowed"),
    "half a pair as a key": (b'{"a": {"\\udfff": 1}}', "surrogates not allowed"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_refused(case: str):
    raw, words = BAD_JSON[case]
    with pytest.raises(AdapterError, match="^here: ") as e:
        parse_object(raw, "here", max_keys=64)
    assert words in str(e.value)


def test_json_that_is_taken():
    value: Any = {"a": [1, -2.5, "\u00e9\u2028\U0001f600", None, True, {}], "b": {"c": [[[[]]]], "9" * 1000: 10**17}}
    assert parse_object(json.dumps(value).encode(), "here", max_keys=64) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode(), "here", max_keys=64) == value


def test_no_more_than_the_limit_is_read(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_object(path, 8) == {"a": 1}
    with pytest.raises(AdapterError, match="more than 7 bytes"):
        read_object(path, 7)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "b.json", 8)


def test_links_of_the_hub_cache_and_no_others(tmp_path: Path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    blob = blobs / ("a1" * 20)
    blob.write_text("x")
    link = snapshot / "a.json"
    link.symlink_to(f"../../blobs/{blob.name}")
    os.close(open_regular(link))
    for target in (blob, f"../../blobs/../blobs/{blob.name}", "../../blobs/a1", f"../../blobs/{blob.name}/"):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(AdapterError, match="link"):
            open_regular(link)
    inner = snapshot / "math" / "a.json"
    inner.parent.mkdir()
    inner.symlink_to(f"../../../blobs/{blob.name}")
    os.close(open_regular(inner))
    (tmp_path / "snapshots" / "blobs").symlink_to(blobs)
    for target in (
        f"../../blobs/{blob.name}",
        f"../../../../{tmp_path.name}/blobs/{blob.name}",
        f"../blobs/{blob.name}",
    ):
        inner.unlink()
        inner.symlink_to(target)
        with pytest.raises(AdapterError, match="link"):
            open_regular(inner)
    blob.rename(blobs / ("b2" * 20))
    blob.symlink_to("b" * 40)
    link.unlink()
    link.symlink_to(f"../../blobs/{blob.name}")
    with pytest.raises(AdapterError, match="not a plain file"):
        open_regular(link)


BAD_FILES = {
    "empty": "a header of 0 bytes in a file of 0",
    "seven bytes": "in a file of 7",
    "header of 2^63 bytes": "9,223,372,036,854,775,808",
    "header beyond the file": "a header of",
    "header is not UTF-8": "can't decode",
    "header is an array": "not a JSON object",
    "header starts with a space": "not a JSON object",
    "header nests deep": "hold every expected tensor",
    "a hundred thousand tensors": "hold every expected tensor",
    "cut body": "bytes of data",
    "trailing bytes": "bytes of data",
    "overlap": "broken entry",
    "hole": "broken entry",
    "size does not fit the shape": "broken entry",
    "offsets go down": "broken entry",
    "shape overflows": "19 digits",
    "shape is true": "broken entry",
    "unknown dtype": "broken entry",
    "entry has more to say": "broken entry",
    "metadata are numbers": "metadata",
    "repeated key": "stands twice",
    "pickle": "a header of",
}


def opened(path: Path, weights: bytes) -> TensorFile:
    path.write_bytes(weights)
    return TensorFile(path, header_limit=4096)


@pytest.mark.parametrize("case", BAD_FILES)
def test_weights_that_are_refused_on_opening(case: str, tmp_path: Path):
    good = contents(save(tmp_path / "good"))[WEIGHTS]
    with pytest.raises(AdapterError) as e:
        opened(tmp_path / "a", attacks.FORGED_WEIGHTS[case](good))
    assert BAD_FILES[case] in str(e.value)


def test_an_overlap_that_fills_the_file(tmp_path: Path):
    """The sum of the sizes fits, yet a part of the file belongs to two tensors and another to none."""
    entries = {
        name: {"dtype": "U8", "shape": [4], "data_offsets": offsets}
        for name, offsets in (("a", [0, 4]), ("b", [0, 4]), ("c", [8, 12]))
    }
    with pytest.raises(AdapterError, match="broken entry"):
        opened(tmp_path / "a", joined(entries, bytes(12)))


def test_empty_tensors_and_scalars_have_their_place(tmp_path: Path):
    named = {"a": torch.ones(0, 3), "b": torch.tensor(2.0), "c": torch.ones(2, 0), "d": torch.tensor([True])}
    file = opened(tmp_path / "a", safetensors.torch.save(named))
    tensors, sha256 = file.load()
    behaviours.assert_same(tensors, named)
    assert sha256 == file.sha256()


def test_shapes_that_overflow_without_many_digits(tmp_path: Path):
    entries = {"a": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 16]}}
    with pytest.raises(AdapterError, match="broken entry"):
        opened(tmp_path / "a", joined(entries, bytes(16)))


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        name: st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F128"]),
                "shape": st.lists(st.integers(0, 3), max_size=3),
                "data_offsets": st.lists(st.sampled_from([0, 0, 4, 8, 12, 24]), min_size=2, max_size=2),
            }
        )
        for name in "abc"
    },
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(HEADERS, st.sampled_from([0, 4, 8, 12, 24]))
def test_what_is_taken_the_library_takes_too(header: dict[str, Any], size: int):
    raw = joined(header, bytes(size))
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    path = folder / f"molora-{os.getpid()}.safetensors"
    try:
        tensors, _ = opened(path, raw).load()
    except AdapterError:
        return
    finally:
        path.unlink()
    behaviours.assert_same(tensors, safetensors.torch.load(raw))


@pytest.mark.parametrize("path", ["a\nb", "", "a..b", ".a", "a\u202eb", "a" * 1000])
def test_a_site_of_no_possible_name(path: str, tmp_path: Path):
    """Weights and config agree on the name, so only the name itself can give it away."""
    first = small_sites()[0].path
    named = {n.replace(first, path): t for n, t in safetensors.torch.load(contents(save(tmp_path))[WEIGHTS]).items()}
    forge(tmp_path, weights=safetensors.torch.save(named), edit=lambda c: c["sites"][0].update(path=path))
    with pytest.raises(AdapterError, match="names joined by dots"):
        read_adapter(tmp_path)


def test_experts_without_ranks_do_not_come_in_billions(tmp_path: Path):
    """No tensor tells of them, but building their bank would spell out a scale for each."""
    many = {"num_experts": 2**20, "ranks": [0], "scales": [1.0], "lead": False, "path": "a"}
    sites = [{**small_sites()[0].to_dict(), **many, "path": f"a{i}", "top_k": None} for i in range(20)]
    edges = {"lora_A": torch.ones(0, 4), "lora_B": torch.ones(6, 0)}
    named = {f"base_model.model.{s['path']}.bank.{n}": t for s in sites for n, t in edges.items()}
    save(tmp_path)
    forge(tmp_path, weights=safetensors.torch.save(named), edit=lambda c: c.update(sites=sites))
    with pytest.raises(AdapterError, match="experts in all"):
        read_adapter(tmp_path)


def test_the_small_adapter_is_what_the_library_reads(tmp_path: Path):
    save(tmp_path)
    header, _ = parts(contents(tmp_path)[WEIGHTS])
    assert header.pop("__metadata__") == {"format": "pt"}
    theirs = safetensors.torch.load_file(tmp_path / WEIGHTS)
    behaviours.assert_same({n.removeprefix("base_model.model."): t for n, t in theirs.items()}, small_tensors())
