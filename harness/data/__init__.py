"""Text in, rows of tokens out: sources, tokenizer, cache, order and batches. Nothing here imports torch."""

from harness.data.batches import Batches, Validation
from harness.data.cache import check, check_evaluation, open_corpus, prepare
from harness.data.corpus import Corpus
from harness.data.order import Order

__all__ = ["Batches", "Corpus", "Order", "Validation", "check", "check_evaluation", "open_corpus", "prepare"]
