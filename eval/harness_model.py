"""The model ``molora`` of lm-evaluation-harness: an adapter on its base, with routing counted by task."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora import context
from molora.adapter.folder import read_adapter
from molora.errors import AdapterError, ConfigError
from molora.eval.counting.counter import RoutingRecorder, routed_sites
from molora.eval.counting.domains import token_texts
from molora.eval.counting.stats import RoutingStats, merge
from molora.eval.counting.summary import summary
from molora.eval.counting.watch import collect_routing
from molora.eval.document import SCHEMA, write_json
from molora.eval.harness_rows import NOBODY, Document, ExpectedRows, answered_rows, document_of
from molora.extras import missing
from molora.load import load
from molora.model import MixtureModel

try:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows
except ImportError as e:
    raise missing("lm-eval", "harness", "lm-evaluation-harness") from e

__all__ = ["MoloraLM"]


class MoloraLM(HFLM):  # type: ignore[misc]  # lm-eval carries no types
    """lm-eval's ``hf`` with an adapter on its base, and a mask over the padding of its batches.

    Without the mask padding would be routed like text: it would count, and in gates with a capacity take places from
    real tokens. ``stats`` are the counts so far, by task, if ``routing`` was asked for.
    """

    _model: Any

    def __init__(
        self, pretrained: Any, base: str | None = None, routing: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> None:
        """Load base, tokenizer and adapter.

        Args:
            pretrained: an adapter folder, or a converted model.
            base: the base's folder or name; by default what the adapter folder names.
            routing: a JSON file. If given, routing is counted while lm-eval scores, a task as a domain and its
                documents as documents, and the file is written anew after each kind of request.
            kwargs: what lm-eval's ``hf`` takes: ``dtype``, ``device``, ``batch_size``, ``tokenizer``, ``max_length``.

        Raises:
            AdapterError: no adapter folder, or one that was made for another base.
            ConfigError: a base that cannot be loaded, a plain model, or ``routing`` where it cannot be counted.
        """
        self.stats: RoutingStats | None = None
        self._routing = Path(routing) if routing else None
        self._recorder: RoutingRecorder | None = None
        self._documents: Iterator[Document] = itertools.repeat(NOBODY)  # of the token rows that lm-eval asks for next
        self._expected: ExpectedRows | None = None
        self._prompts: Sequence[str] = ()
        self._by_prompt: dict[str, list[Document]] = {}
        self._adapter = os.fspath(pretrained) if isinstance(pretrained, str | os.PathLike) else None
        if self._adapter is not None:
            pretrained = _base_of(self._adapter, base)
        elif base is not None:
            raise ConfigError("base: got one beside a model, expected it beside an adapter folder only; leave it out")
        elif not isinstance(pretrained, MixtureModel):
            kind = type(pretrained).__name__
            raise ConfigError(f"pretrained: got a plain {kind}, expected an adapter folder, or what convert() returned")
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            super().__init__(pretrained=pretrained, **{"device": device, **kwargs})
        except OSError as e:
            said = next(iter(str(e).splitlines()), type(e).__name__)
            raise ConfigError(f"base: {pretrained} cannot be loaded: {said}; name another with base=FOLDER") from e
        if self._routing is not None:
            self._check_countable(self._routing)

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        super()._create_model(pretrained, *args, **kwargs)
        assert self._adapter is not None
        self._model = load(self._model, self._adapter)

    def _check_countable(self, path: Path) -> None:
        faults = {
            f"{path} is a folder, expected a file to write": path.is_dir(),
            "this adapter has no router with a choice of experts": not routed_sites(self.model),
            "got an encoder-decoder, expected a causal language model": self.backend != "causal",
            f"got {self.world_size} processes, expected one": self.world_size > 1,
        }
        said = "; ".join(fault for fault, is_so in faults.items() if is_so)
        if said:
            raise ConfigError(f"routing: {said}; change that, or leave routing out")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        with self._counting(document_of(r) for r in requests):
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text."""
        with self._counting(document_of(r) for r in requests for _ in self._windows(r.args[0])):
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each prompt. Routing is counted in a forward over prompt and answer afterwards: while a row
        of a batch waits for the longest, what it is fed is no text.
        """
        self._by_prompt = {}
        for r in requests:
            self._by_prompt.setdefault(r.args[0], []).append(document_of(r))
        with self._counting(iter(())):
            found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return found

    def evaluation(self) -> dict[str, Any]:
        """The evaluation document: the section "routing" over everything scored so far, and what its ids stand for.

        Raises:
            ConfigError: when nothing was counted.
        """
        if self.stats is None:
            raise ConfigError("evaluation: nothing was counted; give routing=FILE, and score something first")
        config, section = self.model._molora.config, summary(self.stats)
        source = "lm-evaluation-harness"
        return {
            "schema": SCHEMA,
            "name": Path(self._adapter).name if self._adapter else config.recipe,
            "provenance": {
                "recipe": config.recipe,
                "adapter": {"folder": self._adapter},
                "base": {"name": self.model.config._name_or_path, "class": type(self.model).__name__},
                "data": {task: {"source": source, **own} for task, own in section["domains"].items()},
            },
            "expert_names": [name for name, _ in config.adapters] or None,
            "routing": section,
            "tokens": token_texts(section, self.tokenizer),
        }

    def _windows(self, text: str) -> Iterator[Any]:
        """A row that lm-eval makes of a text, in turn."""
        tokens = self.tok_encode(text)
        yield from get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Note which rows will come, before lm-eval sorts, joins and pads them."""
        rows: dict[Any, tuple[tuple[int, ...], Document]] = {}
        for i, ((_, asked, said), own) in enumerate(zip(requests, self._documents, strict=False)):
            whole = (*asked, *said)
            # Requests that differ in their last token only are one row to lm-eval, with its cache of logits.
            key = whole[:-1] if self.logits_cache else i
            rows.setdefault(key, (whole[-(self.max_length + 1) :][:-1], own))
        self._expected = ExpectedRows(rows.values()) if self.backend == "causal" else None
        try:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._expected = None
        return found

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> Any:
        """Without rows: what it runs is no text."""
        expected, self._expected = self._expected, None
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._expected = expected

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        if self._expected is None or attn_mask is not None:
            return super()._model_call(inps, attn_mask, labels)
        mask_BS, documents = self._expected.take(inps)
        return self._forward(documents, input_ids=inps, attention_mask=mask_BS)

    def _forward(self, documents: Sequence[Document], **inputs: Any) -> Any:
        """Logits; counted for the documents of the rows if routing was asked for."""
        dtype = self.mixed_precision_dtype
        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        with self._counted(documents), torch.no_grad(), autocast:
            return self.model(**inputs).logits

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As lm-eval's; the prompts are remembered for what is generated from them next."""
        self._prompts = strings
        found: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
        return found

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        out_BS: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        if self._recorder is not None:
            mask_BS = kwargs.get("attention_mask", torch.ones_like(context))
            eos = self.model.generation_config.eos_token_id
            ends = set(eos) if isinstance(eos, list) else {eos, self.eot_token_id}
            ids_BS, mask_BS = answered_rows(context, mask_BS, out_BS, ends, stop, self.tokenizer.decode)
            short = "logits_to_keep" in inspect.signature(self.model.forward).parameters
            documents = [self._by_prompt[text].pop(0) for text in self._prompts]
            last = {"logits_to_keep": 1} if short else {}
            self._forward(documents, input_ids=ids_BS, attention_mask=mask_BS, **last)
        return out_BS

    @contextlib.contextmanager
    def _counting(self, documents: Iterator[Document]) -> Iterator[None]:
        """While lm-eval scores: count the forwards under :meth:`_counted`, no others; then write the file."""
        self._documents = itertools.chain(documents, itertools.repeat(NOBODY))
        if self._routing is None:
            yield
            return
        with collect_routing(self.model) as recorder, context.taping(self.model._molora.owner, None):
            self._recorder = recorder
            try:
                yield
            finally:
                self._recorder = None
        self.stats = recorder if self.stats is None else merge(self.stats, recorder)
        write_json(self.evaluation(), self._routing)

    @contextlib.contextmanager
    def _counted(self, documents: Sequence[Document]) -> Iterator[None]:
        if self._recorder is None:
            yield
            return
        tasks, keys = [d.task for d in documents], [d.key for d in documents]
        with context.taping(self.model._molora.owner, self._recorder), self._recorder.batch(tasks, keys):
            yield


def _base_of(adapter: str, base: str | None) -> str:
    """The base's name, once the folder has been seen to hold an adapter."""
    if base is not None and (Path(adapter) / "adapter_config.json").is_file():
        return base  # also for a PEFT LoRA folder; it is read whole when the base is there
    named = read_adapter(adapter).fingerprint.get("base_model_name_or_path")
    if not named:
        raise AdapterError(f"{adapter}: names no base model; give it as base=FOLDER")
    return str(named)
