"""Teachers behind a server: what vLLM, SGLang and OpenAI-style servers return, as a TopK."""

from rlad_kernels.integrations.served.teacher import from_logprobs

__all__ = ["from_logprobs"]
