"""What the server of `tests.faults.forked` imports once, so that the processes that it forks need not."""

import transformers.models.llama.modeling_llama  # noqa: F401
