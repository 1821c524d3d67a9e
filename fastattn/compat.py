"""`import flash_attn` gives fastattn, in this process, for code that cannot be changed."""

from fastattn.integrations.compat import Installed, install, uninstall

__all__ = ["Installed", "install", "uninstall"]
