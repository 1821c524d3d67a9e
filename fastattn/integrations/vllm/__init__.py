"""vLLM's attention by our paged kernels. vLLM finds `register` by its entry point; what imports vLLM is in `.backend`."""

from __future__ import annotations

import logging

logger = logging.getLogger("fastattn")

BACKEND = "fastattn.integrations.vllm.backend.FastattnBackend"


def register() -> None:
    """Make our kernels vLLM's attention backend "CUSTOM", the name that vLLM keeps for backends of others.

    vLLM calls it in each of its processes, in an environment that has fastattn too (entry point `vllm.general_plugins`), and
    nothing changes until CUSTOM is asked for: `--attention-backend CUSTOM`, or `LLM(…, attention_backend="CUSTOM")`. May be
    called again. It raises nothing, as that would end a vLLM which does not want us: where vLLM has no such registry, or
    another plug-in has taken CUSTOM, a warning says so.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        custom = AttentionBackendEnum.CUSTOM
    except (ImportError, AttributeError) as error:
        logger.warning("vLLM has no registry of attention backends as 0.26 has (%s): CUSTOM is not ours", error)
        return
    if custom.is_overridden() and custom.get_path() != BACKEND:
        logger.warning("vLLM's attention backend CUSTOM is %s already, and not ours", custom.get_path())
        return
    register_backend(custom, BACKEND)
