"""vLLM-Omni's sparse attention plug-in "svg2" (entry point group ``vllm_omni.sparse_attn``).

--diffusion-attention-config.per_role.self.backend SPARSE_ATTN
--diffusion-attention-config.per_role.self.extra '{"backend": "svg2", "params": {"density": 0.1}}'
"""

from __future__ import annotations

from svg2_compile.integrations.vllm_omni.plugin import attention, report, reset

__all__ = ["attention", "report", "reset"]
