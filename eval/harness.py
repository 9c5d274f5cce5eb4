"""lm-evaluation-harness on an adapter folder: its own command line, with the model ``molora`` known to it.

``python -m molora.eval.harness --model molora --model_args pretrained=ADAPTER,routing=evaluation.json --tasks ...``

takes everything that ``lm_eval`` takes. Releases of lm-eval after 0.4.13 find the model by its entry point, so there
``lm_eval --model molora`` is the same; 0.4.13 knows only models that somebody has imported.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from molora.errors import MoloraError

__all__ = ["main", "register"]


def register() -> None:
    """Let this process's lm-eval know the model by name: by our entry point, as its later releases do by themselves, or
    from a bare checkout, which has none, by its class.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    from molora.eval.harness_model import MoloraLM  # first: it says what is missing

    from lm_eval.api.registry import model_registry  # isort: skip

    if "molora" not in model_registry:
        ours = next(iter(entry_points(group="lm_eval.models", name="molora")), MoloraLM)
        model_registry.register("molora", target=ours)


def main() -> None:
    """Run lm-eval's command line; a mistake about the adapter ends in one line and exit code 2."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except MoloraError as e:
        sys.stderr.write(f"error: {e}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
