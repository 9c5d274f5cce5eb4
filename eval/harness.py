"""lm-evaluation-harness on an adapter folder: its own command line, with the model ``molora`` known to it.

``python -m molora.eval.harness --model molora --model_args pretrained=ADAPTER,routing=evaluation.json --tasks ...``

takes everything that ``lm_eval`` takes. Releases of lm-eval after 0.4.13 find the model by its entry point, so there
``lm_eval --model molora`` is the same; 0.4.13 knows only models that somebody has imported.
"""

from __future__ import annotations

import sys

from molora.errors import MoloraError

__all__ = ["main"]


def main() -> None:
    """Run lm-eval's command line; a mistake about the adapter ends in one line and exit code 2."""
    try:
        from molora.eval import harness_model

        harness_model.register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except MoloraError as e:
        sys.stderr.write(f"error: {e}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
