"""Define the entry point through which TensorBoard finds the Attention tab.

An error during the import of this module would stop the whole `tensorboard` command, so it imports almost nothing.
`Loader.load` imports the rest, and an error there costs only this tab.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins.base_plugin import TBLoader

from vit.dashboard.format import PLUGIN

SAMPLES = 200
"""Steps of a series that TensorBoard keeps; its default is 10 for data read on demand."""

log = logging.getLogger("vit")


class Loader(TBLoader):
    """Loads the plugin."""

    def fix_flags(self, flags: Any) -> None:
        """Keep `SAMPLES` steps, unless `--samples_per_plugin` gives a number."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN, SAMPLES)

    def load(self, context: Any) -> Any:
        """Load the plugin; None if it cannot be loaded."""
        if context.data_provider is None:
            return None
        try:
            from vit.dashboard.serving import AttentionPlugin

            return AttentionPlugin(context)
        except Exception:
            log.exception("the Attention tab cannot be shown")
            return None
