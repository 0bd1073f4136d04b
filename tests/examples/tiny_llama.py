"""The tiny random LLaMA that the examples use as a stand-in: config, tokenizer and tensors."""

from common.stand_in import CONFIG, byte_tokenizer, random_tensors

__all__ = ["CONFIG", "byte_tokenizer", "random_tensors"]
