"""`python -m harness.model.gguf FILE FOLDER`: write a GGUF file as an ordinary model folder, in fp32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging


def convert(file: Path, folder: Path) -> None:
    """Write configuration, dequantized weights and, where `transformers` can read it, the tokenizer.

    Args:
        file: GGUF.
        folder: exists.

    Raises:
        Exception: whatever `transformers` raises on a file that it cannot read.
    """
    place, options = str(file.parent), {"gguf_file": file.name, "local_files_only": True}
    quantized: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    # Its configuration says "quantized" whatever its weights are now, and `save_pretrained` refuses that.
    config: Any = AutoConfig.from_pretrained(place, **options)
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        # Files for research often hold none; a run then asks for data.tokenizer.
        print(f"without a tokenizer: {error}", file=sys.stderr)
        return
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
