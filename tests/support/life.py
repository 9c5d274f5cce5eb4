"""The whole life of a thing that stands in a table: one function for each stage, asked of the config's traits alone.

Each stage takes a config and an empty folder. What a mixture cannot do it refuses with one molora error, and is then
as it was; the stage asserts that instead.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import molora
from molora.config import GateConfig, MoloraConfig, Placement
from molora.errors import ConfigError, MoloraError
from molora.initialisers import INITIALISERS
from molora.layers.banks import BANKS
from molora.penalties import PENALTIES
from molora.routers import BALANCES, GATES, ROUTERS
from tests.support import tiny
from tests.support.behaviours import assert_same
from tests.support.quantised import QUANTISED, quantise
from tests.support.tolerances import close
from tests.support.training_runs import SETTINGS, state

BATCH = tiny.batch("llama")
PLAIN = Placement(num_experts=3, r=2, lora_alpha=4, gate=GateConfig(top_k=2, renormalize="one"))


@functools.cache
def _one_layer() -> Any:
    model = tiny.base_model("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def base() -> Any:
    """A tiny frozen Llama of one layer."""
    return copy.deepcopy(_one_layer())


def mixture(placement: Placement, name: str = "life") -> MoloraConfig:
    """A config of one placement."""
    return MoloraConfig(recipe=name, placements=(placement,))


def with_router(name: str) -> Placement:
    entry = ROUTERS[name]
    if not entry.chooses:
        return PLAIN.replace(router=entry.tiny(), num_experts=1, gate=GateConfig())
    return PLAIN.replace(router=entry.tiny())


# By table: its entries, and the smallest placement that uses one.
TABLES: dict[str, tuple[dict[str, Any], Callable[[str], Placement]]] = {
    "router": (ROUTERS, with_router),
    "gate": (GATES, lambda name: PLAIN.replace(gate=GATES[name].tiny())),
    "balance": (BALANCES, lambda name: PLAIN.replace(balance=(BALANCES[name].tiny(),))),
    "penalty": (PENALTIES, lambda name: PLAIN.replace(penalties=(PENALTIES[name].tiny(),))),
    "bank": (BANKS, lambda name: PLAIN.replace(bank=name, **BANKS[name].tiny())),
    "initialiser": (INITIALISERS, lambda name: PLAIN.replace(init_lora_weights=name)),
}


def entries() -> Iterator[tuple[str, str]]:
    """Every table and entry; starts that no option can hold have messages instead of a life."""
    for table, (entry_of, _) in TABLES.items():
        yield from ((table, name) for name, entry in entry_of.items() if not getattr(entry, "instead", ""))


def smallest(table: str, name: str) -> MoloraConfig:
    """The smallest config that uses an entry."""
    return mixture(TABLES[table][1](name))


def start(config: MoloraConfig, armed: bool = True) -> Any:
    model = molora.convert(base(), config, seed=3)
    return tiny.arm(model) if armed else model


def inputs(config: MoloraConfig, labels: bool = True) -> dict[str, Tensor]:
    """A batch; with task ids where a rule needs them."""
    tasks = any(BALANCES[b.kind].needs_tasks for p in config.placements for b in p.balance)
    batch = {k: v for k, v in BATCH.items() if labels or k != "labels"}
    return batch | ({"task_ids": torch.tensor([0, -100])} if tasks else {})


def step(model: Any, config: MoloraConfig) -> Tensor:
    """One step of SGD; the loss before it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss: Tensor = model.train()(**inputs(config)).loss
    loss.backward()
    torch.optim.SGD(trained, lr=0.05).step()
    model.zero_grad()
    return loss.detach()


@contextmanager
def or_refused(model: nn.Module) -> Iterator[list[str]]:
    """Within the block the mixture may refuse with a molora error, and is then as it was; the words, if it did."""
    before, words = {n: t.clone() for n, t in model.state_dict().items()}, []
    try:
        yield words
    except MoloraError as e:
        words.append(str(e))
    if words:
        assert "\n" not in words[0]
        assert_same(dict(model.state_dict()), before)


# The stages


def starts_at_the_base_and_does_something(config: MoloraConfig, folder: Path) -> None:
    plain = tiny.output(base(), BATCH)
    fresh = start(config, armed=False).eval()
    if not any(bool(m.bank.lora_B.any()) for m in fresh.modules() if hasattr(m, "bank")):
        assert torch.equal(tiny.output(fresh, BATCH), plain)
    armed = start(config)
    step(armed, config)
    assert (tiny.output(armed.eval(), BATCH) - plain).abs().max() > 1e-4
    with armed.disable_adapter():
        assert torch.equal(tiny.output(armed, BATCH), plain)


def trains(config: MoloraConfig, folder: Path) -> None:
    model = start(config)
    model.train()(**inputs(config)).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.zero_grad()
    losses = [step(model, config) for _ in range(6)]
    assert losses[-1] < losses[0]


def is_saved_and_loaded(config: MoloraConfig, folder: Path) -> None:
    model = start(config)
    step(model, config)
    model.save_pretrained(folder)
    again = molora.load(base(), folder, trainable=True)
    assert torch.equal(tiny.output(again.eval(), BATCH), tiny.output(model.eval(), BATCH))
    assert again._molora.config.placements == config.placements
    assert torch.equal(step(again, config), step(model, config))
    flags = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert flags[0] == flags[1]


def resumes(config: MoloraConfig, folder: Path) -> None:
    from molora.training import Trainer, TrainingArguments

    tasks = "task_ids" in inputs(config)
    rows = [{k: v[0].tolist() for k, v in tiny.batch("llama", rows=1, seed=i).items()} for i in range(8)]
    rows = [row | ({"task_ids": i % 2} if tasks else {}) for i, row in enumerate(rows)]

    def run(steps: int, resume: bool = False) -> Any:
        model = start(config)
        own = {**SETTINGS, "max_steps": steps, "lr_scheduler_type": "constant", "save_strategy": "steps"}
        settings = TrainingArguments(output_dir=str(folder / "run"), save_steps=2, log_routing=False, **own | more)
        Trainer(model, settings, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    more: dict[str, Any] = {"save_strategy": "no"}
    whole = run(4)
    more = {}
    run(2)
    assert_same(state(run(4, resume=True)), state(whole))


def is_exported(config: MoloraConfig, folder: Path) -> None:
    model = start(config).eval()
    with or_refused(model):
        model.export_expert(0, folder)
        one = molora.load(base(), folder).eval()
        expected = _alone(start(config).eval(), 0)
        close(tiny.output(one, BATCH), expected, "same_math_fp32")


def _alone(model: Any, expert: int) -> Tensor:
    """The output with one expert at weight 1 on every linear, as an adapted weight."""
    plain = base()
    with torch.no_grad():
        for m in model.modules():
            if getattr(m, "bank", None) is not None:
                A, B, scale = m.bank.expert(expert)
                plain.get_submodule(m.site.path).weight += scale * B @ A
    return tiny.output(plain, BATCH)


def gets_an_expert_and_loses_it(config: MoloraConfig, folder: Path) -> None:
    model = start(config).eval()
    before, own = tiny.output(model, BATCH), state(model)
    with or_refused(model) as refused:
        model.add_expert(logit=-30.0)
    if not refused:
        assert all(m.site.num_experts == p.num_experts + 1 for m, p in _sites(model, config))
        assert step(copy.deepcopy(model), config).isfinite()
        gate = GATES[config.placements[0].gate.kind]
        if gate.sums_to_one(config.placements[0].gate):
            close(tiny.output(model, BATCH), before, "same_math_fp32")
    with or_refused(model) as kept:
        model.prune_experts([config.placements[0].num_experts] if not refused else [0])
    if not refused and not kept:
        close(tiny.output(model, BATCH), before, "same_math_fp32")
        assert {n for n in own if not torch.equal(own[n], state(model)[n])} == set()


def _sites(model: Any, config: MoloraConfig) -> list[tuple[Any, Placement]]:
    found = [m for m in model.modules() if hasattr(m, "site")]
    return [(m, config.placements[m.site.placement]) for m in found]


def comes_off(config: MoloraConfig, folder: Path) -> None:
    own = base()
    before = {n: t.clone() for n, t in own.state_dict().items()}
    model = tiny.arm(molora.convert(own, config))
    step(model, config)
    plain = model.unload()
    assert type(plain) is type(base())
    assert_same(dict(plain.state_dict()), before)


def is_copied(config: MoloraConfig, folder: Path) -> None:
    model = start(config)
    twin = copy.deepcopy(model)
    before = tiny.output(model.eval(), BATCH)
    assert torch.equal(tiny.output(twin.eval(), BATCH), before)
    step(twin, config)
    assert torch.equal(tiny.output(model.eval(), BATCH), before)
    assert not torch.equal(tiny.output(twin.eval(), BATCH), before)


def is_compiled(config: MoloraConfig, folder: Path) -> None:
    torch._dynamo.reset()
    model, batch = start(config).train(), inputs(config)
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole = all(p.router.scope != "model" for p in config.placements)  # two passes are two graphs
    torch.compile(model, backend="aot_eager", fullgraph=whole)(**batch).loss.backward()
    for n, p in model.named_parameters():
        if n in expected:
            close(p.grad, expected[n], "same_math_fp32")


def is_parked(config: MoloraConfig, folder: Path) -> None:
    """As one of two named mixtures of PEFT's tuner: put aside, and in force again."""
    from peft import get_peft_model

    other = molora.recipes.lora(r=2)
    model: Any = get_peft_model(base(), molora.peft_config(config, seed=3))
    alone = tiny.output(start(config, armed=False).eval(), BATCH)
    assert torch.equal(tiny.output(model.eval(), BATCH), alone)
    model.add_adapter("other", molora.peft_config(other))
    model.set_adapter("other")
    assert torch.equal(tiny.output(model.eval(), BATCH), tiny.output(base(), BATCH))
    model.set_adapter("default")
    assert torch.equal(tiny.output(model.eval(), BATCH), alone)
    model.save_pretrained(str(folder))
    again = molora.load(base(), folder)
    assert torch.equal(tiny.output(again.eval(), BATCH), alone)


def runs_on_a_quantised_base(config: MoloraConfig, folder: Path) -> None:
    packed = quantise(base, next(iter(QUANTISED)))
    if any(INITIALISERS[p.init_lora_weights].needs_linear for p in config.placements):
        with contextlib.suppress(ConfigError):  # a weight that PEFT cannot unpack
            molora.convert(packed, config)
        return
    model = tiny.arm(molora.convert(packed, config))
    first = step(model, config)
    assert [step(model, config) for _ in range(4)][-1] < first


STAGES: dict[str, Callable[[MoloraConfig, Path], None]] = {
    f.__name__: f
    for f in (
        starts_at_the_base_and_does_something,
        trains,
        is_saved_and_loaded,
        resumes,
        is_exported,
        gets_an_expert_and_loses_it,
        comes_off,
        is_copied,
        is_compiled,
        is_parked,
        runs_on_a_quantised_base,
    )
}


def cases() -> list[tuple[str, str, str]]:
    """(table, entry, stage)."""
    return [(*entry, stage) for entry, stage in itertools.product(entries(), STAGES)]
