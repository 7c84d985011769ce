"""Text in, rows of tokens out: sources, tokenizer, cache, order and batches. Nothing here imports torch."""

from harness.data.batches import Batches, Validation
from harness.data.cache import Corpus, cache_root, open_corpus, prepare
from harness.data.checks import check
from harness.data.order import Order

__all__ = ["Batches", "Corpus", "Order", "Validation", "cache_root", "check", "open_corpus", "prepare"]
