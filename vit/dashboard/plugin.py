"""Where TensorBoard finds the Attention tab: the entry point of the package.

An error while this module is imported would take the whole `tensorboard` command down, so it imports next to nothing;
the rest is loaded in `Loader.load`, and what goes wrong there costs this tab only.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins.base_plugin import TBLoader

from vit.dashboard.format import PLUGIN

SAMPLES = 200
"""Steps of a series that TensorBoard shall keep; by itself it keeps 10 of what is read on demand."""

log = logging.getLogger("vit")


class Loader(TBLoader):
    """Makes the plugin."""

    def fix_flags(self, flags: Any) -> None:
        """Have all logged steps kept, unless `--samples_per_plugin` says how many."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN, SAMPLES)

    def load(self, context: Any) -> Any:
        """The plugin, or None where it cannot be."""
        if context.data_provider is None:
            return None
        try:
            from vit.dashboard.serving import AttentionPlugin

            return AttentionPlugin(context)
        except Exception:
            log.exception("the Attention tab cannot be shown")
            return None
