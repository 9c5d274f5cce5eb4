"""What a converted model gains: a forward with its context around it, PEFT's methods, and the way back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from molora import context
from molora.adapter import hub
from molora.adapter.card import model_card
from molora.adapter.folder import fingerprint, write_adapter
from molora.adapter.peft_lora_writer import write_peft_lora
from molora.errors import ConfigError
from molora.forward.frame import REST, arguments_of, run_in_frame
from molora.forward.recompute import bind, rebind, unbind
from molora.layers.mixture import Mixture
from molora.surgery import reshape
from molora.surgery.install import sites_of, uninstall
from molora.surgery.state import (
    expert_modules,
    keep_trained,
    merge_always_on,
    merge_expert,
    saved_tensors,
    stacks_of,
    trained_copies,
)

__all__ = ["MixtureModel", "adopt", "mixture_class"]


class MixtureModel:
    """Methods of a converted model, under PEFT's names. Mixed into a subclass that otherwise is the base class."""

    _molora: Mixture

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapter folder (never base weights): config, safetensors, model card; atomically.

        ``state_dict``: tensors to save instead of the model's own, under the names of ``model.state_dict()`` (as a
        gathered ZeRO-3 state). ``push_to_hub``: upload the folder as well, to ``repo_id`` or one of the folder's name.
        Other options of transformers' method have no meaning for an adapter and are ignored. A section of the card
        that ``molora report --card`` wrote stays with the weights that it speaks of.

        Raises:
            CheckpointError: when the folder holds another model, or cannot be written.
        """
        if not is_main_process:
            return
        model, mixture = cast(nn.Module, self), self._molora
        tensors, base = saved_tensors(model, state_dict), mixture.fingerprint or fingerprint(model)
        write_adapter(
            save_directory,
            config=mixture.config,
            sites=mixture.sites,
            tensors=tensors,
            fingerprint=base,
            card=model_card(mixture, base, tensors),
        )
        if push_to_hub:
            options = {k: v for k, v in kwargs.items() if k in hub.OPTIONS}
            hub.upload(save_directory, repo_id or os.path.basename(os.path.abspath(save_directory)), **options)

    def push_to_hub(self, repo_id: str, *, tags: str | Iterable[str] = (), **options: Any) -> str:
        """Upload the adapter folder (config, weights and card; never base weights); returns the commit's address.

        ``options``: ``token, private, revision, create_pr, commit_message, commit_description``. ``tags`` are added
        to the card's. A README.md in the repository that does not speak of molora stays.
        """
        more = [tags] if isinstance(tags, str) else [*(tags or ())]
        every = [*(getattr(self, "model_tags", None) or ()), *more]
        return hub.push(self.save_pretrained, repo_id, tags=every, **options)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in cast(nn.Module, self).parameters()]
        return sum(n for n, t in sizes if t), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio, in PEFT's form."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201 printing is the method's purpose
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block and this thread, the model computes exactly what the base does; nests."""
        with context.switched_off(self._molora.owner):
            yield

    def unload(self) -> nn.Module:
        """Take every expert and router off: the base model, as it was, the same object. A no-op the second time."""
        model, mixture = cast(nn.Module, self), self._molora
        unbind(model)
        uninstall(model, mixture)
        model.__class__ = mixture.base_class
        del model._molora
        return model

    def merge_and_unload(self) -> nn.Module:
        """Add the only expert into the base weights and take the wrappers off; modules trained whole stay as trained.

        Raises:
            ConfigError: for a mixture: its weights depend on the token, so no fixed weight gives the same outputs.
        """
        model = cast(nn.Module, self)
        sites = [m for _, m in sites_of(model).values()]
        if not all(m.merges for m in sites):
            raise ConfigError(
                f"merge_and_unload: recipe {self._molora.config.recipe!r} mixes experts by the token: no weight gives "
                "the same outputs; keep the mixture, or use export_expert(...) to take one expert out as a plain LoRA"
            )
        for m in sites:
            merge_expert(model, m)
        keep_trained(model)
        return self.unload()

    def merge_always_on(self, name: str) -> None:
        """Add the always-on expert ``name`` into the base weights and take it off; the routed experts stay as they are.

        Outputs stay the same to rounding, but with the adapter disabled the base is now the merged one. A folder that
        is saved from here on needs the merged base, too. Make the optimizer anew after it.

        Raises:
            ConfigError: when no bank of that name is always on.
            AdapterError: for a base that is no plain float linear, NaN or infinite values; nothing is merged then.
        """
        merge_always_on(cast(nn.Module, self), self._molora, name)

    def export_expert(self, expert: str | int, save_directory: str | os.PathLike[str]) -> None:
        """Write one expert, by index, adapter name or the name of an always-on bank, as an ordinary PEFT LoRA folder.

        With an index or adapter name, sites of a single expert come along, and with any, modules trained whole
        (``modules_to_save``). Always-on banks have folders of their own, by their names.

        Raises:
            ConfigError: when there is no such expert.
        """
        model = cast(nn.Module, self)
        modules = expert_modules(model, [n for n, _ in self._molora.config.adapters], expert)
        base = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
        saved = {path: m.trained.state_dict() for path, m in trained_copies(model).items()}
        fused = stacks_of(model)
        write_peft_lora(save_directory, modules=modules, base_model_name=base, fused=fused, saved=saved)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = torch.utils.checkpoint.checkpoint,
        **kwargs: Any,
    ) -> None:
        """The choke point of every way to switch activation checkpointing on: bind our context to it."""
        func = bind(cast(nn.Module, self), gradient_checkpointing_func) if enable else gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=func, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the base class, which can be found by name; the subclass is made again."""
        parts: Any = super().__reduce_ex__(protocol)
        return (_rebuild, (self._molora.base_class,), *parts[2:])

    def add_expert(self, *, logit: float = reshape.NEW_LOGIT, seed: int = 0) -> None:
        """Add an expert to every router, the last in its order; make the optimizer anew after it.

        Its B is 0, its A drawn from ``seed``, its router row 0 with a bias of ``logit`` (the others get a bias of 0).
        All other parameters keep their bits. While ``logit`` is below those of the chosen, the choice is the same, and
        to rounding the weights, but for a softmax that is not renormalised: it shrinks by about exp(logit - largest).

        Raises:
            ConfigError: without a router, for ready-made adapters, experts that share a logit, a B that is not trained,
                parameters in pieces.
        """
        reshape.add_expert(cast(nn.Module, self), self._molora, logit, seed)

    def prune_experts(self, experts: Iterable[int] | Mapping[str, Iterable[int]]) -> None:
        """Remove experts by index from every router, or from those that a mapping names by path, as tapes do.

        The parameters of the others keep their bits, and so does the choice of a token that chose none of those, and
        to rounding its weights where they are renormalised. Make the optimizer anew after it.

        Raises:
            ConfigError: for an index that a router does not have, fewer experts than its top_k, and as above.
        """
        reshape.prune_experts(cast(nn.Module, self), self._molora, experts)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = mixture_class(cast(Hashable, base))
    return cls.__new__(cls)


@functools.cache
def mixture_class(base: Any) -> type[nn.Module]:
    """The subclass of ``base`` that a converted model of that class gets; its name, module and docs are the base's.

    transformers keys its hidden-state recorders, losses and label shifts by class name, so the name must not change.
    """
    inner: Callable[..., Any] = base.forward
    signature = inspect.signature(inner)
    parameters = [*signature.parameters.values()]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = names[1:]  # the first is the model, whatever it is called
    names += [REST for p in parameters if p.kind is p.VAR_POSITIONAL]

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return _run(self, inner, names, args, kwargs, task_ids)

    task = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    forward.__signature__ = signature.replace(parameters=[*parameters[:at], task, *parameters[at:]])  # type: ignore[attr-defined]
    space = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
    }
    if not hasattr(base, "_set_gradient_checkpointing"):
        space["_set_gradient_checkpointing"] = None
    return type(base.__name__, (MixtureModel, base), space)


def _run(
    model: Any,
    inner: Callable[..., Any],
    names: list[str],
    args: Any,
    kwargs: dict[str, Any],
    task_ids: Tensor | None,
) -> Any:
    """One forward of a converted model; the base's own where the mixture is off."""
    if context.is_off(model._molora.owner):
        return inner(model, *args, **kwargs)
    return run_in_frame(model, inner, arguments_of(names, args, kwargs), task_ids, (args, kwargs))


def adopt(model: nn.Module, mixture: Mixture) -> nn.Module:
    """Make ``model`` (its wrappers are in) an instance of the subclass; bind checkpointing that was already on."""
    model._molora = mixture  # type: ignore[assignment]
    try:
        mixture.fingerprint = mixture.fingerprint or fingerprint(model)
        rebind(model)
        model.__class__ = mixture_class(cast(Hashable, mixture.base_class))
    except BaseException:
        unbind(model)
        uninstall(model, mixture)
        del model._molora
        raise
    return model
