"""Switch a routing recorder on for a while."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from molora import context
from molora.errors import ConfigError
from molora.eval.counting.counter import RoutingRecorder
from molora.eval.counting.inputs import ENCODER, main_input
from molora.forward.frame import arguments_of
from molora.model import MixtureModel

__all__ = ["collect_routing"]


@contextlib.contextmanager
def collect_routing(
    model: nn.Module, *, seed: int = 0, samples: int = 8, sample_tokens: int = 128, vocabulary: bool = True
) -> Iterator[RoutingRecorder]:
    """Within the block and this thread, forwards of ``model``, also those of ``generate``, are counted.

    Announce what runs with ``with stats.batch("code"): model(...)``; a forward without that belongs to the domain
    ``all``. ``samples``: documents kept for looking at by domain, the first ``sample_tokens`` tokens of each;
    ``vocabulary``: count experts by token id. No effect on outputs; memory does not grow with the tokens.

    Raises:
        ConfigError: when the model was not converted.
    """
    if not isinstance(model, MixtureModel):
        raise ConfigError(
            f"collect_routing: got a plain {type(model).__name__}, expected a model that convert() returned"
        )
    recorder = RoutingRecorder(model, seed, samples, sample_tokens, vocabulary)
    owner = model._molora.owner
    with contextlib.ExitStack() as stack:
        stack.enter_context(context.taping(owner, recorder))
        _watch(cast(nn.Module, model), recorder, owner, stack)
        yield recorder
        recorder.end_batch()
    recorder.show(torch.device("cpu"))
    recorder.transitions = [t.cpu() for t in recorder.transitions]
    recorder.vocabulary = {i: t.cpu() for i, t in recorder.vocabulary.items()}


def _watch(model: nn.Module, recorder: RoutingRecorder, owner: object, stack: contextlib.ExitStack) -> None:
    """Tell the recorder when a forward begins and ends, by hooks that go with the block."""
    names = _names(model)

    def ours() -> bool:
        return context.tape_of(owner) is recorder and not context.is_off(owner)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if ours():
            recorder.before(arguments_of(names, args, kwargs))

    def end(*_: Any) -> None:
        if ours():
            recorder.digest()

    stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(model.register_forward_hook(end).remove)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        _watch_encoder(model, recorder, ours, stack)


def _watch_encoder(
    model: nn.Module, recorder: RoutingRecorder, ours: Callable[[], bool], stack: contextlib.ExitStack
) -> None:
    """``generate`` calls the encoder apart from the model, where no frame is open, so nothing reaches a tape: open one
    with the tape and masks of the rows, but with the single row that capacities count without a frame.
    """
    encoder, opened = cast(Any, model).get_encoder(), contextlib.ExitStack()
    names = _names(encoder)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trains = model.training and torch.is_grad_enabled()  # there a missing frame is an error that has to show
        arguments = arguments_of(names, args, kwargs)
        main = main_input(model, arguments)
        if main is None or trains or context.current() is not None or not ours():
            return
        recorder.before(arguments)
        mask = arguments.get(ENCODER)
        all_real = torch.ones((), dtype=torch.bool, device=main.device).expand(main.shape[0], main[0].numel())
        own = mask != 0 if isinstance(mask, torch.Tensor) and mask.shape == main.shape[:2] else all_real
        editor = context.editor_of(cast(Any, model)._molora.owner)
        frame = context.Frame(masks={ENCODER: own, "": all_real}, rows=1, tape=recorder, editor=editor)
        opened.enter_context(context.use(frame))

    def leave(*_: Any) -> None:
        opened.close()

    def end(*_: Any) -> None:
        if ours() and context.current() is None:
            recorder.digest()

    stack.callback(encoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(encoder.register_forward_hook(leave, always_call=True).remove)
    stack.callback(encoder.register_forward_hook(end).remove)


def _names(module: nn.Module) -> list[str]:
    return [p for p in inspect.signature(module.forward).parameters if p != "self"]
