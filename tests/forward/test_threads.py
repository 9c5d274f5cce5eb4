"""One converted model in four threads, each with its own batch, one of them with the experts off (C6)."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch

from molora import context
from tests.support.tiny import RECIPES, batch, converted, output

THREADS, CALLS, LIMIT_S = 4, 25, 120
OFF = THREADS - 1  # the thread that runs the base


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_do_not_see_each_other(recipe: str, root: Path):
    model = converted(recipe, "llama", root)
    inputs = [batch("llama", rows=1 + i, length=5 + 2 * i, seed=i) for i in range(THREADS)]

    def off(i: int) -> contextlib.AbstractContextManager[None]:
        return model.disable_adapter() if i == OFF else contextlib.nullcontext()

    expected = []
    for i in range(THREADS):
        with off(i):
            expected.append(output(model, inputs[i]))
    wrong: list[str] = []
    start = threading.Barrier(THREADS, timeout=LIMIT_S)

    def work(i: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        with off(i):
            for n in range(CALLS):
                if not torch.equal(output(model, inputs[i]), expected[i]):
                    wrong.append(f"thread {i}, call {n}")
        if context.current() is not None:
            wrong.append(f"thread {i} left its context behind")

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(LIMIT_S)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    assert wrong == []
