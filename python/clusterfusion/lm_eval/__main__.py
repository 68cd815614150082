"""``python -m clusterfusion.lm_eval ARGS``: lm_eval's own program, with this package's model."""

from lm_eval.__main__ import cli_evaluate

import clusterfusion.lm_eval  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
