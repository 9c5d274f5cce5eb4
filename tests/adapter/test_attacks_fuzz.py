"""Random damage and random forgery of adapter folders: what was saved, or one AdapterError, within a second."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import molora
from molora.adapter.folder import load_tensors, read_adapter
from molora.adapter.peft_lora import read_peft_lora
from molora.adapter.peft_lora_writer import write_peft_lora
from molora.errors import AdapterError
from tests.support import behaviours, tiny
from tests.support.folders import (
    FINGERPRINT,
    contents,
    forge,
    joined,
    parts,
    save,
    small_config,
    small_sites,
    small_tensors,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 1.0  # of processor time


def examples(number: int) -> Callable[[Any], Any]:
    """So many cases, the same in every run."""
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@functools.cache
def small() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return contents(save(Path(folder)))


@functools.cache
def lora() -> dict[str, bytes]:
    modules = {p: (torch.ones(r, 3), torch.ones(5, r), 2.0 * r) for p, r in (("layers.0.q", 2), ("layers.1.q", 4))}
    with tempfile.TemporaryDirectory() as folder:
        write_peft_lora(folder, modules=modules, base_model_name="org/base")
        return contents(Path(folder))


@functools.cache
def real() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        behaviours.armed("smora", "llama").save_pretrained(folder)
        return contents(Path(folder))


def written(folder: str, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (Path(folder) / name).write_bytes(data)
    return Path(folder)


def outcome(act: Callable[[], Any]) -> Any:
    """What ``act`` returns, or None when it refuses; anything else it raises is a failure, and so is slowness."""
    start = time.thread_time()
    try:
        return act()
    except AdapterError:
        return None
    finally:
        assert time.thread_time() - start < SECONDS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """``data`` with one to three bytes or pieces flipped, cut out, put in, doubled or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        end = draw(st.integers(at, min(at + 40, len(data))))
        kind = draw(st.sampled_from(["flip", "cut", "put", "double", "end"]))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[end:]
        elif kind == "put":
            data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
        elif kind == "double":
            data = data[:end] + data[at:end] + data[end:]
        else:
            data = data[:at]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


@st.composite
def edited(draw: Any, document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with one or two of its values replaced, removed, copied to another place or joined by a stranger."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        paths = [p for p in places(document) if p]
        *way, last = draw(st.sampled_from(paths))
        target = functools.reduce(lambda v, k: v[k], way, document)
        other = functools.reduce(lambda v, k: v[k], draw(st.sampled_from(paths)), document)
        kind = draw(st.sampled_from(["replace", "remove", "copy", "add"]))
        if kind == "remove":
            del target[last]
        elif kind == "add":
            target = target[last] if isinstance(target[last], dict | list) else target
            value = draw(JSON)
            target.append(value) if isinstance(target, list) else target.update({draw(st.text(max_size=8)): value})
        else:
            target[last] = copy.deepcopy(other) if kind == "copy" else draw(JSON)
    return document


def check_damage(name: str, data: bytes) -> None:
    """A damaged file of the small adapter."""
    with tempfile.TemporaryDirectory() as folder:
        place = written(folder, {**small(), name: data})
        adapter = outcome(lambda: read_adapter(place))
        tensors = None if adapter is None else outcome(lambda: load_tensors(adapter))
        if tensors is not None:
            behaviours.assert_same(tensors, small_tensors())
            assert (adapter.config, adapter.sites) == (small_config(), small_sites())
            own = {k: v for k, v in adapter.fingerprint.items() if k != "base_model_name_or_path"}
            assert own.items() <= FINGERPRINT.items()


def check_forgery(weights: bytes | None, config: dict[str, Any] | None) -> None:
    """The small adapter with forged weights or a forged config: what is let in is finite and of the promised shapes."""
    with tempfile.TemporaryDirectory() as folder:
        place = written(folder, small())
        forge(place, weights=weights, edit=None if config is None else lambda c: (c.clear(), c.update(config)))
        adapter = outcome(lambda: read_adapter(place))
        tensors = None if adapter is None else outcome(lambda: load_tensors(adapter))
        for name, t in (tensors or {}).items():
            assert (tuple(t.shape), t.dtype) == adapter.tensors[name]
            assert bool(t.isfinite().all())


def check_lora(files: dict[str, bytes]) -> None:
    """A PEFT LoRA folder with damaged files: pairs that fit, finite, or a refusal."""
    with tempfile.TemporaryDirectory() as folder:
        place = written(folder, {**lora(), **files})
        adapter = outcome(lambda: read_peft_lora(place))
        for A, B, scale in [] if adapter is None else adapter.modules.values():
            assert A.shape[0] == B.shape[1]
            assert bool(A.isfinite().all() and B.isfinite().all())
            assert isinstance(scale, float)


def check_model(base: Any, config: dict[str, Any]) -> None:
    """A real folder with a forged config, loaded onto a model: it stays as it was, or is converted and comes back."""
    before = behaviours.snapshot(base)
    with tempfile.TemporaryDirectory() as folder:
        place = forge(written(folder, real()), edit=lambda c: (c.clear(), c.update(config)))
        if outcome(lambda: molora.load(base, place)) is not None:
            base.unload()
    assert behaviours.snapshot(base) == before


TESTS: dict[str, tuple[int, Callable[[Any], None]]] = {
    "damaged weights": (60, lambda data: check_damage(WEIGHTS, data.draw(damaged(small()[WEIGHTS])))),
    "damaged config": (100, lambda data: check_damage(CONFIG, data.draw(damaged(small()[CONFIG])))),
    "forged header": (
        80,
        lambda data: check_forgery(
            joined(data.draw(edited(parts(small()[WEIGHTS])[0])), parts(small()[WEIGHTS])[1]), None
        ),
    ),
    "forged weights": (40, lambda data: check_forgery(data.draw(damaged(small()[WEIGHTS])), None)),
    "forged config": (100, lambda data: check_forgery(None, data.draw(edited(json.loads(small()[CONFIG]))))),
    "damaged LoRA weights": (50, lambda data: check_lora({WEIGHTS: data.draw(damaged(lora()[WEIGHTS]))})),
    "edited LoRA config": (
        60,
        lambda data: check_lora({CONFIG: json.dumps(data.draw(edited(json.loads(lora()[CONFIG])))).encode()}),
    ),
    "forged config on a model": (
        40,
        lambda data: check_model(
            tiny.base_model("llama", trainable=True), data.draw(edited(json.loads(real()[CONFIG])))
        ),
    ),
}


@pytest.mark.parametrize("case", TESTS)
def test_random_cases(case: str):
    number, check = TESTS[case]
    examples(number)(given(st.data())(check))()


@pytest.mark.slow
@pytest.mark.parametrize("case", TESTS)
def test_many_random_cases(case: str):
    number, check = TESTS[case]
    examples(5 * number)(given(st.data())(check))()
