"""How near a LoRA of a chosen rank comes to the adapter that it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ConversionReport", "ModuleError"]


@dataclass(frozen=True)
class ModuleError:
    """One linear, D = W' - W its change: rank of B A, and the sums of squares that the relative errors are made of.

    ``weight_error = |D - B A| / |D|`` (Frobenius); ``output_error = |(y' - y) - B A x| / |y' - y|`` with y' what the
    adapter's own layer returns for the inputs x and y what the base's linear returns.
    """

    path: str
    rank: int
    weight_off: float
    weight_size: float
    output_off: float
    output_size: float

    @property
    def weight_error(self) -> float:
        """Relative Frobenius error of the change of the weight."""
        return _ratio(self.weight_off, self.weight_size)

    @property
    def output_error(self) -> float:
        """Relative error of the change of the output."""
        return _ratio(self.output_off, self.output_size)


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`molora.interop.to_lora.to_lora` did; ``print(report)`` shows it as a table.

    ``method``: the folder's ``peft_type``. ``route``: ``"peft"`` (its own conversion made the factors),
    ``"difference"`` (truncated SVD of merged weight minus base weight), or both by module. ``model_error``: relative
    error of the change of the whole model's output, ``|f_lora - f_adapter| / |f_adapter - f_base|``; None without
    inputs to the model. All errors are 0 where there is no change.
    """

    folder: str
    method: str
    route: str
    modules: tuple[ModuleError, ...]
    model_error: float | None = None

    @property
    def weight_error(self) -> float:
        """Relative Frobenius error over all modules' changes together."""
        return _ratio(sum(m.weight_off for m in self.modules), sum(m.weight_size for m in self.modules))

    @property
    def output_error(self) -> float:
        """Relative error over all modules' changes of outputs together."""
        return _ratio(sum(m.output_off for m in self.modules), sum(m.output_size for m in self.modules))

    def table(self) -> str:
        """The errors in plain text, one line a module, then all together."""
        return "\n".join(self._lines())

    __str__ = table

    def _lines(self) -> Iterator[str]:
        last, model = "all modules", "output of the model"
        width = max(len(model), *(len(m.path) for m in self.modules))
        yield f"{self.method} in {self.folder} as LoRA (factors by {self.route}), relative errors:"
        yield f"{'module':{width}}  rank  of weights  of outputs"
        for m in self.modules:
            yield f"{m.path:{width}}  {m.rank:4}  {m.weight_error:10.2e}  {m.output_error:10.2e}"
        most = max(m.rank for m in self.modules)
        yield f"{last:{width}}  {most:4}  {self.weight_error:10.2e}  {self.output_error:10.2e}"
        if self.model_error is not None:
            yield f"{model:{width}}  {'':4}  {'':10}  {self.model_error:10.2e}"


def _ratio(off: float, size: float) -> float:
    return (off / size) ** 0.5 if size else 0.0
